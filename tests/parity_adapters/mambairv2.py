"""MambaIRv2: with the case's Gumbel draws, and routed by argmax."""

from __future__ import annotations

import numpy as np
import torch

from comfyui_mend.models.mambairv2 import perturbed


def run(case):
    module, x = case.module(arch=case.json["arch"]), case.inputs["x"]
    names = sorted((n for n in case.inputs if n.startswith("gumbel_u.")), key=_position)
    routes: list[torch.Tensor] = []
    outputs = {"y": module(x, choose=perturbed([_gumbel(case.inputs[n]) for n in names]), classes=routes)}
    outputs |= {n.replace("gumbel_u", "route"): route.float() for n, route in zip(names, routes, strict=True)}
    return outputs | {"y_argmax": module(x)}


def _position(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".")[1:])


def _gumbel(uniform: torch.Tensor) -> torch.Tensor:
    u = np.clip(uniform.numpy().astype(np.float64), 2.0**-25, 1 - 2.0**-25)
    return torch.from_numpy((-np.log(-np.log(u))).astype(np.float32))
