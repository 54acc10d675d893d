"""MambaIRv2: with the case's Gumbel draws, and routed by argmax."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from parity_adapters.mair import with_taps

from comfyui_mend.models.mambairv2 import WindowAttention, perturbed


def check_layout(case):
    return case.check_layout(**case.generation)


def run(case):
    module, x = case.module(**case.generation), case.inputs["x"]
    names = sorted((n for n in case.inputs if n.startswith("gumbel_u.")), key=_position)
    routes: list[torch.Tensor] = []
    choose = perturbed([_gumbel(case.inputs[n]) for n in names])
    outputs = with_taps(case, module, lambda: {"y": module(x, choose=choose, classes=routes)}, _windows)
    outputs |= {n.replace("gumbel_u", "route"): route.float() for n, route in zip(names, routes, strict=True)}
    return outputs | {"y_argmax": module(x)}


def _windows(part: torch.nn.Module, value: torch.Tensor) -> torch.Tensor | None:
    """What window attention gives is recorded window by window, still shifted."""
    if not isinstance(part, WindowAttention):
        return None
    size = part.window
    return rearrange(
        value.roll((-part.shift, -part.shift), dims=(1, 2)), "b (h p) (w q) c -> (b h w) (p q) c", p=size, q=size
    )


def _position(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".")[1:])


def _gumbel(uniform: torch.Tensor) -> torch.Tensor:
    u = np.clip(uniform.numpy().astype(np.float64), 2.0**-25, 1 - 2.0**-25)
    return torch.from_numpy((-np.log(-np.log(u))).astype(np.float32))
