"""The state-space recurrence in plain PyTorch, a chunk of steps at a time: any device, any dtype.

Inside a chunk the decays and the inputs of the recurrence are formed for all steps at once ([T, batch, G, d, N], kept
at a few megabytes); only h_t = a_t h_{t-1} + x_t walks through time. The state is handed from chunk to chunk as it is,
so a long memory is exact, and nothing is ever divided by a cumulative product, so nothing underflows into NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange

from .arguments import Scan, Step2d

STATE_INTERVAL = 128
"""Training keeps the state before every so many steps and recomputes the rest."""

_CPU_ELEMENTS = 1 << 19  # two tensors of 2 MB: they stay in the cache
_DEVICE_ELEMENTS = 1 << 23
_BLOCK = 256


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others: what every backend computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def recurrence_(a: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """x[t] becomes h_t = a[t] h_{t-1} + x[t] along dimension 0; returns the last h. `a` is used up.

    Few states and many steps are cut into segments that walk side by side; pairs (a, x) compose as
    (a2 a1, a2 x1 + x2), which is exact however small the products become.
    """
    steps, width = x.shape[0], max(1, h.numel())
    side_by_side = (1 << 15 if x.device.type == "cpu" else 1 << 22) // width
    segments = 1
    while segments * 2 <= side_by_side and steps % (segments * 2) == 0 and steps // (segments * 2) >= max(8, segments):
        segments *= 2
    if segments == 1:
        for a_t, x_t in zip(a.unbind(0), x.unbind(0), strict=True):
            h = x_t.addcmul_(a_t, h)
        return h
    a, x = (t.unflatten(0, (segments, -1)) for t in (a, x))
    for t in range(1, x.shape[1]):
        x[:, t].addcmul_(a[:, t], x[:, t - 1])
        a[:, t].mul_(a[:, t - 1])
    carried = torch.empty_like(x[:, 0])
    for segment in range(segments):
        carried[segment] = h
        h = torch.addcmul(x[segment, -1], a[segment, -1], h)
    x.addcmul_(a, carried[:, None])
    return h


def chunk_length(device: torch.device, width: int, length: int) -> int:
    """Steps a chunk has, for `width` states in all: a power of two."""
    budget = _CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS
    steps = max(8, min(budget // max(1, width), length, 4096))
    return 1 << (steps.bit_length() - 1)


def chunk_(
    u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk: u, dt [T, batch, G, d]; A [G, d, N]; B, C [T, batch, G, N]; h [batch, G, d, N], the state before it.

    Returns y [T, batch, G, d] without the D term, and all states [T, batch, G, d, N].
    """
    a = (dt.unsqueeze(-1) * A).exp_()
    x = (dt * u).unsqueeze(-1) * B.unsqueeze(-2)
    recurrence_(a, x, h)
    return (C.unsqueeze(-2) @ x.transpose(-1, -2)).squeeze(-2), x


def _time_first(t: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    return rearrange(t, "b (g d) t -> t b g d", g=groups).to(dtype).contiguous()


def _bc(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t.permute(3, 0, 1, 2).to(dtype).contiguous()


def _step_size(delta: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    if bias is not None:
        delta = delta + bias
    return F.softplus(delta) if softplus else delta


def forward(scan: Scan, keep_states: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.scan`, and the states before every STATE_INTERVAL steps [batch, intervals, dim, N] if kept."""
    u, delta, A, B, C, D, delta_bias, delta_softplus = scan
    batch, dim, length = u.shape
    groups, n = scan.groups, scan.states
    dtype = working_dtype(u.dtype)
    A, D, delta_bias = (None if t is None else t.to(dtype).unflatten(0, (groups, -1)) for t in (A, D, delta_bias))
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    intervals = -(-length // STATE_INTERVAL) if keep_states else 0
    states = torch.empty(batch, intervals, dim, n, dtype=dtype, device=u.device)
    h = torch.zeros(batch, *A.shape, dtype=dtype, device=u.device)
    steps = chunk_length(u.device, h.numel(), length)
    block = max(steps, _BLOCK)  # turned to time-first in larger pieces than are computed: the copies are cheaper
    for begin in range(0, length, block):
        span = slice(begin, begin + block)
        u_t = _time_first(u[..., span], groups, dtype)
        dt = _step_size(_time_first(delta[..., span], groups, dtype), delta_bias, delta_softplus)
        B_t, C_t = _bc(B[..., span], dtype), _bc(C[..., span], dtype)
        y_t = torch.empty_like(u_t)
        for start in range(0, len(u_t), steps):
            here, now = slice(start, start + steps), begin + start
            if keep_states and now % STATE_INTERVAL == 0:
                states[:, now // STATE_INTERVAL] = h.flatten(1, 2)
            y_t[here], all_h = chunk_(u_t[here], dt[here], A, B_t[here], C_t[here], h)
            h = all_h[-1]
            if keep_states:
                for step in range(STATE_INTERVAL, len(all_h), STATE_INTERVAL):
                    states[:, (now + step) // STATE_INTERVAL] = all_h[step - 1].flatten(1, 2)
        if D is not None:
            y_t.addcmul_(D, u_t)
        y[..., span] = rearrange(y_t, "t b g d -> b (g d) t")
    return y, h.flatten(1, 2).clone(), states


def backward(grad_y: torch.Tensor, states: torch.Tensor, scan: Scan) -> tuple[torch.Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias (the last two empty where not given), each in its tensor's dtype.

    The adjoint recurrence gh_t = gy_t C_t + a_{t+1} gh_{t+1}, chunk by chunk from the end.
    """
    u, delta, A, B, C, D, delta_bias, delta_softplus = scan
    batch, _, length = u.shape
    groups, dtype = scan.groups, states.dtype
    A_, D_, bias = (None if t is None else t.to(dtype).unflatten(0, (groups, -1)) for t in (A, D, delta_bias))
    grad_u, grad_delta, grad_B, grad_C = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta, B, C)
    )
    grad_A = torch.zeros_like(A_)
    grad_D, grad_bias = (u.new_zeros(A_.shape[:2], dtype=dtype) for _ in range(2))
    gh_next = torch.zeros(batch, *A_.shape, dtype=dtype, device=u.device)
    a_next = torch.zeros_like(gh_next)
    for index in reversed(range(states.shape[1])):
        here = slice(index * STATE_INTERVAL, min((index + 1) * STATE_INTERVAL, length))
        u_t, raw, gy = (_time_first(t[..., here], groups, dtype) for t in (u, delta, grad_y))
        if bias is not None:
            raw = raw + bias
        dt = F.softplus(raw) if delta_softplus else raw
        B_t, C_t = _bc(B[..., here], dtype), _bc(C[..., here], dtype)
        h0 = states[:, index].unflatten(1, (groups, -1))
        _, h = chunk_(u_t, dt, A_, B_t, C_t, h0)
        grad_C[..., here] = torch.einsum("tbgd,tbgdn->bgnt", gy, h)
        a = (dt.unsqueeze(-1) * A_).exp_()

        gh = gy.flip(0).unsqueeze(-1) * C_t.flip(0).unsqueeze(-2)
        recurrence_(torch.cat([a[1:], a_next[None]]).flip(0), gh, gh_next)
        gh = gh.flip(0)
        gh_next, a_next = gh[0].clone(), a[0].clone()

        gh_b = (gh @ B_t.unsqueeze(-1)).squeeze(-1)
        grad_B[..., here] = torch.einsum("tbgdn,tbgd->bgnt", gh, dt * u_t)
        grad_log_a = a.mul_(torch.cat([h0[None], h[:-1]])).mul_(gh)
        grad_A += torch.einsum("tbgdn,tbgd->gdn", grad_log_a, dt)
        grad_dt = torch.einsum("tbgdn,gdn->tbgd", grad_log_a, A_) + gh_b * u_t
        if delta_softplus:
            grad_dt = torch.where(raw > 20, grad_dt, grad_dt * raw.sigmoid())
        grad_u_t = dt * gh_b
        if D_ is not None:
            grad_u_t.addcmul_(D_, gy)
            grad_D += (gy * u_t).sum(dim=(0, 1))
        if bias is not None:
            grad_bias += grad_dt.sum(dim=(0, 1))
        grad_u[..., here] = rearrange(grad_u_t, "t b g d -> b (g d) t")
        grad_delta[..., here] = rearrange(grad_dt, "t b g d -> b (g d) t")
    parameters = grad_A.flatten(0, 1), grad_B, grad_C, grad_D.flatten(), grad_bias.flatten()
    return scan.gradients(grad_u, grad_delta, *parameters)


def state_space_2d(step: Step2d) -> torch.Tensor:
    """The fused step of `kernels.selective_scan.state_space_2d` after the projection: gathers and scatters by chunk."""
    x, projected, order, dt_weight, dt_bias, A, D, prompt, merge = step
    batch, length, width, directions, rank, n = step.sizes
    dtype = working_dtype(x.dtype)
    y = torch.zeros(batch, 1 if merge else directions, length, width, dtype=dtype, device=x.device)
    h = torch.zeros(batch, directions, width, n, dtype=dtype, device=x.device)
    image = torch.arange(batch, device=x.device)[:, None, None]
    direction = torch.arange(directions, device=x.device)[None, :, None]
    slot = torch.zeros_like(direction) if merge else direction
    steps = chunk_length(x.device, h.numel(), length)
    for start in range(0, length, steps):
        pixel = order[:, :, start : start + steps].long()
        row = projected[image, pixel, direction].to(dtype).permute(2, 0, 1, 3)  # [T, B, K, R + 2N]
        low_rank, B, C = row.split((rank, n, n), dim=-1)
        if prompt is not None:
            C = C + prompt[:, start : start + steps].to(dtype).transpose(0, 1)[:, :, None]
        u = x[image, pixel].to(dtype).permute(2, 0, 1, 3).contiguous()
        dt = F.softplus(torch.einsum("tbkr,kdr->tbkd", low_rank, dt_weight) + dt_bias)
        y_t, states = chunk_(u, dt, A, B.contiguous(), C.contiguous(), h)
        h = states[-1]
        y.index_put_((image, slot, pixel), y_t.addcmul_(D, u).permute(1, 2, 0, 3), accumulate=merge)
    return y[:, 0] if merge else y
