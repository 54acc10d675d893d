"""What paints damage into a picture: GenDeg, the small model that comes with Mend, or the simulations.

What travels on the MEND_DEGRADER wire is an object with `kinds` and `paint`; `synthesise` paints a batch and says what
came out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import InputError
from ..guidance import gendeg, synthesis
from ..guidance.measurement import draw
from ..models.degradation_model import DegradationModel
from . import host, tiling
from .loaded import LoadedRestorer
from .pictures import to_pil
from .values import check_image

STARTER = "mend-degradation-model.safetensors"


class Degrader(Protocol):
    """What travels on the MEND_DEGRADER wire."""

    name: str
    kinds: Sequence[str]
    """Degradations it knows: of GenDeg's six, and of their mixtures with haze."""

    def paint(
        self, clean: torch.Tensor, kind: str, mu: float, sigma: float, seed: int, caption: str, steps: int
    ) -> torch.Tensor:
        """The damaged pictures of clean ones, both [B, 3, H, W] in 0..1, any size. steps: 0 takes the usual number."""


@dataclass(frozen=True, eq=False)
class SmallDegrader:
    """Mend's degradation model under the host's memory management."""

    loaded: LoadedRestorer
    name: str = "Mend degradation model"
    usual_steps: int = 12

    def __post_init__(self) -> None:
        if not isinstance(self.loaded.restorer.module, DegradationModel):
            title = self.loaded.restorer.architecture.title
            raise InputError(f"model: {title} is no degradation model; choose {STARTER} or one trained like it")

    @property
    def kinds(self) -> Sequence[str]:
        return self.loaded.restorer.module.kinds

    def paint(
        self, clean: torch.Tensor, kind: str, mu: float, sigma: float, seed: int, caption: str = "", steps: int = 0
    ) -> torch.Tensor:
        steps = steps or self.usual_steps
        progress = host.progress(steps * len(clean))
        memory = tiling.activation_bytes(self.loaded, clean[:1], torch.float32)
        painted = []
        with self.loaded.managed.on_device(memory) as (module, device), torch.inference_mode():
            for number, picture in enumerate(clean.split(1)):
                noise = draw(picture.shape, seed, number)

                def tell(step: int, shown: torch.Tensor) -> None:
                    progress.update(preview=lambda: to_pil(shown[0].cpu()))

                damaged = synthesis.synthesise(
                    module, picture.to(device), kind, mu, sigma, noise.to(device), steps, tell
                )
                painted.append(damaged.to(clean.device))
        return torch.cat(painted)


@dataclass(frozen=True)
class Synthesised:
    """damaged [B, C, H, W] in 0..1; mu and sigma [B], measured on it."""

    damaged: torch.Tensor
    mu: torch.Tensor
    sigma: torch.Tensor

    def text(self, degrader: Degrader, kind: str, mu: float, sigma: float) -> str:
        """A line of what was asked for, and one of what came out for each picture."""
        lines = [f"{kind} by {degrader.name}: asked for mean {mu:.3f}, standard deviation {sigma:.3f}"]
        for number, (m, s) in enumerate(zip(self.mu.tolist(), self.sigma.tolist(), strict=True)):
            lines.append(f"picture {number}: mean {m:.3f}, standard deviation {s:.3f}")
        preset = gendeg.PRESETS.get(kind) or gendeg.MIXED.get(kind)
        if preset and not (preset.mu[0] <= mu <= preset.mu[1] and preset.sigma[0] <= sigma <= preset.sigma[1]):
            low, high = preset.mu, preset.sigma
            lines.append(
                f"outside what training pairs of {kind} had: mean {low[0]:.3f}..{low[1]:.3f}, "
                f"standard deviation {high[0]:.3f}..{high[1]:.3f}"
            )
        return "\n".join(lines)


def synthesise(
    degrader: Degrader,
    image: torch.Tensor,
    kind: str,
    mu: float,
    sigma: float,
    seed: int,
    caption: str = "",
    steps: int = 0,
) -> Synthesised:
    """Damages pictures [B, C, H, W] (grey, colour or with transparency, which stays) and measures the result.

    Raises InputError for kinds the degrader does not know and impossible intensities.
    """
    check_image(image)
    if kind not in degrader.kinds:
        raise InputError(f"degradation: {degrader.name} knows {', '.join(degrader.kinds)}, not {kind!r}")
    if not (0 < mu <= 1 and 0 <= sigma <= 1):
        raise InputError(f"mu, sigma: {mu}, {sigma}; they lie in 0..1, and mu above 0")
    colours = image.shape[1] - (image.shape[1] in (2, 4))
    clean = tiling.as_rgb(image).clamp(0, 1)
    damaged = degrader.paint(clean, kind, mu, sigma, seed, caption, steps)
    measured = gendeg.measure_intensity(clean, damaged)
    damaged = damaged if colours == 3 else damaged.mean(dim=1, keepdim=True)
    return Synthesised(torch.cat([damaged, image[:, colours:].to(damaged)], dim=1), *measured)
