"""Where one shot of a video ends and the next begins, and what a network should decide once per shot.

A cut changes the colours (histogram) and the outlines (edges) at the same time; a flash or a fade changes the colours
alone, fast motion the outlines alone. Both measures are classics: Zhang, Kankanhalli and Smoliar, "Automatic
partitioning of full-motion video" (1993); Zabih, Miller and Mai, "A feature-based algorithm for detecting and
classifying scene breaks" (1995).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InputError
from . import host, tiling
from .flow import box, luma
from .loaded import LoadedRestorer
from .values import check_image

THRESHOLD = 0.55
_SIDE = 48
_BINS = 8


class ShotDetector:
    """`detector(frame)` for every frame in order: how much it looks like a cut, 0 to 1 (1 for the first frame).

    Keeps the last two frames' fingerprints: after a flash of one frame the picture before it is found again.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, frame: torch.Tensor) -> float:
        """frame: [1, C, H, W] in 0..1."""
        current = _fingerprint(frame)
        score = min((_distance(current, past) for past in self._seen), default=1.0)
        self._seen = [*self._seen[-1:], current]
        return score


def _fingerprint(frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour histogram (sums to 1) and blurred edge directions (length 1) of a reduced frame, where noise is gone."""
    colour = frame[:, :3].float() if frame.shape[1] >= 3 else frame[:, :1].float().expand(-1, 3, -1, -1)
    small = F.adaptive_avg_pool2d(colour, _SIDE).clamp(0, 1)
    bins = (small * (_BINS - 1)).round().long()[0].flatten(1)
    joint = (bins[0] * _BINS + bins[1]) * _BINS + bins[2]
    histogram = torch.bincount(joint, minlength=_BINS**3).float() / joint.numel()
    grey = luma(small)
    edges = torch.cat([grey.diff(dim=2)[..., :-1], grey.diff(dim=3)[..., :-1, :]], dim=1)
    edges = box(edges / (edges.norm(dim=1, keepdim=True) + 0.02), 5).flatten()
    return histogram, edges / edges.norm().clamp(min=1e-6)


def _distance(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Geometric mean of what changed in colours and in outlines, 0 to 1."""
    colours = float((a[0] - b[0]).abs().sum() / 2)
    outlines = min(1.0, 1 - float(a[1] @ b[1]))
    return max(0.0, colours * outlines) ** 0.5


def scores(images: torch.Tensor) -> list[float]:
    """How much each frame of [B, C, H, W] looks like the first of a new shot, 0 to 1."""
    check_image(images)
    detector, found = ShotDetector(), []
    for index in range(len(images)):
        host.check_interrupt()
        found.append(detector(images[index : index + 1]))
    return found


def first_frames(values: Sequence[float], threshold: float = THRESHOLD, shortest: int = 1) -> list[int]:
    """Numbers of the frames that begin a shot, from `scores`; shots shorter than `shortest` frames are not begun."""
    starts: list[int] = []
    for index, value in enumerate(values):
        if not starts or (value >= threshold and index - starts[-1] >= shortest):
            starts.append(index)
    return starts


def shot_of_each(starts: Sequence[int], frames: int) -> list[int]:
    """For every frame the number of the first frame of its shot."""
    if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)) or starts[-1] >= max(1, frames):
        raise InputError(f"shots: {list(starts)} do not cut {frames} frames; they were found in another video")
    bounds = [*starts[1:], frames]
    return [start for start, end in zip(starts, bounds, strict=True) for _ in range(end - start)]


def hold(name: str, value: Any, starts: Sequence[int], frames: int) -> Any:
    """A per-frame decision (a routing, a degradation) with that of a shot's first frame for all frames of the shot.

    One made for a single picture holds for all frames and is returned as it is. Raises InputError for the input `name` if
    it was made for other pictures.
    """
    if len(value) == 1:
        return value
    if len(value) != frames:
        raise InputError(
            f"{name}: made for {len(value)} pictures, but there are {frames} frames; make it from all of them, or from one"
        )
    return value[torch.tensor(shot_of_each(starts, frames))]


def decide(loaded: LoadedRestorer, frame: torch.Tensor, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the network decides once per picture (a route, a degradation), from [1, C, H, W]; {} if it decides nothing.

    To be given to `tiling.restore` as `context` for every frame of the shot. Entries of `given` are not decided again.
    """
    if loaded.restorer.architecture.context is None:
        return {}
    colour = tiling.as_rgb(frame)
    needed = tiling.activation_bytes(loaded, colour, torch.float32)
    with torch.inference_mode(), loaded.managed.on_device(needed) as (_, device):
        reduced = tiling.reduced(loaded, colour, torch.float32, device)
        context = tiling.until_it_fits(loaded, reduced, lambda picture: loaded.restorer.context(picture.to(device)))
    kept = {**loaded.options, **(given or {})}
    return {name: value for name, value in context.items() if name not in kept}
