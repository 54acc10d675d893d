"""Losses between a restored image and its clean original."""

from __future__ import annotations

import torch


def fft_loss(restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of real and imaginary parts of the 2-D spectra of [B, C, H, W] images; a scalar."""
    difference = torch.fft.rfft2(restored.float()) - torch.fft.rfft2(target.float())
    return torch.view_as_real(difference).abs().mean()
