"""Networks without initialisation, for weights that are there already; no larger than these can fill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, ConfigError
from .registry import Architecture

# What code that reads names and shapes raises when they make no sense.
NONSENSE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    MemoryError,
)
_CALLS_PER_TENSOR = 30


def build_empty(
    architecture: Architecture, config: Mapping[str, Any], tensors: int = 10_000, size: int = 1 << 34
) -> nn.Module:
    """A network whose random initialisation was skipped; tables that it computes are right. Global RNG untouched.

    tensors, size: how many tensors and bytes of weights there are for it; a network far beyond them is refused before
    its memory is asked for. Raises CheckpointError.
    """
    try:
        with (
            torch.random.fork_rng(devices=[]),
            _Construction(_CALLS_PER_TENSOR * (tensors + 100), 8 * size + (64 << 20)),
        ):
            return architecture.build(config)
    except (*NONSENSE, ConfigError) as error:
        raise CheckpointError(f"looks like {architecture.title}, but no network has such shapes ({error})") from None


class _Construction(TorchFunctionMode):
    """While a network is built: zeros instead of random numbers, and an end when it is far larger than its weights.

    Zeros and not what memory holds: initialisers that draw until all values are within bounds must come to an end.

    calls: how many torch functions it may call; memory: how many bytes it may ask for.
    """

    _FILLS = frozenset(
        [getattr(torch.Tensor, n) for n in ("uniform_", "normal_")]
        + [getattr(nn.init, n) for n in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_")]
    )
    _RANDOM = frozenset((torch.rand, torch.randn))
    _SIZED = frozenset((torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn))

    def __init__(self, calls: int, memory: int) -> None:
        super().__init__()
        self.calls, self.memory = calls, memory

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FILLS:
            return (args[0] if args else kwargs["tensor"]).detach().zero_()
        if func in self._SIZED:
            shape = kwargs.get("size") or (args[0] if args and isinstance(args[0], Sequence) else args)
            self.memory -= 4 * math.prod(shape)
        elif func is torch.full:
            self.memory -= 4 * math.prod(args[0] if args else kwargs["size"])
        elif func in (torch.arange, torch.linspace, torch.eye):
            self.memory -= 8 * int(max([abs(a) for a in args if isinstance(a, (int, float))], default=0))
        self.calls -= 1
        if self.calls < 0 or self.memory < 0:
            raise RuntimeError("it would be far larger than the weights in the file")
        if func in self._RANDOM:
            func = torch.zeros
            kwargs.pop("generator", None)
        return func(*args, **kwargs)
