"""The colours of one picture on another, over batches, with transparency and different sizes."""

from __future__ import annotations

import torch

from ..errors import InputError
from ..guidance import colour_fix
from . import host
from .report import match_size
from .values import check_image, clamped

METHODS = ("wavelet", "statistics")


def fix_colours(
    image: torch.Tensor, reference: torch.Tensor, method: str = "wavelet", strength: float = 1.0, levels: int = 5
) -> torch.Tensor:
    """image [B, C, H, W] in 0..1 with the colours of `reference` [B or 1, C', H', W']; any transparency kept.

    wavelet: low frequencies after `levels` doublings; statistics: mean and spread per channel. Clamped to 0..1, or to 0
    and up for pictures with values above white. Raises InputError for a reference with another number of pictures or
    channels, pictures that are empty or not finite, and an unknown method.
    """
    check_image(image)
    check_image(reference, "reference")
    colours = 3 if image.shape[1] >= 3 else 1
    if len(reference) not in (1, len(image)):
        raise InputError(f"reference: {len(reference)} pictures for {len(image)}; use one, or one per picture")
    if method not in METHODS:
        raise InputError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    if (3 if reference.shape[1] >= 3 else 1) != colours:
        raise InputError("reference: one picture is grey, the other has colours")
    fixed, target, progress = [], host.device(), host.progress(len(image))
    for index, picture in enumerate(image.split(1)):
        content = picture[:, :colours].to(target).float()
        style = match_size(reference[min(index, len(reference) - 1)][None, :colours].to(target).float(), content)
        if method == "wavelet":
            changed = colour_fix.wavelet_colour(content, style, levels)
        else:
            changed = colour_fix.adain_colour(content, style)
        result = clamped(torch.lerp(content, changed, strength), content, style).to(image.device)
        fixed.append(torch.cat([result, picture[:, colours:].float()], dim=1))
        progress.update()
    return torch.cat(fixed)
