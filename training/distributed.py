"""Training in several processes: PyTorch's DistributedDataParallel, started by torchrun (see `torchrun`).

Each process makes its share of every batch; gradients are averaged, so
that all have the same weights and the result is that of one process with the whole batch (up to rounding, and to losses
that compare the pictures of a batch with each other, as TUR's and MoCE-IR's balance loss do).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError


def active() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


def share() -> tuple[int, int]:
    """(which process this is, of how many)."""
    return (dist.get_rank(), dist.get_world_size()) if active() else (0, 1)


def leads() -> bool:
    """Whether this is the process that writes files and talks."""
    return share()[0] == 0


def wrap(module: nn.Module) -> nn.Module:
    """The module, its gradients averaged over all processes when it is called; itself in a single process."""
    # Experts and tasks that a share of the batch lacks leave parameters without gradient.
    return DistributedDataParallel(module, find_unused_parameters=True) if active() else module


def _place() -> torch.device:
    """Where the processes' backend exchanges tensors."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()


def mean(values: dict[str, float]) -> dict[str, float]:
    """The average over all processes of numbers that each has; all must have the same names."""
    if not active() or not values:
        return values
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=_place())
    dist.all_reduce(numbers)
    return dict(zip(values, (numbers / dist.get_world_size()).tolist(), strict=True))


def agree(stop: bool) -> bool:
    """Whether any process wants to stop."""
    if not active():
        return stop
    wish = torch.tensor([float(stop)], device=_place())
    dist.all_reduce(wish, op=dist.ReduceOp.MAX)
    return bool(wish)


@contextmanager
def processes(backend: str = "") -> Iterator[torch.device]:
    """Joins the processes that torchrun started; gives this one's device. Raises ConfigError without torchrun.

    backend: empty chooses the accelerator's own where each process can have one, else gloo on the CPU.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ConfigError("distributed: start this with torchrun (torchrun --nproc_per_node 2 -m ...)")
    local, device = int(os.environ["LOCAL_RANK"]), torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and backend != "gloo" and torch.accelerator.device_count() > local:
        device = torch.device(accelerator.type, local)
        torch.accelerator.set_device_index(local)
    dist.init_process_group(backend or dist.get_default_backend_for_device(device))
    try:
        yield device
    finally:
        dist.destroy_process_group()
