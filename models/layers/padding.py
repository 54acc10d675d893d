"""Padding to the sizes networks ask for, and cropping back."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pad_to_multiple(image: torch.Tensor, multiple: int, minimum: int = 1) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pads [B, C, H, W] at the bottom and right to multiples of `multiple`, at least `minimum`.

    Reflects; where the picture is too small to reflect, repeats the border. Returns the picture and its (H, W).
    """
    height, width = image.shape[-2:]
    target_h = -(-max(height, minimum) // multiple) * multiple
    target_w = -(-max(width, minimum) // multiple) * multiple
    bottom, right = target_h - height, target_w - width
    if bottom or right:
        mode = "reflect" if bottom < height and right < width else "replicate"
        image = F.pad(image, (0, right, 0, bottom), mode=mode)
    return image, (height, width)


def crop(image: torch.Tensor, size: tuple[int, int], scale: int = 1) -> torch.Tensor:
    """Crops [B, C, H, W] to `scale` times `size` (H, W), undoing `pad_to_multiple`."""
    return image[..., : size[0] * scale, : size[1] * scale]
