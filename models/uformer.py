"""Uformer: a U-shaped transformer of locally enhanced window blocks.

Wang et al., "Uformer: A General U-Shaped Transformer for Image Restoration", CVPR 2022, arXiv 2106.03106; retrained
for seven tasks with an uncertainty head by Wu et al. (TUR, AAAI 2025). State-dict keys are the released checkpoints',
misspelt ones included. Feature maps are [B, H, W, C], so pictures need not be square (the published code takes the
root of the number of tokens for both sides).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.state_dict import count_indices
from .layers.uncertainty import UncertaintyHead
from .layers.window import relative_position_index, shifted_window_mask, window_partition, window_reverse
from .registry import Architecture, Config, State, construct

_LEVELS = 4
_HEAD_CHANNELS = 64  # of TUR's uncertainty head, whatever the network's width


class _QueryKeyValue(nn.Module):
    """The released keys' names for the two projections."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_kv = nn.Linear(dim, dim * 2, bias=bias)


class WindowAttention(nn.Module):
    """Self-attention in windows with a learned bias per displacement. [B, windows, n, C] -> same, n = window^2."""

    def __init__(self, dim: int, window: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        # Stored by the released files; a constant, so what a file says is not read.
        self.register_buffer("relative_position_index", relative_position_index(window).clone())
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = _QueryKeyValue(dim, bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """mask: added to the scores, [windows, n, n]."""
        index = relative_position_index(self.window, x.device)
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)
        query = rearrange(self.qkv.to_q(x), "b w n (h d) -> b w h n d", h=self.heads)
        key, value = rearrange(self.qkv.to_kv(x), "b w n (two h d) -> two b w h n d", two=2, h=self.heads)
        if mask is None:
            y = F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (query, key, value)), attn_mask=bias[None])
            y = y.unflatten(0, x.shape[:2])
        else:  # the mask differs by window, not by image: image by image it need not be repeated
            bias = bias + mask[:, None].to(bias.dtype)
            attend = F.scaled_dot_product_attention
            y = torch.stack([attend(q, k, v, attn_mask=bias) for q, k, v in zip(query, key, value, strict=True)])
        return self.proj(rearrange(y, "b w h n d -> b w n (h d)"))


class LocallyEnhancedFeedForward(nn.Module):
    """LeFF: linear, depth-wise 3x3, linear, GELU between. [B, H, W, C] -> same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.dwconv = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.GELU())
        self.linear2 = nn.Sequential(nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dwconv(rearrange(self.linear1(x), "b h w c -> b c h w"))
        return self.linear2(rearrange(x, "b c h w -> b h w c"))


class LeWinBlock(nn.Module):
    """Window attention and LeFF, pre-norm, both residual. [B, H, W, C] -> same; sides multiples of the window."""

    def __init__(
        self, dim: int, heads: int, window: int, shift: int, ratio: float, bias: bool, modulator: bool
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.modulator = nn.Embedding(window * window, dim) if modulator else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads, bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = LocallyEnhancedFeedForward(dim, int(dim * ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, _ = x.shape
        y, mask = self.norm1(x), None
        if self.shift:
            y = y.roll((-self.shift, -self.shift), dims=(1, 2))
            mask = shifted_window_mask(height, width, self.window, self.shift, x.device)
        windows = window_partition(y, self.window)
        if self.modulator is not None:
            windows = windows + self.modulator.weight
        y = self.attn(windows.unflatten(0, (batch, -1)), mask).flatten(0, 1)
        y = window_reverse(y, self.window, height, width)
        if self.shift:
            y = y.roll((self.shift, self.shift), dims=(1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class Stage(nn.Module):
    """A run of blocks under the released key `blocks`; every second one shifts its windows."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        window: int,
        resolution: int,
        ratio: float,
        bias: bool,
        shift: bool,
        modulator: bool,
    ) -> None:
        super().__init__()
        # As published: a declared resolution no larger than the window gives one window, and nothing to shift.
        window, step = (resolution, 0) if resolution <= window else (window, window // 2 if shift else 0)
        self.window = window
        self.blocks = nn.ModuleList(
            [LeWinBlock(dim, heads, window, step if i % 2 else 0, ratio, bias, modulator) for i in range(depth)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Resample(nn.Module):
    """A convolution that halves or doubles the resolution. [B, H, W, C] -> [B, H', W', D]. Keys as released."""

    def __init__(self, key: str, conv: nn.Module) -> None:
        super().__init__()
        self.add_module(key, nn.Sequential(conv))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (conv,) = self.children()
        return rearrange(conv(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")


class _Projection(nn.Module):
    """The first or last 3x3 convolution, under the released key `proj`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Uformer(nn.Module):
    """Uformer. [B, dd_in, H, W] in 0..1 -> [B, in_chans, H, W]; sides multiples of 16 times the window.

    depths, num_heads: of four encoder stages, the bottleneck and four decoder stages. modulator: a learned offset for
    every window position in the decoder. img_size: the declared size of training crops; stages whose share of it is
    no larger than the window lose the shift. shift_flag: shifted windows at all. if_uncertainty: with TUR's head,
    which has 64 channels whatever the width.
    """

    def __init__(
        self,
        img_size: int = 256,
        in_chans: int = 3,
        dd_in: int = 3,
        embed_dim: int = 32,
        depths: Sequence[int] = (2,) * 9,
        num_heads: Sequence[int] = (1, 2, 4, 8, 16, 16, 8, 4, 2),
        win_size: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        token_projection: str = "linear",
        token_mlp: str = "leff",
        shift_flag: bool = True,
        modulator: bool = False,
        if_uncertainty: bool = True,
    ) -> None:
        super().__init__()
        stages = 2 * _LEVELS + 1
        if len(depths) != stages or len(num_heads) != stages:
            raise ConfigError(f"Uformer: depths and num_heads need {stages} entries")
        if (token_projection, token_mlp) != ("linear", "leff"):
            raise ConfigError("Uformer: only token_projection 'linear' and token_mlp 'leff' were ever released")
        if if_uncertainty and embed_dim * 2 != _HEAD_CHANNELS:
            raise ConfigError(f"Uformer: the uncertainty head takes {_HEAD_CHANNELS} channels: embed_dim must be 32")
        widths = [embed_dim * 2**level for level in range(_LEVELS)]
        # A decoder stage works on its skip connection beside the upsampled features: twice the width.
        dims = [*widths, widths[-1] * 2, *(width * 2 for width in reversed(widths))]
        levels = [*range(_LEVELS), _LEVELS, *reversed(range(_LEVELS))]
        for stage, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            if dim % heads:
                raise ConfigError(f"Uformer: stage {stage} has {dim} channels, not a multiple of {heads} heads")

        def stage(index: int) -> Stage:
            decoder = index > _LEVELS
            return Stage(
                dims[index],
                depths[index],
                num_heads[index],
                win_size,
                img_size // 2 ** levels[index],
                mlp_ratio,
                qkv_bias,
                shift_flag,
                modulator and decoder,
            )

        self.in_chans, self.dd_in = in_chans, dd_in
        self.input_proj = _Projection(nn.Conv2d(dd_in, embed_dim, 3, padding=1), nn.LeakyReLU(inplace=True))
        self.output_proj = _Projection(nn.Conv2d(2 * embed_dim, in_chans, 3, padding=1))
        for i, width in enumerate(widths):
            self.add_module(f"encoderlayer_{i}", stage(i))
            self.add_module(f"dowsample_{i}", _Resample("conv", nn.Conv2d(width, width * 2, 4, 2, padding=1)))
        self.conv = stage(_LEVELS)
        for i in range(_LEVELS):
            below, width = dims[_LEVELS + i], widths[_LEVELS - 1 - i]
            self.add_module(f"upsample_{i}", _Resample("deconv", nn.ConvTranspose2d(below, width, 2, 2)))
            self.add_module(f"decoderlayer_{i}", stage(_LEVELS + 1 + i))
        self.var_conv = UncertaintyHead(_HEAD_CHANNELS, in_chans) if if_uncertainty else None
        self.multiple_of = math.lcm(*(2**level * self.stage(i).window for i, level in enumerate(levels)))

    def stage(self, index: int) -> Stage:
        """Stage number `index` in order of execution: 0..3 encoder, 4 bottleneck, 5..8 decoder."""
        if index == _LEVELS:
            return self.conv
        return getattr(self, f"encoderlayer_{index}" if index < _LEVELS else f"decoderlayer_{index - _LEVELS - 1}")

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the output projection and the uncertainty head read, [B, 2 embed_dim, H, W]."""
        if x.shape[-2] % self.multiple_of or x.shape[-1] % self.multiple_of:
            size = f"{x.shape[-2]} x {x.shape[-1]}"
            raise InputError(f"Uformer: sides must be multiples of {self.multiple_of}, got {size}")
        y = rearrange(self.input_proj(x), "b c h w -> b h w c")
        skips = []
        for i in range(_LEVELS):
            skips.append(self.stage(i)(y))
            y = getattr(self, f"dowsample_{i}")(skips[-1])
        y = self.conv(y)
        for i in range(_LEVELS):
            y = self.stage(_LEVELS + 1 + i)(torch.cat([getattr(self, f"upsample_{i}")(y), skips.pop()], dim=-1))
        return rearrange(y, "b h w c -> b c h w")

    def _image(self, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = self.output_proj(features)
        return x + y if self.dd_in == self.in_chans else y

    def forward_with_uncertainty(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The restored picture and its uncertainty, both [B, 3, H, W]; ConfigError without an uncertainty head."""
        if self.var_conv is None:
            raise ConfigError("Uformer: this network has no uncertainty head (var_conv.*)")
        features = self.features(x)
        return self._image(features, x), self.var_conv(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._image(self.features(x), x)


_HEADS = (1, 2, 4, 8, 16, 16, 8, 4, 2)
_COMMON = {"img_size": 256, "embed_dim": 32, "win_size": 8, "mlp_ratio": 4.0, "num_heads": _HEADS}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "TUR 7 tasks": {**_COMMON, "depths": (1, 2, 8, 8, 2, 8, 8, 2, 1), "modulator": True, "if_uncertainty": True},
    "TUR defaults": {**_COMMON, "depths": (2,) * 9, "modulator": False, "if_uncertainty": True},
    "B": {**_COMMON, "depths": (1, 2, 8, 8, 2, 8, 8, 2, 1), "modulator": True, "if_uncertainty": False},
}

_SIGNATURE = ("input_proj.proj.0.weight", "encoderlayer_0.blocks.0.attn.qkv.to_q.weight", "dowsample_0.conv.0.weight")
_IGNORED = {"drop_rate", "attn_drop_rate", "drop_path_rate", "patch_norm", "use_checkpoint"}  # of training only


def _build(config: Mapping[str, Any]) -> Uformer:
    return construct(Uformer, "Uformer", config, without=_IGNORED)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    embed_dim, dd_in = state["input_proj.proj.0.weight"].shape[:2]
    stages = [f"encoderlayer_{i}" for i in range(_LEVELS)] + ["conv"] + [f"decoderlayer_{i}" for i in range(_LEVELS)]
    first = f"{stages[0]}.blocks.0"
    tables = [tuple(state[f"{stage}.blocks.0.attn.relative_position_bias_table"].shape) for stage in stages]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    depths = tuple(count_indices(state, f"{stage}.blocks.") for stage in stages)
    if (2 * window - 1) ** 2 != tables[0][0] or window > 64 or embed_dim > 1024 or max(depths) > 128:
        raise CheckpointError(f"Uformer: width {embed_dim}, tables of {tables[0][0]} rows: not a Uformer")
    # Deep stages of a network declared for small crops have smaller windows: the crop size shows there.
    smaller = [(math.isqrt(rows) + 1) // 2 * 2 ** min(i, 2 * _LEVELS - i) for i, (rows, _) in enumerate(tables)]
    shrunk = [size for size, (rows, _) in zip(smaller, tables, strict=True) if rows != tables[0][0]]
    return {
        "img_size": shrunk[0] if shrunk else 256,
        "in_chans": state["output_proj.proj.0.weight"].shape[0],
        "dd_in": dd_in,
        "embed_dim": embed_dim,
        "win_size": window,
        "token_projection": "linear",
        "token_mlp": "leff",
        "mlp_ratio": state[f"{first}.mlp.linear1.0.weight"].shape[0] / embed_dim,
        "qkv_bias": f"{first}.attn.qkv.to_q.bias" in state,
        "shift_flag": True,
        "depths": depths,
        "num_heads": tuple(heads for _, heads in tables),
        "modulator": "decoderlayer_0.blocks.0.modulator.weight" in state,
        "if_uncertainty": "var_conv.0.weight" in state,
    }


def _multiple_of(config: Config) -> int:
    window, size = config["win_size"], config.get("img_size", 256)
    return math.lcm(*(2**level * min(window, max(size // 2**level, 1)) for level in range(_LEVELS + 1)))


ARCHITECTURES = [
    Architecture(
        id="uformer",
        system="tur",
        title="Uformer",
        paper="Wang et al., Uformer: A General U-Shaped Transformer for Image Restoration, CVPR 2022, "
        "arXiv 2106.03106; retrained by Wu et al. (TUR), AAAI 2025",
        licence="TUR: none stated for code and weights; Uformer's own repository was not examined",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "win_size" in config or "embed_dim" in config,
        tasks=("deblur", "denoise", "jpeg", "derain", "dehaze", "low-light", "super-resolution"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        computed_buffers=(r"\.relative_position_index$",),
        metadata_keys=("img_size", "shift_flag"),
        multiple_of=_multiple_of,
        bytes_per_pixel=lambda config: 4700.0,
        restore_with_uncertainty=lambda module, image: module.forward_with_uncertainty(image),
        global_statistics="nothing global, but windows are counted from the picture's corner and reach far through "
        "five resolutions: tiles may differ slightly from the whole",
    )
]
