"""How much a network for single pictures flickers on a noisy pan, before and after stabilising, and at what cost."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..engine import folders, host, loaded, model_folder, shots, stabiliser, tiling
from ..engine.photos import STARTER, read_photo
from ..engine.report import psnr
from .machine import describe

MARGIN = 8
"""Pixels at the border that are not compared: there the pan brings in what was not seen before."""


def pan(
    name: str, frames: int, size: tuple[int, int], step: tuple[float, float], start: tuple[float, float]
) -> torch.Tensor:
    """A camera moving over a shipped photo, [frames, 3, *size]: `step` (down, right) pixels a frame, from `start`."""
    photo = read_photo(folders.SHIPPED_INPUTS / name)
    height, width = photo.shape[-2:]
    pictures = []
    for t in range(frames):
        y = (torch.arange(size[0]) + start[0] + t * step[0] + 0.5) / height * 2 - 1
        x = (torch.arange(size[1]) + start[1] + t * step[1] + 0.5) / width * 2 - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
        pictures.append(F.grid_sample(photo, grid, mode="bicubic", padding_mode="border", align_corners=False))
    return torch.cat(pictures).clamp(0, 1)


def noisy(images: torch.Tensor, sigma: float, seed: int = 0) -> torch.Tensor:
    """Gaussian noise, sigma in grey levels of 255, new in every frame."""
    generator = torch.Generator().manual_seed(seed)
    return (images + torch.randn(images.shape, generator=generator) * sigma / 255).clamp(0, 1)


def true_flow(images: torch.Tensor, step: tuple[float, float]) -> torch.Tensor:
    """The flow from a frame of `pan` to the one before it, [1, 2, H, W]."""
    return torch.tensor([step[1], step[0]])[None, :, None, None].expand(1, 2, *images.shape[-2:])


def true_errors(video: torch.Tensor, step: tuple[float, float]) -> list[float]:
    """The warping error of every frame along the known motion, without the border."""
    flow, seen = true_flow(video, step), torch.zeros(1, 1, *video.shape[-2:])
    seen[..., MARGIN:-MARGIN, MARGIN:-MARGIN] = 1
    pairs = zip(video[1:].split(1), video[:-1].split(1), strict=True)
    return [stabiliser.warping_error(now, before, flow, seen) for now, before in pairs]


def _timed(function: Callable[[], torch.Tensor], frames: int) -> tuple[torch.Tensor, float]:
    began = time.process_time()
    with torch.inference_mode():
        result = function()
    return result, (time.process_time() - began) / frames


def main(arguments: Sequence[str]) -> int:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(prog="mend bench steady", description=__doc__)
    parser.add_argument("--model", default=STARTER)
    parser.add_argument("--photos", nargs="+", default=["red_panda.jpg", "palace.jpg"])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=2, default=(144, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--step", type=float, nargs=2, default=(0.4, 1.3), metavar=("DOWN", "RIGHT"))
    parser.add_argument("--sigma", type=float, default=25.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    network, step = loaded.load(model_folder.model_path(args.model)), tuple(args.step)
    print(f"{describe(host.device())}\n")
    print("| photo | frames | PSNR dB | flicker of 255 | warping error x 1e-5 | processor s a frame |")
    print("|---|---|---|---|---|---|")
    for name in args.photos:
        clean = pan(name, args.frames, tuple(args.size), step, (80, 150))
        damaged = noisy(clean, args.sigma)

        def each(context: dict, damaged: torch.Tensor = damaged) -> torch.Tensor:
            return torch.cat([tiling.restore(network, frame, context=context) for frame in damaged.split(1)])

        restored, seconds = _timed(lambda each=each: each({}), args.frames)
        held, held_seconds = _timed(lambda each=each, d=damaged: each(shots.decide(network, d[:1])), args.frames)
        steady, more = _timed(lambda held=held: stabiliser.stabilise(held), args.frames)
        for what, video, cost in (
            ("clean", clean, None),
            ("noisy", damaged, None),
            ("restored frame by frame", restored, seconds),
            ("the same, decisions held", held, held_seconds),
            ("the same, stabilised", steady, held_seconds + more),
        ):
            errors = true_errors(video, step)
            fidelity = "" if video is clean else f"{sum(psnr(video, clean)) / len(video):.2f}"
            squared = 1e5 * sum(errors) / len(errors)
            spent = "" if cost is None else f"{cost:.2f}"
            print(f"| {name} | {what} | {fidelity} | {stabiliser.flicker(errors):.2f} | {squared:.1f} | {spent} |")
    return 0
