"""Sampling of the small degradation model: from noise to a damaged picture with the wanted intensity.

Deterministic steps of Karras et al., NeurIPS 2022 (alg. 1 without churn and second-order correction) down their schedule
(eq. 5). What is random is the starting noise, which comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.degradation_model import DegradationModel
from ..models.layers.padding import crop, pad_to_multiple
from .gendeg import measure_intensity

HIGHEST, LOWEST, RHO = 40.0, 0.03, 7.0
CROP = 64
"""Side of the crops of training: beyond it the model has learned nothing about what belongs together."""


def levels(steps: int) -> torch.Tensor:
    """Noise levels of a run, float32 [steps + 1], the last one zero."""
    if steps < 1:
        raise InputError(f"steps: {steps}; at least 1 is needed")
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    curve = (HIGHEST ** (1 / RHO) + share * (LOWEST ** (1 / RHO) - HIGHEST ** (1 / RHO))) ** RHO
    return torch.cat([curve, torch.zeros(1, dtype=torch.float64)]).float()


def of_one_scene(noise: torch.Tensor, window: int = CROP) -> torch.Tensor:
    """Standard normal noise [B, C, H, W] whose means over windows are all nearly that over the first one.

    A model that has seen small crops takes the mean of the noise for the decision what the damage is like (how bright
    the fog, which way the camera moved); on a large picture every part would decide for itself.
    """
    height, width = noise.shape[-2:]
    if max(height, width) <= window:
        return noise
    cells = (max(1, round(height / window)), max(1, round(width / window)))
    local = F.interpolate(F.adaptive_avg_pool2d(noise, cells), (height, width), mode="bilinear")
    return noise - local + noise[..., :window, :window].mean(dim=(2, 3), keepdim=True)


@torch.no_grad()
def synthesise(
    model: DegradationModel,
    clean: torch.Tensor,
    kind: str,
    mu: float,
    sigma: float,
    noise: torch.Tensor,
    steps: int = 12,
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The damaged pictures of clean ones [B, 3, H, W] in 0..1, any size; noise as clean; callback(step, picture so far).

    Raises InputError for a kind that the model does not know, and intensities that no picture can have.
    """
    if kind not in model.kinds:
        raise InputError(f"degradation: this model knows {', '.join(model.kinds)}, not {kind!r}")
    if not (0 < mu <= 1 and 0 <= sigma <= 1):
        raise InputError(f"intensity: mean {mu} and standard deviation {sigma} must lie in 0..1, the mean above 0")
    power, count, device = (mu**2 + sigma**2) ** 0.5, len(clean), clean.device
    noise = of_one_scene(noise)
    padded, size = pad_to_multiple(clean, model.multiple)
    index = torch.full((count,), model.kinds.index(kind), device=device)
    wanted = [torch.full((count,), value, device=device) for value in (mu, sigma)]
    schedule = levels(steps).to(device)
    state = schedule[0] * pad_to_multiple(noise, model.multiple)[0]
    for step, (level, following) in enumerate(zip(schedule[:-1], schedule[1:], strict=True)):
        residual = model(state, padded, index, *wanted, level.expand(count))
        state = residual + following / level * (state - residual)
        if callback is not None:
            callback(step, crop((padded + power * residual).clamp(0, 1), size))
    return with_intensity(clean, crop(power * state, size), mu)


def with_intensity(clean: torch.Tensor, residual: torch.Tensor, mu: float) -> torch.Tensor:
    """clean + k residual in 0..1, k (at most 3, for each picture) such that the mean of |clean - result| is mu."""
    low, high = torch.zeros(len(clean), device=clean.device), torch.full((len(clean),), 3.0, device=clean.device)
    for _ in range(12):
        middle = (low + high) / 2
        reached = ((clean + middle[:, None, None, None] * residual).clamp(0, 1) - clean).abs().mean(dim=(1, 2, 3))
        low, high = torch.where(reached < mu, middle, low), torch.where(reached < mu, high, middle)
    return (clean + ((low + high) / 2)[:, None, None, None] * residual).clamp(0, 1)


def measured(clean: torch.Tensor, damaged: torch.Tensor) -> tuple[float, float]:
    """Intensity of a batch: mean and standard deviation as `measure_intensity`, averaged over its pictures."""
    mu, sigma = measure_intensity(clean, damaged)
    return float(mu.mean()), float(sigma.mean())
