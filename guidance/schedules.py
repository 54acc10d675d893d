"""Noise schedules of the zero-shot schemes, as plain tensors of sigma in the variance-exploding view x = x0 + sigma n."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..errors import InputError

TIMESTEPS = 1000


@lru_cache(maxsize=1)
def vp_alphas() -> torch.Tensor:
    """Cumulated alphas of the linear schedule (Ho et al. 2020), float64 [1000]."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64), dim=0)


@lru_cache(maxsize=1)
def vp_sigmas() -> torch.Tensor:
    """sigma_t = sqrt((1 - a_t) / a_t), float64 [1000], from 0.01 to 157."""
    return ((1 - vp_alphas()) / vp_alphas()).sqrt()


def nearest_timestep(sigma: torch.Tensor) -> torch.Tensor:
    """Index of the table's sigma closest to each of `sigma` [N]."""
    return (vp_sigmas().to(sigma.device)[None] - sigma.double()[:, None]).abs().argmin(dim=1)


def karras_levels(count: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """`count` noise levels from low to high, as EDM and consistency models space them (Karras et al. 2022, eq. 5)."""
    steps = torch.linspace(0, 1, count, dtype=torch.float64)
    return ((low ** (1 / rho) + steps * (high ** (1 / rho) - low ** (1 / rho))) ** rho).float()


def cm4ir_alphas(steps: int = 4, start: int = 250, gamma: float = 0.7) -> torch.Tensor:
    """CM4IR's alphas, float64 [steps]: alpha_0 at time start + 1, then growing by 1 + gamma up to 0.9999."""
    if steps < 1 or not 0 <= start <= TIMESTEPS - 2:
        raise InputError(
            f"steps and start: need at least one step and a start in 0..{TIMESTEPS - 2}, got {steps}, {start}"
        )
    alphas = [float(vp_alphas()[start + 1])]
    while len(alphas) < steps:
        alphas.append(min(alphas[-1] * (1 + gamma), 0.9999))
    return torch.tensor(alphas, dtype=torch.float64)


def cm4ir_sigmas(steps: int = 4, start: int = 250, gamma: float = 0.7) -> torch.Tensor:
    """CM4IR's noise levels, float32 [steps]: sqrt(1 - alpha), within what consistency models were trained for."""
    return (1 - cm4ir_alphas(steps, start, gamma)).sqrt().clamp(0.002, 80.0).float()


@dataclass(frozen=True)
class RdmdSchedule:
    """Everything of RDMD that depends on the iteration alone; tensors are float64 [iterations]."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor
    """Noise level of the diffusion state."""
    regulariser_levels: torch.Tensor
    """Noise level of the deterministic regulariser on the 0..1 scale (the network is told twice that)."""
    regulariser_timesteps: torch.Tensor
    rhos: torch.Tensor
    """Weight of the generative term."""
    regulariser_weight: float
    """Weight of the deterministic term."""
    churn: torch.Tensor
    """Noise level that eta = 1 would inject at each step (0 at the last)."""


def quadratic_timesteps(iterations: int) -> torch.Tensor:
    """From 999 to 0, big steps at high noise, int64 [iterations]."""
    if iterations < 2:
        raise InputError(f"iterations: {iterations}; at least 2 are needed")
    # NumPy, because its rounding decides some entries of the published lists from 117 iterations on.
    forward = torch.from_numpy(np.sqrt(np.linspace(0.0, TIMESTEPS**2, iterations)).astype(np.int64))
    forward[-1] -= 1
    return TIMESTEPS - 1 - forward


def rdmd_schedule(
    iterations: int = 100,
    noise_level: float = 0.05,
    weight: float = 20.0,
    tau: float = 0.5,
    factor: int = 1,
    sigmas: torch.Tensor | None = None,
) -> RdmdSchedule:
    """RDMD's schedule. noise_level is on the 0..1 scale; `weight` is lambda; tau 0 deterministic, 1 generative.

    factor: of super-resolution, 1 otherwise: where the regulariser's level ends, in 8-bit steps.
    sigmas: the levels of the diffusion state, falling, in place of the published ones for `iterations`.
    """
    timesteps = quadratic_timesteps(iterations) if sigmas is None else nearest_timestep(sigmas.double().cpu())
    levels_of_state = vp_sigmas()[timesteps] if sigmas is None else sigmas.double().cpu()
    floor = max(0.001, noise_level)
    last = max(float(factor), 255 * noise_level)
    levels = torch.logspace(math.log10(49), math.log10(last), len(timesteps), dtype=torch.float64) / 255
    betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)[timesteps]
    following = torch.cat([levels_of_state[1:], levels_of_state.new_zeros(1)])
    return RdmdSchedule(
        timesteps=timesteps,
        sigmas=levels_of_state,
        regulariser_levels=levels,
        regulariser_timesteps=nearest_timestep(2 * levels),
        rhos=weight * tau * floor**2 / levels_of_state**2,
        regulariser_weight=weight * (1 - tau) * noise_level**2,
        churn=following * (betas / (1 - vp_alphas()[timesteps])).sqrt(),
    )
