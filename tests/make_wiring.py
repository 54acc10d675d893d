"""Writes tiny untrained checkpoints, so that workflows of methods without starter weights can be opened and run.

    python tests/make_wiring.py [NAME ...]

They show the wiring, not the quality: weights are random (seeded), the last layer is scaled so that the picture stays
recognisable. Files: weights/wiring-<name>.safetensors, half precision, saying in their metadata that they are untrained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from comfyui_mend import models

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
CHANGE = 0.03
"""Standard deviation of what a network changes in a picture."""


@dataclass(frozen=True)
class Wiring:
    """One file: the network it holds and what else lies beside it."""

    system: str
    config: Mapping[str, Any]
    architecture: str
    output: str
    """Name of the last convolution, whose weights are scaled."""
    prefix: str = ""
    beside: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None
    """Further networks by prefix: (system, config)."""
    call: Callable[[torch.nn.Module, torch.Tensor], Any] = lambda module, image: module(image)


FILES = {
    "da-rcot": Wiring(
        "da-rcot",
        {"dim": 4, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 4, 8)},
        "da-rcot",
        "output",
        prefix="Tnet.",
        beside={"Fnet.": ("da-rcot", {"kind": "potential", "patch_size": 64, "width": 4})},
    ),
    "mpmf-net": Wiring(
        "mpmf-net",
        {
            "embed_dims": (6, 12, 24, 12, 6),
            "depths": (1, 1, 2, 2, 2, 1),
            "num_heads": (1, 2, 2, 1, 1),
            "attn_ratio": (1.0, 1.0, 1.0, 0.0, 0.0),
        },
        "mpmf-net",
        "patch_unembed.proj.0",
    ),
    "vlu-net": Wiring(
        "vlu-net",
        {
            "kind": "pipeline",
            "net": {
                "de_dim": 2,
                "dim": 10,
                "num_blocks": (1, 1, 1, 1),
                "num_refinement_blocks": 1,
                "heads": (1, 2, 4, 4),
                "embed_dim": 16,
            },
            "clip": {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1},
            },
        },
        "vlu-net-clip",
        "net.output",
    ),
}


def picture() -> torch.Tensor:
    """A smooth colourful picture [1, 3, 64, 64]."""
    y, x = torch.meshgrid(torch.linspace(0, 6, 64), torch.linspace(0, 6, 64), indexing="ij")
    return torch.stack([x.sin() * y.cos(), (x + y).sin(), (x - y).cos()])[None] * 0.4 + 0.5


def make(name: str) -> Path:
    """Writes one file and returns its path."""
    wiring = FILES[name]
    torch.manual_seed(0)
    module = models.create(wiring.system, wiring.config).eval().requires_grad_(False)
    image = picture()
    result = wiring.call(module, image)
    changed = (result[0] if isinstance(result, tuple) else result) - image
    for parameter in module.get_submodule(wiring.output).parameters():
        parameter.mul_(CHANGE / changed.std())
    state = {wiring.prefix + key: value for key, value in module.state_dict().items()}
    for prefix, (system, config) in (wiring.beside or {}).items():
        state |= {prefix + key: value for key, value in models.create(system, config).state_dict().items()}
    # Shared tensors are stored once: the loader lists them wherever they belong.
    seen: set[int] = set()
    state = {k: v for k, v in state.items() if v.data_ptr() not in seen and not seen.add(v.data_ptr())}
    tensors = {key: value.detach().half().contiguous() for key, value in state.items()}
    metadata = {
        "mend.architecture": wiring.architecture,
        "mend.config": json.dumps(wiring.config),
        "mend.training": "none: random weights, this file shows the wiring and not the quality",
        "mend.licence": "CC0",
    }
    path = WEIGHTS / f"wiring-{name}.safetensors"
    save_file(tensors, str(path), metadata)
    loaded = models.load(path)
    if loaded.architecture.id != wiring.architecture:
        raise ValueError(f"{name} was recognised as {loaded.architecture.id}")
    return path


if __name__ == "__main__":
    for chosen in sys.argv[1:] or FILES:
        written = make(chosen)
        print(f"{written.name}: {written.stat().st_size:,} bytes")
