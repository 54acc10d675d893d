"""SwinIR in the edition of DCPT: no relative position bias, no mask for shifted windows.

Liang et al., "SwinIR: Image Restoration Using Swin Transformer", ICCVW 2021, arXiv 2108.10257; DCPT: Hu et al.,
"Universal Image Restoration Pre-training via Degradation Classification", ICLR 2025, arXiv 2501.15510. Shifted windows
attend freely across the wrapped border of the picture. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError
from .layers.state_dict import count_indices, expansion_factor
from .layers.window import window_partition, window_reverse
from .registry import Architecture, State, construct

_ENCODER_STAGES = _DECODER_STAGES = 3
_MEAN = (0.4488, 0.4371, 0.4040)
_OFFICIAL_HEAD_WIDTH, _OFFICIAL_WINDOW = 30, 8


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows. [windows, pixels, C] -> same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = rearrange(self.qkv(x), "w n (three h d) -> three w h n d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(mixed, "w h n d -> w n (h d)"))


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention and feed-forward, both residual; odd blocks shift the windows by half. [B, H, W, C] -> same."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, hidden: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        normed = self.norm1(x)
        if self.shift:
            normed = normed.roll((-self.shift, -self.shift), dims=(1, 2))
        mixed = window_reverse(self.attn(window_partition(normed, self.window)), self.window, height, width)
        if self.shift:
            mixed = mixed.roll((self.shift, self.shift), dims=(1, 2))
        x = x + mixed
        return x + self.mlp(self.norm2(x))


class Blocks(nn.Module):
    """A run of blocks, under the released key `blocks`."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ResidualSwinStage(nn.Module):
    """Blocks, then a 3x3 convolution, residual (RSTB). [B, H, W, C] -> same."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, hidden: int) -> None:
        super().__init__()
        self.residual_group = Blocks(
            [SwinBlock(dim, heads, window, window // 2 if index % 2 else 0, hidden) for index in range(depth)]
        )
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _channels_last(self.conv(_channels_first(self.residual_group(x)))) + x


def _channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


class SwinIR(nn.Module):
    """The network. [B, 3, H, W] in 0..1, H and W multiples of the window -> same shape, not clamped.

    `depths` and `num_heads` have an entry for each of the six stages: three in a list, three as attributes, as DCPT
    stores them.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 180,
        depths: Sequence[int] = (6,) * 6,
        num_heads: Sequence[int] = (6,) * 6,
        mlp_ratio: float = 2.0,
        window_size: int = 8,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        stages = _ENCODER_STAGES + _DECODER_STAGES
        if len(depths) != stages or len(num_heads) != stages:
            raise ConfigError(f"SwinIR: depths and num_heads need {stages} entries each")
        if any(embed_dim % heads for heads in num_heads):
            raise ConfigError(f"SwinIR: embed_dim {embed_dim} does not divide into {tuple(num_heads)} heads")
        if in_chans not in (1, 3):
            raise ConfigError(f"SwinIR: in_chans is {in_chans}, must be 1 or 3")
        # Not in the state dict: a checkpoint does not carry it.
        mean = torch.tensor(_MEAN if in_chans == 3 else (0.0,)).view(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        made = [
            ResidualSwinStage(embed_dim, depth, heads, window_size, int(embed_dim * mlp_ratio))
            for depth, heads in zip(depths, num_heads, strict=True)
        ]
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.encode_layers = nn.ModuleList(made[:_ENCODER_STAGES])
        for index, stage in enumerate(made[_ENCODER_STAGES:]):
            self.add_module(f"decode_layers{index}", stage)
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.conv_last = nn.Conv2d(embed_dim, in_chans, 3, padding=1)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Two maps [B, C, H, W] at full resolution: after the first convolution, and after the encoder stages."""
        shallow = self.conv_first(x - self.mean)
        deep = self.patch_embed["norm"](_channels_last(shallow))
        for stage in self.encode_layers:
            deep = stage(deep)
        return [shallow, _channels_first(deep)]

    def decode(self, features: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Output [B, C, H, W] of every decoder stage in turn, from the maps of `encode`."""
        x = _channels_last(features[-1])
        for index in range(_DECODER_STAGES):
            x = self.get_submodule(f"decode_layers{index}")(x)
            yield _channels_first(x)

    def decoder_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What a degradation classifier looks at: the decoder stages' maps, the last stage first, all full size."""
        return list(self.decode(self.encode(x)))[::-1]

    def reconstruct(self, features: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The restored image from the maps of `encode` and the image they were made from."""
        (decoded,) = deque(self.decode(features), maxlen=1)  # the earlier maps are freed on the way
        deep = self.conv_after_body(_channels_first(self.norm(_channels_last(decoded)))) + features[0]
        return x + self.conv_last(deep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reconstruct(self.encode(x), x)


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "dcpt-5d": {
        "embed_dim": 180,
        "depths": (6,) * 6,
        "num_heads": (6,) * 6,
        "mlp_ratio": 2.0,
        "window_size": 8,
        "in_chans": 3,
    },
}
_SIGNATURE = ("encode_layers.0.residual_group.blocks.0.attn.qkv.weight", "decode_layers0.conv.weight")
_WITHOUT_EFFECT = {"upscale", "img_range", "img_size", "patch_size", "upsampler", "resi_connection"}


def _build(config: Mapping[str, Any]) -> SwinIR:
    if config.get("upscale", 1) != 1:
        raise ConfigError("SwinIR: DCPT's edition restores at the same size, upscale must be 1")
    return construct(SwinIR, "SwinIR", config, without=_WITHOUT_EFFECT)


def _guess_heads(embed_dim: int) -> int:
    """Heads leave no trace in a state dict: as many as give the official head width, else the official number."""
    candidates = (embed_dim // _OFFICIAL_HEAD_WIDTH, 6, 4, 3, 2, 1)
    return next(heads for heads in candidates if heads and embed_dim % heads == 0)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    embed_dim, in_chans = state["conv_first.weight"].shape[:2]
    stages = [f"encode_layers.{i}" for i in range(_ENCODER_STAGES)]
    stages += [f"decode_layers{i}" for i in range(_DECODER_STAGES)]
    depths = tuple(count_indices(state, f"{stage}.residual_group.blocks.") for stage in stages)
    hidden = state[f"{stages[0]}.residual_group.blocks.0.mlp.fc1.weight"].shape[0]
    if not (1 <= embed_dim <= 2048 and in_chans in (1, 3) and min(depths) >= 1 and hidden >= 1):
        raise CheckpointError(
            f"SwinIR: absurd sizes: {embed_dim} channels, {in_chans} in the image, {depths} blocks a stage"
        )
    return {
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": (_guess_heads(embed_dim),) * len(depths),
        "mlp_ratio": expansion_factor([(embed_dim, hidden)]),
        "window_size": _OFFICIAL_WINDOW,
        "in_chans": in_chans,
    }


ARCHITECTURES = [
    Architecture(
        id="dcpt-swinir",
        system="dcpt",
        title="SwinIR (DCPT)",
        paper="Liang et al., SwinIR, ICCVW 2021, arXiv 2108.10257; edited and pre-trained by Hu et al., Universal Image "
        "Restoration Pre-training via Degradation Classification, ICLR 2025, arXiv 2501.15510",
        licence="network code Apache-2.0; DCPT code and weights: none stated, ask the authors",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "embed_dim" in config,
        tasks=("derain", "denoise", "dehaze", "low-light", "deblur"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        metadata_keys=("num_heads", "window_size"),
        multiple_of=lambda config: config["window_size"],
        bytes_per_pixel=lambda config: 50.0 * config["embed_dim"],
        global_statistics="shifted windows wrap around the border, so every border (of a tile as well) also sees the "
        "opposite one; an overlap of a window or more hides it",
    )
]
