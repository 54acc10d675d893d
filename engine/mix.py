"""Mixing a restored picture with its original: strength, mask, structure and detail, colour. No network runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.colour import coloured_as
from . import host
from .report import matched
from .values import as_batch, ceiling, check_mask, check_values


def low_frequencies(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian low-pass of [B, C, H, W] with `sigma` in pixels, computed on a reduced picture where sigma is large."""
    height, width = image.shape[-2:]
    step = max(1, min(int(sigma // 4), height // 8, width // 8))
    small = image if step == 1 else F.interpolate(image, size=(height // step, width // step), mode="area")
    reduced = sigma / step
    kernel = min(2 * int(3 * reduced) + 1, 2 * (min(small.shape[-2:]) - 1) + 1)
    if kernel >= 3:
        from kornia.filters import gaussian_blur2d  # half a second to import: not while ComfyUI starts

        small = gaussian_blur2d(small, (kernel, kernel), (reduced, reduced), border_type="replicate")
    return small if step == 1 else F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)


FILTERS = ("Gaussian", "guided")
EDGE_VARIANCE = 1e-3
"""Guided filter: variance of the guide within a window above which an edge is kept; about a step of 0.06."""


def guided_low_frequencies(image: torch.Tensor, guide: torch.Tensor, sigma: float) -> torch.Tensor:
    """Low-pass of `image` [B, C, H, W] that stops at the edges of `guide` [B, 1, H, W].

    He, Sun and Tang, "Guided Image Filtering", TPAMI 2013, equations 5 and 6, with Gaussian windows of `sigma` pixels.
    """
    mean, guide_mean = low_frequencies(image, sigma), low_frequencies(guide, sigma)
    covariance = low_frequencies(image * guide, sigma) - mean * guide_mean
    variance = low_frequencies(guide * guide, sigma) - guide_mean**2
    slope = covariance / (variance.clamp_min(0) + EDGE_VARIANCE)
    offset = mean - slope * guide_mean
    return low_frequencies(slope, sigma) * guide + low_frequencies(offset, sigma)


def mix(
    original: torch.Tensor,
    restored: torch.Tensor,
    *,
    strength: float = 1.0,
    mask: torch.Tensor | None = None,
    structure: float = 1.0,
    detail: float = 1.0,
    split: float = 3.0,
    colour_anchor: float = 0.0,
    bands: str = "Gaussian",
) -> torch.Tensor:
    """original + strength * mask * (what the restoration changed), split into frequency bands.

    original [B, C, h, w] is scaled to restored [B, C, H, W]; mask [B or 1, H', W'] in 0..1. structure and detail weigh
    the change below and above a low-pass of `split` pixels, Gaussian or (bands "guided") one that keeps to the edges of the
    restored picture, so that neither bleeds over them; colour_anchor pulls the very low frequencies (a thirtieth
    of the picture) back to the original's. Values outside 0..2 extrapolate. A grey picture mixes with a coloured one as
    three equal colours. Returns [B, C, H, W], clamped to 0..1, or to
    0 and up for pictures with values above white. Raises InputError for what cannot be mixed.
    """
    if bands not in FILTERS:
        raise InputError(f"bands: {bands!r} is not one of {', '.join(FILTERS)}")
    check_values(original, "original")
    check_values(restored, "restored")
    original, restored = coloured_as(original, restored), coloured_as(restored, original)
    channels, count = min(original.shape[1], restored.shape[1]), len(restored)
    if len(original) not in (1, count):
        raise InputError(f"original: {len(original)} pictures, but restored has {count}")
    if mask is not None:
        check_mask(mask, count=count)
    if count == 0:
        return restored.float()
    most = ceiling(original, restored)

    def mixed() -> Iterator[torch.Tensor]:
        bases = matched(original[:, :channels], restored, count)
        for index, (base, picture) in enumerate(zip(bases, restored.split(1), strict=True)):
            result = picture[:, :channels].float()
            change = _weighed(result - base, result, structure, detail, split, colour_anchor, bands)
            weight: torch.Tensor | float = strength
            if mask is not None:
                own = mask[index if len(mask) > 1 else 0].float()[None, None]
                scaled = F.interpolate(own, size=result.shape[-2:], mode="bilinear", align_corners=False)
                weight = strength * scaled.clamp(0, 1).to(result.device)
            whole = torch.cat([base + weight * change, picture[:, channels:].float()], dim=1)
            host.check_interrupt()  # no bar of its own: restoring a video mixes within one
            yield whole[0].clamp_(0.0, most)

    return as_batch(mixed(), count)


def _weighed(
    change: torch.Tensor,
    result: torch.Tensor,
    structure: float,
    detail: float,
    split: float,
    colour_anchor: float,
    bands: str,
) -> torch.Tensor:
    """What of a change [1, C, H, W] that led to `result` is wanted, as `mix` says."""
    if colour_anchor > 0:
        sigma = max(2.0, max(change.shape[-2:]) / 30)
        change = change - colour_anchor * low_frequencies(change, sigma)
    if structure == detail:
        return change * structure
    if bands == "guided":
        low = guided_low_frequencies(change, result.mean(dim=1, keepdim=True), max(0.3, split))
    else:
        low = low_frequencies(change, max(0.3, split))
    return structure * low + detail * (change - low)
