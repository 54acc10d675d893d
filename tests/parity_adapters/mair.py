"""MaIR: whole networks, the scan's index tables, and the official tile-and-merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from comfyui_mend.engine.official_tiling import official_tiles
from comfyui_mend.models.mair import nested_s_orders


def run(case):
    if "state_dict" in case.json and case.json["state_dict"]:
        return {"y": case.module()(case.inputs["x"])}
    return _tiling(case) if case.inputs else _tables(case)


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
