"""Steady video from networks that restore frame by frame: what a frame shares with the ones before it is averaged.

A recursive mean along the motion, with two guards against ghosts: a pixel that the flow there and back does not confirm,
or that looks different from what the motion brings along, starts anew. Streaming: one frame goes in, one comes out, and
only the last output is kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch

from ..errors import InputError
from . import host
from .flow import box, optical_flow, visible, warp
from .values import check_image

STRENGTH = 0.8
TOLERANCE = 0.05
_NEIGHBOURHOOD = 7


class Stabiliser:
    """`stabiliser(frame)` for every frame of a video in order; `reset()` where a new shot begins.

    strength: largest weight of the past, 0 (off) to 0.95 (averages over 20 frames). tolerance: by how much, in 0..1, a
    spot may differ from where it came from before it counts as something else; larger steadies more and risks ghosts.
    """

    def __init__(self, strength: float = STRENGTH, tolerance: float = TOLERANCE) -> None:
        if not 0 <= strength <= 0.95:
            raise InputError(f"stabilise: {strength} is outside 0-0.95")
        if tolerance <= 0:
            raise InputError(f"tolerance: {tolerance} must be above 0")
        self.strength, self.tolerance = strength, tolerance
        self.last: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None

    def reset(self) -> None:
        """Forgets the past: the next frame is the first of a shot."""
        self.last = self.weight = None

    def state(self) -> dict[str, torch.Tensor]:
        """What has to be kept to go on later with the same result."""
        return {} if self.last is None else {"last": self.last, "weight": self.weight}

    def restore_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state` returned."""
        self.last, self.weight = state.get("last"), state.get("weight")

    def __call__(self, frame: torch.Tensor) -> torch.Tensor:
        """[1, C, H, W] in 0..1 (C 1, 3 or 4), steadied. The input is not modified."""
        frame = frame.float()
        if self.strength == 0:
            return frame
        frame = frame.contiguous()  # as `state` is kept in files, which take nothing else
        if self.last is None or self.last.shape != frame.shape:
            self.last, self.weight = frame, frame.new_ones(1, 1, *frame.shape[-2:])
            return frame
        flow, back = optical_flow(torch.cat([frame, self.last]), torch.cat([self.last, frame])).chunk(2)
        past = warp(self.last, flow)
        trust = visible(flow, back) * self._similarity(past - frame)
        # A running mean: the n-th frame of a spot counts 1/n, until `strength` bounds its memory.
        count = warp(self.weight, flow, "bilinear") * trust
        share = (count / (count + 1)).clamp(max=self.strength)
        # Bicubic interpolation overshoots at edges; an average lies between what it averages.
        both = torch.cat([frame, self.last])
        low, high = both.amin(dim=(0, 2, 3), keepdim=True), both.amax(dim=(0, 2, 3), keepdim=True)
        self.last, self.weight = torch.lerp(frame, past, share).clamp(low, high), count + 1
        return self.last

    def _similarity(self, difference: torch.Tensor) -> torch.Tensor:
        """1 where past and present agree within their neighbourhood, 0 where they show different things.

        A change of the whole frame's brightness is flicker, and noise is what differs anyway: both stay out of it.
        """
        overall = difference.flatten(2).median(dim=2).values[..., None, None]
        local = box((difference - overall).abs(), _NEIGHBOURHOOD).amax(dim=1, keepdim=True)
        scale = max(self.tolerance, 2.5 * float(local.median()))
        return torch.exp(-(local / scale).square())


def stabilise(
    images: torch.Tensor,
    strength: float = STRENGTH,
    tolerance: float = TOLERANCE,
    shots: Collection[int] = (0,),
) -> torch.Tensor:
    """[B, C, H, W], the frames of a video in order, steadied; `shots` are the numbers of their first frames.

    Raises InputError for frames that are empty or not finite.
    """
    check_image(images)
    stabiliser, progress = Stabiliser(strength, tolerance), host.progress(len(images))
    result = torch.empty_like(images, dtype=torch.float32)
    for index in range(len(images)):
        if index in shots:
            stabiliser.reset()
        result[index : index + 1] = stabiliser(images[index : index + 1])
        progress.update()
    return result


def warping_errors(videos: Sequence[torch.Tensor], shots: Collection[int] = (0,)) -> Iterator[list[float]]:
    """For every frame but the first of each shot, the warping error of each video (all [B, C, H, W], of one size).

    Mean squared difference between a frame and the one before it, moved along by the flow, where the flow there and back
    agree: Lai et al., "Learning blind video temporal consistency" (ECCV 2018), section 4.2. One flow, estimated on the
    first video, serves all of them.
    """
    guide = videos[0]
    for index in range(1, len(guide)):
        if index in shots:
            continue
        host.check_interrupt()
        now, before = guide[index : index + 1], guide[index - 1 : index]
        flow, back = optical_flow(torch.cat([now, before]), torch.cat([before, now])).chunk(2)
        seen = visible(flow, back)
        yield [warping_error(video[index : index + 1], video[index - 1 : index], flow, seen) for video in videos]


def warping_error(now: torch.Tensor, before: torch.Tensor, flow: torch.Tensor, seen: torch.Tensor) -> float:
    """Mean of (now - before(x + flow))^2 over colours and the pixels `seen` [1, 1, H, W]; pictures [1, C, H, W]."""
    error = (now[:, :3].float() - warp(before[:, :3].float(), flow)).square().mean(dim=1, keepdim=True)
    return float((error * seen).sum() / seen.sum().clamp(min=1))


def flicker(errors: Sequence[float]) -> float:
    """Root of the mean warping error in grey levels of 255: what the eye compares."""
    return 255 * math.sqrt(sum(errors) / len(errors)) if errors else 0.0
