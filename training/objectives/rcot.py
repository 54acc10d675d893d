"""DA-RCOT's training: a transport map and a potential play the dual of an optimal transport problem.

Tang et al., TPAMI 2025, arXiv 2411.01656. The potential F learns to score clean pictures above restored ones
(`critic_loss` and `gradient_penalty`, one step each); the map T then minimises `map_loss`: it pleases F at the least
transport cost, measured on the residual r = degraded - restored. Without pairs the cost alone binds the restored
picture to its input; with pairs an L1 term and a contrastive term on the residual's embeddings are added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Critic = Callable[[torch.Tensor], torch.Tensor]

NOISE_IDS = (0, 1, 2)
"""Degradation ids with a dense spectrum (noise 15/25/50); 3 rain, 4 haze, 5 blur, 6 low light, 7 other."""


def critic_loss(critic: Critic, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-mean F(y) + mean F(T(x)), what the potential minimises; images [B, 3, P, P], a scalar."""
    return critic(restored.detach()).mean() - critic(target).mean()


def gradient_penalty(
    critic: Critic, restored: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor, weight: float = 10.0
) -> torch.Tensor:
    """weight * mean (|grad F(u)| - 1)^2 at u = alpha y + (1 - alpha) T(x); alpha [B, 1, 1, 1] in 0..1; a scalar."""
    between = (alpha * target + (1 - alpha) * restored).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return weight * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def residual_rms(residual: torch.Tensor) -> torch.Tensor:
    """Root of the mean square of a residual [B, 3, H, W] over everything; a scalar."""
    return residual.square().mean().sqrt()


def fourier_cost(residual: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
    """The cost on the residual's spectrum, summed over the batch; a scalar.

    residual [B, 3, H, W], degradation [B] (see NOISE_IDS). L2-like (root mean square) where the spectrum is dense, as
    noise's is; L1 (mean) where it is sparse.
    """
    magnitude = torch.fft.fft2(residual.float()).abs().flatten(1)
    dense = torch.isin(degradation, torch.tensor(NOISE_IDS, device=degradation.device))
    return torch.where(dense, magnitude.square().mean(dim=1).sqrt(), magnitude.mean(dim=1)).sum()


def contrastive_loss(
    embeddings: torch.Tensor, degradation: torch.Tensor, temperature: float = 0.07, corrected: bool = False
) -> torch.Tensor:
    """Pulls residual embeddings [B, ...] of one degradation [B] together, pushes others apart; a scalar, 0 for B = 1.

    As published, the exponential is taken of every product of components and then averaged, which for large
    embeddings is 1 with next to no gradient. `corrected` takes the exponential of the dot product instead.
    """
    vectors = F.normalize(embeddings.flatten(1).float(), dim=1)
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1, device=vectors.device)
    sign = torch.where(degradation[first] == degradation[second], -1.0, 1.0) / temperature
    products = vectors[first] * vectors[second]
    if corrected:
        return (sign * products.sum(dim=1)).exp().sum()
    return (sign[:, None] * products).exp().mean(dim=1).sum()


@dataclass(frozen=True)
class MapLoss:
    """What the transport map minimises, with its terms (scalars)."""

    total: torch.Tensor
    adversarial: torch.Tensor
    residual_rms: torch.Tensor
    fourier: torch.Tensor
    contrastive: torch.Tensor | None = None
    l1: torch.Tensor | None = None


def map_loss(
    critic: Critic,
    degraded: torch.Tensor,
    restored: torch.Tensor,
    degradation: torch.Tensor,
    target: torch.Tensor | None = None,
    embeddings: torch.Tensor | None = None,
    *,
    cost_weight: float = 1.0,
    pair_weight: float = 10000.0,
    contrastive_weight: float = 0.1,
    corrected_contrastive: bool = False,
) -> MapLoss:
    """-mean F(T(x)) + cost_weight * transport cost (+ the paired terms if `target` is given).

    Images [B, 3, P, P] in 0..1, degradation ids [B], `embeddings` the residual's deepest ones [B, C, h, w]. The paper's
    sigma is `cost_weight`, its Sigma `pair_weight`.
    """
    residual = degraded - restored
    adversarial = -critic(restored).mean()
    rms, fourier = residual_rms(residual), fourier_cost(residual, degradation)
    cost = rms + fourier
    if target is None:
        return MapLoss(adversarial + cost_weight * cost, adversarial, rms, fourier)
    l1 = (restored - target).abs().mean()
    contrastive = None
    if embeddings is not None:
        contrastive = contrastive_loss(embeddings, degradation, corrected=corrected_contrastive)
        cost = cost + contrastive_weight * contrastive
    total = adversarial + cost_weight * cost + pair_weight * l1
    return MapLoss(total, adversarial, rms, fourier, contrastive, l1)
