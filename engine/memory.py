"""How much memory a network's activations take: as measured where the table has its settings, else by its formula."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..models.restorer import Restorer

TABLE = Path(__file__).with_name("memory.json")
"""Written by `mend bench memory --write`: bytes per input pixel, without the weights, of each network's settings."""
HALF = 0.6
"""What half precision takes of the formula's float32 figure: normalisations and sums stay in 32 bit."""


def settings(config: Mapping[str, Any]) -> str:
    """A configuration in one spelling: key order, lists or tuples and 1 or 1.0 make no difference."""
    return json.dumps(_plain(config), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@lru_cache(maxsize=1)
def table() -> dict[tuple[str, str], dict[str, Any]]:
    """The measured rows by network and settings; empty if there is no table."""
    if not TABLE.is_file():
        return {}
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    return {(row["network"], settings(row["config"])): row for row in rows}


def measured(restorer: Restorer) -> dict[str, Any] | None:
    """The row of the table for this network, if its settings were measured: all that both name are equal."""
    exact = table().get((restorer.architecture.id, settings(restorer.config)))
    if exact is not None:
        return exact
    config = _plain(restorer.config)
    for (network, _), row in table().items():
        other = _plain(row["config"])
        shared = config.keys() & other.keys()
        if network == restorer.architecture.id and shared and all(config[k] == other[k] for k in shared):
            return row
    return None


def bytes_per_pixel(restorer: Restorer, dtype: torch.dtype) -> float:
    """Activation memory per input pixel at its peak, without the weights."""
    half = dtype in (torch.float16, torch.bfloat16)
    row = measured(restorer)
    if row is not None:
        return row["half" if half else "single"]
    return restorer.architecture.bytes_per_pixel(restorer.config) * (HALF if half else 1.0)
