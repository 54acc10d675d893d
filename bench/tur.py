"""TransWeather, Uformer, AirNet and ACL at one size; the first two against other implementations turn by turn.

    python -m comfyui_mend.bench.tur [--size 256] [--transweather PATH/TO/transweather_model.py]

The file is the published repository's (jeya-maria-jose/TransWeather) with base_networks.py beside it; it is not part of
this project. Uformer is compared with spandrel's, where that is installed. AirNet's published code needs a compiled
deformable convolution (mmcv) and is not run; of ACL there is none to run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .. import models
from . import machine
from .compare import HEADER, compare
from .reference import published


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--transweather", type=Path)
    parser.add_argument("--only", nargs="*", default=("transweather", "uformer", "airnet", "acl"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    image = torch.rand(1, 3, args.size, args.size)
    print(f"{machine.describe(torch.device('cpu'))}; {args.size}x{args.size}, float32, batch 1\n\n{HEADER}", flush=True)
    notes = []
    for name, variant in {
        "transweather": "original",
        "uformer": "B",
        "airnet": "original",
        "acl": "S",
    }.items():
        if name not in args.only:
            continue
        architecture = models.registry.get(name)
        ours = models.create(architecture.system, architecture.variants[variant]).eval().requires_grad_(False)
        calls: dict[str, Callable[[], torch.Tensor]] = {"this project": lambda ours=ours: ours(image)}
        other, title = _other(name, args.transweather, architecture.variants[variant])
        if other is not None:
            other.eval().requires_grad_(False)
            other.load_state_dict(ours.state_dict())
            calls = {title: lambda other=other: other(image), **calls}
        rows, difference = compare(f"{architecture.title} {variant}", calls, args.repeat)
        print("\n".join(rows), flush=True)
        if other is not None:
            notes.append(f"{architecture.title}: largest difference of the two outputs {difference:.1e}")
    print("\n" + "\n".join(notes))
    return 0


def _other(name: str, transweather: Path | None, config: dict) -> tuple[nn.Module | None, str]:
    if name == "transweather" and transweather is not None:
        return published(transweather.parent, transweather.stem).Transweather(), "published"
    if name == "uformer":
        try:
            from spandrel.architectures.Uformer import Uformer
        except (ImportError, RuntimeError):
            return None, ""
        kept = ("img_size", "embed_dim", "win_size", "mlp_ratio", "num_heads", "depths", "modulator")
        return Uformer(**{key: config[key] for key in kept if key in config}), "spandrel"
    return None, ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
