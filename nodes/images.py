"""ComfyUI's IMAGE and MASK tensors to the channel-first form that everything below works on, and back."""

from __future__ import annotations

import torch

from ..engine import host, tiling
from ..engine.values import check_image


def channels_first(image: torch.Tensor) -> torch.Tensor:
    """IMAGE [B, H, W, C] as [B, C, H, W] float32; the input is not modified."""
    return image.movedim(-1, 1).float()


def colours_first(image: torch.Tensor) -> torch.Tensor:
    """IMAGE as [B, 3, H, W] without transparency. Raises InputError for an empty batch and values that are no colours."""
    picture = channels_first(image)
    check_image(picture)
    return tiling.as_rgb(picture)


def as_image(image: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] as IMAGE [B, H, W, C]: float32, contiguous, on the intermediate device."""
    return image.movedim(1, -1).to(host.intermediate_device(), torch.float32).contiguous()


def as_mask(mask: torch.Tensor) -> torch.Tensor:
    """[B, H, W] as MASK: float32, contiguous, on the intermediate device."""
    return mask.to(host.intermediate_device(), torch.float32).contiguous()


def connected_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """MASK as [B, H, W] in float32; None stays None. A single [H, W] is taken as a batch of one."""
    if mask is None:
        return None
    return (mask[None] if mask.ndim == 2 else mask).float()
