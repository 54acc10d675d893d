"""The uncertainty head of Task Uncertainty Regularization (Wu et al., AAAI 2025)."""

from __future__ import annotations

from torch import nn


class UncertaintyHead(nn.Sequential):
    """Features [B, C, H, W] -> a positive map [B, 3, H, W]: how hard each pixel is. Keys 0, 2, 4 as released."""

    def __init__(self, channels: int, out_channels: int = 3) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
            nn.Softplus(),
        )
