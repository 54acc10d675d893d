"""The objective of pixel priors: noise to be predicted, pictures to be denoised, or equal answers at two noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...errors import ConfigError
from ...guidance import priors, schedules
from ...guidance.parametrisation import edm_weight
from .base import Method, Network, Objective, Parts, Pass


@dataclass(frozen=True)
class DenoisingObjective(Objective):
    """Trains a diffusion prior on the clean pictures of a data set.

    ADM networks predict the noise at a random timestep (Ho et al. 2020), EDM and consistency networks the picture at a
    log-normal noise level (Karras et al. 2022). With `consistency` the latter must give the same picture from two
    neighbouring noise levels on one path, the less noisy one as target, without gradient (Song et al. 2023, consistency
    training; `levels` of the schedule, pseudo-Huber distance of Song & Dhariwal 2024).
    """

    kind: ClassVar[str] = "denoising"
    consistency: bool = False
    levels: int = 40
    shown: float = 0.4
    """The noise level, in -1..1 pictures, that validation looks at."""

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        if network.architecture.kind != "prior":
            raise ConfigError(f"denoising: {network.architecture.title} is no prior")
        if self.levels < 2:
            raise ConfigError("denoising: a schedule needs at least 2 levels")
        noise = priors.predicts_noise(network.module, network.config.get("wrapper"))
        if self.consistency and noise:
            raise ConfigError("denoising: consistency needs a consistency or EDM network; this one predicts noise")
        return _Denoising(self, not noise)


class _Denoising(Method):
    def __init__(self, settings: DenoisingObjective, karras: bool) -> None:
        super().__init__()
        self.settings, self.karras = settings, karras

    def good_for(self, given: tuple[str, ...]) -> tuple[str, ...]:
        kind = () if not self.karras else ("consistency",) if self.settings.consistency else ("EDM",)
        return (*(task for task in given if task not in ("consistency", "EDM")), *kind)

    def _prior(self, module: nn.Module, label: torch.Tensor | None) -> priors.Prior:
        if not self.karras:
            return priors.epsilon_prior(module, label).unclamped()
        return priors.consistency_prior(module, label, boundary=self.settings.consistency).unclamped()

    def _levels(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Random noise levels [B]."""
        if self.karras:
            return (1.2 * torch.randn(batch, generator=generator) - 1.2).exp()
        return schedules.vp_sigmas()[torch.randint(1, 1000, (batch,), generator=generator)].float()

    def _label(self, module: nn.Module, batch: int, generator: torch.Generator) -> torch.Tensor | None:
        classes = getattr(module, "num_classes", None)
        return None if classes is None else torch.randint(classes, (batch,), generator=generator)

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        clean, g = run.batch.clean * 2 - 1, run.generator
        noise = torch.randn(clean.shape, generator=g).to(clean)
        prior = self._prior(run.network.module, self._label(run.network.module, len(clean), g))
        if not self.settings.consistency:
            sigma = self._levels(len(clean), g).to(clean)
            level = sigma.reshape(-1, 1, 1, 1)
            error = (prior(clean + level * noise, sigma) - clean).square()
            # In units of the noise for ADM (the epsilon loss), EDM's weight for the others.
            weight = edm_weight(level) if self.karras else 1 / level**2
            loss = (weight * error).mean()
            return loss, {"denoising": loss}
        steps = schedules.karras_levels(self.settings.levels).to(clean.device)
        index = torch.randint(len(steps) - 1, (len(clean),), generator=g).to(clean.device)
        high, low = steps[index + 1], steps[index]
        with torch.no_grad():
            target = prior(clean + low.reshape(-1, 1, 1, 1) * noise, low)
        found = prior(clean + high.reshape(-1, 1, 1, 1) * noise, high)
        c = 0.00054 * clean[0].numel() ** 0.5
        distance = ((found - target).square().sum(dim=(1, 2, 3)) + c**2).sqrt() - c
        loss = (distance / (high - low)).mean()
        return loss, {"consistency": loss}

    def restore(self, network: Network, image: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(image.shape, generator=generator).to(image)
        label = self._label(network.module, len(image), generator)
        prior = self._prior(network.module, label)
        return prior(image * 2 - 1 + self.settings.shown * noise, self.settings.shown) / 2 + 0.5
