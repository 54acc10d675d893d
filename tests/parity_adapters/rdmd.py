"""RDMD: whole trajectories on a small ADM network, every draw given."""

from __future__ import annotations

import torch

from comfyui_mend.guidance import filters, kernels, priors, rdmd, schedules


def _operator(config, inputs):
    if config["task"] == "sr":
        return filters.Resize(1 / config["factor"])
    if config["blur"] == "gaussian":
        return filters.ReflectBlur(kernels.gaussian_2d(config["kernel_size"], config["kernel_std"]))
    return filters.ReflectBlur(inputs["kernel"] / inputs["kernel"].sum())


def run(case):
    config, inputs = case.config, case.inputs
    prior = priors.epsilon_prior(case.module())
    operator, level = _operator(config, inputs), config["noise_level"]
    truth = torch.floor(inputs["hr"] * 255 + 0.5) / 255 * 2 - 1
    operator = operator.fitted(*truth.shape[-2:])
    y = operator.A(truth) + 2 * level * inputs["noise_y"]
    factor = config.get("factor", 1)
    schedule = schedules.rdmd_schedule(config["iterations"], level, config["lambda"], config["tau"], factor)
    sigma = float(schedule.sigmas[0])
    if config["task"] == "sr":
        u, x = rdmd.start_super_resolution(y, truth.shape[-2:], sigma, inputs["noise_init"])
    else:
        u, x = rdmd.start_from_noisy(y, level, sigma, inputs["noise_init"])
    outputs = {
        "y": y,
        "timesteps": schedule.timesteps,
        "regulariser_timesteps": schedule.regulariser_timesteps,
        "rhos_used": schedule.rhos.float(),
        "pnp_sigmas": schedule.regulariser_levels.float(),
    }
    record, alphas = set(config["record_iterations"]), schedules.vp_alphas()[schedule.timesteps].sqrt()

    def keep(step):
        if step.index in record:
            i = step.index
            following = min(i + 1, config["iterations"] - 1)
            scale = 1.0 if i == config["iterations"] - 1 else float(alphas[following])
            outputs[f"regularised_{i}"], outputs[f"denoised_{i}"] = step.regularised, step.denoised
            outputs[f"x0_{i}"], outputs[f"x_next_{i}"] = step.u, step.x_next * scale

    estimate, denoised = rdmd.sample(
        prior,
        operator,
        y,
        u,
        x,
        schedule,
        lambda i, name: inputs[f"noise_{name}_{i}"],
        zeta=config["zeta"],
        eta=config["eta"],
        skip_unused=False,
        callback=keep,
    )
    outputs["output"] = (estimate if config["task"] == "sr" else denoised) / 2 + 0.5
    return outputs
