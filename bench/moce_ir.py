"""MoCE-IR against the published implementation on the same machine, in one process, turn by turn.

    python -m comfyui_mend.bench.moce_ir PATH/TO/src/net/moce_ir.py [--size 256] [--variant S]

The file is the published repository's (eduardzamfir/MoCE-IR); it is not part of this project. Both networks get the same
weights and picture; routing noise is zero.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from .. import models
from ..engine.meter import PeakMemory
from . import machine


def published(path: Path, config: dict) -> torch.nn.Module:
    """The published network. fvcore, which its file imports for counting operations, is replaced by nothing."""
    stub = types.ModuleType("fvcore.nn")
    stub.FlopCountAnalysis = stub.flop_count_table = None
    spec = importlib.util.spec_from_file_location("published_moce_ir", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"fvcore": types.ModuleType("fvcore"), "fvcore.nn": stub}):
        spec.loader.exec_module(module)
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    return module.MoCEIR(**settings, levels=4, with_complexity=True, depth_type="constant", stage_depth=[1, 1, 1])


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("published", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--variant", default="S", choices=("S", "base"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = dict(models.registry.get("moce-ir").variants[args.variant])
    theirs, ours = published(args.published, config).eval(), models.create("moce-ir", config).eval()
    missing = ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    image = torch.rand(1, 3, args.size, args.size)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "published": lambda: theirs(image),
        "this project": lambda: ours(image),
    }
    wall: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    outputs, peaks = {}, {}
    # The published evaluation draws routing noise; without it both take the same experts.
    with torch.inference_mode(), mock.patch.object(torch, "randn_like", torch.zeros_like):
        for name, call in calls.items():
            with PeakMemory() as peak:
                outputs[name] = call()
            peaks[name] = peak.bytes
        for _ in range(args.repeat):
            for name, call in calls.items():
                start = time.perf_counter(), time.process_time()
                call()
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    difference = (outputs["published"] - outputs["this project"]).abs().max().item()
    print(
        f"{machine.describe(torch.device('cpu'))}; MoCE-IR {args.variant}, {args.size}x{args.size}, float32, batch 1\n"
    )
    print("| implementation | processor s, best (median) | wall s, best (median) | peak of tensors MB |")
    print("|---|---|---|---|")
    for name in calls:
        figures = [f"{min(t):.2f} ({statistics.median(t):.2f})" for t in (processor[name], wall[name])]
        print(f"| {name} | {' | '.join(figures)} | {peaks[name] / 1e6:.0f} |")
    print(f"\nlargest difference of the two outputs: {difference:.1e}; keys not in the published state dict: {missing}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
