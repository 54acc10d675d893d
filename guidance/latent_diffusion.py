"""Stable Diffusion's noise schedule and the few formulas that OSDFace and GenDeg need of it.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022. Variance-exploding view:
z = z0 + sigma n; the network sees z / sqrt(1 + sigma^2) and a time 0..999, and predicts n. The network itself is never
here: it is a function, ComfyUI's or any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch

from ..errors import InputError

TIMESTEPS = 1000
SCALE_FACTOR = 0.18215
"""Latents of the autoencoder times this have about unit variance (Stable Diffusion 1 and 2)."""
OSDFACE_TIMESTEP = 399

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(z [B, C, H, W], sigma scalar) -> z0."""


@lru_cache(maxsize=1)
def alphas_cumprod() -> torch.Tensor:
    """Cumulated alphas of the scaled-linear schedule, 0.00085 to 0.012; float64 [1000]."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2, dim=0)


@lru_cache(maxsize=1)
def log_sigmas() -> torch.Tensor:
    """ln sqrt((1 - a) / a), float64 [1000], increasing."""
    alphas = alphas_cumprod()
    return ((1 - alphas) / alphas).log() / 2


def sigma_at(time: torch.Tensor) -> torch.Tensor:
    """Noise level at any real time 0..999 (float64), log-linear between the table's entries."""
    time = time.double().cpu()
    low = time.floor().long().clamp(0, TIMESTEPS - 2)
    table = log_sigmas()
    return torch.lerp(table[low], table[low + 1], time - low).exp()


def time_at(sigma: torch.Tensor) -> torch.Tensor:
    """The inverse of `sigma_at`: a fractional time 0..999, float64; levels outside the table get its ends."""
    table, wanted = log_sigmas(), sigma.double().cpu().log()
    low = (torch.searchsorted(table, wanted) - 1).clamp(0, TIMESTEPS - 2)
    return low + ((wanted - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)


def linear_time_sigmas(steps: int) -> torch.Tensor:
    """Noise levels at `steps` times spaced evenly from 999 to 0, then 0; float32 [steps + 1]."""
    if steps < 1:
        raise InputError(f"steps: {steps}; at least 1 is needed")
    times = torch.linspace(TIMESTEPS - 1, 0, steps, dtype=torch.float64)
    return torch.cat([sigma_at(times), torch.zeros(1, dtype=torch.float64)]).float()


def one_step_sigma(timestep: int = OSDFACE_TIMESTEP) -> float:
    """The noise level that a one-step model at `timestep` takes its input for; 1.1606 for OSDFace."""
    return float(log_sigmas()[timestep].exp())


def one_step_prescale(timestep: int = OSDFACE_TIMESTEP) -> float:
    """What a latent is multiplied by so that a stock sampler's network sees it unchanged: sqrt(1 + sigma^2)."""
    return float(alphas_cumprod()[timestep]) ** -0.5


def one_step_clean(z: torch.Tensor, noise: torch.Tensor, timestep: int = OSDFACE_TIMESTEP) -> torch.Tensor:
    """z0 = (z - sqrt(1 - a) n) / sqrt(a), in float64, for z taken as the diffused latent at `timestep`."""
    alpha = alphas_cumprod()[timestep]
    return ((z.double() - (1 - alpha).sqrt() * noise.double()) / alpha.sqrt()).to(z.dtype)


def posterior_sample(mean: torch.Tensor, log_variance: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """mean + std noise, the log-variance clamped to -30..20; the mean itself without noise."""
    return mean if noise is None else mean + (log_variance.clamp(-30, 20) / 2).exp() * noise


def epsilon_denoiser(network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Denoiser:
    """network(z scaled, time [B]) -> noise, as a denoiser; times are fractional."""

    def denoise(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        time = time_at(sigma).to(z).expand(len(z))
        return z - sigma * network(z * (1 + sigma**2).rsqrt(), time)

    return denoise


def three_way_guidance(
    full: torch.Tensor, image: torch.Tensor, nothing: torch.Tensor, text_scale: float = 7.5, image_scale: float = 1.5
) -> torch.Tensor:
    """Guidance by text and picture (Brooks et al., InstructPix2Pix, CVPR 2023, eq. 3).

    The three are predictions with text and picture, with the picture alone, with neither; any one parametrisation.
    """
    return nothing + text_scale * (full - image) + image_scale * (image - nothing)


def euler_ancestral(
    denoise: Denoiser,
    z: torch.Tensor,
    sigmas: torch.Tensor,
    draw: Callable[[int], torch.Tensor],
    callback: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Ancestral sampling with Euler steps (Karras et al. 2022; eta 1) from z at sigmas[0] down to sigmas[-1].

    draw(k) is the standard normal noise after step k, asked for only where the next level is not zero; callback(k, z0).
    """
    for step, (sigma, following) in enumerate(_pairs(sigmas)):
        clean = denoise(z, sigma)
        if callback is not None:
            callback(step, clean)
        up = torch.minimum(following, (following**2 * (sigma**2 - following**2) / sigma**2).clamp(min=0).sqrt())
        down = (following**2 - up**2).clamp(min=0).sqrt()
        z = z + (z - clean) / sigma * (down - sigma)
        if following > 0:
            z = z + draw(step) * up
    return z


def _pairs(sigmas: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return zip(sigmas[:-1], sigmas[1:], strict=True)
