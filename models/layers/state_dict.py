"""Reading hyper-parameters from the keys of a state dict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from ...errors import CheckpointError


def indices(keys: Iterable[str], prefix: str) -> list[int]:
    """The numbers that follow `prefix` in `keys`, sorted: for "enc.", keys "enc.0.x" and "enc.2.y" give [0, 2]."""
    found = set()
    for key in keys:
        if key.startswith(prefix):
            head = key[len(prefix) :].split(".", 1)[0]
            if head.isdigit():
                found.add(int(head))
    return sorted(found)


def count_indices(keys: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix` in `keys`."""
    return len(indices(keys, prefix))


def layer_widths(state: Mapping[str, torch.Tensor], layers: Iterable[str]) -> list[tuple[int, int]]:
    """Input and output channels of those of the `layers` that are there."""
    weights = [state[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in state]
    return [(weight.shape[1], weight.shape[0]) for weight in weights]


def expansion_factor(widths: Iterable[tuple[int, int]]) -> float:
    """The shortest decimal f with hidden == int(width * f) for every (width, hidden).

    Networks store int(width * f) channels, never f itself. Raises CheckpointError if no f gives all of them.
    """
    pairs = list(widths)
    low = max(hidden / width for width, hidden in pairs)
    for digits in range(7):
        step = 10**digits
        for factor in (math.floor(low * step) / step, math.ceil(low * step) / step):
            if all(int(width * factor) == hidden for width, hidden in pairs):
                return factor
    raise CheckpointError(f"no expansion factor gives these widths and hidden widths: {pairs}")
