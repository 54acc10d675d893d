"""The state-space recurrence written as its formula: the truth that the other backends are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [batch, dim, L] and the last state [batch, dim, N], step by step, in the dtype of the arguments.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t h_t + D u_t  (Gu and Dao, Mamba, arXiv 2312.00752, eq. 2).
    u, delta [batch, dim, L]; A [dim, N]; B, C [batch, G, N, L]; D, delta_bias [dim] or None. Autograd goes through it.
    """
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    channels = A.shape[0] // B.shape[1]
    B, C = (t.repeat_interleave(channels, dim=1) for t in (B, C))
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[-1]):
        dt = delta[..., t, None]
        state = torch.exp(dt * A) * state + dt * B[..., t] * u[..., t, None]
        outputs.append((state * C[..., t]).sum(dim=-1))
    y = torch.stack(outputs, dim=-1)
    return (y if D is None else y + D[:, None] * u), state
