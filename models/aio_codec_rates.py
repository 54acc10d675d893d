"""What symbols of the all-in-one codec cost: the distributions that its entropy model learned, and their bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST_SCALE = 1e-5
LARGEST_SYMBOL = 30_000
"""What y and z are rounded to lies within plus and minus this, so that it fits 16 bits."""
_WITHOUT_FLOAT64 = ("mps",)


class CumulativeLayer(nn.Module):
    """One factor of the learned cumulative distribution of z."""

    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        self.h = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.01)
        self.b = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.01)
        self.a = None if last else nn.Parameter(torch.randn(1, channels, 1, 1) * 0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * F.softplus(self.h) + self.b
        return x if self.a is None else x + torch.tanh(x) * torch.tanh(self.a)


class BitEstimator(nn.Module):
    """Learned cumulative distribution per channel (Balle et al. 2018): [B, C, H, W] -> probabilities below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f1 = CumulativeLayer(channels, last=False)
        self.f2 = CumulativeLayer(channels, last=False)
        self.f3 = CumulativeLayer(channels, last=False)
        self.f4 = CumulativeLayer(channels, last=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.f4(self.f3(self.f2(self.f1(x)))))


class LowerBound(torch.autograd.Function):
    """max(x, bound) whose gradient also passes where it would bring x back above the bound."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bound: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * ((x >= ctx.bound) | (gradient < 0)), None


def bits_of(probability: torch.Tensor) -> torch.Tensor:
    """max(0, -log2(p + 1e-5)): the published rate estimate per symbol."""
    return LowerBound.apply(-torch.log2(probability + 1e-5), 0.0)


def gaussian_bits(symbols: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Bits of integers under zero-mean Gaussians of these standard deviations."""
    sigma = scales.clamp(SMALLEST_SCALE, 1e10)
    upper, lower = torch.special.ndtr((symbols + 0.5) / sigma), torch.special.ndtr((symbols - 0.5) / sigma)
    return bits_of(upper - lower)


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64 for tensors of a device: there, or on the CPU if it has no such numbers (Apple's)."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device
