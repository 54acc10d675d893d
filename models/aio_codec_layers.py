"""The layers of the all-in-one codec (Zeng et al., WACV 2025): its two transforms and what its entropy model is built of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .layers.attention import GatedFeedForward, TransposedAttention
from .layers.norm import NormBody
from .layers.restormer import Downsample, OverlapPatchEmbed, Upsample

# Transform --------------------------------------------------------------------------------------------------------------


class SpatialAttention(nn.Module):
    """Spatially decoupled attention: a gate from 1x5 and 5x1 depth-wise convolutions. [B, C, H, W] -> same."""

    def __init__(self, dim: int, sigmoid: bool) -> None:
        super().__init__()
        self.a = nn.Sequential(
            nn.Conv2d(dim, dim, 1),
            nn.GELU(),
            nn.Conv2d(dim, dim, (1, 5), padding=(0, 2), groups=dim, bias=False),
            nn.GELU(),
            nn.Conv2d(dim, dim, (5, 1), padding=(2, 0), groups=dim, bias=False),
        )
        self.v = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.sigmoid = sigmoid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.a(x)
        return self.proj((gate.sigmoid() if self.sigmoid else gate) * self.v(x))


class HybridBlock(nn.Module):
    """Channel attention, spatial attention, gated feed-forward, each normalised first and residual."""

    def __init__(self, dim: int, heads: int, expansion: float, bias: bool, norm_bias: bool, sigmoid: bool) -> None:
        super().__init__()
        self.norm1 = NormBody(dim, norm_bias)
        self.attn = TransposedAttention(dim, heads, bias)
        self.norm2 = NormBody(dim, norm_bias)
        self.ffn = GatedFeedForward(dim, expansion, bias)
        self.attn_s = SpatialAttention(dim, sigmoid)
        self.norm3 = NormBody(dim, norm_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.attn_s(self.norm3(x))
        return x + self.ffn(self.norm2(x))


class Stage(nn.Module):
    """Layers in a row, under the released key `blocks`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class AnalysisTransform(nn.Module):
    """Image [B, 3, H, W] -> features [B, 16 d, H/16, W/16]; `quality` scales the features at H/4."""

    def __init__(self, dim: int, counts: Sequence[int], make: Callable[[int, int], list[nn.Module]]) -> None:
        super().__init__()
        self.patch_embed = OverlapPatchEmbed(3, dim)
        stages = [Stage([*make(level, counts[level]), Downsample(dim * 2**level)]) for level in range(4)]
        self.encoder_x2, self.encoder_x4, self.encoder_x8, self.encoder_x16 = stages

    def forward(self, x: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
        x = self.encoder_x4(self.encoder_x2(self.patch_embed(x))) * quality
        return self.encoder_x16(self.encoder_x8(x))


class SynthesisTransform(nn.Module):
    """Features [B, 16 d, h, w] -> [B, d, 16 h, 16 w]; `quality` scales the features at a quarter of the size."""

    def __init__(self, dim: int, counts: Sequence[int], make: Callable[[int, int], list[nn.Module]]) -> None:
        super().__init__()
        stages = [Stage([Upsample(dim * 2 ** (level + 1)), *make(level, counts[level])]) for level in range(4)]
        self.decoder_x8, self.decoder_x4, self.decoder_x2, self.decoder_x1 = reversed(stages)

    def forward(self, x: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
        x = self.decoder_x4(self.decoder_x8(x)) * quality
        return self.decoder_x1(self.decoder_x2(x))


# Entropy model ----------------------------------------------------------------------------------------------------------


class DepthConv(nn.Module):
    """1x1, depth-wise 3x3, 1x1, with a residual (projected where the width changes)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.LeakyReLU(0.01))
        self.depth_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.conv2 = nn.Conv2d(channels, out_channels, 1)
        self.adaptor = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x if self.adaptor is None else self.adaptor(x)
        return self.conv2(self.depth_conv(self.conv1(x))) + residual


class GatedConvFeedForward(nn.Module):
    """Residual 1x1 feed-forward of two halves: the sum of their activations, or the first gated by the second."""

    def __init__(self, channels: int, product: bool, expansion: float) -> None:
        super().__init__()
        self.product = product
        half = int(channels * expansion / 2)
        self.conv = nn.Conv2d(channels, 2 * half, 1)
        self.conv_out = nn.Conv2d(half, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        if self.product:
            return x + self.conv_out(a * F.leaky_relu(b, 0.1))
        return x + self.conv_out(F.leaky_relu(a, 0.1) + F.leaky_relu(b, 0.01))


class DepthConvBlock(nn.Module):
    """`DepthConv` and a feed-forward, under the released key `block`."""

    def __init__(self, channels: int, out_channels: int, product: bool = False, expansion: float = 4.0) -> None:
        super().__init__()
        self.block = nn.Sequential(
            DepthConv(channels, out_channels), GatedConvFeedForward(out_channels, product, expansion)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class UpsampleBlock(nn.Module):
    """Residual pixel-shuffle up-sampling by 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.subpel_conv = nn.Sequential(nn.Conv2d(channels, channels * 4, 1), nn.PixelShuffle(2))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(channels, channels * 4, 1), nn.PixelShuffle(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        main = F.leaky_relu(self.conv(F.leaky_relu(self.subpel_conv(x), 0.01)), 0.1)
        return main + self.upsample(x)
