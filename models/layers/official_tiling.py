"""The tile-and-merge with which MambaIR, MambaIRv2 and MaIR are published."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

_THRESHOLD = 200


def official_tiles(
    image: torch.Tensor, restore: Callable[[torch.Tensor], torch.Tensor], scale: int, threshold: int = _THRESHOLD
) -> torch.Tensor:
    """`restore` on tiles of at most about `threshold` pixels, pasted without blending, as the official testers do.

    image [B, C, H, W] -> [B, C, scale * H, scale * W]. A side of n pixels is cut into n // threshold + 1 equal tiles,
    reflected at the end so that they are; each tile also sees a tenth of its length of its neighbours. Use it to
    repeat published figures: these networks read the whole tile, so their results depend on the cut, and seams show.
    """
    height, width = image.shape[-2:]
    rows, columns = height // threshold + 1, width // threshold + 1
    image = F.pad(image, (0, -width % columns, 0, -height % rows), mode="reflect")
    if rows == columns == 1:
        return restore(image)
    down, right = image.shape[-2] // rows, image.shape[-1] // columns
    result = None
    for row in range(rows):
        top, bottom, first_row = _span(row, rows, down)
        for column in range(columns):
            left, end, first_column = _span(column, columns, right)
            tile = restore(image[..., top:bottom, left:end])
            if result is None:
                result = tile.new_empty(*tile.shape[:2], image.shape[-2] * scale, image.shape[-1] * scale)
            core = tile[
                ...,
                first_row * scale : (first_row + down) * scale,
                first_column * scale : (first_column + right) * scale,
            ]
            result[
                ...,
                row * down * scale : (row + 1) * down * scale,
                column * right * scale : (column + 1) * right * scale,
            ] = core
    return result[..., : height * scale, : width * scale]


def _span(index: int, count: int, length: int) -> tuple[int, int, int]:
    """Start and end of a tile with its overlap, and where its own part starts inside it."""
    overlap = length // 10
    start = index * length - (overlap if index > 0 else 0)
    end = (index + 1) * length + (overlap if index < count - 1 else 0)
    return start, end, index * length - start
