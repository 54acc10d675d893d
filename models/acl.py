"""ACL (re-designed): a U-shaped network of linear-attention blocks with multi-scale dilated convolutions.

After Gu, Meng, Ji and Sun, "ACL: Activating Capability of Linear Attention for Image Restoration", CVPR 2025. Of that
paper only the abstract was at hand, neither code nor checkpoints: that encoder and decoder are made of Mamba-like
blocks with linear attention in place of the scan, and that multi-scale dilated convolutions enhance local detail, is
the paper's; widths, depths, order of layers, dilations and everything else here is this project's own design.
**Official ACL checkpoints cannot be expected to load, and no figures of the paper apply to this network.**

The block is MILA's: Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024. Feature
maps are [B, H, W, C] inside the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..kernels.linear_attention import linear_attention, rotary_angles
from .layers.convolution import DilatedConv2d
from .layers.padding import crop, pad_to_multiple
from .layers.state_dict import count_indices, expansion_factor, layer_widths
from .registry import Architecture, State, construct

_LEVELS = 3


class _ChannelsLastConv2d(DilatedConv2d):
    """A convolution of [B, H, W, C] maps: the memory layout PyTorch's kernels call channels-last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _ChannelsLastConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of [B, H, W, C] maps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _depthwise(dim: int, dilation: int = 1) -> nn.Conv2d:
    return _ChannelsLastConv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim)


class RotaryTable(nn.Module):
    """The rotations that MILA's released state dicts carry (cosine, sine); the network computes its own per size."""

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # a constant has values even where parameters are built without
            angles = rotary_angles(height, width, dim).unflatten(0, (height, width))
        self.register_buffer("rotations", torch.stack([angles.cos(), angles.sin()], dim=-1))


class LinearAttention(nn.Module):
    """Linear attention with rotary positions and a local positional term (LePE). [B, H, W, C] -> same.

    The input is its own value; queries and keys are one projection. rope, lepe: switches for research.
    """

    def __init__(self, dim: int, heads: int, rope: bool = True, lepe: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rope
        self.qk = nn.Linear(dim, dim * 2, bias=bias)
        self.lepe = _depthwise(dim) if lepe else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        query, key = self.qk(x).flatten(1, 2).chunk(2, dim=-1)
        y = linear_attention(query, key, x.flatten(1, 2), self.heads, height, width, rotary=self.rotary)
        y = y.unflatten(1, (height, width))
        return y if self.lepe is None else y + self.lepe(x)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LocalEnhancement(nn.Module):
    """Depth-wise convolutions of several dilations side by side, between two projections. [B, H, W, C] -> same.

    That such a module exists is the paper's; its details are this project's.
    """

    def __init__(self, dim: int, hidden: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.proj_in = _ChannelsLastConv2d(dim, hidden, 1)
        self.branches = nn.ModuleList([_depthwise(hidden, dilation) for dilation in dilations])
        self.proj_out = _ChannelsLastConv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj_in(x)
        enhanced = x
        for branch in self.branches:
            enhanced = enhanced + branch(x)
        return self.proj_out(F.gelu(enhanced))


class _MilaCore(nn.Module):
    """What MILA's block and ACL's share: gated linear attention between two convolutional positional encodings."""

    def __init__(self, dim: int, attention: nn.Module, eps: float = 1e-5) -> None:
        super().__init__()
        self.cpe1 = _depthwise(dim)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.in_proj = nn.Linear(dim, dim)
        self.act_proj = nn.Linear(dim, dim)
        self.dwc = _depthwise(dim)
        self.attn = attention
        self.out_proj = nn.Linear(dim, dim)
        self.cpe2 = _depthwise(dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """The block up to its second norm. [B, H, W, C] -> same."""
        x = x + self.cpe1(x)
        normed = self.norm1(x)
        gate = F.silu(self.act_proj(normed))
        x = x + self.out_proj(self.attn(F.silu(self.dwc(self.in_proj(normed)))) * gate)
        return x + self.cpe2(x)


class MilaBlock(_MilaCore):
    """MILA's block as released (MLLABlock). [B, H, W, C] -> same, any H and W."""

    def __init__(
        self,
        dim: int,
        input_resolution: Sequence[int],
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        attention = LinearAttention(dim, num_heads, bias=qkv_bias)
        attention.rope = RotaryTable(*input_resolution, dim)
        super().__init__(dim, attention, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(x)
        return x + self.mlp(self.norm2(x))


class AclBlock(_MilaCore):
    """MILA's block with local enhancement in place of the MLP, or beside it if `mlp_ratio` is given."""

    def __init__(
        self,
        dim: int,
        heads: int,
        lem_ratio: float,
        dilations: Sequence[int],
        rope: bool,
        lepe: bool,
        mlp_ratio: float | None,
    ) -> None:
        super().__init__(dim, LinearAttention(dim, heads, rope, lepe))
        self.lem = LocalEnhancement(dim, int(dim * lem_ratio), dilations)
        self.mlp = None if mlp_ratio is None else Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(x)
        normed = self.norm2(x)
        x = x + self.lem(normed)
        return x if self.mlp is None else x + self.mlp(normed)


class ACL(nn.Module):
    """The re-designed ACL. [B, 3, H, W] in 0..1 -> restored [B, 3, H, W], any size (pads to multiples of 4 itself).

    channels: width at full resolution, doubled at each of the two deeper levels. blocks: per level, the same in
    encoder and decoder. head_dim: channels of an attention head. lem_ratio, dilations: of the local enhancement.
    rope, lepe, mlp_ratio: research switches (rotary positions, local positional term, an MLP beside it).
    """

    def __init__(
        self,
        channels: int = 32,
        blocks: Sequence[int] = (4, 6, 8),
        head_dim: int = 32,
        lem_ratio: float = 2.0,
        dilations: Sequence[int] = (1, 2, 4),
        rope: bool = True,
        lepe: bool = True,
        mlp_ratio: float | None = None,
    ) -> None:
        super().__init__()
        if len(blocks) != _LEVELS or min(blocks) < 0 or min(channels, head_dim, *dilations) < 1:
            raise ConfigError(f"ACL: blocks needs {_LEVELS} entries; channels, head_dim and dilations at least 1")
        if rope and channels % 4:
            raise ConfigError(f"ACL: rotary positions need channels to be a multiple of 4, got {channels}")
        widths = [channels * 2**level for level in range(_LEVELS)]

        def stage(level: int) -> nn.Sequential:
            width = widths[level]
            heads = max(1, width // head_dim)
            if width % heads:
                raise ConfigError(f"ACL: {width} channels at level {level} do not split into {heads} heads")
            return nn.Sequential(
                *(AclBlock(width, heads, lem_ratio, dilations, rope, lepe, mlp_ratio) for _ in range(blocks[level]))
            )

        steps = range(_LEVELS - 1)
        self.patch_embed = _ChannelsLastConv2d(3, channels, 3, padding=1)
        self.encoder = nn.ModuleList([stage(level) for level in range(_LEVELS)])
        self.down = nn.ModuleList([_ChannelsLastConv2d(widths[i], widths[i + 1], 3, 2, padding=1) for i in steps])
        self.decoder = nn.ModuleList([stage(level) for level in range(_LEVELS)])
        self.up = nn.ModuleList(
            [_ChannelsLastConvTranspose2d(widths[i + 1], widths[i], 4, 2, padding=1) for i in steps]
        )
        self.fuse = nn.ModuleList([_ChannelsLastConv2d(widths[i] * 2, widths[i], 1) for i in steps])
        self.out = _ChannelsLastConv2d(channels, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded, size = pad_to_multiple(x, 2 ** (_LEVELS - 1))
        y = self.encoder[0](self.patch_embed(rearrange(padded, "b c h w -> b h w c")))
        skips = []
        for level in range(1, _LEVELS):
            skips.append(y)
            y = self.encoder[level](self.down[level - 1](y))
        y = self.decoder[-1](y)
        for level in reversed(range(_LEVELS - 1)):
            y = self.decoder[level](self.fuse[level](torch.cat([self.up[level](y), skips.pop()], dim=-1)))
        return crop(padded + rearrange(self.out(y), "b h w c -> b c h w"), size)


_S = {"blocks": (4, 6, 8), "lem_ratio": 2.0, "dilations": (1, 2, 4)}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "S": {"channels": 32, "head_dim": 32, **_S},
    "B": {"channels": 48, "head_dim": 48, **_S},
}

_SIGNATURE = ("encoder.0.0.attn.qk.weight", "encoder.0.0.lem.branches.0.weight")
_MILA_SIGNATURE = ("attn.rope.rotations", "cpe1.weight", "mlp.fc1.weight")


def _build(config: Mapping[str, Any]) -> ACL:
    return construct(ACL, "ACL", config)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    channels = state["patch_embed.weight"].shape[0]
    blocks = tuple(count_indices(state, f"encoder.{level}.") for level in range(_LEVELS))
    first = "encoder.0.0"
    hidden = state[f"{first}.lem.proj_in.weight"].shape[0]
    branches = count_indices(state, f"{first}.lem.branches.")
    if channels > 4096 or max(blocks) > 256 or branches > 16 or hidden > 64 * channels:
        raise CheckpointError(
            f"ACL: {channels} channels, blocks {blocks}, {branches} branches: not a network of Mend's"
        )
    mlp = state.get(f"{first}.mlp.fc1.weight")
    return {
        "channels": channels,
        "blocks": blocks,
        # Heads and dilations leave no trace in the shapes: the variants' rule, unless the file's metadata says more.
        "head_dim": next((v["head_dim"] for v in VARIANTS.values() if v["channels"] == channels), 32),
        "lem_ratio": expansion_factor(layer_widths(state, _first_blocks("lem.proj_in"))),
        "dilations": tuple(2**i for i in range(branches)),
        "rope": True,
        "lepe": f"{first}.attn.lepe.weight" in state,
        "mlp_ratio": None if mlp is None else expansion_factor(layer_widths(state, _first_blocks("mlp.fc1"))),
    }


def _first_blocks(layer: str) -> list[str]:
    """The names of a layer in the first block of every level of the encoder."""
    return [f"encoder.{level}.0.{layer}" for level in range(_LEVELS)]


def _build_block(config: Mapping[str, Any]) -> MilaBlock:
    return construct(MilaBlock, "MILA block", config, without=("act",))  # the activations are fixed


def _block_config(state: State) -> dict[str, Any]:
    height, width, pairs, _ = state["attn.rope.rotations"].shape
    dim = pairs * 2
    if max(height, width, dim) > 4096:
        raise CheckpointError(f"MILA block: rotations for {height} x {width}, {dim} channels: not a block")
    return {
        "dim": dim,
        "input_resolution": (height, width),
        "num_heads": max(1, dim // 32),
        "mlp_ratio": expansion_factor([(dim, state["mlp.fc1.weight"].shape[0])]),
        "qkv_bias": "attn.qk.bias" in state,
        "norm_eps": 1e-5,
    }


ARCHITECTURES = [
    Architecture(
        id="acl",
        system="acl",
        title="ACL (re-designed)",
        paper="after Gu et al., ACL: Activating Capability of Linear Attention for Image Restoration, CVPR 2025; "
        "the layers are this project's own design",
        licence="this network is Mend's (Apache-2.0); official code and weights: unknown, and they do not fit it",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "input_resolution" not in config,
        tasks=("derain", "deblur"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        metadata_keys=("head_dim", "dilations", "rope"),
        bytes_per_pixel=lambda config: 2000.0,
        multiple_of=lambda config: 2 ** (_LEVELS - 1),
        global_statistics="linear attention sums over the whole picture: tiles differ slightly from the whole",
    ),
    Architecture(
        id="mila-block",
        system="acl",
        title="MILA block",
        paper="Han et al., Demystify Mamba in Vision: A Linear Attention Perspective, NeurIPS 2024",
        licence="official code MIT",
        detect=lambda state: all(key in state for key in _MILA_SIGNATURE),
        config_from_state_dict=_block_config,
        build=_build_block,
        matches_config=lambda config: "input_resolution" in config,
        kind="helper",
        signature=_MILA_SIGNATURE,
        computed_buffers=(r"^attn\.rope\.rotations$",),
        metadata_keys=("num_heads", "norm_eps"),
        global_statistics="linear attention sums over the whole picture",
    ),
]
