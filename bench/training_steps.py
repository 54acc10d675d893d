"""`mend bench training`: what a step of training a starter costs, and how long each kind of damage makes its gradient.

The times are of loss and gradients of one crop on one thread: with the layers as they are, with those for training on a CPU
(`training.accelerate`), and with these compiled. The lengths of the gradients are those of single crops, under shipped
weights: between kinds that differ tenfold, only clipping each keeps the long ones from drowning the short ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from ..training.accelerate import accelerate, compile_blocks
from ..training.data import PairStream, PhotoCrops, load_photos
from ..training.starters import STARTERS, Starter
from ..training.trainer import read_export
from . import machine, report

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda module: module.to(memory_format=torch.channels_last),
    "for training on a CPU": accelerate,
    "the same, compiled": lambda module: compile_blocks(accelerate(module)),
}


def gradient(
    recipe: Starter, module: nn.Module, damaged: torch.Tensor, clean: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """The loss's gradient with respect to every parameter, with products in bfloat16, as in training."""
    damaged = damaged.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = recipe.objective(module, damaged, clean, torch.Generator().manual_seed(0))
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)


def times(recipe: Starter, module: nn.Module, size: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Per form the seconds of the first step and of a later one, the fastest of `repeats`."""
    damaged, clean = torch.rand(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, form in FORMS.items():
        network, taken = form(deepcopy(module)).train(), []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            gradient(recipe, network, damaged, clean)
            taken.append(time.perf_counter() - begun)
        found[name] = taken[0], min(taken[1:])
    return found


def lengths(recipe: Starter, module: nn.Module, crops: PhotoCrops, size: int, count: int) -> dict[str, torch.Tensor]:
    """Per task the norms of the gradients of `count` crops, in rising order."""
    module, generator = accelerate(deepcopy(module)).train(), torch.Generator().manual_seed(0)
    found = {}
    for task in recipe.tasks:
        pairs, norms = PairStream(crops, (task,), generator), []
        for _ in range(count):
            damaged, clean, _ = pairs.batch(1, size)
            parts = [part for part in gradient(recipe, module, damaged, clean) if part is not None]
            norms.append(nn.utils.get_total_norm(parts))
        found[task.name] = torch.stack(norms).sort().values
    return found


def main(arguments: Sequence[str]) -> int:
    """Prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(prog="mend bench training", description=__doc__)
    parser.add_argument("--which", choices=STARTERS, default="moce-ir", help="which starter (moce-ir)")
    parser.add_argument("--photos", type=Path, help="folder of photographs; without, no gradients are measured")
    parser.add_argument("--size", type=int, default=128, help="side of the crops (128)")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--count", type=int, default=16, help="crops a kind of damage (16)")
    parser.add_argument("--out", type=Path, help="also write the tables here (.md)")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = STARTERS[parsed.which]
    module = read_export(SHIPPED / recipe.file)
    lines = [
        "# A step of training",
        "",
        f"`{recipe.file}`, loss and gradients of one crop of {parsed.size} pixels, products in bfloat16.",
        "",
        machine.command("training", "--which", parsed.which, "--photos PHOTOS/train"),
        "",
        "| layers | first step | later ones |",
        "|---|---|---|",
    ]
    for name, (first, later) in times(recipe, module, parsed.size, parsed.repeats).items():
        lines.append(f"| {name} | {first:.1f} s | {later:.3f} s |")
    if parsed.photos:
        lines += ["", f"Length of the gradient, {parsed.count} crops a kind:", ""]
        lines += ["| damage | share of the crops | median | largest |", "|---|---|---|---|"]
        total, crops = sum(task.weight for task in recipe.tasks), PhotoCrops(load_photos(parsed.photos))
        found = lengths(recipe, module, crops, parsed.size, parsed.count)
        for task in recipe.tasks:
            norms = found[task.name]
            lines.append(f"| {task.name} | {task.weight / total:.0%} | {norms.median():.2f} | {norms[-1]:.1f} |")
    report.publish(lines, parsed.out)
    return 0
