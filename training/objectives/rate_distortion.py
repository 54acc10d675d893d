"""Rate-distortion training of the all-in-one codec: what its bits cost against how far its pictures are from clean ones.

Zeng et al., "All-in-One Image Compression and Restoration", WACV 2025. The published code lacks its training step; what
stands in for rounding here is usual in this family of codecs (Minnen & Singh, ICIP 2020): bits are counted with uniform
noise added, pictures are decoded from rounded values whose gradient passes straight through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import ConfigError
from ...models.aio_codec import LATENT_STRIDE, QUALITIES, AllInOneCodec, rate_weight
from ...models.aio_codec_rates import gaussian_bits
from ...models.layers.padding import crop, pad_to_multiple
from .base import Method, Network, Objective, Parts, Pass

FIRST_QUALITIES = ((0, 21), (42, 63))
"""Pairs of qualities of the published first stage; afterwards they are drawn from all 64."""


def straight_through(x: torch.Tensor) -> torch.Tensor:
    """Rounds, with the gradient of doing nothing."""
    return x + (x.round() - x).detach()


def _noisy(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """x + U(-1/2, 1/2): what stands for rounding where bits are counted."""
    return x + (torch.rand(x.shape, generator=generator) - 0.5).to(x)


@dataclass(frozen=True)
class RateDistortion:
    """lambda(quality) * distortion + bits per pixel, averaged over the qualities of a step.

    Distortion: squared error to the clean picture, summed over RGB, averaged over pixels. Called as other objectives are:
    the codec, damaged and clean pictures [B, 3, H, W] in 0..1, and a CPU generator for noise and qualities.

    anchors: how many qualities a step draws. pairs: sets of qualities to draw one from instead (`FIRST_QUALITIES`).
    clean: probability with which a picture is compressed as it is, undamaged.
    """

    anchors: int = 2
    pairs: Sequence[Sequence[int]] = ()
    clean: float = 0.2

    def __post_init__(self) -> None:
        if self.anchors < 1 or any(not 0 <= q < QUALITIES for pair in self.pairs for q in pair):
            raise ConfigError(f"rate-distortion: needs at least one quality, each in 0..{QUALITIES - 1}")
        if any(not pair for pair in self.pairs) or not 0 <= self.clean <= 1:
            raise ConfigError("rate-distortion: an empty set of qualities, or a probability outside 0..1")

    def __call__(
        self, module: AllInOneCodec, damaged: torch.Tensor, clean: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        swap = torch.rand(len(damaged), 1, 1, 1, generator=generator) < self.clean
        padded, size = pad_to_multiple(torch.where(swap.to(damaged.device), clean, damaged), LATENT_STRIDE)
        totals = []
        for quality in self._qualities(generator):
            index = torch.full((len(padded),), quality, device=padded.device)
            y, z = module.analyse(padded, index)
            latent = module.quantise(y, z, rounding=straight_through)
            bits_y = gaussian_bits(_noisy(latent.y_res, generator), latent.scales_hat).sum()
            bits_z = module.hyper_bits(_noisy(z, generator)).sum()
            error = crop(module.synthesise(latent.y_hat, index), size).float() - clean.float()
            distortion = error.square().sum(dim=1).mean()
            rate = (bits_y + bits_z) / padded[:, 0].numel()
            totals.append(torch.stack([rate_weight(index[0]) * distortion + rate, distortion, rate]))
        loss, distortion, rate = torch.stack(totals).mean(dim=0)
        return loss, {"distortion": distortion.detach(), "bits_per_pixel": rate.detach()}

    def _qualities(self, generator: torch.Generator) -> Sequence[int]:
        if self.pairs:
            return self.pairs[int(torch.randint(len(self.pairs), (), generator=generator))]
        return torch.randint(QUALITIES, (self.anchors,), generator=generator).tolist()


@dataclass(frozen=True)
class LogRateDistortion:
    """Mean over the pictures of log(lambda D + R), every picture at a quality of its own: many qualities in one step.

    The logarithm leaves the trade of each picture as it is and lets all weigh alike; without it the pictures that
    nothing can restore, thick haze at high qualities, drown the gradients of all others.

    weights: lambda of the lowest and the highest quality, geometric in between (published: 128 and 2048).
    """

    weights: tuple[float, float] = (128.0, 2048.0)

    def __post_init__(self) -> None:
        if not 0 < self.weights[0] <= self.weights[1]:
            raise ConfigError(f"rate-distortion: weights are {self.weights}, must be positive and ascending")

    def __call__(
        self, module: AllInOneCodec, damaged: torch.Tensor, clean: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        padded, size = pad_to_multiple(damaged, LATENT_STRIDE)
        # One quality from each of as many equal parts of the range as there are pictures: less noise from step to step.
        places = (
            torch.randperm(len(padded), generator=generator) + torch.rand(len(padded), generator=generator)
        ) / len(padded)
        quality = (places * QUALITIES).floor().clamp_max(QUALITIES - 1).to(padded.device)
        low, high = (math.log(w) for w in self.weights)
        weight = torch.exp(low + (high - low) * quality / (QUALITIES - 1))
        y, z = module.analyse(padded, quality)
        latent = module.quantise(y, z, rounding=straight_through)
        bits = gaussian_bits(_noisy(latent.y_res, generator), latent.scales_hat).flatten(1).sum(dim=1)
        bits = bits + module.hyper_bits(_noisy(z, generator)).flatten(1).sum(dim=1)
        rate = bits / padded[0, 0].numel()
        error = crop(module.synthesise(latent.y_hat, quality), size).float() - clean.float()
        distortion = error.square().sum(dim=1).mean(dim=(1, 2))
        cost = weight * distortion + rate
        parts = {"cost": cost, "distortion": distortion, "bits_per_pixel": rate}
        return cost.log().mean(), {name: value.detach().mean() for name, value in parts.items()}


# The objective --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RateDistortionObjective(Objective):
    """What a codec's bits cost against how far its pictures are from clean ones (see rate_distortion.py)."""

    kind: ClassVar[str] = "rate-distortion"
    anchors: int = 2
    clean: float = 0.2
    shown: int = 40
    """The quality that validation looks at."""

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        if network.architecture.kind != "codec":
            raise ConfigError(f"rate-distortion: {network.architecture.title} is no codec")
        return _RateDistortionMethod(RateDistortion(anchors=self.anchors, clean=self.clean), self.shown)


class _RateDistortionMethod(Method):
    def __init__(self, objective: RateDistortion, shown: int) -> None:
        super().__init__()
        self.objective, self.shown = objective, shown

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        return self.objective(run.network.module, run.batch.damaged, run.batch.clean, run.generator)

    def restore(self, network: Network, image: torch.Tensor) -> torch.Tensor:
        padded, size = pad_to_multiple(image, network.architecture.multiple_of(network.config))
        quality = torch.full((len(image),), self.shown, device=image.device)
        y, z = network.module.analyse(padded, quality)
        return crop(network.module.synthesise(network.module.quantise(y, z).y_hat, quality), size)
