"""The networks, and the two ways to get one: `create` from hyper-parameters, `load` from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import registry
from .checkpoint import load
from .restorer import Restorer

__all__ = ["Restorer", "create", "load", "registry"]


def create(system: str, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised network of `system`; `config` uses the names of the method's parity cases.

    A method that samples with another system's network ("rdmd", "cm4ir") gives that network.
    Raises ConfigError if the system is unknown or the configuration cannot work.
    """
    system, config = registry.network_of(system, config)
    return registry.find(system, config).build(config)
