"""What the backends are called with, checked once by `selective_scan` and `state_space_2d`."""

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


class Step2d(NamedTuple):
    """The 2-D step after its projection, as arguments that fit each other.

    x [B, L, d]; projected [B, L, K, R + 2N]; order [B, K, L]; dt_weight [K, d, R]; dt_bias, D [K, d]; A [K, d, N];
    prompt [B, L, N].
    """

    x: torch.Tensor
    projected: torch.Tensor
    order: torch.Tensor
    dt_weight: torch.Tensor
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    prompt: torch.Tensor | None
    merge: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Images B, steps L, channels d, paths K, rank R of the dt projection, states N."""
        return *self.x.shape, self.dt_weight.shape[0], self.dt_weight.shape[2], self.A.shape[2]
