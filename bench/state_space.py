"""`mend bench scan`: state-space networks end to end on the CPU, each scan backend in turn.

Processor time on one thread: what an idle machine would take, also where this one is shared. Random weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import kernels
from . import machine, report
from .restorer import networks


def seconds(restorer: object, image: torch.Tensor, backend: str, repeat: int) -> tuple[float, float]:
    """Least processor time of the whole network, and the share of it spent in state-space operators."""
    best, share = float("inf"), 0.0
    for _ in range(repeat):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            begin = time.process_time()
            restorer(image, scan_backend=backend)
            spent = time.process_time() - begin
        if spent < best:
            events = profile.key_averages()
            scans = sum(e.cpu_time_total for e in events if e.key.startswith("mend::"))
            best, share = spent, scans / sum(e.self_cpu_time_total for e in events)
    return best, share


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table, and writes it where asked."""
    parser = argparse.ArgumentParser(prog="mend bench scan", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["mair", "mambairv2"], help="ids of networks")
    parser.add_argument("--variant", nargs="*", default=["T-x2", "S-x2", "light-x2"], help="names of settings")
    parser.add_argument("--size", type=int, default=256, help="side of the test picture (256)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--backend", nargs="*", help="backends; otherwise all fast ones that run here")
    parser.add_argument("--out", type=Path, help="also write the table here (.md)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = [s.name for s in kernels.backends("cpu") if s.available and s.name != "reference"]
    lines = [
        "# State-space networks end to end, CPU",
        "",
        machine.command("scan", *arguments),
        "",
        f"One picture of {args.size} x {args.size}, float32, random weights; processor time of the fastest of {args.repeat} "
        "runs after a warm-up of 64 x 64, and the share of it in the state-space operators (by the profiler, on the clock).",
        "",
        "| network | backend | s | scans |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines))
    image = torch.rand(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for name, restorer in networks(None, args.only, args.variant):
            for backend in args.backend or found:
                restorer(image[..., :64, :64], scan_backend=backend)  # compiles
                spent, share = seconds(restorer, image, backend, args.repeat)
                lines.append(f"| {name} | {backend} | {spent:.1f} | {100 * share:.0f} % |")
                print(lines[-1], flush=True)
    report.write(lines, args.out)
    return 0
