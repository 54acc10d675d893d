"""Data sets to fine-tune on: pairs, clean pictures that are damaged on the fly, and mixtures of them.

A `Dataset` is a list of entries, a clean picture and its damaged twin or the ways to damage it. Each pair is drawn from
a seed of its own, so that a run can be resumed exactly and several processes can share out a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.layers.padding import pad_to_multiple
from .data import PhotoCrops, Task, as_arriving, central_crop, reduce, within_crop
from .degradations import Degradation
from .picture_files import pictures


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


def describe(source: Source) -> str:
    """A data set in words, a line for each part."""

    def line(part: Mapping[str, Any]) -> str:
        weight = f", weight {part['weight']:g}" if "weight" in part else ""
        return f"{part['name']}: {part['pictures']} pictures, {', '.join(part['damage'])}{weight}"

    def lines(part: Mapping[str, Any]) -> list[str]:
        return [entry for inner in part["mixture"] for entry in lines(inner)] if "mixture" in part else [line(part)]

    return "\n".join(lines(source.describe()))


def _draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _rank(name: str) -> float:
    """A number in 0..1 that depends on the name only, so that the split never moves."""
    return int.from_bytes(sha256(f"held out: {name}".encode()).digest()[:6], "big") / 2**48


def _index(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


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
