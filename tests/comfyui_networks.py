"""Stable Diffusion's U-Net and autoencoder from ComfyUI's own code, for parity cases that need them.

Mend has no second U-Net: its nodes use the one that ComfyUI has loaded. These are ComfyUI's bare modules, on the CPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from comfyui_mend.engine.comfyui import find_comfyui


def _module(name: str) -> Any:
    root = find_comfyui()
    if root is None:
        raise RuntimeError(
            "this case runs Stable Diffusion's U-Net or VAE, which Mend takes from ComfyUI, and no ComfyUI was found: set "
            "COMFYUI_PATH to its folder (the one with main.py); see docs/testing-with-comfyui.md"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        importlib.import_module("comfy.options").enable_args_parsing(False)
        importlib.import_module("comfy.cli_args").args.cpu = True
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(
            f"this case runs Stable Diffusion's U-Net or VAE from ComfyUI at {root}, whose packages this Python lacks "
            f"({error.name or error}): run tests/parity.py with the Python that runs ComfyUI, with safetensors installed"
        ) from error


def _loaded(module: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    module.load_state_dict(state, strict=True)
    return module.eval().requires_grad_(False)


def unet(state: Mapping[str, torch.Tensor], **config: Any) -> nn.Module:
    """ComfyUI's UNetModel with these weights (names without `diffusion_model.`).

    config: model_channels, channel_mult, num_res_blocks, attention_resolutions, and num_heads or num_head_channels; the
    rest is read from the weights. module(x, time [B], context=...).
    """
    attended = set(config.pop("attention_resolutions"))
    blocks, mults = config["num_res_blocks"], list(config["channel_mult"])
    depth = [int(2**level in attended) for level in range(len(mults))]
    proj_in = state["middle_block.1.proj_in.weight"]
    context_dim = state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    settings = {
        "image_size": 32,
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "use_spatial_transformer": True,
        "transformer_depth": [d for d in depth for _ in range(blocks)],
        "transformer_depth_output": [d for d in depth for _ in range(blocks + 1)],
        "transformer_depth_middle": 1,
        "context_dim": context_dim,
        "use_linear_in_transformer": proj_in.ndim == 2,
        "legacy": False,
    }
    made = _module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel(**{**settings, **config})
    return _loaded(made, state)


def autoencoder(state: Mapping[str, torch.Tensor], *, ch: int, ch_mult: list[int], num_res_blocks: int) -> nn.Module:
    """ComfyUI's AutoencoderKL with these weights (names without `first_stage_model.`)."""
    settings = {
        "double_z": True,
        "z_channels": state["post_quant_conv.weight"].shape[0],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": ch,
        "ch_mult": list(ch_mult),
        "num_res_blocks": num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    embed_dim = state["post_quant_conv.weight"].shape[1]
    made = _module("comfy.ldm.models.autoencoder").AutoencoderKL(ddconfig=settings, embed_dim=embed_dim)
    # Attention's projections are stored as 1x1 convolutions here and as linear layers in diffusers.
    shapes = {key: value.shape for key, value in made.state_dict().items()}
    return _loaded(made, {key: value.reshape(shapes[key]) for key, value in state.items()})


def moments(vae: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the posterior of pictures in -1..1, unscaled latents."""
    return vae.quant_conv(vae.encoder(image)).chunk(2, dim=1)
