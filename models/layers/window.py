"""Non-overlapping windows of feature maps."""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange


def window_partition(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, H, W, C] -> [B * windows, size * size, C], windows and their pixels in row-major order."""
    return rearrange(x, "b (h p) (w q) c -> (b h w) (p q) c", p=size, q=size)


def window_reverse(windows: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    """[B * windows, size * size, C] -> [B, H, W, C], undoing `window_partition`."""
    return rearrange(windows, "(b h w) (p q) c -> b (h p) (w q) c", h=height // size, w=width // size, p=size, q=size)


@lru_cache(maxsize=32)
def relative_position_index(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [size^2, size^2]: the row of a table of (2 size - 1)^2 displacements for every pair of window pixels."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
        position = torch.arange(size, device=device)
        grid = torch.stack(torch.meshgrid(position, position, indexing="ij")).flatten(1)
        rows, columns = grid[:, :, None] - grid[:, None, :] + size - 1
        return rows * (2 * size - 1) + columns


@lru_cache(maxsize=32)
def shifted_window_mask(height: int, width: int, size: int, shift: int, device: torch.device) -> torch.Tensor:
    """Additive mask [windows, size^2, size^2], float32: -100 between pixels that a cyclic shift brought together.

    For windows of `size` after rolling a [height, width] map by -shift along both axes (Swin Transformer, 3.2).
    """

    def region(length: int) -> torch.Tensor:
        """0 for pixels in unbroken windows, 1 and 2 for the two parts of the last window."""
        position = torch.arange(length, device=device)
        return (position >= length - size).long() + (position >= length - shift).long()

    with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
        label = region(height)[:, None] * 3 + region(width)
        label = window_partition(label[None, :, :, None], size).squeeze(-1)
        different = label[:, :, None] != label[:, None, :]
        return different.float().mul_(-100.0)
