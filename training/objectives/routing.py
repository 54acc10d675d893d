"""MoCE-IR's balance loss as an objective (Zamfir et al., CVPR 2025, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import ConfigError
from .base import Method, Network, Objective, Parts, Pass


@dataclass(frozen=True)
class RoutingObjective(Objective):
    """MoCE-IR's balance loss (section 3.3): all experts are to be used; with `complexity`, cheap ones more."""

    kind: ClassVar[str] = "routing"
    complexity: bool = True

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        if not hasattr(network.module, "balance_loss"):
            raise ConfigError(f"routing objective: {network.architecture.title} has no routed experts; use MoCE-IR")
        network.module.with_complexity = self.complexity
        return _RoutingMethod()


class _RoutingMethod(Method):
    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        balance = run.network.module.balance_loss(run.outputs.routing)
        return balance, {"balance": balance}
