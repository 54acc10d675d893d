"""Writes tiny untrained checkpoints, so that workflows of methods without starter weights can be opened and run.

    python tests/make_wiring.py [NAME ...]

They show the wiring, not the quality: weights are random (seeded), the last layer is scaled so that the picture stays
recognisable, or solved on the example pictures themselves, so that there is something to see.
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
from PIL import Image
from safetensors.torch import save_file

from comfyui_mend import models
from comfyui_mend.engine.pictures import from_pil

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS, EXAMPLES = ROOT / "weights", ROOT / "workflows" / "inputs"
SOLVED = (
    "none but the last layers, which were solved on the example pictures: this shows the wiring and not the quality"
)
CHANGE = 0.03
"""Standard deviation of what a network changes in a picture."""


@dataclass(frozen=True)
class Wiring:
    """One file: the network it holds and what else lies beside it."""

    system: str
    config: Mapping[str, Any]
    architecture: str
    output: str
    """Name of the last convolution, whose weights are scaled; "" leaves them as they are."""
    prefix: str = ""
    beside: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None
    """Further networks by prefix: (system, config)."""
    adjust: Callable[[torch.nn.Module], None] = lambda module: None
    """Changes the random weights before the last layer is scaled."""
    training: str = "none: random weights, this file shows the wiring and not the quality"
    """What its metadata say about how it came about."""
    awake: str | tuple[str, ...] = ()
    """Parameters whose names end so start at zero, which would leave their layers without effect; drawn instead."""


def solve_mpmf(network: torch.nn.Module) -> None:
    """Solves the last layer of MPMF-Net's coarse branch, then its very last one."""
    weight, bias = least_squares(
        [_before_the_coarse_image(network, damaged) for damaged, _ in examples()],
        [clean[:, :, ::4, ::4] for _, clean in examples()],
    )
    last = network.inr.imnet.layers[-1]
    last.weight.copy_(weight)
    last.bias.copy_(bias)
    solve_output("patch_unembed.proj.0", "reflect")(network)


def solve_output(name: str, padding: str = "constant") -> Callable[[torch.nn.Module], None]:
    """Solves a last 3x3 convolution for the change from damaged to clean example pictures, in every pass of it."""

    def solve(network: torch.nn.Module) -> None:
        output, seen, wanted = network.get_submodule(name), [], []
        hook = output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for damaged, clean in examples():
            network(damaged)
            wanted += [clean - damaged] * (len(seen) - len(wanted))
        hook.remove()
        pads = (torch.nn.functional.pad(features, [1] * 4, mode=padding) for features in seen)
        weight, bias = least_squares([torch.nn.functional.unfold(p, 3) for p in pads], wanted)
        output.weight.copy_(weight.view_as(output.weight))
        if output.bias is not None:
            output.bias.copy_(bias)

    return solve


def examples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Damaged and clean example pictures [1, 3, H, W], at half size, cropped to multiples of 8."""
    pairs = []
    for name in ("mountains_haze", "palace_snow", "red_panda_rain", "night_dark"):
        both = (from_pil(Image.open(EXAMPLES / f"{n}.jpg").reduce(2))[None] for n in (name, name.rsplit("_", 1)[0]))
        pairs.append(tuple(p[..., : p.shape[-2] // 8 * 8, : p.shape[-1] // 8 * 8] for p in both))
    return pairs


def least_squares(features: list[torch.Tensor], wanted: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias that turn [1, N, pixels] into [1, 3, H, W] best, over all pictures."""
    x = torch.cat([f[0].T for f in features]).double()
    y = torch.cat([w[0].flatten(1).T for w in wanted]).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    ridge = 1e-4 * torch.eye(x.shape[1], dtype=torch.double)
    solution = torch.linalg.solve(x.T @ x / len(x) + ridge, x.T @ y / len(x)).float()
    return solution[:-1].T, solution[-1]


def _before_the_coarse_image(network: torch.nn.Module, damaged: torch.Tensor) -> torch.Tensor:
    """What the last layer of the coarse branch sees, [1, N, pixels]."""
    *hidden, _ = network.inr.imnet.layers
    seen: list[torch.Tensor] = []
    hook = network.inr.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.coarse(damaged)
    hook.remove()
    x, first = torch.nn.functional.unfold(seen[0], 3, padding=1).mT, hidden[0]
    x = x @ first.weight[:, : x.shape[2]].T + first.bias + 2 * first.weight[:, -2:].sum(dim=1)
    for layer in hidden[1:]:
        x = layer(x)
    return x.mT


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
        "",
        adjust=solve_output("output"),
        training=SOLVED,
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
        "",
        adjust=solve_mpmf,
        training=SOLVED,
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
        "",
        adjust=solve_output("net.output"),
        training=SOLVED,
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
    if wiring.output:
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
        "mend.training": wiring.training,
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
