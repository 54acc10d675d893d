"""Feature maps of encoder-decoder networks on real pictures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from ..errors import InputError, OutOfMemoryError
from ..models import features
from ..models.features import Features
from . import host, tiling
from .loaded import LoadedRestorer
from .pictures import from_pil, labelled, to_pil
from .values import check_image, clamped


def encode(loaded: LoadedRestorer, image: torch.Tensor) -> Features:
    """The feature maps of [B, C, H, W], on the intermediate device; whole pictures, never tiles.

    Raises InputError for a network without features, OutOfMemoryError for a picture that does not fit.
    """
    check_image(image)
    colour = tiling.as_rgb(image)
    return _whole(loaded, image, lambda restorer, device: features.encode(restorer, colour.to(device), loaded.options))


def decode(loaded: LoadedRestorer, maps: Features) -> torch.Tensor:
    """The restored pictures [B, 3, H, W], clamped as by `tiling.restore`.

    Raises as `encode`, for features of another network, and for maps changed so much that the result is no picture.
    """
    maps = replace(maps, context={**maps.context, **loaded.options})
    restored = _whole(loaded, maps.image, lambda restorer, device: features.decode(restorer, maps.to(device)))
    if not all(bool(picture.isfinite().all()) for picture in restored):
        raise InputError(
            "features: the network makes NaN or infinite values of these maps; use smaller gains or amounts"
        )
    return clamped(restored, maps.image)


def _whole(loaded: LoadedRestorer, image: torch.Tensor, function):
    memory = tiling.activation_bytes(loaded, image, torch.float32)
    host.check_interrupt()

    def work() -> Any:
        with loaded.managed.on_device(memory) as (_, device):
            return function(loaded.restorer, device).to(host.intermediate_device())

    try:
        return host.attempt(work)
    except host.DidNotFitError:
        raise OutOfMemoryError(
            f"image: {len(image)} pictures of {image.shape[-1]} x {image.shape[-2]} do not fit into memory at once, and "
            "features cannot be cut into tiles; make them smaller"
        ) from None


def picture(maps: Features, level: int = -1, side: int = 384) -> torch.Tensor:
    """What the maps hold, as colours (three principal components): [B, 3, h, w].

    level: 0 the shallowest; -1 all of them side by side, `side` pixels wide each.
    """
    if level >= len(maps.maps):
        raise InputError(f"level: {level} of {len(maps.maps)} feature maps, counted from 0")
    height, width = maps.image.shape[-2:]
    if level >= 0:
        return features.principal_components(maps.maps[level])
    size = (max(1, round(side * height / width)), side)
    coloured = [features.principal_components(m, size) for m in maps.maps]
    names = [f"level {i}: {m.shape[1]} x {m.shape[3]} x {m.shape[2]}" for i, m in enumerate(maps.maps)]
    return torch.stack([from_pil(labelled([to_pil(level[i]) for level in coloured], names)) for i in range(len(maps))])


def describe(maps: Features) -> str:
    """A line a level: size, mean, spread."""
    lines = [
        f"level {i}: {m.shape[1]} channels of {m.shape[3]} x {m.shape[2]}, mean {m.mean():.4g}, deviation {m.std():.4g}"
        for i, m in enumerate(maps.maps)
    ]
    return f"{maps.network}, {len(maps)} pictures\n" + "\n".join(lines)


def numbers(text: str, count: int, name: str) -> list[float]:
    """ "0.5" for all or "1, 1, 0.5" for each of `count` levels, shallow to deep. Raises InputError naming `name`."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{name}: {text!r} is no list of numbers such as 1, 1, 0.5") from None
    if not all(map(math.isfinite, values)):
        raise InputError(
            f"{name}: {text!r} holds a number that is NaN or infinite; use ordinary ones such as 1, 1, 0.5"
        )
    if len(values) == 1:
        values *= count
    if len(values) != count:
        raise InputError(
            f"{name}: {len(values)} numbers for {count} levels (shallow to deep); give one, or one a level"
        )
    return values
