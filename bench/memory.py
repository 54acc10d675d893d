"""`mend bench memory`: bytes of activations per pixel, per network and precision; `--write` puts them where tiling looks.

The figure is the larger of two: the peak of the larger test picture over its pixels (which holds what does not grow
with the picture), and the growth from the smaller to the larger one (for networks that grow faster than the picture).
Half precision is that figure times the share that bfloat16 takes of float32's growth up to the smaller size; growth, as
the weights' copies in half precision do not depend on the picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from .. import models
from ..codec import compress
from ..engine import host, loaded, memory
from ..engine.meter import PeakMemory
from . import machine
from .restorer import networks

HEAD = "| network | settings | float32 | half | formula, float32 | measured / formula |\n|---|---|---|---|---|---|"


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table of bytes per pixel; writes engine/memory.json with --write."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    host.set_device("cpu")
    rows = json.loads(memory.TABLE.read_text(encoding="utf-8"))["rows"] if memory.TABLE.is_file() else []
    known = {(row["network"], memory.settings(row["config"])): row for row in rows}
    print(f"{machine.command('memory', *arguments)}; bytes per pixel\n\n{HEAD}")
    kinds = ("restorer", "codec")
    for name, restorer in networks(args.model, args.only, args.variant, kinds=kinds):
        key = restorer.architecture.id, memory.settings(restorer.config)
        if args.new and key in known:
            continue
        single, half = measure(restorer, args.size)
        formula = restorer.architecture.bytes_per_pixel(restorer.config)
        ratio = f"{single / formula:.2f}"
        label = name.removeprefix(f"{restorer.architecture.id} ")
        print(
            f"| {restorer.architecture.id} | {label} | {single:.0f} | {half:.0f} | {formula:.0f} | {ratio} |",
            flush=True,
        )
        known[key] = {
            "network": restorer.architecture.id,
            "name": label,
            "single": round(single),
            "half": round(half),
            "config": restorer.config,
        }
        if args.write:
            _write(list(known.values()))
    return 0


def measure(restorer: models.Restorer, sizes: Sequence[int]) -> tuple[float, float]:
    """Bytes per pixel in float32 and in half precision, from square pictures of two `sizes`."""
    small, large = sorted(sizes)
    at_small, at_large = peak(restorer, small, torch.float32), peak(restorer, large, torch.float32)
    single = max(at_large / large**2, (at_large - at_small) / (large**2 - small**2))
    if not restorer.architecture.half or restorer.architecture.kind == "codec":  # these always compute in float32
        return single, single
    growth = {
        dtype: peak(restorer, small, dtype) - peak(restorer, small // 2, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    share = growth[torch.bfloat16] / max(1, growth[torch.float32])
    return single, single * min(1.0, max(0.5, share))


def peak(restorer: models.Restorer, side: int, dtype: torch.dtype) -> int:
    """Most bytes of tensors alive at one time while a picture of `side` x `side` pixels is restored on the CPU."""
    if restorer.architecture.kind == "codec":
        codec, picture = loaded.wrap(restorer), torch.rand(3, side, side)
        with PeakMemory() as meter:
            compress.decompress(codec, compress.compress(codec, picture, 32))
        return meter.bytes
    channels = restorer.channels
    image, half = torch.rand(1, channels, side, side), dtype != torch.float32
    # Not inference mode: there autocast does not see what a counted operator is made of.
    with torch.no_grad(), torch.autocast("cpu", dtype if half else None, enabled=half), PeakMemory() as meter:
        restorer(image)
    return meter.bytes


def _write(rows: list[dict]) -> None:
    rows = sorted(rows, key=lambda row: (row["network"], row["single"], memory.settings(row["config"])))
    lines = ",\n".join(json.dumps(row) for row in rows)
    how = "bytes of activations per input pixel, written by `mend bench memory --write`"
    memory.TABLE.write_text(f'{{"what": "{how}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mend bench memory", description=__doc__)
    parser.add_argument("--model", nargs="*", help="model files; otherwise every released setting with random weights")
    parser.add_argument("--only", nargs="*", help="ids of networks, e.g. moce-ir mair")
    parser.add_argument("--variant", nargs="*", help="names of settings, e.g. S")
    parser.add_argument("--size", nargs=2, type=int, default=[128, 256], help="sides of the two square test pictures")
    parser.add_argument("--new", action="store_true", help="leave out what the table has already")
    parser.add_argument("--write", action="store_true", help="put the figures into engine/memory.json")
    parser.add_argument("--threads", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
