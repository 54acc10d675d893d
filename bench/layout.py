"""`mend bench layout`: what channels-last feature maps gain on a CPU, for the networks that ask for them at their entry."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..models import registry
from ..models.layers.layout import fastest_layout
from . import machine, report

NETWORKS = ("nafnet", "restormer", "promptir")


def seconds(module: torch.nn.Module, image: torch.Tensor, repeats: int) -> float:
    """Processor seconds of one forward pass, the fastest of `repeats` after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begun = time.process_time()
        module(image)
        times.append(time.process_time() - begun)
    return min(times[1:])


@torch.inference_mode()
def measure(network: str, size: int, repeats: int) -> tuple[float, float, float]:
    """Processor seconds with plain and with channels-last maps, and the largest difference of the results."""
    architecture = next(a for a in registry.architectures() if a.id == network)
    file = importlib.import_module(f"..models.{network}", __package__)
    torch.manual_seed(0)
    module = architecture.build(dict(next(iter(architecture.variants.values())))).eval()
    image = torch.rand(1, 3, size, size)
    found, results = [], []
    for layout in (torch.Tensor.contiguous, fastest_layout):
        file.fastest_layout = layout
        found.append(seconds(module, image, repeats))
        results.append(module(image))
    return *found, float((results[0] - results[1]).abs().max())


def main(arguments: Sequence[str]) -> int:
    """Prints a table, and writes it where asked."""
    parser = argparse.ArgumentParser(prog="mend bench layout", description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="side of the picture (128)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table here (.md)")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = [
        "# Channels-last feature maps on a CPU",
        "",
        f"`mend bench layout --size {parsed.size}`: each network's first variant, random weights, processor seconds of one pass.",
        machine.describe(),
        "",
        "| network | plain | channels last | saved | largest difference |",
        "|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        plain, last, difference = measure(network, parsed.size, parsed.repeats)
        lines.append(f"| {network} | {plain:.3f} s | {last:.3f} s | {1 - last / plain:.0%} | {difference:.1e} |")
    report.publish(lines, parsed.out)
    return 0
