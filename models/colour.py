"""Pictures of one to four channels as three colours."""

from __future__ import annotations

import torch


def rgb(image: torch.Tensor) -> torch.Tensor:
    """[B, 1..4, H, W] as [B, 3, H, W]: grey repeated, alpha left out."""
    return image[:, :1].expand(-1, 3, -1, -1) if image.shape[1] < 3 else image[:, :3]


def coloured_as(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`image` [B, C, H, W], as three equal colours if it is grey and `other` is not."""
    return rgb(image) if image.shape[1] < 3 <= other.shape[1] else image
