"""Which network weights resemble that lack some of its keys, for errors that help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from . import registry
from .registry import Architecture
from .unwrap import views

_RESEMBLANCE = 0.6
"""The share of a network's kinds of keys that a file must have to be called an incomplete one."""
_NUMBER = re.compile(r"\d+")


def closest(tensors: Mapping[str, Any], candidates: list[Architecture]) -> tuple[Architecture, list[str]] | None:
    """The architecture that lacks the fewest kinds of keys, if most are there; with examples of what it lacks."""
    best: tuple[float, Architecture, list[str]] | None = None
    for view, _, _ in views(dict(tensors)):
        present = {_NUMBER.sub("#", key) for key in view}
        for architecture in candidates:
            if not any(_NUMBER.sub("#", key) in present for key in architecture.signature):
                continue  # saves building its outline
            wanted = _kinds_of_keys(architecture.id)
            missing = [key for kind, key in wanted.items() if kind not in present]
            share = 1 - len(missing) / max(len(wanted), 1)
            if missing and share >= _RESEMBLANCE and (best is None or share > best[0]):
                best = (share, architecture, missing)
    return None if best is None else best[1:]


@lru_cache(maxsize=64)
def _kinds_of_keys(architecture_id: str) -> dict[str, str]:
    """The names of an architecture's weights with "#" for numbers, each with an example; of its first released form."""
    architecture = registry.get(architecture_id)
    config = next(iter(architecture.variants.values()), None)
    if config is None:
        return {}
    with torch.device("meta"):
        keys = architecture.build(config).state_dict()
    computed = [re.compile(p) for p in architecture.computed_buffers]
    return {_NUMBER.sub("#", k): k for k in reversed(keys) if not any(p.search(k) for p in computed)}
