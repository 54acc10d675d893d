"""Perceptual loss: distance between features of a VGG16, and what MPMF-Net is trained with.

Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016, arXiv 1603.08155.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Features = Callable[[torch.Tensor], list[torch.Tensor]]


class VGG16Features(nn.Module):
    """Features of VGG16 after relu1_2, relu2_2 and relu3_3; keys as torchvision's (`features.N`).

    [B, 3, H, W] -> three maps at full, half and quarter size. No normalisation of the input.
    """

    TAPS = (3, 8, 15)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width, count in ((64, 2), (128, 2), (256, 3)):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.TAPS:
                taps.append(x)
        return taps


def perceptual_loss(features: Features, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the taps of the mean squared difference of features; images [B, 3, H, W] in 0..1; a scalar."""
    with torch.no_grad():
        wanted = features(target)
    pairs = zip(features(restored), wanted, strict=True)
    return torch.stack([F.mse_loss(got, want) for got, want in pairs]).mean()


@dataclass(frozen=True)
class CoarseToFineLoss:
    """MPMF-Net's loss and its terms (scalars)."""

    total: torch.Tensor
    l1: torch.Tensor
    perceptual: torch.Tensor
    coarse: torch.Tensor


def coarse_to_fine_loss(
    features: Features,
    restored: torch.Tensor,
    coarse: torch.Tensor,
    target: torch.Tensor,
    *,
    perceptual_weight: float = 0.04,
    coarse_weight: float = 0.1,
) -> CoarseToFineLoss:
    """L1 + perceptual on the restored image, L1 on the coarse one against every fourth pixel of the target.

    restored, target [B, 3, H, W] in 0..1, coarse [B, 3, H/4, W/4]; weights as published for MPMF-Net.
    """
    l1 = F.l1_loss(restored, target)
    perceptual = perceptual_loss(features, restored, target)
    coarse_l1 = F.l1_loss(coarse, target[:, :, ::4, ::4])
    total = l1 + perceptual_weight * perceptual + coarse_weight * coarse_l1
    return CoarseToFineLoss(total, l1, perceptual, coarse_l1)
