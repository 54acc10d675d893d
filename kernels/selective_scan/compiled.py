"""The state-space kernels for CPUs, compiled by Numba."""

from __future__ import annotations

import torch


class KernelError(RuntimeError):
    """The kernels could not be compiled or run on this machine."""


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why these kernels cannot compute `dtype` on `device`; "" if they can."""
    return "not part of this version yet"
