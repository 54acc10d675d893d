"""Which range of values a network wants: for files that do not say."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.layers.padding import pad_to_multiple
from ..models.transweather import INPUT_RANGES, TransWeather, likely_input_range
from . import tiling
from .loaded import LoadedRestorer
from .values import check_image

_SIDE = 256
"""A wrong range shows in a small picture as well as in a large one."""


def choose(loaded: LoadedRestorer, wanted: str, image: torch.Tensor | None = None) -> tuple[LoadedRestorer, str]:
    """The network set to the range `wanted`, and what was decided in words.

    wanted: "auto" (as the file's edition suggests), "0..1", "-1..1", or "measure": the range that leaves the coarse
    colours of `image` [B, C, H, W] (its first picture) closer to themselves. Networks with one range stay as they are.
    """
    if wanted not in INPUT_RANGES:
        raise InputError(f"range: {wanted!r} is not one of {', '.join(INPUT_RANGES)}")
    module, title = loaded.restorer.module, loaded.restorer.architecture.title
    if not isinstance(module, TransWeather):
        return loaded, f"{title} has one range: nothing to choose"
    if wanted == "measure":
        if image is None:
            raise InputError("image: connect a picture to measure with, best an undamaged one")
        check_image(image)
        wanted, how = _measured(loaded, image[:1]), "measured"
    else:
        wanted, how = (module.input_range, "by the file's edition") if wanted == "auto" else (wanted, "as set")
    return loaded.with_options(input_range=wanted), f"{title} is fed {wanted} ({how})"


def _measured(loaded: LoadedRestorer, image: torch.Tensor) -> str:
    height, width = image.shape[-2:]
    scale = min(1.0, _SIDE / max(height, width))
    small = F.interpolate(tiling.as_rgb(image), size=[max(8, round(s * scale)) for s in (height, width)], mode="area")
    padded, _ = pad_to_multiple(small, loaded.restorer.multiple_of, loaded.restorer.minimum_size)
    with loaded.managed.on_device(tiling.activation_bytes(loaded, padded, torch.float32)) as (module, device):
        return likely_input_range(module, padded.to(device))
