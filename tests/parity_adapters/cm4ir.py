"""CM4IR: whole trajectories on a small consistency network, every draw given."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from parity_adapters import measurement_operators as degradations

from comfyui_mend.guidance import cm4ir, parametrisation, priors, schedules


def run(case):
    config, inputs = case.config, case.inputs
    module = case.module()
    inputs |= {n: (inputs[n] >= s["threshold"]).float() for n, s in case.json["inputs"].items() if "threshold" in s}
    prior = priors.consistency_prior(module, inputs.get("classes"))
    x_true, sigma_y, zeta = inputs["image"], config["sigma_y"], config["zeta"]
    stand_in = SimpleNamespace(
        config={**config, "operator": config["degradation"]}, inputs={**inputs, "y": inputs["noise_y"]}
    )
    operator = degradations._operator(stand_in)
    y = operator.A(x_true) + 2 * sigma_y * degradations._measurement(stand_in, operator, x_true)
    schedule = (config["steps"], config["iN"], config["gamma"])
    alphas, sigmas = schedules.cm4ir_alphas(*schedule), schedules.cm4ir_sigmas(*schedule)
    x_start = cm4ir.start(operator, y, zeta, sigma_y)
    x_0 = x_start + float((1 - alphas[0]).sqrt()) * inputs["noise_0"]
    deltas = config["deltas"] or ()
    told = torch.stack([s * (1 + d) for s, d in zip(sigmas, deltas or [0.0] * len(sigmas), strict=True)])
    outputs = {
        "y": degradations._flat_measurement(stand_in, operator, y),
        "pinv_y": operator.A_dagger(y, cm4ir.damping(zeta, sigma_y)),
        "x_start": x_start,
        "x_0": x_0,
        "alphas": alphas.float(),
        "sigmas": sigmas,
        "time_inputs": parametrisation.edm_time(told),
    }

    def keep(step):
        outputs[f"x0_{step.index}"], outputs[f"bp_{step.index}"] = step.x0, step.guided
        if step.x_next is not None:
            outputs[f"x_{step.index + 1}"] = step.x_next

    outputs["final"] = cm4ir.sample(
        prior,
        operator,
        y,
        x_0,
        sigmas,
        [inputs[f"noise_{k}"] for k in range(1, config["steps"])],
        deltas=deltas,
        delta_in_scalings=config["deltas_injection_type"] == 1,
        sigma_y=sigma_y,
        zeta=zeta,
        eta=config["eta"],
        mu=config.get("mu", 1.0),
        mu_factor=config.get("mu_factor", 1.0),
        callback=keep,
    )
    return outputs
