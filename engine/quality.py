"""How good pictures look without a reference: noise and blur in closed form, learned measures if pyiqa is installed."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InputError, MissingDependency
from ..models.colour import rgb
from . import host
from .values import check_image

GAUSSIAN_MEDIAN = 0.6745
"""Median of |x| for a standard normal x."""
BLUR_WINDOW = 9


def noise_level(image: torch.Tensor) -> list[float]:
    """Standard deviation of noise in each picture of [B, C, H, W], in steps of 8-bit pictures (0..255).

    Median absolute value of the finest diagonal Haar coefficients (Donoho and Johnstone, "Ideal spatial adaptation by
    wavelet shrinkage", Biometrika 1994), mean over channels. Fine texture counts as noise; 0 below 2 pixels.
    """
    height, width = (side // 2 * 2 for side in image.shape[-2:])
    if min(height, width) < 2:
        return [0.0] * len(image)
    x = image[..., :height, :width].float()
    diagonal = (x[..., ::2, ::2] - x[..., ::2, 1::2] - x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 2
    median = diagonal.abs().flatten(2).median(dim=2).values
    return (255 * median / GAUSSIAN_MEDIAN).mean(dim=1).tolist()


def blur(image: torch.Tensor) -> list[float]:
    """How blurred each picture of [B, C, H, W] is, from 0 (sharp) to 1; 0 if it is flat.

    Compares the picture's steps with those after blurring it again: Crete et al., "The Blur Effect: Perception and
    Estimation with a New No-Reference Perceptual Blur Metric", SPIE 2007.
    """
    grey = image.float().mean(dim=1, keepdim=True)
    found = []
    for axis in (-2, -1):
        if grey.shape[axis] < 2:
            continue
        window = [1, 1]
        window[axis] = BLUR_WINDOW
        pad = [BLUR_WINDOW // 2 if axis == -1 else 0] * 2 + [BLUR_WINDOW // 2 if axis == -2 else 0] * 2
        blurred = F.avg_pool2d(F.pad(grey, pad, mode="replicate"), window, stride=1)
        sharp, soft = grey.diff(dim=axis).abs(), blurred.diff(dim=axis).abs()
        lost = (sharp - soft).clamp_min(0).sum(dim=(1, 2, 3))
        total = sharp.sum(dim=(1, 2, 3))
        found.append(torch.where(total > 0, (total - lost) / total.clamp_min(1e-12), 0))
    return torch.stack(found).amax(dim=0).tolist() if found else [0.0] * len(image)


def learned(image: torch.Tensor, name: str, tell: Callable[[], None] | None = None) -> list[float]:
    """A measure of the package pyiqa ("niqe", "musiq", "clipiqa" ...) for each picture of [B, 1..4, H, W].

    tell: called after each. Never downloads: raises MissingDependency without the package or its weights, InputError for
    an unknown name or one that needs a reference.
    """
    found = []
    with torch.inference_mode(False), torch.no_grad():
        measure = _measure(name)
        for picture in rgb(image).split(1):
            found.append(float(measure(picture.float().clone().clamp_(0, 1))))
            if tell is not None:
                tell()
    return found


@lru_cache(maxsize=4)
def _measure(name: str) -> Any:
    if importlib.util.find_spec("pyiqa") is None:
        raise MissingDependency(
            f"{name}: needs the package pyiqa (pip install pyiqa, which brings many others: better in an environment of its own)"
        )
    pyiqa = importlib.import_module("pyiqa")
    if name not in pyiqa.list_models():
        raise InputError(f"measures: pyiqa has no {name!r}; some it has: niqe, brisque, musiq, clipiqa, topiq_nr")
    with offline(name):
        measure = pyiqa.create_metric(name, device="cpu")
    if getattr(measure, "metric_mode", "NR") != "NR":
        raise InputError(f"measures: {name} compares with a reference; without one there are niqe, musiq, clipiqa ...")
    return measure


@contextmanager
def offline(what: str) -> Iterator[None]:
    """While packages load weights: a download raises MissingDependency instead of happening."""

    def refuse(url: Any = "", *args: Any, **kwargs: Any) -> None:
        raise MissingDependency(
            f"{what}: its weights are not on this computer ({url}); Mend downloads nothing: load it once in Python yourself"
        )

    replaced = [
        ("torch.hub", "download_url_to_file", refuse),
        ("pyiqa.utils.download_util", "download_url_to_file", refuse),
    ]
    replaced.append(("huggingface_hub.constants", "HF_HUB_OFFLINE", True))
    kept = []
    try:
        for module, attribute, value in replaced:
            if hasattr(sys.modules.get(module), attribute):
                kept.append((sys.modules[module], attribute, getattr(sys.modules[module], attribute)))
                setattr(sys.modules[module], attribute, value)
        yield
    finally:
        for module, attribute, value in kept:
            setattr(module, attribute, value)


def table(image: torch.Tensor, names: Sequence[str] = ()) -> tuple[str, dict[str, float]]:
    """Figures of [B, C, H, W] without a reference: a line of text a picture, and the means by name.

    Raises InputError for pictures that are empty or not finite.
    """
    check_image(image)
    colour = image[:, : 3 if image.shape[1] >= 3 else 1]
    columns: dict[str, list[float]] = {"noise": [], "blur": []}
    progress = host.progress(len(image) * (1 + len(names)))
    for picture in colour.split(1):
        columns["noise"] += noise_level(picture)
        columns["blur"] += blur(picture)
        progress.update()
    for name in names:
        columns[name] = learned(image, name, progress.update)
    lines = [f"picture {i}: " + ", ".join(f"{n} {v[i]:.4g}" for n, v in columns.items()) for i in range(len(image))]
    return "\n".join(lines), {name: math.fsum(v) / len(v) for name, v in columns.items()}
