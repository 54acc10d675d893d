"""What it saves to keep freed memory while a network runs on the CPU (engine/allocator.py), and what it takes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..engine import allocator, host, loaded, tiling
from . import report
from .machine import command, peak_bytes, resident

WEIGHTS = host.PACK / "weights" / "mend-moce-ir-starter.safetensors"


def measure(height: int, width: int, keep: bool, threads: int) -> dict[str, Any]:
    """One restoration in this process, with Mend's own tiles: seconds, processor seconds and memory."""
    torch.set_num_threads(threads)
    if not keep:
        allocator.available = lambda: False
        allocator.kept = nullcontext
    network = loaded.load(WEIGHTS)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    before, began = os.times(), time.monotonic()
    with torch.inference_mode():
        tiling.restore(network, image)
    seconds, after = time.monotonic() - began, os.times()
    return {
        "seconds": seconds,
        "user": after.user - before.user,
        "system": after.system - before.system,
        "peak": peak_bytes(),
        "afterwards": resident(),
    }


def main(arguments: Sequence[str]) -> int:
    """Prints a table in Markdown; Linux only."""
    parser = argparse.ArgumentParser(prog="mend bench freed", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["640x360", "1024x768", "1600x1200"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        width, height = map(int, args.one[0].split("x"))
        print(json.dumps(measure(height, width, args.one[1] == "kept", args.threads)))
        return 0
    torch.set_num_threads(args.threads)
    lines = [
        "# Keeping freed memory on the CPU",
        "",
        "The starter network restores a picture in a process of its own, in float32 with the tiles that Mend chooses; of "
        f"{args.repeats} runs of each kind, one after the other in turn, the faster one.",
        "",
        command("freed", "--sizes", *args.sizes, "--threads", str(args.threads)),
        "",
        "| picture | freed memory | seconds | processor: computing | processor: system | peak GB | afterwards GB |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = []
    for size in args.sizes:
        runs: dict[str, list[dict[str, Any]]] = {"given back": [], "kept": []}
        for _ in range(args.repeats):
            for kind, found in runs.items():
                one = [sys.executable, "-m", "comfyui_mend", "bench", "freed", "--one", size, kind]
                done = subprocess.run(
                    [*one, "--threads", str(args.threads)], stdout=subprocess.PIPE, text=True, check=True
                )
                found.append(json.loads(done.stdout.splitlines()[-1]))
        for kind, found in runs.items():
            best = min(found, key=lambda run: run["seconds"])
            times = f"{best['seconds']:.1f} | {best['user']:.1f} | {best['system']:.1f}"
            lines.append(
                f"| {size} | {kind} | {times} | {max(r['peak'] for r in found) / 1e9:.2f} | {best['afterwards'] / 1e9:.2f} |"
            )
            figures.append({"size": size, "kind": kind, "runs": found})
    report.publish(lines, args.out, figures)
    return 0
