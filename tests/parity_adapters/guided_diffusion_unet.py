"""The pixel-space U-Net: raw outputs, taps, and the EDM and consistency parametrisations."""

from __future__ import annotations

from comfyui_mend.guidance import parametrisation


def run(case):
    module, inputs = case.module(), case.inputs
    if case.config.get("convert_to_fp16"):
        module.half_torso()
    y = inputs["y"].long() if "y" in inputs else None
    taps: dict = {}
    hooks = [
        module.get_submodule(name).register_forward_hook(lambda _m, _i, out, n=name: taps.setdefault(f"tap.{n}", out))
        for name in case.json.get("taps", [])
    ]
    if "sigma" in inputs:
        sigma, x = inputs["sigma"].float(), inputs["x"]
        output = module(x * parametrisation.edm_c_in(sigma), parametrisation.edm_time(sigma), y)
        outputs = {
            "F": output,
            "denoised_edm": parametrisation.edm_denoised(x, sigma, output),
            "denoised_consistency": parametrisation.consistency_denoised(x, sigma, output),
        }
    else:
        outputs = {"out": module(inputs["x"], inputs["t"].float(), y)}
    for hook in hooks:
        hook.remove()
    return outputs | taps
