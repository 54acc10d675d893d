"""The state-space operators on CPUs: Numba loops over vector code, spread over threads.

Numba is an optional extra; nothing is imported or compiled before the first call. Threads are Python's own: the
compiled code runs without the GIL, several callers may run at once, and `torch.set_num_threads` is obeyed.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F

from .arguments import Scan, Step2d
from .chunked import STATE_INTERVAL

log = logging.getLogger(__name__)

_LOG2E = 1.4426950408889634
_BLOCKS_A_TASK = 4  # blocks that share one look at B, C and the order


class KernelError(RuntimeError):
    """The kernels could not be compiled on this machine."""


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why these kernels cannot compute `dtype` on `device`; "" if they can."""
    if device.type != "cpu":
        return f"computes on the CPU, the tensors are on {device.type}"
    if dtype == torch.float64:
        return "computes in float32 only"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    return ""


@lru_cache(maxsize=1)
def _loops() -> ModuleType:
    try:
        log.info("compiling the CPU kernels (once; kept in Numba's cache)")
        from . import loops

        assert loops.INTERVAL == STATE_INTERVAL
    except Exception as error:  # a Numba that does not fit this Python, NumPy or LLVM
        raise KernelError(f"numba: {error}") from error
    return loops


_pool: tuple[int, ThreadPoolExecutor] | None = None
_pool_lock = threading.Lock()


def _run(function: Callable, tasks: Iterable[tuple]) -> None:
    """Calls `function(*task)` for every task on as many threads as torch uses."""
    from numba.core.errors import NumbaError

    try:
        _spread(function, tasks)
    except NumbaError as error:
        raise KernelError(f"numba: {' '.join(str(error).split())[:300]}") from error


def _spread(function: Callable, tasks: Iterable[tuple]) -> None:
    global _pool
    tasks, threads = list(tasks), torch.get_num_threads()
    if threads == 1 or len(tasks) == 1:
        for task in tasks:
            function(*task)
        return
    with _pool_lock:
        if _pool is None or _pool[0] != threads:
            if _pool is not None:
                _pool[1].shutdown(wait=False)
            _pool = threads, ThreadPoolExecutor(threads, thread_name_prefix="mend-scan")
        futures = [_pool[1].submit(function, *task) for task in tasks]
    for future in futures:
        future.result()


def _split(blocks: int, pieces: int) -> list[tuple[int, int]]:
    """0..blocks cut into at most `pieces` ranges of nearly equal length."""
    pieces = max(1, min(pieces, blocks))
    edges = [blocks * i // pieces for i in range(pieces + 1)]
    return list(zip(edges, edges[1:], strict=False))


def _flat(t: torch.Tensor):
    """A float32 tensor as a flat NumPy array; shares memory where it can."""
    return t.detach().to(torch.float32).contiguous().view(-1).numpy()


def pack(t: torch.Tensor, groups: int, lanes: int):
    """Parameters of channels [G d, ...] as [G, blocks, ..., lanes], zero where a block is not full; flat."""
    t = t.detach().float().unflatten(0, (groups, -1))
    width = t.shape[1]
    t = t.movedim(1, -1)
    t = F.pad(t, (0, -width % lanes)).unflatten(-1, (-1, lanes))
    return t.movedim(-2, 1).contiguous().view(-1).numpy()


def _parameters(A: torch.Tensor, D: torch.Tensor | None, bias: torch.Tensor | None, groups: int, lanes: int) -> tuple:
    zeros = A.new_zeros(A.shape[0])
    return (
        pack(A * _LOG2E, groups, lanes),
        pack(zeros if D is None else D, groups, lanes),
        pack(zeros if bias is None else bias, groups, lanes),
    )


def forward(scan: Scan, keep_states: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `chunked.forward`."""
    loops = _loops()
    u, delta, A, B, C, D, delta_bias, delta_softplus = scan
    batch, dim, length = u.shape
    groups, n, width = scan.groups, scan.states, scan.width
    blocks = -(-width // loops.LANES)
    intervals = -(-length // STATE_INTERVAL) if keep_states else 0
    y = torch.empty(u.shape, dtype=torch.float32)
    last, states = torch.empty(batch, dim, n), torch.empty(batch, intervals, dim, n)
    A_, D_, bias = _parameters(A, D, delta_bias, groups, loops.LANES)
    inputs = (_flat(u), _flat(delta), A_, _flat(B), _flat(C), D_, bias, delta_softplus)
    results = (_flat(y), _flat(last), _flat(states))
    sizes = (groups, width, n, length, intervals)
    pieces = max(-(-blocks // _BLOCKS_A_TASK), -(-2 * torch.get_num_threads() // (batch * groups)))
    _run(
        loops.scan,
        (
            (*inputs, *results, sizes, image, group, first, end)
            for image in range(batch)
            for group in range(groups)
            for first, end in _split(blocks, pieces)
        ),
    )
    return y.to(u.dtype), last, states


def backward(grad_y: torch.Tensor, states: torch.Tensor, scan: Scan) -> tuple[torch.Tensor, ...]:
    """As `chunked.backward`."""
    loops = _loops()
    u, delta, A, B, C, D, delta_bias, delta_softplus = scan
    batch, dim, length = u.shape
    groups, n, width = scan.groups, scan.states, scan.width
    blocks = -(-width // loops.LANES)
    A_, D_, bias = _parameters(A, D, delta_bias, groups, loops.LANES)
    inputs = (_flat(grad_y), _flat(states), _flat(u), _flat(delta), A_, _flat(B), _flat(C), D_, bias, delta_softplus)
    grad_u, grad_delta = torch.empty(u.shape), torch.empty(u.shape)
    grad_A, grad_D, grad_bias = torch.empty(batch, dim, n), torch.zeros(batch, dim), torch.zeros(batch, dim)
    # Tasks that share a group each add into B and C gradients of their own: no more of them than there are threads.
    ranges = _split(blocks, -(-torch.get_num_threads() // (batch * groups)))
    shares = torch.zeros(2, len(ranges), batch, groups, length, n)
    results = (_flat(grad_u), _flat(grad_delta), _flat(grad_A))
    ends = (_flat(grad_D), _flat(grad_bias))
    sizes = (groups, width, n, length, states.shape[1])
    _run(
        loops.adjoint,
        (
            (*inputs, *results, _flat(shares[0, i]), _flat(shares[1, i]), *ends, sizes, image, group, *ranges[i])
            for image in range(batch)
            for group in range(groups)
            for i in range(len(ranges))
        ),
    )
    grad_B, grad_C = (share.sum(dim=0).transpose(-2, -1) for share in shares)
    parameters = grad_A.sum(dim=0), grad_B, grad_C, grad_D.sum(dim=0), grad_bias.sum(dim=0)
    return scan.gradients(grad_u, grad_delta, *parameters)


def state_space_2d(step: Step2d) -> torch.Tensor:
    """As `chunked.state_space_2d`."""
    loops = _loops()
    x, projected, order, dt_weight, dt_bias, A, D, prompt, merge = step
    batch, length, width, paths, rank, n = step.sizes
    blocks = -(-width // loops.LANES)
    y = torch.empty(batch, length, width) if merge else torch.empty(batch, paths, length, width)
    A_, D_, bias = _parameters(A.flatten(0, 1), D.flatten(), dt_bias.flatten(), paths, loops.LANES)
    inputs = (
        _flat(x),
        _flat(projected),
        order.to(torch.int64).contiguous().view(-1).numpy(),
        pack(dt_weight.flatten(0, 1), paths, loops.LANES),
        bias,
        A_,
        D_,
        _flat(x.new_empty(0) if prompt is None else prompt),
        merge,
        _flat(y),
        (paths, width, n, length, rank),
    )
    starts = (0,) if merge else range(paths)
    together = paths if merge else 1
    pieces = max(-(-blocks // _BLOCKS_A_TASK), -(-2 * torch.get_num_threads() // (batch * len(starts))))
    _run(
        loops.state_space_2d,
        (
            (*inputs, image, path, together, first, end)
            for image in range(batch)
            for path in starts
            for first, end in _split(blocks, pieces)
        ),
    )
    return y
