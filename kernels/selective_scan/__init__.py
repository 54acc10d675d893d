"""The selective state-space scan of Mamba, and the 2-D state-space step that image networks build from it.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752. The two public
functions choose a backend (see `kernels.backend`): CUDA C++ through NVRTC, Numba on CPUs, PyTorch in chunks, or the
plain reference. No backend ever builds a tensor of (batch, dim, L, N).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F

from ...errors import InputError
from .. import backend
from . import chunked, reference
from .arguments import Scan, Step2d

__all__ = ["selective_scan", "state_space_2d"]


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y[t] = C[t] h[t] + D u[t] with h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t], times silu(z) if given.

    u, delta, z [batch, dim, L]; A [dim, N] real; B, C [batch, G, N, L] (channels in G contiguous runs), [batch, N, L]
    or, constant over time, [dim, N]; D, delta_bias [dim]. dt = delta + delta_bias, through softplus if asked. Computes
    in float32 (float64 for float64 input) whatever the dtype of u and under autocast too; returns y in u's dtype, and
    the last state [batch, dim, N] if asked, through which no gradient flows. Raises InputError for shapes that do not
    fit. Arguments as in the operator of mamba_ssm.
    """
    batch, dim, length, B, C = _checked(u, delta, A, B, C)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and vector.shape != (dim,):
            raise InputError(f"selective_scan: {name} must be ({dim},), got {tuple(vector.shape)}")
    dtype = u.dtype
    if z is not None:  # one rounding, after the gate
        u = u.to(chunked.working_dtype(dtype))
    tensors = (u, delta, A, B, C, D, delta_bias)
    if _reference_wanted():
        with torch.autocast(u.device.type, enabled=False):
            working = chunked.working_dtype(dtype)
            y, state = reference.scan(*(None if t is None else t.to(working) for t in tensors), delta_softplus)
        y, state = y.to(u.dtype), state.detach()
    else:
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, state, _ = _scan(*tensors, delta_softplus, keep)
    if z is not None:
        y = (y * F.silu(z.to(y.dtype))).to(dtype)
    return (y, state) if return_last_state else y


def state_space_2d(
    x: torch.Tensor,
    order: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A_logs: torch.Tensor,
    D: torch.Tensor,
    *,
    prompt: torch.Tensor | None = None,
    merge: bool = True,
) -> torch.Tensor:
    """Reads a feature map along K paths, scans each, and puts the results back at their pixels.

    x [B, L, d], pixels in raster order; order [K, L] or [B, K, L], integer: the pixel that path k reads at step t, each
    path a permutation; x_proj_weight [K, R + 2N, d]; dt_weight [K, d, R]; dt_bias [K, d]; A_logs [K d, N] with
    A = -exp(A_logs); D [K d]. prompt [B, L, N] or None is added to C of every step (MambaIRv2's attentive equation, in
    the order of the steps). Returns [B, L, d], the sum over the paths, or with merge=False [B, K, L, d]; float32
    (float64 for float64 input). u is gathered and delta formed inside the scan; neither is ever written. Where a
    gradient is needed the unfused operators run instead. Raises InputError for shapes that do not fit.
    """
    batch, length, width = x.shape
    directions, rank = dt_weight.shape[0], dt_weight.shape[2]
    n = A_logs.shape[1]
    if order.ndim == 2:
        order = order.expand(batch, -1, -1)
    wanted = {
        "order": (order, (batch, directions, length)),
        "x_proj_weight": (x_proj_weight, (directions, rank + 2 * n, width)),
        "dt_weight": (dt_weight, (directions, width, rank)),
        "dt_bias": (dt_bias, (directions, width)),
        "A_logs": (A_logs, (directions * width, n)),
        "D": (D, (directions * width,)),
        "prompt": (prompt, (batch, length, n)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"state_space_2d: {name} must be {shape}, got {tuple(tensor.shape)}")
    if length == 0:
        raise InputError("state_space_2d: the feature map is empty")
    tensors = (x, x_proj_weight, dt_weight, dt_bias, A_logs, D, prompt)
    differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    dtype = chunked.working_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        # A projection and a permutation commute: one product in raster order instead of K gathered copies.
        projected = F.linear(x, x_proj_weight.flatten(0, 1).to(x.dtype)).unflatten(-1, (directions, -1))
        A = -torch.exp(A_logs.to(dtype)).unflatten(0, (directions, width))
        D = D.to(dtype).unflatten(0, (directions, width))
        step = Step2d(x, projected, order, dt_weight.to(dtype), dt_bias.to(dtype), A, D, prompt, merge)
        return _unfused(step) if differentiate or _reference_wanted() else _state_space_2d(*step)


def _reference_wanted() -> bool:
    """Whether the plain loop was asked for; under torch.compile the operators are opaque and choose when they run."""
    return not torch.compiler.is_compiling() and backend.requested() == "reference"


def _unfused(step: Step2d) -> torch.Tensor:
    """`state_space_2d` out of `selective_scan` and index operations; differentiable."""
    x, projected, order, dt_weight, dt_bias, A, D, prompt, merge = step
    batch, _, width, directions, rank, n = step.sizes
    image = torch.arange(batch, device=x.device)[:, None, None]
    direction = torch.arange(directions, device=x.device)[None, :, None]
    order = order.long()
    rows = projected[image, order, direction].to(A.dtype)
    low_rank, B, C = rows.split((rank, n, n), dim=-1)
    if prompt is not None:
        C = C + prompt.to(A.dtype)[:, None]
    u = x[image, order].to(A.dtype).transpose(2, 3).flatten(1, 2)
    delta = torch.einsum("bklr,kdr->bkdl", low_rank, dt_weight).flatten(1, 2)
    y = selective_scan(
        u,
        delta,
        A.flatten(0, 1),
        B.transpose(2, 3),
        C.transpose(2, 3),
        D.flatten(),
        delta_bias=dt_bias.flatten(),
        delta_softplus=True,
    )
    y = y.unflatten(1, (directions, width)).transpose(2, 3)
    inverse = torch.empty_like(order).scatter_(2, order, torch.arange(order.shape[2], device=x.device).expand_as(order))
    y = y[image, direction, inverse]
    return y.sum(dim=1) if merge else y


def _checked(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[int, int, int, torch.Tensor, torch.Tensor]:
    if u.ndim != 3 or delta.shape != u.shape:
        raise InputError(
            f"selective_scan: u and delta must be [batch, dim, L], got {tuple(u.shape)}, {tuple(delta.shape)}"
        )
    batch, dim, length = u.shape
    if A.ndim != 2 or A.shape[0] != dim or A.is_complex():
        raise InputError(f"selective_scan: A must be real and [{dim}, N], got {A.dtype} {tuple(A.shape)}")
    if 0 in (batch, dim, length, A.shape[1]):
        raise InputError(f"selective_scan: empty input, u {tuple(u.shape)}, A {tuple(A.shape)}")
    expanded = []
    for name, t in (("B", B), ("C", C)):
        if t.ndim == 2:
            t = t[None, :, :, None].expand(batch, -1, -1, length)
        elif t.ndim == 3:
            t = t[:, None]
        if t.ndim != 4 or (t.shape[0], t.shape[2], t.shape[3]) != (batch, A.shape[1], length) or dim % t.shape[1]:
            raise InputError(
                f"selective_scan: {name} must be [{batch}, G, {A.shape[1]}, {length}] with G dividing {dim}, "
                f"got {tuple(t.shape)}"
            )
        expanded.append(t)
    groups = max(t.shape[1] for t in expanded)  # one of them may have fewer groups than the other
    B, C = (t if t.shape[1] == groups else t.repeat_interleave(groups // t.shape[1], dim=1) for t in expanded)
    return batch, dim, length, B, C


def _implementation(name: str) -> ModuleType:
    return importlib.import_module(f".{ {'jit': 'compiled', 'torch': 'chunked'}.get(name, name) }", __package__)


def _dispatch(function: str, like: torch.Tensor, *arguments: object) -> object:
    """Runs `function` of the backend chosen for tensors like this one.

    A kernel that fails on the machine gives way to PyTorch, announced once.
    """
    name = backend.choose(like.device, like.dtype)
    if name == "reference":
        name = "torch"
    if name in ("cuda", "jit"):
        module = _implementation(name)
        try:
            return getattr(module, function)(*arguments)
        except module.KernelError as error:
            if backend.requested() == name:
                raise
            backend.mark_broken(name, str(error))
    return getattr(chunked, function)(*arguments)


@torch.library.custom_op("mend::selective_scan", mutates_args=())
def _scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        return _dispatch("forward", u, Scan(u, delta, A, B, C, D, delta_bias, delta_softplus), keep_states)


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states):
    batch, dim, length = u.shape
    dtype = chunked.working_dtype(u.dtype)
    intervals = -(-length // chunked.STATE_INTERVAL) if keep_states else 0
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    state = torch.empty(batch, dim, A.shape[1], dtype=dtype, device=u.device)
    return y, state, torch.empty(batch, intervals, dim, A.shape[1], dtype=dtype, device=u.device)


@torch.library.custom_op("mend::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: torch.Tensor,
    states: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        scan = Scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
        return _dispatch("backward", grad_y, grad_y, states, scan)


@_scan_backward.register_fake
def _(grad_y, states, u, delta, A, B, C, D, delta_bias, delta_softplus):
    def like(t: torch.Tensor | None) -> torch.Tensor:
        if t is None:
            return torch.empty(0, dtype=states.dtype, device=u.device)
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return tuple(like(t) for t in (u, delta, A, B, C, D, delta_bias))


def _setup_context(ctx, inputs, output) -> None:
    u, delta, A, B, C, D, delta_bias, ctx.delta_softplus, ctx.keep_states = inputs
    ctx.save_for_backward(output[2], u, delta, A, B, C, D, delta_bias)


def _gradient(ctx, grad_y, grad_state, grad_states):
    states, u, delta, A, B, C, D, delta_bias = ctx.saved_tensors
    if not ctx.keep_states:  # called below `selective_scan`, as opcheck does
        states = torch.ops.mend.selective_scan(u, delta, A, B, C, D, delta_bias, ctx.delta_softplus, True)[2]
    grads = list(
        torch.ops.mend.selective_scan_backward(grad_y, states, u, delta, A, B, C, D, delta_bias, ctx.delta_softplus)
    )
    grads[5] = None if D is None else grads[5]
    grads[6] = None if delta_bias is None else grads[6]
    return *grads, None, None


_scan.register_autograd(_gradient, setup_context=_setup_context)


@torch.library.custom_op("mend::state_space_2d", mutates_args=())
def _state_space_2d(
    x: torch.Tensor,
    projected: torch.Tensor,
    order: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    prompt: torch.Tensor | None,
    merge: bool,
) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _dispatch("state_space_2d", x, Step2d(x, projected, order, dt_weight, dt_bias, A, D, prompt, merge))


@_state_space_2d.register_fake
def _(x, projected, order, dt_weight, dt_bias, A, D, prompt, merge):
    batch, length, width = x.shape
    shape = (batch, length, width) if merge else (batch, dt_weight.shape[0], length, width)
    return torch.empty(shape, dtype=chunked.working_dtype(x.dtype), device=x.device)
