"""Inputs for the state-space operators, and how their results are compared."""

from __future__ import annotations

import math

import torch

from comfyui_mend.kernels import use_backend


def scan_inputs(batch, dim, groups, n, length, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length),
        "A": -4 * torch.rand(dim, n, generator=generator, dtype=torch.float64).to(dtype) - 0.05,
        "B": normal(batch, groups, n, length),
        "C": normal(batch, groups, n, length),
        "D": normal(dim),
        "delta_bias": normal(dim) - 2,
    }


def step_inputs(batch, length, width, paths, rank, n, *, per_image=False, prompt=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    orders = [torch.randperm(length, generator=generator) for _ in range(paths * (batch if per_image else 1))]
    return {
        "x": normal(batch, length, width),
        "order": torch.stack(orders).view(*((batch, paths) if per_image else (paths,)), length),
        "x_proj_weight": normal(paths, rank + 2 * n, width) / math.sqrt(width),
        "dt_weight": normal(paths, width, rank) / math.sqrt(rank),
        "dt_bias": normal(paths, width) - 1,
        "A_logs": normal(paths * width, n),
        "D": normal(paths * width),
        "prompt": normal(batch, length, n) if prompt else None,
    }


def on(backend, function, **arguments):
    with use_backend(backend):
        return function(**arguments)


def reference(function, **arguments):
    """In float64."""
    double = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }
    return on("reference", function, **double)


def assert_near(got, want, tolerance=3e-6):
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-3)
