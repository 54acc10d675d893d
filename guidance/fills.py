"""What to put into the holes of a picture before a zero-shot scheme begins: functions of image [B, C, H, W] and mask [H, W]."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .solvers import check_interrupt, conjugate_gradients


def median_fill(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Fills the pixels where mask [H, W] is 0 with medians of known ones around, in growing windows. image [B, C, H, W].

    Sweep n fills every missing pixel that has a known pixel within n + 1 (the lower median per channel); pixels filled
    in one sweep serve the next. A picture without a known pixel is returned as zeros.
    """
    missing = mask.to(image.device) < 0.5
    if bool(missing.all()):
        return torch.zeros_like(image)
    filled = image.masked_fill(missing, float("nan"))
    radius = 1
    while bool(missing.any()):
        radius += 1
        size = 2 * radius + 1
        padded = F.pad(filled, (radius,) * 4, value=float("nan"))
        rows, columns = missing.nonzero(as_tuple=True)
        for part in torch.arange(len(rows), device=image.device).split(max(1, 4_000_000 // size**2)):
            check_interrupt()
            offset = torch.arange(size, device=image.device)
            r = rows[part][:, None, None] + offset[:, None]
            c = columns[part][:, None, None] + offset
            filled[:, :, rows[part], columns[part]] = padded[:, :, r, c].flatten(3).nanmedian(dim=-1).values
        missing = filled[0, 0].isnan()
    return filled


def _bending(x: torch.Tensor) -> torch.Tensor:
    """Differences to the four neighbours, summed; none across the border. A symmetric map of [B, C, H, W]."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    around = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    return around - 4 * x


def smooth_fill(image: torch.Tensor, mask: torch.Tensor, iterations: int = 200) -> torch.Tensor:
    """Fills the pixels where mask [H, W] is 0 by the surface of least bending (biharmonic) through the known ones.

    image [B, C, H, W]. Conjugate gradients from what `median_fill` gives; large holes may stay short of the exact surface.
    """
    begun, free = median_fill(image, mask), 1 - mask.to(image)
    if not bool(free.any()) or not bool(mask.any()):
        return begun

    def energy(x: torch.Tensor) -> torch.Tensor:
        return free * _bending(_bending(x))

    return begun + conjugate_gradients(lambda x: energy(x * free), -energy(begun), iterations, 1e-4) * free
