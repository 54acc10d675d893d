"""Where to work on a picture: regions made from maps of doubt, difference or degradation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.degradation import Degradation
from . import classify, host
from .loaded import LoadedRestorer
from .mix import low_frequencies
from .values import check_image, check_mask

CLEAN = "clean"


def region(
    values: torch.Tensor, threshold: float, softness: float = 0.0, feather: float = 0.0, invert: bool = False
) -> torch.Tensor:
    """Where `values` [B, H, W] reach `threshold`, as a mask [B, H, W] in 0..1.

    softness: width of the rise from 0 to 1 around the threshold, in values; 0 is a hard edge. feather: sigma in pixels of
    a Gaussian over the result.
    """
    check_mask(values, "map")
    if softness > 0:
        rise = ((values.float() - threshold) / softness + 0.5).clamp(0, 1)
        mask = rise * rise * (3 - 2 * rise)
    else:
        mask = (values >= threshold).float()
    if feather > 0:
        mask = low_frequencies(mask[:, None], feather)[:, 0].clamp(0, 1)
    return 1 - mask if invert else mask


def degradation_map(
    classifier: LoadedRestorer,
    image: torch.Tensor,
    label: str = "",
    network: LoadedRestorer | None = None,
    *,
    window: int = 0,
    grid: int = 8,
) -> tuple[torch.Tensor, str]:
    """How probable a degradation is at each place of [B, C, H, W]: [B, H, W] in 0..1, and its label.

    Judges overlapping windows of side `window` (0: as the classifier was trained), at most `grid` across and down, and
    interpolates between their centres. label "": the most probable one of the whole batch other than "clean"; with
    "clean" itself the map says where nothing is wrong. Raises InputError for a label that the classifier does not know.
    """
    check_image(image)
    side = window or int(classifier.restorer.config.get("window") or classify.WINDOW)
    height, width = image.shape[-2:]
    h, w = min(side, height), min(side, width)
    tops, lefts = _starts(height, h, grid), _starts(width, w, grid)
    found: list[Degradation] = []
    for number, picture in enumerate(image):
        windows = torch.stack([picture[:, top : top + h, left : left + w] for top in tops for left in lefts])
        with host.part_of_progress(number, len(image)):
            found.append(classify.classify(classifier, windows, network, window=max(h, w), grid=1))
    label = _label(found, label)
    maps = [f.probability(label).float().reshape(1, 1, len(tops), len(lefts)) for f in found]
    return torch.cat([_spread(m, (h, w), (height, width)) for m in maps])[:, 0], label


def _starts(length: int, window: int, most: int) -> list[int]:
    """Evenly spaced starts of windows that overlap by half, `most` at most."""
    count = min(most, 1 + -(-2 * (length - window) // window))
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def _label(found: Sequence[Degradation], label: str) -> str:
    known = found[0].labels
    if label:
        exact = next((name for name in known if name.casefold() == label.casefold()), None)
        if exact is None:
            raise InputError(f"label: {label!r} is unknown; this classifier knows: {', '.join(known)}")
        return exact
    mean = torch.cat([f.probabilities.float() for f in found]).mean(dim=0)
    order = [known[i] for i in mean.argsort(descending=True).tolist()]
    return next((name for name in order if name.casefold() != CLEAN), order[0])


def _spread(values: torch.Tensor, window: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Values [1, 1, rows, columns] at the centres of windows, interpolated to `size`, constant beyond the outer centres."""
    inner = [max(1, length - side) for length, side in zip(size, window, strict=True)]
    between = F.interpolate(values, size=inner, mode="bilinear", align_corners=True)
    before = [side // 2 for side in window]
    after = [length - middle - first for length, middle, first in zip(size, inner, before, strict=True)]
    return F.pad(between, (before[1], after[1], before[0], after[0]), mode="replicate")
