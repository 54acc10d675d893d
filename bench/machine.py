"""What a figure was measured on, in words: every result names it. And the memory of this process."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

import torch

CPU = torch.device("cpu")


def command(*words: str, device: torch.device = CPU) -> str:
    """How a result was made, `mend bench` followed by these words, and on what."""
    return f"`mend bench {' '.join(words)}`; {describe(device)}"


def describe(device: torch.device = CPU) -> str:
    """Device, torch version, threads and date on one line."""
    if device.type == "cpu":
        what = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    else:
        what = torch.get_device_module(device).get_device_name(device)
    return f"{what}; torch {torch.__version__}; {platform.system()}; {datetime.date.today().isoformat()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def resident() -> int:
    """Bytes of memory that this process holds; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
