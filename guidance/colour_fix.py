"""Giving a restored picture the colours of the picture it was made from. Pictures [B, C, H, W], any range, not clamped.

Wavelet form: Wang et al., "Exploiting Diffusion Prior for Real-World Image Super-Resolution", IJCV 2024 (StableSR);
statistics form: Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
ICCV 2017.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import InputError


def _check(content: torch.Tensor, style: torch.Tensor) -> None:
    if content.shape[1:] != style.shape[1:] or len(style) not in (1, len(content)):
        raise InputError(
            f"colour reference: {tuple(style.shape)} does not fit the picture {tuple(content.shape)}; resize it first"
        )


def low_frequencies(image: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """What is left after `levels` binomial blurs of radius 1, 2, 4, ... (the a-trous wavelet's last approximation)."""
    binomial = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype, device=image.device)
    across = binomial.expand(image.shape[1], 1, 1, 3)
    for level in range(levels):
        radius = 2**level
        padded = F.pad(image, (radius,) * 4, mode="replicate")
        rows = F.conv2d(padded, across, groups=image.shape[1], dilation=radius)
        image = F.conv2d(rows, across.transpose(2, 3), groups=image.shape[1], dilation=radius)
    return image


def wavelet_colour(content: torch.Tensor, style: torch.Tensor, levels: int = 5) -> torch.Tensor:
    """The details of `content` on the low frequencies of `style`."""
    _check(content, style)
    # Blurring is linear: one pass over the difference replaces one over each picture.
    return content + low_frequencies(style - content, levels)


def adain_colour(content: torch.Tensor, style: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """`content` with the mean and standard deviation of `style`, per picture and channel."""
    _check(content, style)
    (var_c, mean_c), (var_s, mean_s) = (torch.var_mean(x, dim=(2, 3), keepdim=True) for x in (content, style))
    return (content - mean_c) * ((var_s + eps) / (var_c + eps)).sqrt() + mean_s


def edge_magnitude(image: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Sobel gradient magnitude of the mean of the channels, [B, 1, H, W]: what OSDFace's edge-aware loss compares."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=image.dtype, device=image.device)
    gradients = F.conv2d(image.mean(dim=1, keepdim=True), torch.stack([sobel, sobel.T])[:, None], padding=1)
    return (gradients.square().sum(dim=1, keepdim=True) + eps).sqrt()
