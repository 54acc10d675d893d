"""ACL: the linear-attention core, MILA's block, and the re-designed network."""

from __future__ import annotations

import re

from support import tapped

from comfyui_mend.kernels.linear_attention import feature_map, key_value_state, linear_attention, rotary_angles, rotate


def run(case):
    if "xq" in case.inputs:
        return _core(case)
    if "input_resolution" in case.config:
        return _block(case)
    return _network(case)


def _core(case):
    config, (query, key, value) = case.config, (case.inputs[k] for k in ("xq", "xk", "v"))
    height, width, heads = config["H"], config["W"], config["heads"]
    arguments = (heads, height, width)
    angles = rotary_angles(height, width, config["C"], base=config["rope_base"])
    return {
        "out_rope": linear_attention(query, key, value, *arguments, eps=config["eps"]),
        "out_plain": linear_attention(query, key, value, *arguments, rotary=False, eps=config["eps"]),
        "q_feature": feature_map(query),
        "q_rotated": rotate(feature_map(query), angles),
        "angles": angles,
        "kv_rope": key_value_state(key, value, *arguments),
    }


def _block(case):
    module, x = case.module(), case.inputs["x"]
    height, width = case.config["input_resolution"]
    names = {"cpe1": "cpe1", "qk": "attn.qk", "attn": "attn", "out_proj": "out_proj", "mlp": "mlp"}
    taps = {f"mid_{n}": module.get_submodule(path) for n, path in names.items()}
    out, kept = tapped(taps, lambda: module(x.unflatten(1, (height, width))))
    outputs = {n: v.permute(0, 3, 1, 2) if n == "mid_cpe1" else v.flatten(1, 2) for n, v in kept.items()}
    return {"out": out.flatten(1, 2), **outputs, "rotations": module.attn.rope.rotations}


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
