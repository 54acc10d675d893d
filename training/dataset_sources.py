"""Data sets of what there is: pairs in two folders, clean pictures, what a manifest lists, pictures in memory."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..models.colour import rgb
from .data import Task
from .datasets import Dataset, Entry
from .picture_files import files_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"


def paired_folder(folder: Path, label: str = "damaged", held_out_share: float = 0.1) -> Dataset:
    """Pairs of equal names (suffixes may differ) in FOLDER/damaged and FOLDER/clean.

    label: what is wrong with them, for objectives that tell tasks apart. If damaged/ has folders that clean/ lacks, as
    damaged/rain/a.png to clean/a.png, each is a label of its own. Raises InputError if nothing fits together.
    """
    clean = files_of(folder / "clean")
    entries, lonely = [], []
    for name, path in files_of(folder / "damaged").items():
        head, _, rest = name.partition("/")
        if name in clean:
            entries.append(Entry(name, clean[name], path, label))
        elif rest in clean:
            entries.append(Entry(rest, clean[rest], path, head))
        else:
            lonely.append(name)
    if not entries:
        raise InputError(f"data set: no picture in {folder / 'damaged'} has the name of one in {folder / 'clean'}")
    if lonely:
        logger.warning("%s: %d damaged pictures have no clean twin, such as %s", folder, len(lonely), lonely[0])
    return Dataset(folder.name, tuple(entries), held_out_share=held_out_share)


def clean_folder(folder: Path, tasks: Sequence[Task], held_out_share: float = 0.1, colours: bool = True) -> Dataset:
    """The pictures of a folder (and the folders in it), to be damaged on the fly."""
    entries = tuple(Entry(name, path) for name, path in files_of(folder).items())
    return Dataset(folder.name, entries, tuple(tasks), held_out_share, colours)


def images(
    clean: torch.Tensor,
    damaged: torch.Tensor | None = None,
    tasks: Sequence[Task] = (),
    label: str = "damaged",
    held_out_share: float = 0.1,
) -> Dataset:
    """Pictures [B, 3, H, W] in 0..1 that are in memory already, with their damaged twins or damaged on the fly.

    Raises InputError if the batches differ in length.
    """
    if damaged is not None and len(damaged) not in (1, len(clean)):
        raise InputError(f"data set: {len(clean)} clean pictures and {len(damaged)} damaged ones")
    twins = [None] * len(clean) if damaged is None else list(_bytes(damaged).expand(len(clean), -1, -1, -1))
    entries = (Entry(f"image {i}", c, d, label) for i, (c, d) in enumerate(zip(_bytes(clean), twins, strict=True)))
    return Dataset("images", tuple(entries), tuple(tasks), held_out_share)


def manifest(path: Path, held_out_share: float = 0.1, intensity: tuple[float, float] = (0.0, math.inf)) -> Dataset:
    """The pairs that a manifest lists, as GenDeg-style synthesis writes it: a JSON object a line with `clean` and
    `damaged` (files, relative to the manifest's folder), `degradation`, `intensity` {mu, sigma} and `seed`.

    path: the file, or the folder with manifest.jsonl. intensity: keeps the pairs whose mu, the mean absolute
    difference in 0..1, lies between; pairs without one are kept. Raises InputError naming the line that is wrong.
    """
    path = path / MANIFEST if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"data set: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data set: {path} cannot be read ({error})") from None
    lines, entries = text.splitlines(), []
    if not text.endswith("\n") and len(lines) > 1 and not lines[-1].rstrip().endswith("}"):
        lines.pop()  # its writer was interrupted, and will cut it off
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            clean, damaged = (path.parent / _relative(row[side]) for side in ("clean", "damaged"))
            mu = (row.get("intensity") or {}).get("mu")
            kept = mu is None or intensity[0] <= float(mu) <= intensity[1]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"data set: {where}: needs clean and damaged, paths of pictures ({error!r})") from None
        for picture in (clean, damaged):
            if not picture.is_file():
                raise InputError(f"data set: {where}: there is no file {picture}")
        if kept:
            entries.append(Entry(str(row["clean"]), clean, damaged, str(row.get("degradation") or "damaged")))
    if not entries:
        raise InputError(f"data set: {path} lists no pairs" + (" of this intensity" if lines else ""))
    return Dataset(path.parent.name, tuple(entries), held_out_share=held_out_share)


def _relative(name: str) -> str:
    if Path(name).is_absolute():
        raise ValueError(f"{name} must be relative to the manifest")
    return name


def _bytes(image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):  # pictures on the graph are inference tensors
        return (rgb(image).cpu().clone().clamp(0, 1) * 255).round().byte()
