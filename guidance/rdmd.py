"""RDMD: zero-shot restoration that uses one diffusion model twice, as a regulariser and as a generative chain.

Wang et al., "Reconciling Stochastic and Deterministic Strategies for Zero-shot Image Restoration using Diffusion Model in
Dual", CVPR 2025, arXiv 2503.01288, written in the variance-exploding view (exact: the factors of alpha cancel), so that any
denoiser serves. Pictures in -1..1; u is the running estimate, x the diffusion state u + sigma n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .operators import Operator
from .priors import Prior
from .schedules import RdmdSchedule, nearest_timestep, vp_sigmas


def start_super_resolution(
    y: torch.Tensor, size: tuple[int, int], sigma: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, x) from a small picture: u its bicubic enlargement to `size` (a = -0.75), x = u + sigma noise."""
    u = F.interpolate(y, size=size, mode="bicubic", align_corners=False)
    return u, u + sigma * noise


def start_from_noisy(
    y: torch.Tensor, noise_level: float, sigma: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, x) from a degraded picture of full size: y counts as already noisy at the table's level nearest 2 noise_level."""
    level = float(vp_sigmas()[nearest_timestep(torch.tensor([2 * noise_level]))[0]])
    return y, y * math.sqrt(1 + level**2) + math.sqrt(max(0.0, sigma**2 - level**2)) * noise


def regularise(prior: Prior, u: torch.Tensor, level: float, consistent: bool = False) -> torch.Tensor:
    """r: the prior's clean picture for the estimate u, told the noise level 2 `level` (of -1..1 pictures).

    The published code feeds u without the factor that a noised picture would have: a slight gain. consistent: without.
    """
    sigma = float(vp_sigmas()[nearest_timestep(torch.tensor([2 * level]))[0]])
    return prior(u if consistent else u * math.sqrt(1 + sigma**2), sigma)


def update(
    operator: Operator,
    y: torch.Tensor,
    u: torch.Tensor,
    r: torch.Tensor | None,
    p: torch.Tensor | None,
    weight: float,
    rho: float,
) -> torch.Tensor:
    """One explicit step on the data term, the deterministic term (r, weight) and the generative term (p, rho)."""
    change = operator.gradient(u, y)
    if r is not None:
        change = change + weight * (u - r)
    if p is not None:
        change = change + rho * (u - p)
    return u - change / (1 + weight + rho)


def renoise(
    x: torch.Tensor,
    u: torch.Tensor,
    sigma: float,
    sigma_next: float,
    *,
    zeta: float = 0.0,
    noise: torch.Tensor | None = None,
    churn: float = 0.0,
    churn_noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next diffusion state: the chain's own direction, a share zeta of fresh noise, and DDIM's churn (a level)."""
    direction = (x - u) / sigma * math.sqrt(max(0.0, sigma_next**2 - churn**2))
    if churn > 0:
        direction = direction + churn * churn_noise
    result = u + math.sqrt(1 - zeta) * direction
    return result if zeta == 0 else result + math.sqrt(zeta) * sigma_next * noise


@dataclass(frozen=True)
class Step:
    """One iteration: regularised (r), denoised (p), the estimate u after it, the state handed on."""

    index: int
    regularised: torch.Tensor | None
    denoised: torch.Tensor | None
    u: torch.Tensor
    x_next: torch.Tensor


def iterate(
    prior: Prior,
    operator: Operator,
    y: torch.Tensor,
    u: torch.Tensor,
    x: torch.Tensor,
    schedule: RdmdSchedule,
    i: int,
    draw: Callable[[int, str], torch.Tensor],
    *,
    zeta: float = 0.0,
    eta: float = 0.0,
    consistent: bool = False,
    skip_unused: bool = True,
) -> Step:
    """Iteration i of RDMD from the estimate u and the state x; arguments as for `sample`."""
    last = i == len(schedule.sigmas) - 1
    weight, sigma, rho = schedule.regulariser_weight, float(schedule.sigmas[i]), float(schedule.rhos[i])
    needs_r = not skip_unused or (weight != 0 and not last)
    needs_p = not skip_unused or rho != 0 or last
    r = regularise(prior, u, float(schedule.regulariser_levels[i]), consistent) if needs_r else None
    p = prior(x, sigma) if needs_p else None
    if last:
        return Step(i, r, p, u, u)
    u = update(operator, y, u, r, p, weight, rho)
    churn = eta * float(schedule.churn[i])
    x_next = renoise(
        x,
        u,
        sigma,
        float(schedule.sigmas[i + 1]),
        zeta=zeta,
        noise=draw(i, "zeta") if zeta > 0 else None,
        churn=churn,
        churn_noise=draw(i, "eta") if churn > 0 else None,
    )
    return Step(i, r, p, u, x_next)


def sample(
    prior: Prior,
    operator: Operator,
    y: torch.Tensor,
    u: torch.Tensor,
    x: torch.Tensor,
    schedule: RdmdSchedule,
    draw: Callable[[int, str], torch.Tensor],
    *,
    callback: Callable[[Step], None] | None = None,
    **options: float | bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RDMD's iterations; returns (estimate, last denoised), both in about -1..1.

    draw(i, "eta" or "zeta") gives a standard normal picture where one is needed. Options: zeta, the share of fresh noise;
    eta, DDIM's churn; consistent, as for `regularise`; skip_unused (True) leaves out the evaluation whose weight is zero
    (tau 0 or 1), which halves the cost; the last iteration evaluates the chain in any case.
    Published scripts return the estimate for super-resolution and the last denoised picture for deblurring.
    """
    for i in range(len(schedule.sigmas)):
        done = iterate(prior, operator, y, u, x, schedule, i, draw, **options)
        u, x = done.u, done.x_next
        if callback is not None:
            callback(done)
    return u, done.denoised
