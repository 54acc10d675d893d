"""Two implementations of one network, turn by turn in one process: results, time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..engine.meter import PeakMemory


@dataclass
class Measured:
    """One implementation's result, bytes of tensors at the peak, and processor seconds of every round."""

    output: torch.Tensor
    peak: int
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
            start = time.process_time()
            call()
            measured[name].processor.append(time.process_time() - start)
    return measured
