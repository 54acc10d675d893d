"""What long jobs over many files remember and report: a journal to resume from, fingerprints of settings, a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import MendError
from . import host
from .loaded import LoadedRestorer

logger = logging.getLogger(__name__)

JOURNAL = "mend-journal.jsonl"
REPORT = "mend-report"


class Journal:
    """A text file with a line per finished piece of work, beside the results.

    Lines are appended and forced to the disk, so that an interruption, even of the power, costs at most the last one; a
    torn line is skipped. The newest line with a key counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry
            except (ValueError, TypeError, KeyError):
                logger.warning("%s: skipped a line that cannot be read", path.name)

    def find(self, key: str, made_from: str) -> dict[str, Any] | None:
        """The entry of a piece of work if it was made from the same source with the same settings."""
        entry = self.entries.get(key)
        return entry if entry is not None and entry.get("made_from") == made_from else None

    def add(self, key: str, made_from: str, **facts: Any) -> None:
        """Writes down that a piece of work is finished."""
        self.entries[key] = {"key": key, "made_from": made_from, **facts}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + json.dumps(self.entries[key]) + "\n")
            self._torn = False
            file.flush()
            os.fsync(file.fileno())


# Fingerprints ---------------------------------------------------------------------------------------------------------


def fingerprint(*values: Any) -> str:
    """Equal for equal settings: numbers, texts, paths (as text), lists, dicts, tensors, dataclasses, loaded networks.

    Anything else gives a new fingerprint every time, so that work is rather done again than wrongly skipped.
    """
    digest = hashlib.sha256()
    for part in _parts(values):
        digest.update(part)
    return digest.hexdigest()[:32]


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    if value is None or isinstance(value, (str, int, float, bool, Path)):
        yield f"{type(value).__name__}:{value}\0".encode()
    elif isinstance(value, bytes):
        yield f"bytes:{len(value)}\0".encode()
        yield value
    elif isinstance(value, torch.Tensor):
        yield f"tensor:{value.dtype}:{tuple(value.shape)}\0".encode()
        yield memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, LoadedRestorer):
        restorer = value.restorer
        yield from _parts(
            [restorer.architecture.id, dict(restorer.config), restorer.module.state_dict(), value.options]
        )
    elif isinstance(value, Mapping):
        yield f"dict:{len(value)}\0".encode()
        for key, item in value.items():
            yield from _parts(str(key))
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        yield f"list:{len(value)}\0".encode()
        for item in value:
            yield from _parts(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__qualname__.encode()
        yield from _parts({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    else:
        yield uuid.uuid4().bytes


def identity(path: Path) -> str:
    """Changes when a file does: size and time of its last change."""
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def content(path: Path) -> str:
    """Equal for files with equal bytes, whenever they were written."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """`with written_whole(path) as unfinished: write(unfinished)`: the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def find_files(folder: Path, suffixes: Iterable[str], subfolders: bool = True) -> list[Path]:
    """Files below a folder, sorted, hidden ones and unfinished ones (.part) left out."""
    wanted = frozenset(suffixes)
    found = folder.rglob("*") if subfolders else folder.glob("*")
    return sorted(
        path
        for path in found
        if path.suffix.lower() in wanted
        and not path.stem.endswith(".part")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


# Reports --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """What became of every file of a job."""

    title: str
    entries: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stopped: bool = False
    """Before the last file."""
    _began: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, source: str, status: str, **facts: Any) -> None:
        """status: "done", "skipped" (done before, with the same settings) or "failed" (`why`)."""
        self.entries.append({"source": source, "status": status, **facts})

    @contextmanager
    def file(self, source: str) -> Iterator[None]:
        """Whatever goes wrong inside is the report's, and the next file's turn comes; only a cancel goes through."""
        try:
            yield
        except Exception as error:
            if host.is_interrupt(error):
                self.stopped = True
                raise
            logger.debug("%s", source, exc_info=True)
            known = isinstance(error, MendError)
            self._failed(source, str(error) if known else f"{type(error).__name__}: {error}")

    def _failed(self, source: str, why: str) -> None:
        logger.warning("%s: %s", source, why)
        self.add(source, "failed", why=why)

    def count(self, status: str) -> int:
        return sum(entry["status"] == status for entry in self.entries)

    def text(self) -> str:
        """For a person: the sums, then what failed and why."""
        sums = ", ".join(f"{self.count(status)} {status}" for status in ("done", "skipped", "failed"))
        lines = [f"{self.title}: {sums} in {time.monotonic() - self._began:.0f} s"]
        if self.stopped:
            lines.append("stopped; what is done is kept, the next run goes on from here")
        lines += [f"failed: {e['source']}: {e['why']}" for e in self.entries if e["status"] == "failed"]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes mend-report.json and mend-report.txt into a folder."""
        data = {"title": self.title, "stopped": self.stopped, "files": self.entries}
        with written_whole(folder / f"{REPORT}.json") as file:
            file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        with written_whole(folder / f"{REPORT}.txt") as file:
            file.write_text(self.text() + "\n", encoding="utf-8")
