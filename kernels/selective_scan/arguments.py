"""What the backends of the selective scan are called with, checked once by `selective_scan`."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Scan(NamedTuple):
    """Arguments that fit each other: u, delta [batch, dim, L]; A [dim, N]; B, C [batch, G, N, L]; D, delta_bias [dim]."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    delta_bias: torch.Tensor | None
    delta_softplus: bool

    @property
    def groups(self) -> int:
        """How many sets of B and C there are."""
        return self.B.shape[1]

    @property
    def states(self) -> int:
        """N."""
        return self.A.shape[1]

    @property
    def width(self) -> int:
        """Channels that share a set of B and C."""
        return self.u.shape[1] // self.groups

    def gradients(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of u, delta, A, B, C, D, delta_bias, each in its tensor's dtype; empty where there is no tensor."""
        return tuple(
            value.new_empty(0) if tensor is None else value.to(tensor.dtype).contiguous()
            for tensor, value in zip(self[:7], values, strict=True)
        )
