"""One workflow for many pictures: each takes the place of the file that a Load Image node names."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, MendError, WorkflowError
from . import folders, host
from .journal import JOURNAL, Journal, Report, find_files, fingerprint, identity
from .restore_folder import check_folders
from .runner import Result, Runner
from .validation import NodeClasses, Prompt

logger = logging.getLogger(__name__)

LOADER = "LoadImage"


@dataclass
class Worker:
    """Runs the workflow for one picture after the other; loaded networks stay loaded in between."""

    runner: Runner
    prompt: Prompt
    node: str
    """The node whose `image` each picture takes the place of."""
    inputs: Path
    outputs: Path

    def __call__(self, name: str) -> dict[str, Any]:
        """Runs it for the picture `name` (relative to `inputs`): the results' names relative to `outputs`, and texts.

        Results appear when all of them are there. Raises MendError if the workflow did not run to its end.
        """
        scratch = self.outputs / ".mend-unfinished" / fingerprint(name)
        shutil.rmtree(scratch, ignore_errors=True)
        folders.set_folders(inputs=[self.inputs], output=scratch / "output", temp=scratch / "temp")
        self.prompt[self.node]["inputs"]["image"] = name
        try:
            result = self.runner.run(self.prompt)
            if result.exception is not None and host.is_interrupt(result.exception):
                raise result.exception
            if not result.complete:
                raise WorkflowError(result.describe() or "not every output node ran")
            return {"results": self._take(result, name, scratch), "texts": _texts(result)}
        finally:
            self.runner.forget_shown()  # its files are gone from where it saved them
            shutil.rmtree(scratch, ignore_errors=True)

    def _take(self, result: Result, name: str, scratch: Path) -> list[str]:
        """Moves what was saved (or, if nothing was, what was shown) to where it belongs.

        Saved pictures are called as the picture; other files (bitstreams, reports, folders) keep their names after its.
        """
        found: dict[str, list[Path]] = {}
        for kind in ("output", "temp"):
            for node_id, shown in result.outputs.items():
                entries = [e for values in shown.values() for e in values if isinstance(e, dict) and "filename" in e]
                files = [scratch / kind / e.get("subfolder", "") / e["filename"] for e in entries if e["type"] == kind]
                if files:
                    found[node_id] = files
            if found:
                break
        listed = {file for files in found.values() for file in files}
        base = scratch / "output"
        others = [file for file in sorted(base.rglob("*")) if file.is_file() and file not in listed]
        if others and not any(file.is_relative_to(base) for file in listed):
            found = {}  # something was saved, so what was only shown is not wanted
        if not found and not others:
            raise WorkflowError("the workflow saved nothing; add a Save Image node")
        taken = []
        for file in others:
            inside = file.relative_to(base)
            target = (self.outputs / name).parent / f"{Path(name).stem}-{inside.parts[0]}" / Path(*inside.parts[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
            taken.append(target.relative_to(self.outputs).as_posix())
        for node_id, files in found.items():
            title = (self.prompt[node_id].get("_meta") or {}).get("title") or node_id
            label = "" if len(found) == 1 else f"-{''.join(c if c.isalnum() else '_' for c in title)}"
            for number, file in enumerate(files, 1):
                stem = f"{Path(name).stem}{label}" + (f"-{number}" if number > 1 else "")
                target = (self.outputs / name).with_name(stem + file.suffix)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
                taken.append(target.relative_to(self.outputs).as_posix())
        return taken


def _texts(result: Result) -> dict[str, list[str]]:
    return {node_id: list(shown["text"]) for node_id, shown in result.outputs.items() if "text" in shown}


def loader_of(prompt: Prompt) -> str:
    """The one Load Image node of a workflow. Raises WorkflowError if there are none or several."""
    found = [node_id for node_id, node in prompt.items() if node["class_type"] == LOADER]
    if len(found) == 1:
        return found[0]
    if not found:
        raise WorkflowError("the workflow has no Load Image node for the pictures to go into")
    titles = ", ".join(f"{i} {(prompt[i].get('_meta') or {}).get('title', '')}".strip() for i in found)
    raise WorkflowError(f"the workflow has several Load Image nodes ({titles}); say which with --node")


def settings_of(prompt: Prompt, node: str, classes: NodeClasses) -> str:
    """A fingerprint of all that the results depend on besides the picture: the workflow and the files that it names."""
    plain: Prompt = json.loads(json.dumps(prompt))
    plain[node]["inputs"].pop("image", None)
    prints: dict[str, Any] = {}
    for node_id, entry in plain.items():
        entry.pop("_meta", None)
        node_class = classes[entry["class_type"]]
        if node_id != node and node_class.overridden("fingerprint_inputs") is not None:
            constants = {k: None if isinstance(v, list) else v for k, v in entry["inputs"].items()}
            prints[node_id] = repr(node_class.fingerprint_inputs(**constants))
    return fingerprint(plain, prints)


def run_batch(
    pictures: Iterable[str],
    inputs: Path,
    outputs: Path,
    settings: str,
    run_all: Any,
    *,
    title: str = "Batch",
    again: bool = False,
) -> Report:
    """Runs pictures (names relative to `inputs`) and reports; saves the report in `outputs`.

    run_all takes the names that are not done and yields (name, what `Worker` returned or an exception). What is done
    already, from the same picture with the same settings, is skipped unless `again`.
    """
    report, journal, waiting = Report(title), Journal(outputs / JOURNAL), {}
    for name in pictures:
        made_from = fingerprint(settings, identity(inputs / name))
        before = journal.find(name, made_from)
        if before and not again and all((outputs / result).is_file() for result in before["results"]):
            report.add(name, "skipped", results=before["results"])
        else:
            waiting[name] = made_from
    progress = host.progress(len(waiting))
    try:
        for name, outcome in run_all(list(waiting)):
            with report.file(name):
                if isinstance(outcome, BaseException):
                    raise outcome
                journal.add(name, waiting[name], **outcome)
                report.add(name, "done", **outcome)
            progress.update()
    except BaseException:
        report.stopped = True
        raise
    finally:
        shutil.rmtree(outputs / ".mend-unfinished", ignore_errors=True)
        report.save(outputs)
    return report


def find_pictures(inputs: Path, outputs: Path) -> list[str]:
    """Names, relative to `inputs`, of the pictures to run. Raises InputError if there are none."""
    check_folders(inputs, outputs)
    found = [file.relative_to(inputs).as_posix() for file in find_files(inputs, folders.IMAGE_SUFFIXES)]
    if not found:
        raise InputError(f"{inputs}: there are no pictures in this folder")
    return found


def one_by_one(worker: Worker, names: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any] | Exception]]:
    """`run_all` in this process."""
    for name in names:
        host.check_interrupt()
        try:
            outcome: Mapping[str, Any] | Exception = worker(name)
        except MendError as error:
            if host.is_interrupt(error):
                raise
            outcome = error
        yield name, outcome
