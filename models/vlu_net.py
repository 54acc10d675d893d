"""VLU-Net: deep unfolding in feature space, steered by what CLIP says is wrong with the picture.

Zeng et al., "Vision-Language Gradient Descent-driven All-in-One Deep Unfolding Networks", CVPR 2025, arXiv 2503.16930.
Every level is one proximal gradient step x - r Phi^T (Phi x - y) on features, Phi being channel attention whose keys
come from a dictionary of prompt maps, mixed by a degradation vector. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .degradation import Degradation
from .degradation_encoder import SOURCE, DegradationEncoder
from .layers.attention import TransposedAttention, transposed_attention
from .layers.restormer import Downsample, OverlapPatchEmbed, RestormerBlock, Upsample, restormer_config
from .layers.state_dict import count_indices
from .registry import Architecture, State, construct


class PromptAttention(nn.Module):
    """The operator Phi: channel attention with queries and values from features, keys from a prompt map.

    features [B, C, H, W], prompt [B or 1, P, H, W] -> [B, C, H, W]; two heads whatever the level.
    """

    def __init__(self, dim: int, prompt_dim: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.qv = nn.Conv2d(dim, dim * 2, 1, bias=False)
        self.qv_dwconv = nn.Conv2d(dim * 2, dim * 2, 3, padding=1, groups=dim * 2, bias=False)
        self.k = nn.Conv2d(prompt_dim, dim, 1, bias=False)
        self.k_dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        query, value = self.qv_dwconv(self.qv(x)).chunk(2, dim=1)
        key = self.k_dwconv(self.k(prompt))
        return self.project_out(transposed_attention(query, key, value, self.temperature))


class GradientDescent(nn.Module):
    """One gradient step x - r Phi^T (Phi x - y), eq. 7; x, y [B, C, H, W], degradation [B or 1, D]."""

    def __init__(self, dim: int, stage: int, de_dim: int, embed_dim: int) -> None:
        super().__init__()
        prompt_dim, side = dim // 10 * stage, 96 // stage
        self.r = nn.Parameter(torch.ones(1))
        self.prompt_param = nn.Parameter(torch.rand(1, de_dim, prompt_dim, side, side))
        self.phi = PromptAttention(dim, prompt_dim)
        self.phit = TransposedAttention(dim, 2, bias=False)
        self.linear = nn.Linear(embed_dim, de_dim)

    def weights(self, degradation: torch.Tensor) -> torch.Tensor:
        """[B, de_dim]: how much of each prompt this degradation takes."""
        return self.linear(degradation).softmax(dim=-1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        prompt = torch.einsum("bj,jchw->bchw", self.weights(degradation), self.prompt_param[0])
        prompt = F.interpolate(prompt, x.shape[-2:], mode="bilinear", align_corners=False)
        return x - self.r * self.phit(self.phi(x, prompt) - y)


class Proximal(nn.Module):
    """The proximal mapping: Restormer blocks, under the key `blocks`."""

    def __init__(self, dim: int, heads: int, expansion: float, count: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(RestormerBlock(dim, heads, expansion) for _ in range(count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class UnfoldingStage(nn.Module):
    """A level of the network: gradient step, then proximal mapping."""

    def __init__(self, gradient_descent: GradientDescent, denoiser: Proximal) -> None:
        super().__init__()
        self.gradient_descent = gradient_descent
        self.denoiser = denoiser

    def forward(self, x: torch.Tensor, y: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        return self.denoiser(self.gradient_descent(x, y, degradation))


class VLUNet(nn.Module):
    """The network. [B, 3, H, W] in 0..1, H and W multiples of 8, and degradation vectors [B or 1, 512] -> restored.

    `down1_2_i` is in every released file and never used: `down1_2` serves both streams.
    """

    def __init__(
        self,
        *,
        de_dim: int = 7,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: tuple[int, ...] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        embed_dim: int = 512,
    ) -> None:
        super().__init__()
        if len(num_blocks) != 4 or len(heads) != 4:
            raise ConfigError("VLU-Net: num_blocks and heads need four entries, from shallow to deep")
        if dim < 10 or dim % 2 or any(dim * 2**i % heads[i] for i in range(4)):
            raise ConfigError(f"VLU-Net: dim {dim} must be even, at least 10, and divisible by heads {tuple(heads)}")
        if de_dim < 1:
            raise ConfigError(f"VLU-Net: de_dim is {de_dim}, must be at least 1")

        def stage(width: int, number: int, its_heads: int, count: int) -> UnfoldingStage:
            return UnfoldingStage(
                GradientDescent(width, number, de_dim, embed_dim),
                Proximal(width, its_heads, ffn_expansion_factor, count),
            )

        def level(index: int) -> UnfoldingStage:
            return stage(dim * 2**index, index + 1, heads[index], num_blocks[index])

        def mix(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1, bias=False)

        self.patch_embed = OverlapPatchEmbed(inp_channels, dim)
        self.patch_embed_i = OverlapPatchEmbed(inp_channels, dim)
        self.encoder_level1 = level(0)
        self.down1_2, self.down1_2_i = Downsample(dim), Downsample(dim)
        self.encoder_level2 = level(1)
        self.down2_3, self.down2_3_i = Downsample(dim * 2), Downsample(dim * 2)
        self.encoder_level3 = level(2)
        self.down3_4, self.down3_4_i = Downsample(dim * 4), Downsample(dim * 4)
        self.latent = level(3)
        self.up4_3, self.up4_3_i = Upsample(dim * 8), Upsample(dim * 8)
        self.reduce_chan_level3, self.reduce_chan_level3_img = mix(dim * 8, dim * 4), mix(dim * 8, dim * 4)
        self.decoder_level3 = level(2)
        self.up3_2, self.up3_2_i = Upsample(dim * 4), Upsample(dim * 4)
        self.reduce_chan_level2, self.reduce_chan_level2_img = mix(dim * 4, dim * 2), mix(dim * 4, dim * 2)
        self.decoder_level2 = level(1)
        self.up2_1, self.up2_1_i = Upsample(dim * 2), Upsample(dim * 2)
        self.decoder_level1 = stage(dim * 2, 1, heads[0], num_blocks[0])
        self.refinement = stage(dim * 2, 1, heads[0], num_refinement_blocks)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=False)

    @property
    def stages(self) -> dict[str, UnfoldingStage]:
        """Every unfolding stage by name, in order of execution."""
        return {name: module for name, module in self.named_children() if isinstance(module, UnfoldingStage)}

    def prompt_weights(self, degradation: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mixture of prompts that degradation vectors [B, 512] take: stage name -> [B, de_dim]."""
        return {name: stage.gradient_descent.weights(degradation) for name, stage in self.stages.items()}

    def forward(self, image: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        d = degradation
        x1, y1 = self.patch_embed(image), self.patch_embed_i(image)
        x1 = self.encoder_level1(x1, y1, d)
        y2 = self.down1_2(y1)
        x2 = self.encoder_level2(self.down1_2(x1), y2, d)
        y3 = self.down2_3_i(y2)
        x3 = self.encoder_level3(self.down2_3(x2), y3, d)
        y4 = self.down3_4_i(y3)
        x = self.latent(self.down3_4(x3), y4, d)
        x = self.reduce_chan_level3(torch.cat([self.up4_3(x), x3], dim=1))
        y = self.reduce_chan_level3_img(torch.cat([self.up4_3_i(y4), y3], dim=1))
        x = self.decoder_level3(x, y, d)
        x = self.reduce_chan_level2(torch.cat([self.up3_2(x), x2], dim=1))
        y = self.reduce_chan_level2_img(torch.cat([self.up3_2_i(y), y2], dim=1))
        x = self.decoder_level2(x, y, d)
        x = torch.cat([self.up2_1(x), x1], dim=1)
        y = torch.cat([self.up2_1_i(y), y1], dim=1)
        x = self.refinement(self.decoder_level1(x, y, d), y, d)
        return self.output(x) + image


class VLUNetPipeline(nn.Module):
    """Network and degradation encoder, as a Lightning file holds them. [B, 3, H, W] -> restored."""

    def __init__(self, net: Mapping[str, Any], clip: Mapping[str, Any]) -> None:
        super().__init__()
        self.net = _build_net(net)
        self.model_degradation = DegradationEncoder(**clip)

    def forward(self, image: torch.Tensor, degradation: torch.Tensor | None = None) -> torch.Tensor:
        if degradation is None:
            degradation = self.model_degradation.encode_image(image)
        return self.net(image, degradation)


_RELEASED = {
    "kind": "net",
    "inp_channels": 3,
    "out_channels": 3,
    "dim": 48,
    "num_blocks": (4, 6, 6, 8),
    "num_refinement_blocks": 4,
    "heads": (1, 2, 4, 8),
    "ffn_expansion_factor": 2.66,
}
_CLIP_VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "7 prompts": {**_RELEASED, "de_dim": 7},
    "5 prompts": {**_RELEASED, "de_dim": 5},
}
PIPELINE_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    name: {"kind": "pipeline", "net": net, "clip": _CLIP_VIT_B_32} for name, net in VARIANTS.items()
}

_SIGNATURE = (
    "encoder_level1.gradient_descent.prompt_param",
    "encoder_level1.gradient_descent.phi.qv.weight",
    "patch_embed_i.proj.weight",
)
_IMAGE, _TEXT = "model_degradation.ad_imageEncoder.", "model_degradation.ad_textEncoder."
_PIPELINE_SIGNATURE = (f"net.{_SIGNATURE[0]}", f"{_IMAGE}adapter.0.weight", f"{_IMAGE}clip_model.visual.conv1.weight")


def _build_net(config: Mapping[str, Any]) -> VLUNet:
    # Settings of the published class that change nothing in it.
    return construct(VLUNet, "VLU-Net", config, without=("kind", "bias", "LayerNorm_type", "decoder"))


def _build_pipeline(config: Mapping[str, Any]) -> VLUNetPipeline:
    try:
        clip = dict(config["clip"])
        if clip["text_cfg"] is not None and config.get("text_heads"):
            clip["text_cfg"] = {**clip["text_cfg"], "heads": config["text_heads"]}
        return VLUNetPipeline(config["net"], clip)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"VLU-Net with CLIP: {error}") from None


def _net_config(state: State) -> dict[str, Any]:
    dim, first = state["patch_embed.proj.weight"].shape[0], "encoder_level1.gradient_descent"
    de_dim, embed_dim = state[f"{first}.linear.weight"].shape
    if state[f"{first}.prompt_param"].shape != (1, de_dim, dim // 10, 96, 96):
        raise CheckpointError(
            f"VLU-Net: prompts of {tuple(state[f'{first}.prompt_param'].shape)} do not fit "
            f"{dim} channels and {de_dim} prompts"
        )
    return {"kind": "net", "de_dim": de_dim, **restormer_config(state, ".denoiser.blocks"), "embed_dim": embed_dim}


def _pipeline_config(state: State) -> dict[str, Any]:
    net = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    clip = _clip_config(state, f"{_IMAGE}clip_model.")
    heads = clip["text_cfg"]["heads"] if clip["text_cfg"] else 0
    return {"kind": "pipeline", "net": _net_config(net), "clip": clip, "text_heads": heads}


def _clip_config(state: State, prefix: str) -> dict[str, Any]:
    visual = f"{prefix}visual."
    width, _, patch, _ = state[f"{visual}conv1.weight"].shape
    grid = math.isqrt(state[f"{visual}positional_embedding"].shape[0] - 1)
    text = None
    if f"{prefix}token_embedding.weight" in state:
        vocabulary, text_width = state[f"{prefix}token_embedding.weight"].shape
        text = {
            "context_length": state[f"{prefix}positional_embedding"].shape[0],
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": max(text_width // 64, 1),
            "layers": count_indices(state, f"{prefix}transformer.resblocks."),
        }
    return {
        "embed_dim": state[f"{visual}proj"].shape[1],
        "vision_cfg": {
            "image_size": grid * patch,
            "layers": count_indices(state, f"{visual}transformer.resblocks."),
            "width": width,
            "patch_size": patch,
        },
        "text_cfg": text,
    }


def _mirror_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Lists the shared CLIP under both encoders, whichever copy a file has kept; drops a text tower without adapter."""
    image, text = f"{_IMAGE}clip_model.", f"{_TEXT}clip_model."
    if f"{_TEXT}adapter.0.weight" not in state:
        return {k: v for k, v in state.items() if not k.startswith(_TEXT) and not _is_text_tower(k)}
    mirrored = dict(state)
    for source, target in ((image, text), (text, image)):
        for key in [k for k in state if k.startswith(source)]:
            mirrored.setdefault(target + key.removeprefix(source), state[key])
    return mirrored


def _is_text_tower(key: str) -> bool:
    image = f"{_IMAGE}clip_model."
    return key.startswith(image) and not key.startswith(f"{image}visual.")


def _needs_degradation(
    module: VLUNet, image: torch.Tensor, degradation: Degradation | torch.Tensor | None = None
) -> torch.Tensor:
    if degradation is None:
        raise InputError(
            "degradation: this VLU-Net file holds no CLIP encoder, so nothing says what is wrong with the picture; "
            "connect a degradation or load the original Lightning file (.ckpt)"
        )
    return module(image, vector(degradation, module.encoder_level1.gradient_descent.linear.weight))


def vector(degradation: Degradation | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The vectors [B, D] of a degradation in the dtype and on the device of `like` [..., D]; InputError if not ours."""
    if isinstance(degradation, Degradation):
        if degradation.embedding is None or degradation.source != SOURCE:
            raise InputError(f"degradation: made by {degradation.source or 'another method'}, VLU-Net needs its own")
        degradation = degradation.embedding
    if degradation.shape[-1] != like.shape[-1]:
        raise InputError(f"degradation: {degradation.shape[-1]} numbers a picture, this network needs {like.shape[-1]}")
    return degradation.to(like)


def _restore_pipeline(
    module: VLUNetPipeline, image: torch.Tensor, degradation: Degradation | torch.Tensor | None = None
) -> torch.Tensor:
    if degradation is None:
        degradation = module.model_degradation.encode_image(image)
    return _needs_degradation(module.net, image, degradation)


def _pipeline_context(module: VLUNetPipeline, image: torch.Tensor) -> dict[str, Any]:
    return {"degradation": Degradation(embedding=module.model_degradation.encode_image(image), source=SOURCE)}


_COMMON: dict[str, Any] = {
    "system": "vlu-net",
    "paper": "Zeng et al., Vision-Language Gradient Descent-driven All-in-One Deep Unfolding Networks, CVPR 2025, "
    "arXiv 2503.16930",
    "licence": "none stated for code and weights; the CLIP inside is LAION's, MIT",
    "tasks": ("denoise", "derain", "dehaze", "deblur", "low-light"),
    "multiple_of": lambda config: 8,
    "wires": ("degradation",),
    "global_statistics": "channel attention looks at the whole picture; the degradation vector is computed once on the "
    "whole picture and shared by all tiles, attention is computed per tile",
}

ARCHITECTURES = [
    Architecture(
        id="vlu-net-clip",
        title="VLU-Net with CLIP",
        detect=lambda state: all(key in state for key in _PIPELINE_SIGNATURE),
        config_from_state_dict=_pipeline_config,
        build=_build_pipeline,
        matches_config=lambda config: config.get("kind") == "pipeline" or "clip" in config,
        variants=PIPELINE_VARIANTS,
        signature=_PIPELINE_SIGNATURE,
        metadata_keys=("text_heads",),
        prepare_state_dict=_mirror_clip,
        bytes_per_pixel=lambda config: 210.0 * config["net"]["dim"],
        restore=_restore_pipeline,
        context=_pipeline_context,
        **_COMMON,
    ),
    Architecture(
        id="vlu-net",
        title="VLU-Net",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_net_config,
        build=_build_net,
        matches_config=lambda config: config.get("kind", "net") == "net" and "clip" not in config,
        variants=VARIANTS,
        signature=_SIGNATURE,
        bytes_per_pixel=lambda config: 210.0 * config["dim"],
        restore=_needs_degradation,
        **_COMMON,
    ),
]
