"""DA-RCOT's training: a transport map and a potential play the dual of an optimal transport problem.

Tang et al., TPAMI 2025, arXiv 2411.01656. The potential F learns to score clean pictures above restored ones
(`critic_loss` and `gradient_penalty`, one step each); the map T then minimises `map_loss`: it pleases F at the least
transport cost, measured on the residual r = degraded - restored. Without pairs the cost alone binds the restored
picture to its input; with pairs an L1 term and a contrastive term on the residual's embeddings are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError
from ...models import Restorer, registry
from ...models.da_rcot import Potential
from .. import distributed
from .base import Method, Network, Objective, Parts, Pass

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


# The objective --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransportObjective(Objective):
    """DA-RCOT's game (Tang et al., TPAMI 2025): a potential learns to score clean pictures above restored ones, the
    network to please it at the least transport cost, measured on what it removes and on its spectrum.

    paired: also the L1 and contrastive terms; without, the potential sees clean pictures that have nothing to do with the
    damaged ones. cost, pair: the paper's sigma and Sigma. corrected: the contrastive term with dot products, as meant.
    width: channels of the potential's first layer (published: 64). critic_rate: its learning rate (RMSprop).
    """

    kind: ClassVar[str] = "da-rcot"
    paired: bool = True
    cost: float = 1.0
    pair: float = 10000.0
    contrastive: float = 0.1
    corrected: bool = False
    penalty: float = 10.0
    width: int = 64
    critic_rate: float = 1e-4

    @property
    def optimizer(self) -> str:
        return "rmsprop"

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        network.require_restorer("DA-RCOT")
        patch = size * network.scale
        if patch % 32:
            raise ConfigError(f"DA-RCOT: the potential needs crops that are multiples of 32 pixels, not {patch}")
        if network.scale != 1:
            raise ConfigError("DA-RCOT: the transport cost needs a network that leaves the size as it is")
        return _Transport(self, degradation_ids(labels), Potential(patch_size=patch, width=self.width))


def degradation_ids(labels: Sequence[str]) -> dict[str, int]:
    """DA-RCOT's numbers: 0 to 2 for noise, whose spectrum is dense, 3 and up for all else, each its own."""
    noisy = [label for label in labels if "noise" in label or label == "poisson"]
    rest = [label for label in labels if label not in noisy]
    return {**{n: min(i, 2) for i, n in enumerate(noisy)}, **{n: 3 + i for i, n in enumerate(rest)}}


class _CriticLoss(nn.Module):
    """The potential's two losses as a forward pass, so that processes can share its gradients."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(
        self, restored: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor | None, weight: float
    ) -> torch.Tensor:
        if alpha is None:
            return critic_loss(self.critic, restored, target)
        return gradient_penalty(self.critic, restored, target, alpha, weight)


class _Transport(Method):
    def __init__(self, settings: TransportObjective, ids: Mapping[str, int], critic: Potential) -> None:
        super().__init__()
        # Frozen but in its own step: it is no part of what is trained with the network.
        self.settings, self.ids, self.critic = settings, ids, critic.requires_grad_(False)
        self.wants_other = not settings.paired
        self._optimizer: torch.optim.Optimizer | None = None
        self._loss: list[nn.Module] = []  # a list: not a submodule of its own
        self._state: dict[str, Any] = {}

    def _critic_optimizer(self) -> torch.optim.Optimizer:
        """Made at the first step, when the critic lies on its device."""
        if self._optimizer is None:
            self._optimizer = torch.optim.RMSprop(self.critic.parameters(), lr=self.settings.critic_rate)
            if self._state:
                self._optimizer.load_state_dict(self._state)
            self._loss = [distributed.wrap(_CriticLoss(self.critic))]
        return self._optimizer

    def prepare(self, run: Pass) -> Parts:
        self.critic.requires_grad_(True)
        batch, optimizer = run.batch, self._critic_optimizer()
        target = batch.clean if batch.other is None else batch.other
        restored = run.restored.detach().float()
        alpha = torch.rand(len(restored), 1, 1, 1, generator=run.generator).to(restored)
        values = []
        for mix in (None, alpha):  # two backward passes and two steps, as published
            loss = self._loss[0](restored, target, mix, self.settings.penalty)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        self.critic.requires_grad_(False)
        return {"critic": values[0], "penalty": values[1]}

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        s, batch = self.settings, run.batch
        ids = torch.tensor([self.ids[label] for label in batch.labels], device=batch.damaged.device)
        found = map_loss(
            self.critic,
            batch.damaged,
            run.restored.float(),
            ids,
            batch.clean if s.paired else None,
            run.outputs.embedding if s.paired else None,
            cost_weight=s.cost,
            pair_weight=s.pair,
            contrastive_weight=s.contrastive,
            corrected_contrastive=s.corrected,
        )
        parts = {"adversarial": found.adversarial, "residual": found.residual_rms, "fourier": found.fourier}
        if found.l1 is not None:
            parts["L1"] = found.l1
        if found.contrastive is not None:
            parts["contrastive"] = found.contrastive
        return found.total, parts

    def companions(self, network: Network) -> dict[str, Restorer]:
        """The potential, as Load Potential and Potential Score take it."""
        config = {"kind": "potential", "patch_size": self.critic.patch_size, "width": self.settings.width}
        return {"potential": Restorer(registry.get("da-rcot-potential"), config, self.critic)}

    def get_extra_state(self) -> dict[str, Any]:
        return self._optimizer.state_dict() if self._optimizer is not None else self._state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._state = state
