"""Writes tiny untrained checkpoints, so that workflows of methods without starter weights can be opened and run.

    python tests/make_wiring.py [NAME ...]

They show the wiring, not the quality: weights are random (seeded), the last layer is scaled so that the picture stays
recognisable, and MPMF-Net's coarse branch is solved for returning its input, so that there is something to see.
Files: weights/wiring-<name>.safetensors, half precision, saying in their metadata that they are untrained.
"""

from __future__ import annotations

import json
import re
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
    adjust: Callable[[torch.nn.Module], None] = lambda module: None
    """Changes the random weights before the last layer is scaled."""
    awake: str | tuple[str, ...] = ()
    """Parameters whose names end so start at zero, which would leave their layers without effect; drawn instead."""


def return_the_input(network: torch.nn.Module) -> None:
    """Solves the last layer of MPMF-Net's coarse branch so that its output is close to its input."""
    grain = [torch.rand(8, 3, side, side) * torch.rand(8, 3, 1, 1) for side in (2, 4, 8, 16, 32, 64)]
    pictures = torch.cat([torch.nn.functional.interpolate(g, (64, 64), mode="bilinear") for g in grain])
    *hidden, last = network.inr.imnet.layers
    seen = {}
    hook = network.inr.register_forward_pre_hook(lambda module, inputs: seen.update(features=inputs[0]))
    network.coarse(pictures)
    hook.remove()
    x = torch.nn.functional.unfold(seen["features"], 3, padding=1).transpose(1, 2).flatten(0, 1)
    first = hidden[0]
    x = x @ first.weight[:, : x.shape[1]].T + first.bias + 2 * first.weight[:, -2:].sum(dim=1)
    for layer in hidden[1:]:
        x = layer(x)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).double()
    wanted = pictures[:, :, ::4, ::4].flatten(2).transpose(1, 2).flatten(0, 1).double()
    ridge = 1e-4 * torch.eye(x.shape[1], dtype=torch.double)
    solution = torch.linalg.solve(x.T @ x / len(x) + ridge, x.T @ wanted / len(x)).float()
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])


def enlarge_bilinearly(network: torch.nn.Module) -> None:
    """Lets the skip path of a light x2 network carry the picture and its head enlarge it bilinearly."""
    first, head = network.conv_first, network.upsample[0]
    for convolution in (first, head):
        convolution.bias.zero_()
    first.weight[:3] = 0
    head.weight.zero_()
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1
        for row in range(2):
            for column in range(2):
                rows, columns = torch.tensor([0.25, 0.75, 0.0]), torch.tensor([0.25, 0.75, 0.0])
                kernel = torch.outer(rows.flip(0) if row else rows, columns.flip(0) if column else columns)
                head.weight[channel * 4 + row * 2 + column, channel] = kernel


def pass_the_picture_on(network: torch.nn.Module) -> None:
    """Lets the first three features of AirNet carry the picture from head to tail, past everything between."""
    head, tail = network.R.head[0], network.R.tail[0]
    for convolution in (head, tail):
        convolution.bias.zero_()
    head.weight[:3] = 0
    tail.weight.zero_()
    for channel in range(3):
        head.weight[channel, channel, 1, 1] = tail.weight[channel, channel, 1, 1] = 1
    # Untrained uncertainty is nearly the same everywhere; louder, there is something to see.
    network.R.var_conv[4].weight.mul_(30)
    network.R.var_conv[4].bias.fill_(-2)


FILES = {
    "acl": Wiring("acl", {"channels": 16, "blocks": (1, 1, 1), "head_dim": 16}, "acl", "out"),
    "airnet": Wiring(
        "tur",
        {"n_groups": 1, "n_blocks": 2, "n_feats": 16, "if_uncertainty": True, "contrastive": False},
        "airnet",
        "R.body.1",
        adjust=pass_the_picture_on,
    ),
    "mambairv2": Wiring(
        "mambairv2",
        {
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 2),
            "d_state": 4,
            "mlp_ratio": 1.0,
            "inner_rank": 8,
            "num_tokens": 16,
            "window_size": 8,
            "light": True,
            "upsampler": "pixelshuffledirect",
            "upscale": 2,
        },
        "mambairv2",
        "conv_after_body",
        adjust=enlarge_bilinearly,
        awake=("embeddingA.weight", "embeddingB.weight", "route.0.weight", "route.2.weight"),
    ),
    "mair": Wiring(
        "mair",
        {
            "embed_dim": 16,
            "depths": (2, 2),
            "d_state": 1,
            "ssm_ratio": 1.1,
            "mlp_ratio": 1.6,
            "scan_len": 8,
            "upsampler": "pixelshuffledirect",
            "upscale": 2,
        },
        "mair",
        "conv_after_body",
        adjust=enlarge_bilinearly,
        awake=("in_proj.weight", "x_proj_weight", "out_proj.weight", "gating.1.weight"),
    ),
    "nafnet": Wiring(
        "nafnet",
        {"width": 8, "enc_blk_nums": (1, 1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1, 1)},
        "nafnet",
        "ending",
        awake="beta",
    ),
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
        adjust=return_the_input,
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
    return torch.stack([x.sin() * y.cos(), (x + y).sin(), (x - y).cos()])[None] * 0.45 + 0.5


def make(name: str) -> Path:
    """Writes one file and returns its path."""
    wiring = FILES[name]
    torch.manual_seed(0)
    module = models.create(wiring.system, wiring.config).eval().requires_grad_(False)
    if wiring.awake:
        for key, parameter in module.named_parameters():
            if key.endswith(wiring.awake):
                parameter.normal_()
    wiring.adjust(module)
    image = picture()
    result = module(image)
    result = result[0] if isinstance(result, tuple) else result
    changed = result - torch.nn.functional.interpolate(image, result.shape[-2:], mode="bilinear")
    for parameter in module.get_submodule(wiring.output).parameters():
        parameter.mul_(CHANGE / changed.std())
    computed = models.registry.get(wiring.architecture).computed_buffers
    state = {
        wiring.prefix + key: value
        for key, value in module.state_dict().items()
        if not any(re.search(pattern, key) for pattern in computed)
    }
    for prefix, (system, config) in (wiring.beside or {}).items():
        network = models.create(system, config)
        for part in network.modules():
            if isinstance(part, torch.nn.Conv2d):  # louder than a critic starts its training, or scores are all equal
                torch.nn.init.kaiming_normal_(part.weight, a=0.2)
        state |= {prefix + key: value for key, value in network.state_dict().items()}
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
