"""Normalisation over the channels of feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .layout import is_channels_last


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of every pixel. [B, C, H, W] -> [B, C, H, W]; statistics in float32.

    `bias=False` is Restormer's bias-free form: divided by the standard deviation, the mean stays. Wrap it as
    `body` where a checkpoint's keys ask for it (`NormBody`).
    """

    def __init__(self, channels: int, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None and is_channels_last(x):
            normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
            return normed.permute(0, 3, 1, 2)
        wide = x.float()
        centred = wide - wide.mean(dim=1, keepdim=True)
        # Not var_mean: across channels it is several times slower than two plain means.
        inverse = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + self.eps)
        weight = self.weight[:, None, None]
        if self.bias is None:
            return (wide * inverse).to(x.dtype) * weight
        return torch.addcmul(self.bias[:, None, None], (centred * inverse).to(x.dtype), weight)


class NormBody(nn.Module):
    """`ChannelLayerNorm` under the key `body`, as Restormer-like checkpoints store it."""

    def __init__(self, channels: int, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.body = ChannelLayerNorm(channels, bias, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)
