"""MaIR: whole networks, the scan's index tables, and the official tile-and-merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support import tapped

from comfyui_mend.engine.official_tiling import official_tiles
from comfyui_mend.models.layers.restormer import Downsample, OverlapPatchEmbed, Upsample
from comfyui_mend.models.layers.state_space import GatedStateSpace2d
from comfyui_mend.models.mair import nested_s_orders


def run(case):
    if "state_dict" in case.json and case.json["state_dict"]:
        module, x = case.module(), case.inputs["x"]
        return with_taps(case, module, lambda: {"y": module(x)})
    return _tiling(case) if case.inputs else _tables(case)


def with_taps(case, module, call, layout=lambda part, value: None):
    """The outputs of `call`, and what the modules gave that the case's outputs `tap.<module>` name, as recorded.

    layout(part, value): another layout of what a module gave; None: the usual one.
    """
    parts = {name: _part(module, name.removeprefix("tap.")) for name in case.outputs if name.startswith("tap.")}
    outputs, kept = tapped(parts, call)
    for name, value in kept.items():
        own = layout(parts[name], value)
        outputs[name] = _as_recorded(parts[name], value) if own is None else own
    return outputs


def _part(module, name):
    part = module.get_submodule(name)
    return part["norm"] if isinstance(part, torch.nn.ModuleDict) else part  # the flat networks' patch embedding


def _as_recorded(part, value):
    """Maps are tokens [B, H W, C] in the reference, but for convolutions [B, C, H, W] and state-space layers."""
    if isinstance(part, (torch.nn.Conv2d, torch.nn.Sequential, GatedStateSpace2d)):
        return value
    if isinstance(part, (OverlapPatchEmbed, Downsample, Upsample)):
        return value.flatten(2).transpose(1, 2)
    return value.flatten(1, 2)


def _tables(case):
    outputs = {}
    for item in case.config["cases"]:
        size = item["h"], item["w"], item["scan_len"], item["shift"]
        scan = nested_s_orders(*size, device=torch.device("cpu")).long()
        name = "h{}_w{}_len{}_shift{}".format(*size)
        outputs |= {f"{name}.scan": scan.float(), f"{name}.inverse": scan.argsort(dim=1).float()}
    return outputs


def _tiling(case):
    """The case's toy network: nearest enlargement plus half the mean over the tile."""
    outputs = {}
    for item in case.config["cases"]:
        scale, sizes = item["scale"], []

        def toy(x, scale=scale, sizes=sizes):
            sizes.append(list(x.shape[-2:]))
            return F.interpolate(x, scale_factor=scale, mode="nearest") + 0.5 * x.mean(dim=(2, 3), keepdim=True)

        outputs[f"y.{item['input']}"] = official_tiles(case.inputs[item["input"]], toy, scale)
        assert sizes == item["tile_sizes"], (sizes, item["tile_sizes"])
    return outputs
