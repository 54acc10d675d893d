"""Data sets of pairs that a graph makes: one progress bar over all of them, with previews."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..training import make_dataset
from . import host
from .degraders import Degrader
from .pictures import to_pil

Tell = Callable[[int, int, torch.Tensor | None], None]
"""As `training.make_dataset.make_dataset` takes it."""


def make(
    photos: Sequence[make_dataset.Photo],
    out: Path,
    degrader: Degrader | None,
    degradations: str,
    *,
    seed: int = 0,
    largest: int = 512,
    per_photo: int = 1,
) -> make_dataset.Report:
    """Makes the missing pairs of the data set `out`; interrupts are obeyed, and the next run goes on there.

    degrader None: by simulation. degradations: names with commas between them, or "all". Raises InputError as
    `training.make_dataset.make_dataset`.
    """
    painter, tell = _simulation() if degrader is None else _painter(degrader)
    kinds = make_dataset.kinds_from_text(degradations, painter.kinds)
    settings = make_dataset.Settings(painter.name, seed, largest)
    return make_dataset.make_dataset(photos, out, painter, kinds, settings, per_photo, tell)


def _simulation() -> tuple[make_dataset.Painter, Tell]:
    """The formulas, which are quick: the bar counts pairs."""
    bar: host.Progress | None = None

    def tell(done: int, total: int, damaged: torch.Tensor | None) -> None:
        nonlocal bar
        bar = bar or host.progress(total)
        bar.update(done - bar.done, None if damaged is None else lambda: to_pil(damaged[0]))

    return make_dataset.simulation(), tell


def _painter(degrader: Degrader) -> tuple[make_dataset.Painter, Tell]:
    """A degrader that shows its own steps: each of its runs is a part of the bar."""
    place = 0, 1

    def tell(done: int, total: int, damaged: torch.Tensor | None) -> None:
        nonlocal place
        place = done, total

    def paint(clean: torch.Tensor, kind: str, mu: float, sigma: float, seed: int) -> torch.Tensor:
        with host.part_of_progress(*place):
            return degrader.paint(clean, kind, mu, sigma, seed, "", 0)

    return make_dataset.Painter(degrader.name, degrader.kinds, paint), tell
