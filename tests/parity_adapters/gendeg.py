"""GenDeg: conditioning, structure correction, intensity sampler, and sampling and training through ComfyUI's U-Net."""

from __future__ import annotations

import random
import re

import comfyui_networks
import torch
from torch import nn

from comfyui_mend import models
from comfyui_mend.guidance import gendeg
from comfyui_mend.guidance import latent_diffusion as ld
from comfyui_mend.models.gendeg import averaged_name, with_averaged_weights


def _loaded(config, state) -> nn.Module:
    module = models.create("gendeg", config)
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def _conditioner(state, context_dim=768):
    own = {k: v for k, v in state.items() if k.startswith(("stats_proj.", "cc_projection."))}
    bins = own["stats_proj.weight"].shape[1] - 1
    return _loaded({"num_bins": bins, "context_dim": context_dim}, own)


def _conditioning(case):
    config, module = case.config, case.module()
    text, null = case.inputs["text_emb"], case.inputs["null_emb"]
    ranges = config.get("mu_range", (0, 0.7)), config.get("sigma_range", (0, 0.4))
    bins = module.bin_indices(config["mu"], config["sigma"], *ranges)
    condition = module(text, bins)
    outputs = {
        "stats_tokens": module.stats_tokens(bins),
        "null_stats_tokens": module.stats_tokens(module.null_bins()),
        "uncond": module(null, module.null_bins()),
        "cond_norms": condition.flatten(1).norm(dim=1),
    }
    for name in case.outputs:
        match = re.fullmatch(r"cond_item(\d+(?:_\d+)*)", name)
        if match:
            outputs[name] = condition[[int(i) for i in match[1].split("_")]]
    return outputs


def _correction(case):
    module, kept = case.module(), {}
    module.middle_blks.register_forward_hook(lambda _m, _i, out: kept.__setitem__("middle", out))
    corrected = module(case.inputs["clean"], case.inputs["generated"])
    return {"corrected": corrected, "image01": (corrected / 2 + 0.5).clamp(0, 1), **kept}


def _statistics(case):
    config, rng = case.config, random.Random(case.json["seed"])
    histograms = {
        name: gendeg.JointHistogram(config["joint_counts"][name], config["mu_range"], config["sigma_range"])
        for name in config["datasets"]
    }
    sampler = gendeg.IntensitySampler(histograms, config["weights"], config["random_every"])
    draws = [sampler.draw(k, rng) for k in range(case.outputs["samples"]["shape"][0])]
    rows = [[config["datasets"].index(d.dataset), d.mu, d.sigma, d.uniform] for d in draws]
    return {"samples": torch.tensor(rows, dtype=torch.float32)}


def check_layout(case):
    """The released layout: every averaged name has its raw parameter, and the generator's own layers are found."""
    if {"enc_blk_nums", "num_bins"} & case.config.keys():
        return case.check_layout()
    state = {key: torch.empty(shape, device="meta") for key, shape, _ in case.json["state_dict"]}
    raw, moved = with_averaged_weights(state)
    averaged = [k for k in state if k.startswith("model_ema.") and k.split(".")[1] not in ("decay", "num_updates")]
    assert moved == len(averaged) == sum(k.startswith("model.") for k in state), (moved, len(averaged))
    for key in raw:
        assert not key.startswith("model.") or raw[key] is state[averaged_name(key.removeprefix("model."))]
    found = models.registry.detect(models.registry.get("gendeg-conditioner").prepare_state_dict(state))
    assert found is not None and found.id == "gendeg-conditioner"
    return {}


def _diffusion(case, *, averaged):
    """ComfyUI's U-Net and autoencoder with the case's weights, and the conditioner."""
    config, weights = case.config, case.state_dict()
    if averaged:
        weights, _ = with_averaged_weights(weights)  # a pruned file has none, and is used as it is

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    unet = comfyui_networks.unet(part("model.diffusion_model."), **config["unet"])
    vae = comfyui_networks.autoencoder(part("first_stage_model."), **config["vae"])

    def network(x, time, context):
        return unet(x, time, context=context)

    return network, vae, _conditioner(weights, config.get("context_dim", 768)), part


def _sampling(case):
    config, inputs = case.config, case.inputs
    network, vae, conditioner, part = _diffusion(case, averaged=True)
    condition = conditioner(inputs["text_emb"], conditioner.bin_indices(config["mu"], config["sigma"]))
    null = conditioner(inputs["null_emb"], conditioner.null_bins())
    picture, _ = comfyui_networks.moments(vae, inputs["clean"])
    denoise = gendeg.guided_denoiser(network, condition, null, picture, config["cfg_text"], config["cfg_image"])
    sigmas, many = ld.linear_time_sigmas(config["steps"]), ld.linear_time_sigmas(100)
    start = inputs["noise_00"] * sigmas[0]
    first = ld.time_at(sigmas[0]).float().expand(len(start))
    scaled = start * (1 + sigmas[0] ** 2).rsqrt()
    outputs = {
        "cond_crossattn_item0": condition[:1],
        "uncond_crossattn_item0": null[:1],
        "c_concat": picture,
        "sigmas": sigmas,
        "sigmas_100": many,
        "timesteps": ld.time_at(sigmas[:-1]).float(),
        "timesteps_100": ld.time_at(many[:-1]).float(),
        "unet_eps_first": network(torch.cat([scaled, picture], dim=1), first, condition),
    }

    def keep(step, clean):
        outputs[f"denoised_step{step}"] = clean

    z = ld.euler_ancestral(denoise, start, sigmas, lambda step: inputs[f"noise_{step + 1:02d}"], keep)
    decoded = vae.decode(z / config["scale_factor"])
    outputs |= {"z": z, "decoded": decoded, "image_no_scm": (decoded.clamp(-1, 1) / 2 + 0.5)}
    if "scm" in config:
        scm = _loaded(config["scm"], part("scm."))
        corrected = scm(inputs["clean"], decoded.clamp(-1, 1))
        outputs |= {"corrected": corrected, "image": (corrected / 2 + 0.5).clamp(0, 1)}
    return outputs


def _training(case):
    config, inputs = case.config, case.inputs
    network, vae, conditioner, _ = _diffusion(case, averaged=False)
    condition = conditioner(inputs["text_emb"], conditioner.bin_indices(config["mu"], config["sigma"]))
    null = conditioner(inputs["null_emb"], conditioner.null_bins())
    picture, _ = comfyui_networks.moments(vae, inputs["clean"])
    degraded = comfyui_networks.moments(vae, inputs["degraded"])
    z = ld.posterior_sample(*degraded, inputs["noise_posterior"]) * config["scale_factor"]
    context, picture = gendeg.drop_conditions(condition, null, picture, torch.tensor(config["mask_uniform"]))
    step = gendeg.training_step(network, z, context, picture, torch.tensor(config["t"]), inputs["noise_q"])
    return {
        "z": z,
        "c_crossattn": context,
        "c_concat": picture,
        "x_noisy": step.x_noisy,
        "eps": step.predicted,
        "loss": step.loss.reshape(1),
    }


def run(case):
    config = case.config
    if "joint_counts" in config:
        return _statistics(case)
    if "enc_blk_nums" in config:
        return _correction(case)
    if "mask_uniform" in config:
        return _training(case)
    if "steps" in config:
        return _sampling(case)
    return _conditioning(case)
