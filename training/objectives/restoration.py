"""Losses between a restored image and its clean original, and the plain training objective made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


def charbonnier(restored: torch.Tensor, target: torch.Tensor, epsilon: float = 1e-3) -> torch.Tensor:
    """Mean of sqrt(difference^2 + epsilon^2): the absolute difference, smooth at zero. Any shape; a scalar."""
    return ((restored.float() - target.float()).square() + epsilon**2).sqrt().mean()


def log_error(restored: torch.Tensor, target: torch.Tensor, floor: float = 1e-5) -> torch.Tensor:
    """Mean over the images of [B, C, H, W] of the logarithm of the mean squared error: PSNR, up to sign and scale.

    An image's gradient is divided by its error, so that a dark or hazy one (a large error, the same everywhere) does not
    drown a noisy one.
    """
    error = (restored.float() - target.float()).square().mean(dim=(1, 2, 3))
    return (error + floor).log().mean()


def fft_loss(restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of real and imaginary parts of the 2-D spectra of [B, C, H, W] images; a scalar."""
    difference = torch.fft.rfft2(restored.float()) - torch.fft.rfft2(target.float())
    return torch.view_as_real(difference).abs().mean()


@dataclass(frozen=True)
class Restoration:
    """Charbonnier + `fft` * spectrum difference + `log` * log error, and what some networks add.

    Those are `balance` * the routing loss (MoCE-IR), and `coarse` * the absolute error of a coarse image against every
    fourth pixel of the clean one (MPMF-Net, whose forward pass returns both).
    Called with the module, a batch of pairs [B, 3, H, W] and a CPU generator for what the network draws; returns the
    loss and its parts as numbers for the log.
    """

    fft: float = 0.1
    balance: float = 0.01
    coarse: float = 0.1
    log: float = 0.0
    pixel: float = 1.0
    floor: float = 1e-5
    """Mean squared error below which the log error hardly falls: the smaller, the more nearly perfect images weigh."""

    def __call__(
        self, module: nn.Module, damaged: torch.Tensor, clean: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parts: dict[str, torch.Tensor] = {}
        if hasattr(module, "forward_with_routing"):
            experts = module.dec[0][2].layers[0].adapter.routing.freq_gate.out_features
            shape = (len(module.decoder_blocks), damaged.shape[0], experts)
            noise = torch.randn(shape, generator=generator).to(damaged.device)
            restored, routing = module.forward_with_routing(damaged, noise)
            parts["balance"] = module.balance_loss(routing)
        else:
            restored = module(damaged)
        if isinstance(restored, tuple):
            restored, coarse = restored
            parts["coarse"] = charbonnier(coarse, clean[:, :, ::4, ::4])
        parts["pixel"] = charbonnier(restored, clean)
        parts["fft"] = fft_loss(restored, clean)
        loss = self.pixel * parts["pixel"] + self.fft * parts["fft"]
        for name in ("balance", "coarse"):
            loss = loss + getattr(self, name) * parts.get(name, 0.0)
        if self.log:
            parts["log"] = log_error(restored, clean, self.floor)
            loss = loss + self.log * parts["log"]
        return loss, {name: value.detach() for name, value in parts.items()}
