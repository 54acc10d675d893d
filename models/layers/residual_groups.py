"""The frame that SwinIR introduced and MambaIR, MaIR and MambaIRv2 keep: groups of blocks between two convolutions.

Liang et al., "SwinIR: Image Restoration Using Swin Transformer", ICCVW 2021, arXiv 2108.10257. State-dict keys are the
released checkpoints'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import CheckpointError, ConfigError
from .state_dict import count_indices
from .state_space import convolve

_RGB_MEAN = (0.4488, 0.4371, 0.4040)
_HEAD_CHANNELS = 64
UPSAMPLERS = ("", "pixelshuffle", "pixelshuffledirect", "nearest+conv")

WITHOUT_EFFECT = frozenset(
    "img_size patch_size patch_norm drop_rate drop_path_rate norm_layer use_checkpoint dynamic_ids ape batch_size".split()
)
"""Constructor arguments of the official classes that do not change what the network computes when it restores."""


class Blocks(nn.Module):
    """A run of blocks under the key `name`, each called with the map and what the network prepared for this size."""

    def __init__(self, name: str, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.add_module(name, nn.ModuleList(blocks))

    def forward(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        for block in next(self.children()):
            x = block(x, prepared)
        return x


def _group_convolution(dim: int, connection: str) -> nn.Module:
    if connection == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    if connection != "3conv":
        raise ConfigError(f"resi_connection is {connection!r}, must be '1conv' or '3conv'")
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim // 4, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim, 3, padding=1),
    )


class ResidualGroup(nn.Module):
    """Blocks and a convolution, residual. [B, H, W, C] -> same."""

    def __init__(self, dim: int, name: str, blocks: Sequence[nn.Module], connection: str) -> None:
        super().__init__()
        self.residual_group = Blocks(name, blocks)
        self.conv = _group_convolution(dim, connection)

    def forward(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        return x + convolve(self.conv, self.residual_group(x, prepared))


class ResidualGroupNetwork(nn.Module):
    """Base of the flat networks: [B, C, H, W] in 0..1, any size -> [B, C, scale * H, scale * W], not clamped.

    A subclass gives the blocks (one list a group) and `prepare`, which makes what all blocks share for one forward
    pass (scan orders, attention masks).
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Module]],
        *,
        blocks_key: str,
        embed_dim: int,
        in_chans: int,
        upscale: int,
        upsampler: str | None,
        resi_connection: str,
        img_range: float,
    ) -> None:
        super().__init__()
        if in_chans not in (1, 3):
            raise ConfigError(f"in_chans is {in_chans}, must be 1 (grey) or 3 (colour)")
        if not groups or not all(groups):
            raise ConfigError("depths needs at least one group of at least one block")
        self.in_chans, self.img_range = in_chans, img_range
        self.upsampler = upsampler or ""
        # Not in the state dict: no checkpoint carries it.
        mean = torch.tensor(_RGB_MEAN if in_chans == 3 else (0.0,)).view(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.layers = nn.ModuleList(
            [ResidualGroup(embed_dim, blocks_key, blocks, resi_connection) for blocks in groups]
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = _group_convolution(embed_dim, resi_connection)
        self._add_head(embed_dim, upscale)

    def _add_head(self, dim: int, scale: int) -> None:
        channels, features = self.in_chans, _HEAD_CHANNELS
        if self.upsampler not in UPSAMPLERS:
            raise ConfigError(f"upsampler is {self.upsampler!r}, must be one of {', '.join(map(repr, UPSAMPLERS))}")
        self.scale = int(scale) if self.upsampler else 1
        if self.upsampler == "":
            self.conv_last = nn.Conv2d(dim, channels, 3, padding=1)
            return
        if self.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(
                nn.Conv2d(dim, channels * self.scale**2, 3, padding=1), nn.PixelShuffle(self.scale)
            )
            return
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, features, 3, padding=1), nn.LeakyReLU(0.01))
        if self.upsampler == "pixelshuffle":
            self.upsample = nn.Sequential(*_shuffle_steps(features, self.scale))
        else:
            if self.scale != 4:
                raise ConfigError(f"upsampler 'nearest+conv' enlarges 4 times, not {scale}")
            self.conv_up1 = nn.Conv2d(features, features, 3, padding=1)
            self.conv_up2 = nn.Conv2d(features, features, 3, padding=1)
            self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, channels, 3, padding=1)

    def prepare(self, x: torch.Tensor, **options: Any) -> Any:
        """What every block needs besides the map x [B, H, W, C]."""
        raise NotImplementedError

    def features(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Deep features [B, C, H, W] of the normalised picture x."""
        shallow = self.conv_first(x)
        deep = self.patch_embed["norm"](shallow.permute(0, 2, 3, 1))
        prepared = self.prepare(deep, **options)
        for group in self.layers:
            deep = group(deep, prepared)
        return self.conv_after_body(self.norm(deep).permute(0, 3, 1, 2)) + shallow

    def reconstruct(self, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The (normalised) result from deep features and the normalised picture."""
        if self.upsampler == "":
            return x + self.conv_last(features)
        if self.upsampler == "pixelshuffledirect":
            return self.upsample(features)
        features = self.conv_before_upsample(features)
        if self.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(features))
        for convolution in (self.conv_up1, self.conv_up2):
            features = F.leaky_relu(convolution(F.interpolate(features, scale_factor=2.0, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(features), 0.2))

    def forward(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        x = (image - self.mean) * self.img_range
        return self.reconstruct(self.features(x, **options), x) / self.img_range + self.mean


def _shuffle_steps(features: int, scale: int) -> list[nn.Module]:
    factors = [2] * (scale.bit_length() - 1) if scale & (scale - 1) == 0 else [scale]
    if factors not in ([2], [2, 2], [2, 2, 2], [3]):
        raise ConfigError(f"upsampler 'pixelshuffle' enlarges 2, 3, 4 or 8 times, not {scale}")
    steps: list[nn.Module] = []
    for factor in factors:
        steps += [nn.Conv2d(features, features * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
    return steps


def frame_config(state: Mapping[str, torch.Tensor], blocks_key: str) -> dict[str, Any]:
    """The frame's hyper-parameters from a state dict. Raises CheckpointError for shapes that cannot be right."""
    embed_dim, in_chans = state["conv_first.weight"].shape[:2]
    groups = count_indices(state, "layers.")
    depths = tuple(count_indices(state, f"layers.{i}.residual_group.{blocks_key}.") for i in range(groups))
    upsampler, upscale = _head(state, in_chans)
    if not (in_chans in (1, 3) and 1 <= embed_dim <= 2048 and depths and min(depths) >= 1 and sum(depths) <= 512):
        raise CheckpointError(
            f"absurd sizes: {embed_dim} channels, {in_chans} in the image, {depths} blocks in {groups} groups"
        )
    return {
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": depths,
        "upscale": upscale,
        "upsampler": upsampler,
        "resi_connection": "1conv" if "conv_after_body.weight" in state else "3conv",
        "img_range": 1.0,
    }


def _head(state: Mapping[str, torch.Tensor], in_chans: int) -> tuple[str, int]:
    """Upsampler and scale."""
    if "conv_up1.weight" in state:
        return "nearest+conv", 4
    if "upsample.0.weight" not in state:
        return "", 1
    rows, columns = state["upsample.0.weight"].shape[:2]
    if "conv_before_upsample.0.weight" not in state:
        scale = math.isqrt(rows // in_chans)
        if not 1 <= scale <= 8 or scale * scale * in_chans != rows:
            raise CheckpointError(f"upsample.0.weight has {rows} rows, not {in_chans} times a square up to 64")
        return "pixelshuffledirect", scale
    factor, steps = math.isqrt(rows // columns), count_indices(state, "upsample.")
    if rows != columns * factor**2 or (factor, steps) not in ((2, 1), (2, 2), (2, 3), (3, 1)):
        raise CheckpointError(f"upsample: {steps} steps from {columns} to {rows} channels enlarge by no known factor")
    return "pixelshuffle", factor**steps
