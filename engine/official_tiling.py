"""The tile-and-merge with which MambaIR, MambaIRv2 and MaIR are published."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import tiling
from .loaded import LoadedRestorer
from .values import check_image, clamped

THRESHOLD = 200


def official_tiles(
    image: torch.Tensor, restore: Callable[[torch.Tensor], torch.Tensor], scale: int, threshold: int = THRESHOLD
) -> torch.Tensor:
    """`restore` on tiles of at most about `threshold` pixels, pasted without blending, as the official testers do.

    image [B, C, H, W] -> [B, C, scale * H, scale * W]. A side of n pixels is cut into n // threshold + 1 equal tiles,
    reflected at the end so that they are; each tile also sees a tenth of its length of its neighbours.
    """
    height, width = image.shape[-2:]
    rows, columns = height // threshold + 1, width // threshold + 1
    if rows == columns == 1:
        return restore(image)
    image = F.pad(image, (0, -width % columns, 0, -height % rows), mode="reflect")
    down, right = image.shape[-2] // rows, image.shape[-1] // columns
    result = None
    for row in range(rows):
        top, bottom, inner_top = _span(row, rows, down)
        for column in range(columns):
            left, end, inner_left = _span(column, columns, right)
            tile = restore(image[..., top:bottom, left:end])
            if result is None:
                result = tile.new_empty(*tile.shape[:2], image.shape[-2] * scale, image.shape[-1] * scale)
            core = tile[..., inner_top * scale :, inner_left * scale :][..., : down * scale, : right * scale]
            place = result[..., row * down * scale :, column * right * scale :]
            place[..., : down * scale, : right * scale] = core
    return result[..., : height * scale, : width * scale]


def _span(index: int, count: int, length: int) -> tuple[int, int, int]:
    """Start and end of a tile with its overlap, and where its own part starts inside it."""
    overlap = length // 10
    start = index * length - (overlap if index > 0 else 0)
    end = (index + 1) * length + (overlap if index < count - 1 else 0)
    return start, end, index * length - start


def restore(
    loaded: LoadedRestorer, image: torch.Tensor, *, precision: str = "auto", threshold: int = THRESHOLD
) -> torch.Tensor:
    """As `tiling.restore`, cut and merged the official way: to repeat published figures, seams included."""
    check_image(image)

    def whole(tile: torch.Tensor) -> torch.Tensor:
        return tiling.restore(loaded, tile, tile=max(tile.shape[-2:]), precision=precision, clamp=False)

    restored = official_tiles(image, whole, loaded.restorer.scale, threshold)
    return clamped(restored, image)
