"""Two implementations of one network, turn by turn in one process: time, memory, and how far their results differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from ..engine.meter import PeakMemory

HEADER = "| network | implementation | processor s, best (median) | wall s, best (median) | peak of tensors MB |\n|---|---|---|---|---|"


def compare(network: str, calls: Mapping[str, Callable[[], torch.Tensor]], repeat: int) -> tuple[list[str], float]:
    """Markdown rows, one a call, and the largest difference between the first result and the others.

    Processor time is the figure to compare on a machine that others use too; peaks count tensors made meanwhile.
    """
    outputs, peaks = [], {}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for name, call in calls.items():
            with PeakMemory() as peak:
                outputs.append(call())
            peaks[name] = peak.bytes
        for _ in range(repeat):
            for name, call in calls.items():
                start = time.perf_counter(), time.process_time()
                call()
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    rows = []
    for name in calls:
        figures = [f"{min(t):.2f} ({statistics.median(t):.2f})" for t in (processor[name], wall[name])]
        rows.append(f"| {network} | {name} | {' | '.join(figures)} | {peaks[name] / 1e6:.0f} |")
    return rows, max((float((o - outputs[0]).abs().max()) for o in outputs[1:]), default=0.0)
