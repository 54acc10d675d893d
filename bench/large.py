"""`mend bench large`: peak memory and time of a whole process that restores one large picture, on the CPU."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from ..engine import host, loaded, tiling
from . import machine

HEAD = (
    "| network | parameters | picture | tile | whole process, peak GB | of which before the network runs | seconds |\n"
    "|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table, each network measured in a process of its own. Status 1 above --limit."""
    args = _parser().parse_args(arguments)
    if args.one:
        return _one(args)
    print(f"{machine.command('large', *arguments)}\n\n{HEAD}", flush=True)
    command = [sys.executable, "-m", __package__.partition(".")[0], "bench", "large", *arguments, "--one"]
    failed = [name for name in args.model if subprocess.run([*command, name]).returncode]
    return 1 if failed else 0


def _one(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    host.set_device("cpu")
    width, height = args.size
    network = loaded.load(host.model_path(args.one))
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    before, start = peak_bytes(), time.perf_counter()
    with torch.inference_mode():
        side = args.tile or tiling.choose_tile(network, height, width, torch.float32, torch.device("cpu"))
        restored = tiling.restore(network, picture, tile=args.tile)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    whole = restored.shape[-2:] == (height * network.restorer.scale, width * network.restorer.scale)
    if not whole or not bool(restored.isfinite().all()):
        print(f"| {args.one} | gave {tuple(restored.shape)} or values that are not finite | | | | | |")
        return 1
    print(
        f"| {args.one.removesuffix('.safetensors')} | {network.restorer.parameters:,} | {width}x{height} | {side} | "
        f"{peak / 1e9:.2f} | {before / 1e9:.2f} | {seconds:.0f} |",
        flush=True,
    )
    return 0 if peak < args.limit * 1e9 else 1


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mend bench large", description=__doc__)
    parser.add_argument("--model", nargs="*", default=["mend-moce-ir-starter.safetensors"], help="model files")
    parser.add_argument("--size", nargs=2, type=int, default=[4096, 3072], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--tile", type=int, default=0, help="side of a tile; 0 chooses by itself")
    parser.add_argument("--limit", type=float, default=3.0, help="gigabytes that the process may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
