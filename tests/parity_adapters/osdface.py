"""OSDFace: the embedder, the colour fixes, the LoRA's targets, and the whole path through ComfyUI's U-Net and VAE."""

from __future__ import annotations

import json

import comfyui_networks
import torch

from comfyui_mend import models
from comfyui_mend.guidance import colour_fix
from comfyui_mend.guidance import latent_diffusion as ld
from comfyui_mend.models import lora_sd


def _embedder_entries(case):
    return [e for e in case.json.get("state_dict", []) if e[0].startswith(("vre.", "embedding_change."))]


def _embedder(case):
    entries = _embedder_entries(case)
    module = models.create("osdface", case.config)
    case.check_manifest(module, entries)
    module.load_state_dict(case.state_dict(entries))
    return module.eval().requires_grad_(False)


def _vre(case):
    module, outputs = _embedder(case), {}
    resized = "no resize" not in case.config.get("input_stage", "")
    for name, image in case.inputs.items():
        z = module.vre(module.prepared((image + 1) / 2) if resized else image)
        tokens = module.vre.quantize.select(z, module.tokens).tokens
        outputs |= {f"{name}.z": z, f"{name}.tokens": tokens, f"{name}.prompt": module.project(tokens)}
        if f"{name}.tokens_cat" in case.outputs:
            outputs[f"{name}.tokens_cat"] = module.vre.quantize.select_concatenated(z, module.tokens)
    return outputs


def _colour_fix(case):
    content, style, config = case.inputs["content"], case.inputs["style"], case.config
    return {
        "wavelet": colour_fix.wavelet_colour(content, style, config.get("wavelet_levels", 5)),
        "adain": colour_fix.adain_colour(content, style, config.get("adain_eps", 1e-5)),
        "edges": colour_fix.edge_magnitude(content, config.get("edge_eps", 1e-6)),
    }


def check_layout(case):
    """The embedder's keys; or, for a LoRA, that its modules find weights of their shapes in the U-Net of the folder."""
    if not (case.folder / "lora_key_map.json").exists():
        entries = _embedder_entries(case)
        return case.check_layout(entries) if entries else {}
    weights = {m["comfy_weight"]: m for m in json.loads((case.folder / "lora_key_map.json").read_text())}
    unet = {name: torch.empty(m["weight_shape"], device="meta") for name, m in weights.items()}
    names = json.loads((case.folder / "unet_diffusers_to_comfy.json").read_text())
    assert lora_sd.diffusers_names(names.values()) == names
    factors = {key: torch.empty(shape, device="meta") for key, shape, _ in case.json["state_dict"]}
    match = lora_sd.match_lora(lora_sd.read_lora(factors), unet)
    assert not match.unmatched and match.patches.keys() == unet.keys(), match.describe()
    return {}


def _pipeline(case):
    config, inputs = case.config, case.inputs
    weights = case.state_dict()
    renamed = {k: v.removeprefix("model.diffusion_model.") for k, v in case.json["ldm_key_map"].items()}
    unet_state = {name: weights[key] for key, name in renamed.items()}
    vae_names = {k: v.removeprefix("first_stage_model.") for k, v in case.json["vae_ldm_key_map"].items()}
    factors = case.state_dict(case.json["lora_state_dict"])
    match = lora_sd.match_lora(lora_sd.read_lora(factors, config["lora"]["alpha"]), unet_state)
    assert not match.unmatched, match.describe()
    unet_state = lora_sd.merged(unet_state, match)
    norms = [unet_state[renamed[f"unet.{k}"]].norm() for k in case.json["merged_keys_in_order_of_merged_weight_norms"]]

    base, vae_config = config["unet"], config["vae"]
    width = base["channels"][0]
    unet = comfyui_networks.unet(
        unet_state,
        model_channels=width,
        channel_mult=[c // width for c in base["channels"]],
        num_res_blocks=base["res_blocks"],
        attention_resolutions=[2**level for level in base["attn_levels"]],
        num_head_channels=base["head_channels"],
    )
    vae = comfyui_networks.autoencoder(
        {name: weights[key] for key, name in vae_names.items()},
        ch=vae_config["channels"][0],
        ch_mult=[c // vae_config["channels"][0] for c in vae_config["channels"]],
        num_res_blocks=vae_config["res_blocks"],
    )
    factor, step, image = vae_config["scaling_factor"], config["timestep"], inputs["image"]
    embedder = _embedder(case)
    tokens = embedder.select((image + 1) / 2).tokens
    prompt = embedder.project(tokens)
    mean, log_variance = comfyui_networks.moments(vae, image)
    latent = ld.posterior_sample(mean, log_variance, inputs.get("posterior_noise")) * factor
    noise = unet(latent, torch.full((len(latent),), float(step)), context=prompt)
    clean = ld.one_step_clean(latent, noise, step)
    decoded = vae.decode(clean / factor)
    return {
        "tokens": tokens,
        "prompt": prompt,
        "latent_mean": mean,
        "latent_std": (log_variance.clamp(-30, 20) / 2).exp(),
        "lq_latent": latent,
        "model_pred": noise,
        "x0_latent": clean,
        "decoded": decoded,
        "image": decoded.clamp(-1, 1) / 2 + 0.5,
        "merged_weight_norms": torch.stack(norms),
    }


def run(case):
    if "lora_state_dict" in case.json:
        return _pipeline(case)
    if "wavelet_levels" in case.config:
        return _colour_fix(case)
    return _vre(case)
