"""Two restorations made into one: by a mask, by how sure each is, by what is wrong with the picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.colour import coloured_as
from ..models.degradation import Degradation
from .mix import low_frequencies
from .report import match_size
from .values import check_mask, check_values, clamped


def weight_from_mask(mask: torch.Tensor, like: torch.Tensor, name: str = "mask") -> torch.Tensor:
    """Mask [B or 1, h, w] as the weight [B or 1, 1, H, W] of the second picture, at the size of `like`.

    Raises InputError with the mask's `name` for one that is empty or not finite.
    """
    check_mask(mask, name)
    scaled = F.interpolate(mask[:, None].float(), size=like.shape[-2:], mode="bilinear", align_corners=False)
    return scaled.clamp(0, 1)


def weight_from_uncertainty(first: torch.Tensor, second: torch.Tensor | None, sharpness: float = 2.0) -> torch.Tensor:
    """Weight of the second picture where the first is the less sure of the two, [B, 1, H, W].

    first, second: uncertainties [B, 1, H, W] >= 0 on one scale. first^s / (first^s + second^s), which for s = 2 and
    uncertainties that are standard deviations is the average of least variance. Without `second`: `first` clamped.
    """
    if second is None:
        return first.clamp(0, 1)
    a, b = (u.clamp_min(1e-6) ** sharpness for u in (first, second))
    return a / (a + b)


def weight_from_degradation(degradation: Degradation, label: str, batch: int) -> torch.Tensor:
    """Weight [B, 1, 1, 1] of the second picture: how probable `label` is in each."""
    return degradation.expand(batch).probability(label)[:, None, None, None]


def softened(weight: torch.Tensor, sigma: float) -> torch.Tensor:
    """A weight [B, 1, H, W] blurred by a Gaussian of `sigma` pixels; one without places stays as it is."""
    return low_frequencies(weight, sigma) if sigma > 0 and min(weight.shape[-2:]) > 1 else weight


def blend(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1 - weight) first + weight second, clamped to 0..1; values above white stay if one of the pictures has some.

    first [B, C, H, W]; second is brought to its size, a grey one to the other's colours; batches of one are
    repeated. weight: [B or 1, 1, H or 1, W or 1]. Raises InputError for other batches and for values that are not finite.
    """
    check_values(first, "first")
    check_values(second, "second")
    first, second = coloured_as(first, second), coloured_as(second, first)
    channels = min(first.shape[1], second.shape[1])
    batch = max(len(first), len(second), len(weight))
    if any(n not in (1, batch) for n in (len(first), len(second), len(weight))):
        counts = f"{len(first)} and {len(second)} pictures with {len(weight)} masks"
        raise InputError(f"first, second and mask: cannot blend {counts}; use as many of each, or one")
    a = first[:, :channels].float()
    b = match_size(second[:, :channels].float(), first).to(a.device)
    weight = weight.to(a)
    return clamped(a + weight * (b - a), first, second)
