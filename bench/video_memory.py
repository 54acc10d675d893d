"""Memory of this process while it restores a long video: flat, however long it is."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch

from .. import models
from ..engine import host, loaded
from ..engine.restore_video import VideoSettings, restore_video
from ..engine.video import VideoInfo, VideoReader, VideoWriter, join
from .machine import describe, resident
from .steady_video import noisy, pan

TINY = {
    "dim": 8,
    "num_blocks": (1, 1, 1, 1),
    "num_dec_blocks": (1, 1, 1),
    "heads": (1, 2, 4, 8),
    "num_refinement_blocks": 1,
}
"""A MoCE-IR of a few thousand weights: what is measured is the way of the frames, not a network."""


def write_long(path: Path, frames: int, size: tuple[int, int], folder: Path) -> Path:
    """A pan to and fro, written a frame at a time."""
    some = noisy(pan("red_panda.jpg", 40, size, (0.4, 1.3), (60, 90)), 10)
    first = folder / "seed.nut"
    info = VideoInfo(size[1], size[0], Fraction(25), Fraction(1, 25), frames, 0, Fraction(1), 8, (2, 2, 2), ())
    writer = VideoWriter(first, info, size, crf=20)
    for index in range(frames):
        place = index % 78
        writer.write(some[min(place, 78 - place)], index)
    writer.close()
    join([first], str(first), path)
    return path


def main(arguments: Sequence[str]) -> int:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(prog="mend bench video", description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 96), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--stabilise", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    module = models.create("moce-ir", TINY).eval().requires_grad_(False)
    config = {**TINY, "num_experts": 4, "inp_channels": 3}
    network = loaded.wrap(models.Restorer(models.registry.get("moce-ir"), config, module))
    seen: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_long(folder / "long.mp4", args.frames, tuple(args.size), folder)
        with VideoReader(source) as reader:
            assert sum(1 for _ in reader) == args.frames
        host.set_hooks(progress=lambda done, total, preview: seen.setdefault(done * args.frames // total, resident()))
        began, cpu = time.monotonic(), time.process_time()
        made = restore_video(network, source, folder / "out", "long", VideoSettings(stabilise=args.stabilise))
        host.set_hooks()
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
    print(f"{describe(host.device())}\n")
    print(
        f"{made.frames} frames of {args.size[1]}x{args.size[0]}, stabilise {args.stabilise:g}: {wall:.0f} s, "
        f"{cpu:.0f} s of processor time\n"
    )
    print("| after frame | resident memory MiB |\n|---|---|")
    marks = [args.frames * part // 100 for part in (5, 10, 25, 50, 75, 100)]
    for mark in marks:
        print(f"| {mark} | {seen[min(seen, key=lambda frame: abs(frame - mark))] / 2**20:.0f} |")
    late = [value for frame, value in seen.items() if frame >= args.frames // 10]
    print(f"\nFrom frame {args.frames // 10} on: {min(late) / 2**20:.0f} to {max(late) / 2**20:.0f} MiB.")
    return 0
