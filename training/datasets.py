"""Data sets to fine-tune on: pairs from two folders, clean pictures that are damaged on the fly, manifests, mixtures.

A `Dataset` is a list of entries, a clean picture and its damaged twin or the ways to damage it. Pictures are decoded
when they are needed and kept within a budget of bytes. Each pair is drawn from a seed of its own, so that a run can be
resumed exactly and several processes can share out a batch.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..models.colour import rgb
from ..models.layers.padding import pad_to_multiple
from .data import STARTER_TASKS, SUFFIXES, PhotoCrops, Task, as_arriving, central_crop, reduce, within_crop
from .degradations import KINDS, Degradation, parse

logger = logging.getLogger(__name__)

EVERYTHING = "everything"
"""In a text of degradations: all that the starter network was trained for."""
MANIFEST = "manifest.jsonl"


# Pictures -------------------------------------------------------------------------------------------------------------


class PictureCache:
    """Decoded pictures, uint8 [3, H, W], the least recently used ones dropped when they exceed `budget` bytes."""

    def __init__(self, budget: int = 1_000_000_000) -> None:
        self.budget, self.used = budget, 0
        self._kept: OrderedDict[Path, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, source: Path | torch.Tensor) -> torch.Tensor:
        """The picture of a file, turned upright; a tensor is returned as it is. Raises InputError for other files."""
        if isinstance(source, torch.Tensor):
            return source
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
        picture = _decode(source)
        with self._lock:
            if source not in self._kept:
                self._kept[source] = picture
                self.used += picture.numel()
            while self.used > self.budget and len(self._kept) > 1:
                self.used -= self._kept.popitem(last=False)[1].numel()
        return picture

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._kept.clear()
            self.used = 0


pictures = PictureCache()
"""What all data sets share; cleared after a training."""


def _decode(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as picture:
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise InputError(f"data set: {path} cannot be read as a picture ({error})") from None
    with torch.inference_mode(False):  # kept, and trained on later
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _files(folder: Path) -> dict[str, Path]:
    """Pictures of a folder and the folders in it by their name without suffix, in order. Raises InputError if none."""
    if not folder.is_dir():
        raise InputError(f"data set: there is no folder {folder}")
    found = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    }
    if not found:
        raise InputError(f"data set: no pictures in {folder} ({', '.join(SUFFIXES)})")
    return found


# Entries --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entry:
    """A clean picture under a name, and its damaged twin with what is wrong with it; None: it is damaged on the fly.

    Pictures are files or tensors, uint8 [3, H, W].
    """

    name: str
    clean: Path | torch.Tensor
    damaged: Path | torch.Tensor | None = None
    label: str = ""


@dataclass(frozen=True, eq=False)
class Sample:
    """A pair of float pictures in 0..1, [3, h, w] and [3, scale h, scale w], and what is wrong with the damaged one."""

    damaged: torch.Tensor
    clean: torch.Tensor
    label: str


class Source(Protocol):
    """What can be trained on: `Dataset` and `Mixture`."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    def sample(self, size: int, generator: torch.Generator, scale: int = 1) -> Sample: ...

    def held_out(self, size: int, count: int = 3, scale: int = 1) -> list[Sample]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """Entries to train on; some, chosen by the hash of their names, are held out for validation."""

    name: str
    entries: tuple[Entry, ...]
    tasks: tuple[Task, ...] = ()
    """How entries without a damaged twin are damaged."""
    held_out_share: float = 0.1
    colours: bool = True
    """Whether augmentation changes colours where pictures are damaged on the fly."""

    def __post_init__(self) -> None:
        if not self.entries:
            raise InputError(f"data set {self.name}: it is empty")
        if any(e.damaged is None for e in self.entries) and not self.tasks:
            raise InputError(f"data set {self.name}: say how its clean pictures are to be damaged")
        if not 0 <= self.held_out_share < 1:
            raise InputError(f"data set {self.name}: the validation share {self.held_out_share} is outside 0..1")

    @property
    def labels(self) -> tuple[str, ...]:
        """Everything that may be wrong with its pictures, each once."""
        made = [t.name for t in self.tasks] if any(e.damaged is None for e in self.entries) else []
        return tuple(dict.fromkeys([*made, *(e.label for e in self.entries if e.damaged is not None)]))

    @cached_property
    def _split(self) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """(entries to train on, entries held out). At least one of each if there are two."""
        ranks = {e.name: _rank(e.name) for e in self.entries}
        held = {name for name, rank in ranks.items() if rank < self.held_out_share}
        order = sorted(ranks, key=ranks.get)
        if self.held_out_share == 0 or len(order) == 1:
            held = set()
        elif not held:
            held = {order[0]}
        elif len(held) == len(order):
            held.discard(order[-1])
        return tuple(e for e in self.entries if e.name not in held), tuple(e for e in self.entries if e.name in held)

    @property
    def training(self) -> tuple[Entry, ...]:
        return self._split[0]

    @property
    def validation(self) -> tuple[Entry, ...]:
        """What is held out; the training pictures themselves where nothing can be."""
        return self._split[1] or self._split[0]

    def sample(self, size: int, generator: torch.Generator, scale: int = 1) -> Sample:
        """A random, augmented pair: the damaged crop `size` pixels wide and high, the clean one `scale` times that.

        Raises InputError if two pictures of a pair do not fit.
        """
        entry = self.training[_index(len(self.training), generator)]
        if entry.damaged is None:
            clean = self._crop(pictures(entry.clean), size * scale, generator)
            task = self.tasks[
                int(torch.multinomial(torch.tensor([t.weight for t in self.tasks]), 1, generator=generator))
            ]
            chain = task.chains[_index(len(task.chains), generator)]
            return Sample(_damage(reduce(clean[None], scale), chain, generator), clean, task.name)
        damaged, clean = _pair(entry, scale)
        damaged, _ = pad_to_multiple(damaged[None], 1, size)
        clean, _ = pad_to_multiple(clean[None], 1, size * scale)
        top, left = (_index(extent - size + 1, generator) for extent in damaged.shape[-2:])
        crops = (
            damaged[0, :, top : top + size, left : left + size],
            clean[0, :, scale * top : scale * (top + size), scale * left : scale * (left + size)],
        )
        return Sample(*(c.float() / 255 for c in _turn(crops, generator)), entry.label)

    def _crop(self, photo: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
        """As PhotoCrops draws them: half of them from a photo that is shrunk to 0.5..1 of its size."""
        scale = 0.5 + 0.5 * _draw(generator) if _draw(generator) < 0.5 else 1.0
        side = min(*photo.shape[1:], math.ceil(size / scale))
        top, left = (_index(extent - side + 1, generator) for extent in photo.shape[1:])
        crop = photo[:, top : top + side, left : left + side].float() / 255
        if side != size:
            crop = F.interpolate(crop[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
        (crop,) = _turn([crop], generator)
        if self.colours and _draw(generator) < 0.4:
            crop = PhotoCrops._recolour(crop, generator)
        return crop.contiguous()

    def held_out(self, size: int, count: int = 3, scale: int = 1) -> list[Sample]:
        """At most `count` pairs of each label, always the same ones: the centres, `size` pixels wide at most."""
        found: list[Sample] = []
        left = dict.fromkeys(self.labels, count)
        for index, entry in enumerate(self.validation):
            if not any(left.values()):
                break
            if entry.damaged is not None:
                if left[entry.label]:
                    damaged, clean = (p.float() / 255 for p in _pair(entry, scale))
                    found.append(Sample(*_centre(damaged, clean, size, scale), entry.label))
                    left[entry.label] -= 1
                continue
            clean = central_crop(pictures(entry.clean).float() / 255, size * scale, scale)
            small = reduce(clean[None], scale)
            for task in self.tasks:
                if left[task.name]:
                    seed = int.from_bytes(sha256(f"{entry.name}/{task.name}".encode()).digest()[:6], "big")
                    chain, generator = task.chains[index % len(task.chains)], torch.Generator().manual_seed(seed)
                    found.append(Sample(_damage(small, chain, generator, file=True), clean, task.name))
                    left[task.name] -= 1
        order = {label: position for position, label in enumerate(self.labels)}
        return sorted(found, key=lambda s: order[s.label])

    def describe(self) -> dict[str, Any]:
        """What it is, for the provenance of what is trained on it."""
        return {"name": self.name, "pictures": len(self.training), "damage": list(self.labels)}


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several data sets; each pair is drawn from one of them with a probability in proportion to its weight."""

    parts: tuple[tuple[Source, float], ...]

    def __post_init__(self) -> None:
        if not self.parts or any(not w >= 0 for _, w in self.parts) or sum(w for _, w in self.parts) <= 0:
            raise InputError("data sets: a mixture needs weights of zero or more, at least one of them above zero")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(label for part, weight in self.parts if weight for label in part.labels))

    def sample(self, size: int, generator: torch.Generator, scale: int = 1) -> Sample:
        weights = torch.tensor([weight for _, weight in self.parts], dtype=torch.float32)
        part, _ = self.parts[int(torch.multinomial(weights, 1, generator=generator))]
        return part.sample(size, generator, scale)

    def held_out(self, size: int, count: int = 3, scale: int = 1) -> list[Sample]:
        return [s for part, weight in self.parts if weight for s in part.held_out(size, count, scale)]

    def describe(self) -> dict[str, Any]:
        return {"mixture": [{**part.describe(), "weight": weight} for part, weight in self.parts]}


class Stream:
    """Endless batches from a data set, as the trainer asks for them.

    generator: gives every pair its seed. share: (which, of how many) parts of each batch this process makes; all
    processes must have generators in the same state.
    """

    def __init__(
        self, source: Source, generator: torch.Generator, scale: int = 1, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.source, self.generator, self.scale, self.share = source, generator, scale, share

    def batch(self, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Damaged [n, 3, size, size], clean [n, 3, scale size, scale size] and labels; n is this share of `count`."""
        seeds = torch.randint(2**62, (count,), generator=self.generator).tolist()
        which, of = self.share
        samples = [
            self.source.sample(size, torch.Generator().manual_seed(seed), self.scale) for seed in seeds[which::of]
        ]
        damaged, clean = (torch.stack([getattr(s, side) for s in samples]) for side in ("damaged", "clean"))
        return damaged, clean, [s.label for s in samples]


# Making them ----------------------------------------------------------------------------------------------------------


def paired_folder(folder: Path, label: str = "damaged", held_out_share: float = 0.1) -> Dataset:
    """Pairs of equal names (suffixes may differ) in FOLDER/damaged and FOLDER/clean.

    label: what is wrong with them, for objectives that tell tasks apart. If damaged/ has folders that clean/ lacks, as
    damaged/rain/a.png to clean/a.png, each is a label of its own. Raises InputError if nothing fits together.
    """
    clean = _files(folder / "clean")
    entries, lonely = [], []
    for name, path in _files(folder / "damaged").items():
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
    entries = tuple(Entry(name, path) for name, path in _files(folder).items())
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


def tasks_from_text(text: str) -> tuple[Task, ...]:
    """Tasks from text, a line each: kinds of damage joined by "+", each with its strength or exact parameters, and
    after "@" how often the line is drawn.

        everything
        rain 0.7 + noise @ 2
        jpeg: quality 10

    "everything" stands for the tasks of the starter network. Raises InputError for what cannot be read.
    """
    tasks: dict[str, Task] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        body, _, amount = line.partition("@")
        try:
            weight = float(amount) if amount else 1.0
        except ValueError:
            raise InputError(f"degradations: {amount.strip()!r} in {line!r} is not a number") from None
        if not weight > 0 or not math.isfinite(weight):
            raise InputError(f"degradations: the weight in {line!r} must be above zero")
        if body.strip().lower() == EVERYTHING:
            tasks.update({t.name: replace(t, weight=t.weight * weight) for t in STARTER_TASKS})
            continue
        chain = tuple(_step(part.strip(), line) for part in body.split("+"))
        kinds = [step.kind for step in chain if step is not None]
        name = " + ".join(kinds) or "clean"
        before = tasks.get(name, Task(name, 0.0, ()))
        steps = tuple(step for step in chain if step is not None)
        tasks[name] = Task(name, before.weight + weight, (*before.chains, steps))
    if not tasks:
        raise InputError(
            f"degradations: name at least one, such as noise; known: {EVERYTHING}, clean, {', '.join(KINDS)}"
        )
    return tuple(tasks.values())


def _step(text: str, line: str) -> Degradation | None:
    """One kind of damage; None for "clean"."""
    if ":" in text:
        return parse(text)[0]
    kind, _, strength = text.partition(" ")
    if kind == "clean":
        return None
    try:
        return Degradation(kind, float(strength) if strength.strip() else 1.0)
    except ValueError:
        raise InputError(
            f"degradations: cannot read {text!r} in {line!r}; write KIND STRENGTH, or KIND: NAME VALUE"
        ) from None


# Pixels ---------------------------------------------------------------------------------------------------------------


def _draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _rank(name: str) -> float:
    """A number in 0..1 that depends on the name only, so that the split never moves."""
    return int.from_bytes(sha256(f"held out: {name}".encode()).digest()[:6], "big") / 2**48


def _index(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _bytes(image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):  # pictures on the graph are inference tensors
        return (rgb(image).cpu().clone().clamp(0, 1) * 255).round().byte()


def _turn(crops: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """One of the eight symmetries of the square, the same for all."""
    turns, mirror = _index(4, generator), _index(2, generator)
    turned = (torch.rot90(c, turns, (1, 2)) for c in crops)
    return [(c.flip(2) if mirror else c).contiguous() for c in turned]


def _damage(
    image: torch.Tensor, chain: Sequence[Degradation], generator: torch.Generator, file: bool = False
) -> torch.Tensor:
    """[1, 3, h, w] damaged, [3, h, w]. As a picture file holds it if `file`; else as crops to train on are."""
    for step in chain:
        seen = step if file else within_crop(step, generator)
        image, _ = seen(image, generator)
    return as_arriving(image, 0.0 if file else _draw(generator))[0]


def _pair(entry: Entry, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Damaged and clean, uint8. Raises InputError unless the clean one is `scale` times as large."""
    damaged, clean = pictures(entry.damaged), pictures(entry.clean)
    if tuple(clean.shape[1:]) != tuple(scale * extent for extent in damaged.shape[1:]):
        sizes = " and ".join(f"{p.shape[2]}x{p.shape[1]}" for p in (damaged, clean))
        wanted = "the same size" if scale == 1 else f"{scale} times as large when clean, as the network enlarges"
        raise InputError(f"data set: {entry.name}: damaged and clean are {sizes} pixels, must be {wanted}")
    return damaged, clean


def _centre(damaged: torch.Tensor, clean: torch.Tensor, size: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    small = central_crop(damaged, size)
    top, left = ((damaged.shape[i] - small.shape[i]) // 2 * scale for i in (1, 2))
    height, width = (scale * extent for extent in small.shape[1:])
    return small, clean[:, top : top + height, left : left + width].contiguous()


def describe(source: Source) -> str:
    """A data set in words, a line for each part."""

    def line(part: Mapping[str, Any]) -> str:
        weight = f", weight {part['weight']:g}" if "weight" in part else ""
        return f"{part['name']}: {part['pictures']} pictures, {', '.join(part['damage'])}{weight}"

    def lines(part: Mapping[str, Any]) -> list[str]:
        return [entry for inner in part["mixture"] for entry in lines(inner)] if "mixture" in part else [line(part)]

    return "\n".join(lines(source.describe()))
