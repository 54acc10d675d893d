"""The state-space operators on NVIDIA GPUs: `scan.cu` and `scan_backward.cu`, compiled at first use through NVRTC."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import torch

from .. import jit
from ..jit import KernelError
from . import chunked
from .arguments import Scan, Step2d
from .chunked import STATE_INTERVAL

__all__ = ["KernelError", "backward", "forward", "state_space_2d", "why_not"]

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("scan.cu")
BACKWARD_SOURCE = Path(__file__).with_name("scan_backward.cu")
_SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STATE_BYTES = 64 << 20
"""Memory for the states between chunks; more chunks run more threads side by side."""
_BACKWARD_THREADS = 32
_BACKWARD_STATES = 96
"""N up to which the backward kernel fits into the shared memory that every device has."""


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why these kernels cannot compute `dtype` on `device`; "" if they can."""
    if dtype not in _SCALARS:
        return f"computes float32, float16 and bfloat16, not {dtype}"
    return jit.why_not(device)


def options(states: int, rank: int, width: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Compiler options for N states, a dt projection of `rank`, `width` channels a group and a type."""
    threads = 64 if -(-width // 64) * 64 <= -(-width // 32) * 32 else 32
    return (f"-DN_STATES={states}", f"-DRANK={rank}", f"-DTHREADS={threads}", f"-DSCALAR={_SCALARS[dtype]}")


def backward_options(states: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The same for `scan_backward.cu`."""
    names = {"N_STATES": states, "THREADS": _BACKWARD_THREADS, "CHUNK": STATE_INTERVAL, "SCALAR": _SCALARS[dtype]}
    return tuple(f"-D{name}={value}" for name, value in names.items())


def _threads(flags: tuple[str, ...]) -> int:
    return int(flags[2].rsplit("=", 1)[1])


def _chunk(length: int, channels: int, states: int) -> int:
    """Steps of a chunk: STATE_INTERVAL, doubled until the states between chunks fit into _STATE_BYTES."""
    chunk = STATE_INTERVAL
    while -(-length // chunk) * channels * states * 4 > _STATE_BYTES and chunk < length:
        chunk *= 2
    return chunk


def _ready(t: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    return None if t is None else t.detach().to(dtype).contiguous()


def forward(scan: Scan, keep_states: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `chunked.forward`."""
    u, delta, A, B, C, D, delta_bias, delta_softplus = scan
    batch, dim, length = u.shape
    groups, n = scan.groups, scan.states
    flags = options(n, 1, dim // groups, u.dtype)
    threads = _threads(flags)
    u, delta, B, C = (_ready(t, u.dtype) for t in (u, delta, B, C))
    A, D, bias = (_ready(t) for t in (A, D, delta_bias))
    chunk = STATE_INTERVAL if keep_states else _chunk(length, batch * dim, n)
    chunks = -(-length // chunk)
    y, last = torch.empty_like(u), torch.empty(batch, dim, n, device=u.device)
    states, sums = torch.empty(batch, chunks, dim, n, device=u.device), torch.empty(batch, chunks, dim, device=u.device)
    grid = (chunks, groups * -(-(dim // groups) // threads), batch)
    sizes = (groups, dim // groups, length, chunk, int(delta_softplus))
    with torch.cuda.device(u.device):
        module = jit.load(SOURCE, u.device, flags)
        launch = module.kernel("scan")
        if chunks > 1:
            launch(grid, threads, u, delta, A, B, C, None, bias, None, states, sums, None, *sizes)
            module.kernel("carry")((-(-dim * n // 256), batch, 1), 256, states, sums, A, dim, chunks)
        else:
            states.zero_()
        launch(grid, threads, u, delta, A, B, C, D, bias, y, states, None, last, *sizes)
    return y, last, states if keep_states else states.new_empty(batch, 0, dim, n)


def backward(grad_y: torch.Tensor, states: torch.Tensor, scan: Scan) -> tuple[torch.Tensor, ...]:
    """As `chunked.backward`, which takes over where the kernel cannot run."""
    if scan.states <= _BACKWARD_STATES:
        try:
            return _backward(grad_y, states, scan)
        except KernelError as error:
            _say_once(str(error))
    return chunked.backward(grad_y, states, scan)


@lru_cache(maxsize=8)
def _say_once(reason: str) -> None:
    log.warning("the cuda kernel for gradients failed (%s): using plain PyTorch instead, which is slower", reason)


def _backward(grad_y: torch.Tensor, states: torch.Tensor, scan: Scan) -> tuple[torch.Tensor, ...]:
    u, delta, A, B, C, D, delta_bias, delta_softplus = scan
    batch, dim, length = u.shape
    groups, n, chunks, dtype = scan.groups, scan.states, states.shape[1], u.dtype
    gy, u, delta, B, C = (_ready(t, dtype) for t in (grad_y, u, delta, B, C))
    states, A, D, bias = (_ready(t) for t in (states, A, D, delta_bias))
    tiles = -(-scan.width // _BACKWARD_THREADS)
    grid, sizes = (chunks, groups * tiles, batch), (groups, scan.width, length, int(delta_softplus))
    grad_u, grad_delta, grad_A = torch.empty_like(u), torch.empty_like(u), torch.empty_like(states)
    grad_B, grad_C = (torch.empty(tiles, *B.shape, device=u.device) for _ in range(2))
    grad_D, grad_bias, sums = (torch.empty(batch, chunks, dim, device=u.device) for _ in range(3))
    handed = torch.empty_like(states) if chunks > 1 else None
    with torch.cuda.device(u.device):
        module = jit.load(BACKWARD_SOURCE, u.device, backward_options(n, dtype))
        if chunks > 1:
            module.kernel("adjoint")(grid, _BACKWARD_THREADS, gy, delta, A, C, bias, handed, sums, *sizes)
            module.kernel("carry_back")((-(-dim * n // 256), batch, 1), 256, handed, sums, A, dim, chunks)
        inputs = (gy, u, delta, A, B, C, D, bias, states, handed)
        results = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias)
        module.kernel("scan_backward")(grid, _BACKWARD_THREADS, *inputs, *results, *sizes)
    parameters = grad_A.sum(dim=(0, 1)), grad_B.sum(dim=0), grad_C.sum(dim=0), grad_D.sum(dim=(0, 1))
    return scan.gradients(grad_u, grad_delta, *parameters, grad_bias.sum(dim=(0, 1)))


def state_space_2d(step: Step2d) -> torch.Tensor:
    """As `chunked.state_space_2d`."""
    x, projected, order, dt_weight, dt_bias, A, D, prompt, merge = step
    batch, length, width, paths, rank, n = step.sizes
    flags = options(n, rank, width, x.dtype)
    threads = _threads(flags)
    x, projected = (_ready(t, x.dtype) for t in (x, projected))
    order = order.to(torch.int32).contiguous()
    parameters = [_ready(t) for t in (dt_weight, dt_bias, A, D, prompt)]
    chunk = _chunk(length, batch * paths * width, n)
    chunks = -(-length // chunk)
    slots = 1 if merge else paths
    y = torch.empty(batch, slots, length, width, device=x.device)
    states = torch.empty(batch, chunks, paths * width, n, device=x.device)
    sums = torch.empty(batch, chunks, paths * width, device=x.device)
    tiles = -(-width // threads)
    inputs = (x, projected, order, *parameters)
    y_path = 0 if merge else length * width
    with torch.cuda.device(x.device):
        module = jit.load(SOURCE, x.device, flags)
        launch = module.kernel("state_space")
        if chunks > 1:
            sizes = (paths, width, length, chunk, 0, 0, 0, 0)
            launch((chunks, tiles, batch * paths), threads, *inputs, None, states, sums, *sizes)
            carry = module.kernel("carry")
            carry((-(-paths * width * n // 256), batch, 1), 256, states, sums, parameters[2], paths * width, chunks)
        start = states if chunks > 1 else None
        for path in range(paths):
            sizes = (paths, width, length, chunk, path, int(merge and path > 0), slots * length * width, y_path)
            launch((chunks, tiles, batch), threads, *inputs, y, start, None, *sizes)
    return y[:, 0] if merge else y
