"""ACL: the linear-attention core, MILA's block, and the re-designed network."""

from __future__ import annotations

import re

from support import tapped

from comfyui_mend.kernels.linear_attention import (
    ROTARY_BASE,
    feature_map,
    key_value_state,
    linear_attention,
    rotary_angles,
    rotate,
)

INSIDE_ATTENTION = ("qk", "lepe")
CONVOLUTIONS = ("cpe1", "cpe2", "dwc", "lepe")  # recorded as [B, C, H, W], all else as tokens


def run(case):
    if "xq" in case.inputs:
        return _core(case)
    if "input_resolution" in case.config:
        return _block(case)
    return _network(case)


def _core(case):
    config, (query, key, value) = case.config, (case.inputs[k] for k in ("xq", "xk", "v"))
    height, width, heads = config["H"], config["W"], config["heads"]
    arguments, base = (heads, height, width), config.get("rope_base", ROTARY_BASE)
    angles = rotary_angles(height, width, config["C"], base=base)
    return {
        "out_rope": linear_attention(query, key, value, *arguments, eps=config["eps"], base=base),
        "out_plain": linear_attention(query, key, value, *arguments, rotary=False, eps=config["eps"]),
        "q_feature": feature_map(query),
        "q_rotated": rotate(feature_map(query), angles),
        "angles": angles,
        "kv_rope": key_value_state(key, value, *arguments, base=base),
    }


def _block(case):
    module, x = case.module(), case.inputs["x"]
    height, width = case.config["input_resolution"]
    names = [n.removeprefix("mid_") for n in case.outputs if n.startswith("mid_")]
    taps = {n: module.get_submodule(f"attn.{n}" if n in INSIDE_ATTENTION else n) for n in names}
    out, kept = tapped(taps, lambda: module(x.unflatten(1, (height, width))))
    maps = {f"mid_{n}": v.permute(0, 3, 1, 2) if n in CONVOLUTIONS else v.flatten(1, 2) for n, v in kept.items()}
    return {"out": out.flatten(1, 2), **maps, "rotations": module.attn.rope.rotations}


def _network(case):
    module = case.module()
    taps = {name: _stage(module, name) for name in case.outputs if name.startswith("mid_")}
    out, kept = tapped(taps, lambda: module(case.inputs["x"]))
    return {"out": out} | {n: v.permute(0, 3, 1, 2) for n, v in kept.items()}


def _stage(module, name):
    """mid_first_attn, mid_first_lem: of the first block; mid_e0, mid_d1: an encoder or decoder level."""
    stage = re.fullmatch(r"mid_([ed])(\d)", name)
    if stage:
        return (module.encoder if stage[1] == "e" else module.decoder)[int(stage[2])]
    return module.encoder[0][0].get_submodule(name.removeprefix("mid_first_"))
