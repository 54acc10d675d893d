"""Two implementations of one network, turn by turn in one process: time, memory, and how far their results differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..engine.meter import PeakMemory

HEADER = "| network | implementation | processor s, best (median) | wall s, best (median) | peak of tensors MB |\n|---|---|---|---|---|"


@dataclass
class Measured:
    """One implementation's result, bytes of tensors at the peak, and seconds of every round."""

    output: torch.Tensor
    peak: int
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


@torch.inference_mode()
def measure(calls: Mapping[str, Callable[[], torch.Tensor]], repeat: int) -> dict[str, Measured]:
    """Every call once, to warm up and for its memory, then `repeat` rounds of all in turn.

    Processor time is the figure to compare on a machine that others use too; peaks count tensors made meanwhile.
    """
    measured = {}
    for name, call in calls.items():
        with PeakMemory() as peak:
            output = call()
        measured[name] = Measured(output, peak.bytes)
    for _ in range(repeat):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            measured[name].wall.append(time.perf_counter() - start[0])
            measured[name].processor.append(time.process_time() - start[1])
    return measured


def compare(network: str, calls: Mapping[str, Callable[[], torch.Tensor]], repeat: int) -> tuple[list[str], float]:
    """Markdown rows, one a call, and the largest difference between the first result and the others."""
    measured = measure(calls, repeat)
    rows = []
    for name, one in measured.items():
        figures = [f"{min(t):.2f} ({statistics.median(t):.2f})" for t in (one.processor, one.wall)]
        rows.append(f"| {network} | {name} | {' | '.join(figures)} | {one.peak / 1e6:.0f} |")
    first, *others = (one.output for one in measured.values())
    return rows, max((float((o - first).abs().max()) for o in others), default=0.0)
