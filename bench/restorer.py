"""`mend bench restorer`: milliseconds, megapixels a second and peak memory per network, size, device and precision."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import models
from ..engine import host, loaded, model_folder
from ..engine.meter import PeakMemory
from ..errors import InputError
from . import machine


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    host.set_device(args.device)
    device = host.device()
    print(f"{machine.command('restorer', *arguments, device=device)}; best of {args.repeat} (median)\n")
    print("| network | parameters | size | precision | ms (median) | MP/s | peak activations MB | bytes/pixel |")
    print("|---|---|---|---|---|---|---|---|")
    for name, restorer in networks(args.model, args.only, args.variant):
        for size in args.size:
            for precision in args.precision:
                try:
                    print(_row(name, restorer, size, precision, device, args.repeat), flush=True)
                except Exception as error:
                    print(f"| {name} | | {size} | {precision} | {type(error).__name__}: {error} | | | |", flush=True)
    return 0


def _row(name: str, restorer: models.Restorer, size: int, precision: str, device: torch.device, repeat: int) -> str:
    image = torch.rand(1, restorer.channels, size, size, device=device)
    dtype = host.working_dtype(precision, device)
    half = dtype != torch.float32
    module = restorer.module.to(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype if half else None, enabled=half):
        with PeakMemory() as peak:
            restorer(image)
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            restorer(image)
            _wait(device)
            times.append((time.perf_counter() - start) * 1000)
    module.to("cpu")
    best, median = min(times), statistics.median(times)
    rate = size * size / best / 1000
    return (
        f"| {name} | {restorer.parameters:,} | {size}x{size} | {precision} | {best:.0f} ({median:.0f}) | {rate:.2f} | "
        f"{peak.bytes / 1e6:.0f} | {peak.bytes / size**2:.0f} |"
    )


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def networks(
    files: Sequence[str] | None,
    only: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    kinds: Sequence[str] = ("restorer",),
) -> Iterator[tuple[str, models.Restorer]]:
    """Name and network of model files, or without any of every released setting with random weights.

    Raises InputError for ids of no network.
    """
    check_ids(only, kinds)
    for file in files or []:
        yield file, loaded.load(model_folder.model_path(file)).restorer
    for architecture in models.registry.architectures():
        if architecture.kind not in kinds or files or (only and architecture.id not in only):
            continue
        for variant, config in architecture.variants.items():
            if not variants or variant in variants:
                module = _module(architecture, config)
                yield f"{architecture.id} {variant}", models.Restorer(architecture, config, module)


def check_ids(ids: Sequence[str] | None, kinds: Sequence[str] = ("restorer",)) -> None:
    """Raises InputError for one that no network of these kinds has."""
    known = [a.id for a in models.registry.architectures() if a.kind in kinds]
    for name in ids or []:
        if name not in known:
            raise InputError(f"{name!r} is no network's id; one of {', '.join(known)}")


def _module(architecture: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return architecture.build(config).eval().requires_grad_(False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mend bench restorer", description=__doc__)
    parser.add_argument("--model", nargs="*", help="model files; otherwise every released setting with random weights")
    parser.add_argument("--only", nargs="*", help="ids of networks, e.g. moce-ir mair")
    parser.add_argument("--variant", nargs="*", help="names of settings, e.g. S")
    parser.add_argument("--size", nargs="*", type=int, default=[256], help="sides of the square test pictures")
    parser.add_argument("--precision", nargs="*", default=["fp32"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
