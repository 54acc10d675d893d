"""Which values pictures and masks may have, and to which range results are cut."""

from __future__ import annotations

from collections.abc import Iterable

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
    """Raises InputError for values that are NaN, infinite or beyond `LARGEST`. An empty batch passes.

    One picture after another: what is made for it on the way is as large as one, not as the batch.
    """
    if all(_is_usable(picture) for picture in image):
        return
    if bad := sum(int((~torch.isfinite(picture)).sum()) for picture in image):
        raise InputError(
            f"{name}: {bad} values are NaN or infinite; the node before this one failed (often half precision in a "
            "VAE: try its fp32 option)"
        )
    large = sum(int((picture.abs() > LARGEST).sum()) for picture in image)
    raise InputError(
        f"{name}: {large} values are beyond {LARGEST:g}, but white is 1; the node before this one failed, or the "
        "picture has another scale: divide it so that white is 1"
    )


def _is_usable(picture: torch.Tensor) -> bool:
    if picture.numel() == 0:
        return True
    low, high = (float(end) for end in torch.aminmax(picture))
    return -LARGEST <= low and high <= LARGEST  # NaN is neither


def check_mask(mask: torch.Tensor, name: str = "mask", count: int | None = None) -> None:
    """Raises InputError unless [B, H, W] with at least one pixel and values that can be computed with.

    count: of the pictures that the masks are for; one mask, or as many, will do.
    """
    if mask.ndim != 3:
        raise InputError(f"{name}: expected a batch of masks [B, H, W], got {tuple(mask.shape)}")
    if min(mask.shape) == 0:
        raise InputError(f"{name}: empty, {tuple(mask.shape)}; connect at least one mask of at least one pixel")
    check_values(mask, name)
    if count is not None and len(mask) not in (1, count):
        raise InputError(f"{name}: {len(mask)} masks for {count} pictures; use one, or one per picture")


def clamped(result: torch.Tensor, *pictures: torch.Tensor) -> torch.Tensor:
    """`result`, cut in place to 0..1; values above white stay if one of the `pictures` that it was made from has some."""
    return result.clamp_(0.0, ceiling(*pictures))


def ceiling(*pictures: torch.Tensor) -> float | None:
    """To what results made from these batches are cut: 1, or None if one of them has values above white."""
    bright = any(one.numel() > 0 and float(one.max()) > 1.0 for batch in pictures for one in batch)
    return None if bright else 1.0


def as_batch(pictures: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """`count` pictures [C, H, W] of one size as [B, C, H, W], in memory as ComfyUI's IMAGE lies there.

    Each may be freed when the next is made, and no copy of the batch is made, here or where it goes onto the graph.
    """
    batch: torch.Tensor | None = None
    for index, picture in enumerate(pictures):
        if batch is None:
            channels, height, width = picture.shape
            batch = picture.new_empty(count, height, width, channels).movedim(-1, 1)
        batch[index] = picture
    if batch is None:
        raise ValueError("no pictures")
    return batch
