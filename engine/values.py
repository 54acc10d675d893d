"""Which values pictures and masks may have, and to which range results are cut."""

from __future__ import annotations

import torch

from ..errors import InputError

LARGEST = 1e9
"""Far beyond any HDR picture; squares of values from about 1e19 on no longer fit into 32 bits."""


def check_image(image: torch.Tensor, name: str = "image") -> None:
    """Raises InputError unless [B, 1..4, H, W] with at least one pixel and values that can be computed with."""
    if image.ndim != 4 or image.shape[1] not in (1, 2, 3, 4):
        raise InputError(f"{name}: expected a batch of pictures with 1, 3 or 4 channels, got {tuple(image.shape)}")
    if min(image.shape) == 0:
        raise InputError(f"{name}: empty, {tuple(image.shape)}; connect at least one picture of at least one pixel")
    check_values(image, name)


def check_values(image: torch.Tensor, name: str = "image") -> None:
    """Raises InputError for values that are NaN, infinite or beyond `LARGEST`. An empty batch passes."""
    bad = int((~torch.isfinite(image)).sum())
    if not bad and bool((image.abs() <= LARGEST).all()):
        return
    if bad:
        raise InputError(
            f"{name}: {bad} values are NaN or infinite; the node before this one failed (often half precision in a "
            "VAE: try its fp32 option)"
        )
    large = int((image.abs() > LARGEST).sum())
    raise InputError(
        f"{name}: {large} values are beyond {LARGEST:g}, but white is 1; the node before this one failed, or the "
        "picture has another scale: divide it so that white is 1"
    )


def check_mask(mask: torch.Tensor, name: str = "mask") -> None:
    """Raises InputError unless [B, H, W] with at least one pixel and values that can be computed with."""
    if mask.ndim != 3:
        raise InputError(f"{name}: expected a batch of masks [B, H, W], got {tuple(mask.shape)}")
    if min(mask.shape) == 0:
        raise InputError(f"{name}: empty, {tuple(mask.shape)}; connect at least one mask of at least one pixel")
    check_values(mask, name)


def clamped(result: torch.Tensor, *pictures: torch.Tensor) -> torch.Tensor:
    """`result`, cut in place to 0..1; values above white stay if one of the `pictures` that it was made from has some."""
    bright = any(picture.numel() > 0 and float(picture.max()) > 1.0 for picture in pictures)
    return result.clamp_(0.0, None if bright else 1.0)
