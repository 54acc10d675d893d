"""What travels on the MEND_RESTORER wire: a network, its place in memory, and options set on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import models
from . import host

SETTINGS = {"scan_len": "scan_len", "input_range": "input_range", "local_pooling": "train_size"}
"""Options that a network can also be configured with, and so keep in a file: the names of their settings."""


@dataclass(frozen=True, eq=False)
class LoadedRestorer:
    """A restorer under the host's memory management.

    `options` are keyword arguments for the network (a routing mode, a scan length) that nodes add without touching
    the shared network; see `with_options`.
    """

    restorer: models.Restorer
    managed: host.Managed
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> LoadedRestorer:
        """The same network with more options."""
        return replace(self, options={**self.options, **options})

    def configured(self) -> tuple[models.Restorer, dict[str, Any]]:
        """The restorer with the options that a file can keep in its configuration, and the other options.

        Its network is the shared one, which is not set so.
        """
        config, others = dict(self.restorer.config), {}
        for name, value in self.options.items():
            if name not in SETTINGS:
                others[name] = value
            elif name == "local_pooling":
                config["train_size"] = (value, value) if value else None
            elif value:  # 0: the network's own scan length
                config[SETTINGS[name]] = value
        return replace(self.restorer, config=config), others

    @property
    def size(self) -> int:
        return self.managed.size


def load(path: str | Path, *, system: str | None = None, config: Mapping[str, Any] | None = None) -> LoadedRestorer:
    """Loads a model file, or returns it if it is loaded already; changed files are loaded anew."""
    path = Path(path)
    status = path.stat()
    settings = tuple(sorted((k, str(v)) for k, v in (config or {}).items()))
    key = (str(path.resolve()), status.st_mtime_ns, status.st_size, system, settings)
    return host.networks.get(key, lambda: _load(path, system, config), lambda loaded: loaded.size)


def wrap(restorer: models.Restorer) -> LoadedRestorer:
    """Puts a restorer that is already in memory under the host's management."""
    return LoadedRestorer(restorer, host.Managed(restorer.module))


def _load(path: Path, system: str | None, config: Mapping[str, Any] | None) -> LoadedRestorer:
    # Normal tensors, not inference ones: guidance and training need gradients through the same network.
    with torch.inference_mode(False):
        restorer = models.load(path, system=system, config=config)
        restorer.module.eval().requires_grad_(False)
        return wrap(restorer)
