"""The pieces of Restormer that its many descendants share, under the key names of released checkpoints.

Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022, arXiv 2111.09881.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .attention import GatedFeedForward, TransposedAttention
from .norm import NormBody
from .state_dict import count_indices, expansion_factor

_LEVELS = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")


class RestormerBlock(nn.Module):
    """Channel attention, then gated feed-forward, each normalised first and residual. [B, C, H, W] -> same.

    Keys: norm1.body, attn, norm2.body, ffn. `norm_bias=False` is the "BiasFree" norm; `activation` as in
    `transposed_attention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: float,
        bias: bool = False,
        norm_bias: bool = True,
        eps: float = 1e-5,
        activation: str = "softmax",
    ) -> None:
        super().__init__()
        self.norm1 = NormBody(dim, norm_bias, eps)
        self.attn = TransposedAttention(dim, heads, bias, activation)
        self.norm2 = NormBody(dim, norm_bias, eps)
        self.ffn = GatedFeedForward(dim, expansion, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, 2C, H/2, W/2]: 3x3 convolution to C/2, pixel unshuffle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C/2, 2H, 2W]: 3x3 convolution to 2C, pixel shuffle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim * 2, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class OverlapPatchEmbed(nn.Module):
    """The first 3x3 convolution, under the key `proj`."""

    def __init__(self, channels: int, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 3, padding=1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def restormer_config(state: Mapping[str, torch.Tensor], body: str = "") -> dict[str, Any]:
    """The hyper-parameters that Restormer's descendants share, from a state dict.

    `body` is what stands between a stage's name and its blocks' numbers. Raises CheckpointError for widths that belong to
    no expansion factor.
    """
    dim, inp_channels = state["patch_embed.proj.weight"].shape[:2]
    widths = [tuple(state[f"{level}{body}.0.ffn.project_out.weight"].shape[:2]) for level in _LEVELS]
    return {
        "dim": dim,
        "num_blocks": tuple(count_indices(state, f"{level}{body}.") for level in _LEVELS),
        "num_refinement_blocks": count_indices(state, f"refinement{body}."),
        "heads": tuple(state[f"{level}{body}.0.attn.temperature"].shape[0] for level in _LEVELS),
        "ffn_expansion_factor": expansion_factor(widths),
        "inp_channels": inp_channels,
        "out_channels": state["output.weight"].shape[0],
    }


def norm_type(state: Mapping[str, torch.Tensor], body: str = "") -> str:
    """Which norm the blocks have, "WithBias" or "BiasFree"; `body` as for `restormer_config`."""
    return "WithBias" if f"latent{body}.0.norm1.body.bias" in state else "BiasFree"
