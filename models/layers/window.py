"""Non-overlapping windows of feature maps."""

from __future__ import annotations

import torch
from einops import rearrange


def window_partition(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, H, W, C] -> [B * windows, size * size, C], windows and their pixels in row-major order."""
    return rearrange(x, "b (h p) (w q) c -> (b h w) (p q) c", p=size, q=size)


def window_reverse(windows: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    """[B * windows, size * size, C] -> [B, H, W, C], undoing `window_partition`."""
    return rearrange(windows, "(b h w) (p q) c -> b (h p) (w q) c", h=height // size, w=width // size, p=size, q=size)
