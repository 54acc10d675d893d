"""`mend bench large`: peak memory and time of a whole process that restores one large picture, on the CPU.

A network that would take an hour can be stopped after --seconds: its peak is reached with the first tile, as the picture
and the whole result are there from the start.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from .. import models
from ..engine import host, loaded, model_folder, tiling
from ..errors import Cancelled
from . import machine
from .restorer import check_ids, networks

HEAD = (
    "| network | parameters | picture | tile | tiles done | whole process, peak GB | of which before the network runs | seconds |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table, each network measured in a process of its own. Status 1 above --limit."""
    args = _parser().parse_args(arguments)
    if args.one:
        return _one(args)
    print(f"{machine.command('large', *arguments)}\n\n{HEAD}", flush=True)
    command = [sys.executable, "-m", __package__.partition(".")[0], "bench", "large", *arguments, "--one"]
    names = list(args.model) if args.released is None else list(_released(args.released))
    failed = [name for name in names if subprocess.run([*command, name]).returncode]
    return 1 if failed else 0


def _released(only: Sequence[str]) -> Iterator[str]:
    """The first released setting of every network, or of those named, as "ID/SETTING". Raises InputError for others."""
    check_ids(only)
    for architecture in models.registry.architectures():
        if architecture.kind == "restorer" and (not only or architecture.id in only):
            yield f"{architecture.id}/{next(iter(architecture.variants))}"


def _network(name: str, released: bool) -> loaded.LoadedRestorer:
    """A file by its name, which may lie in a subfolder, or a released setting (ID/SETTING) with random weights."""
    if not released:
        return loaded.load(model_folder.model_path(name))
    network, _, setting = name.partition("/")
    ((_, restorer),) = networks(None, [network], [setting])
    return loaded.wrap(restorer)


class Clock:
    """Counts tiles, and stops the run after the first one that ends later than `seconds`; 0: never."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds, self.done, self.total = time.perf_counter(), seconds, 0, 0
        host.set_hooks(self._progress, self._interrupt)

    def _progress(self, done: int, total: int, _: object) -> None:
        self.done, self.total = done, total

    def _interrupt(self) -> bool:
        return bool(self.seconds and self.done and self.spent() > self.seconds)

    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.start


def _one(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    host.set_device("cpu")
    width, height = args.size
    network = _network(args.one, args.released is not None)
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    before, clock, restored = machine.peak_bytes(), Clock(args.seconds), None
    with torch.inference_mode():
        side = args.tile or tiling.choose_tile(network, height, width, torch.float32, torch.device("cpu"))
        try:
            restored = tiling.restore(network, picture, tile=args.tile)
        except Cancelled:
            pass
    seconds, peak = clock.spent(), machine.peak_bytes()
    whole = (height * network.restorer.scale, width * network.restorer.scale)
    if restored is not None and (restored.shape[-2:] != whole or not bool(restored.isfinite().all())):
        print(f"| {args.one} | gave {tuple(restored.shape)} or values that are not finite | | | | | | |")
        return 1
    print(
        f"| {args.one.removesuffix('.safetensors')} | {network.restorer.parameters:,} | {width}x{height} | {side} | "
        f"{clock.done} of {clock.total} | {peak / 1e9:.2f} | {before / 1e9:.2f} | {seconds:.0f} |",
        flush=True,
    )
    return 0 if peak < args.limit * 1e9 else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mend bench large", description=__doc__)
    parser.add_argument("--model", nargs="*", default=["mend-moce-ir-starter.safetensors"], help="model files")
    parser.add_argument("--released", nargs="*", metavar="ID", help="released settings with random weights instead")
    parser.add_argument("--seconds", type=float, default=0, help="stop after the tile that ends later; 0: never")
    parser.add_argument("--size", nargs=2, type=int, default=[4096, 3072], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--tile", type=int, default=0, help="side of a tile; 0 chooses by itself")
    parser.add_argument("--limit", type=float, default=3.0, help="gigabytes that the process may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
