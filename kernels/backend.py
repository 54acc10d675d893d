"""Which implementation of an operator runs: automatic choice by device, and the two ways to override it."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import ConfigError, MissingDependency

log = logging.getLogger(__name__)

NAMES = ("cuda", "jit", "torch", "reference")
ENVIRONMENT_VARIABLE = "MEND_SCAN_BACKEND"

_override: contextvars.ContextVar[str] = contextvars.ContextVar("mend_scan_backend", default="auto")
_broken: dict[str, str] = {}


class BackendStatus(NamedTuple):
    """One backend as `backends` reports it; `reason` says why it is not available, or what it is."""

    name: str
    available: bool
    reason: str


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the state-space operators on one backend within the `with` block, in this thread.

    `name` is "cuda", "jit", "torch", "reference" or "auto". Raises ConfigError for another name; an operator called
    inside raises MissingDependency if the backend cannot run there.
    """
    if name not in (*NAMES, "auto"):
        raise ConfigError(f"no backend called {name!r}; one of {', '.join(NAMES)} or auto")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def requested() -> str:
    """The backend asked for: `use_backend`, else the environment variable MEND_SCAN_BACKEND, else "auto"."""
    name = _override.get()
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
        if name not in (*NAMES, "auto"):
            raise ConfigError(f"{ENVIRONMENT_VARIABLE} is {name!r}; one of {', '.join(NAMES)} or auto")
    return name


def why_not(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Why a backend cannot compute `dtype` on `device`; "" if it can."""
    if name in _broken:
        return _broken[name]
    if name in ("torch", "reference"):
        return ""
    module = {"cuda": "cuda", "jit": "compiled"}[name]
    return importlib.import_module(f".selective_scan.{module}", __package__).why_not(device, dtype)


def backends(device: str | torch.device = "cpu") -> list[BackendStatus]:
    """Every backend with whether it can run on `device`, and why not."""
    device = torch.device(device)
    about = {
        "cuda": "CUDA C++ compiled at first use through NVRTC",
        "jit": "compiled at first use by Numba, all cores",
        "torch": "PyTorch in chunks, any device",
        "reference": "a plain loop over the steps: slow, the tests' truth",
    }
    found = []
    for name in NAMES:
        reason = why_not(name, device)
        found.append(BackendStatus(name, not reason, reason or about[name]))
    return found


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors of `dtype` on `device`: the one asked for, or the first that can.

    Raises MissingDependency if the one asked for cannot.
    """
    name = requested()
    if name != "auto":
        reason = why_not(name, device, dtype)
        if reason:
            raise MissingDependency(f"the {name} backend was asked for but cannot run: {reason}")
        return name
    for name in ("cuda", "jit"):
        if name == ("cuda" if device.type == "cuda" else "jit") and not why_not(name, device, dtype):
            return name
    return "torch"


def mark_broken(name: str, reason: str) -> None:
    """Takes a backend out of the automatic choice after it failed, and says so once."""
    if name not in _broken:
        _broken[name] = reason
        log.warning("the %s kernels failed (%s): using plain PyTorch instead, which is slower", name, reason)
