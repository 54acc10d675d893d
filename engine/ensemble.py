"""Self-ensemble: the average over flips and quarter turns of the picture (Timofte et al., CVPR 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import host, tiling
from .loaded import LoadedRestorer
from .values import check_image, clamped


def transform(image: torch.Tensor, index: int) -> torch.Tensor:
    """Transform number 0..7 of [..., H, W]: bit 0 flips left to right, bit 1 top to bottom, bit 2 transposes."""
    if index & 1:
        image = image.flip(-1)
    if index & 2:
        image = image.flip(-2)
    return image.transpose(-1, -2) if index & 4 else image


def undo(image: torch.Tensor, index: int) -> torch.Tensor:
    """The inverse of `transform`."""
    if index & 4:
        image = image.transpose(-1, -2)
    if index & 2:
        image = image.flip(-2)
    return image.flip(-1) if index & 1 else image


def restore(
    loaded: LoadedRestorer,
    image: torch.Tensor,
    count: int = 8,
    *,
    tile: int = 0,
    overlap: int = -1,
    precision: str = "auto",
    context: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of `count` (1..8) restorations of [B, C, H, W] under transforms, and their spread [B, H, W].

    The spread is the standard deviation between them, averaged over channels: where it is large, the network is
    guessing. Takes `count` times as long; memory does not grow with it. The mean is clamped as by `tiling.restore`.
    """
    check_image(image)
    for index in range(count):
        host.check_interrupt()
        with host.part_of_progress(index, count):
            restored = tiling.restore(
                loaded,
                transform(image, index).contiguous(),
                tile=tile,
                overlap=overlap,
                precision=precision,
                context=context,
                clamp=False,
            )
        restored = undo(restored, index).contiguous()
        if index == 0:
            mean, squares = restored, torch.zeros_like(restored)
            continue
        change = restored - mean  # Welford's update: exact where the spread is small against the values
        mean += change / (index + 1)
        squares += change.mul_(restored - mean)
    return clamped(mean, image), (squares / count).clamp_min_(0).sqrt_().mean(dim=1)
