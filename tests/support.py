"""Networks and helpers that several test files use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from comfyui_mend import models
from comfyui_mend.engine import host, loaded
from comfyui_mend.models.registry import Architecture


def wrapped(architecture: str, config: Mapping[str, Any]) -> loaded.LoadedRestorer:
    """A network with the weights it starts with, as nodes take it."""
    module = models.create(architecture, config).eval().requires_grad_(False)
    return loaded.wrap(models.Restorer(models.registry.get(architecture), config, module))


def tapped(taps: Mapping[str, torch.nn.Module], call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What `call` returns, and what each of the modules last returned meanwhile."""
    kept: dict[str, Any] = {}
    hooks = [m.register_forward_hook(lambda _m, _i, out, n=n: kept.__setitem__(n, out)) for n, m in taps.items()]
    try:
        result = call()
    finally:
        for hook in hooks:
            hook.remove()
    return result, kept


class LocalNetwork(torch.nn.Module):
    """Three 3x3 convolutions with a skip, scaled by nearest neighbour: receptive field radius 3."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
        self.scale = scale
        self.calls: list[tuple[int, ...]] = []
        self.fail_above: int | None = None
        self.fail_with: BaseException = RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail_above is not None and x.shape[0] * x.shape[-1] * x.shape[-2] > self.fail_above:
            raise self.fail_with
        self.calls.append(tuple(x.shape))
        y = 0.5 * x + 0.2 * torch.tanh(self.layers(x))
        return torch.nn.functional.interpolate(y, scale_factor=self.scale) if self.scale > 1 else y


def local_restorer(scale: int = 1, multiple: int = 4) -> loaded.LoadedRestorer:
    """A network with a known, finite receptive field."""
    architecture = Architecture(
        id="local-test",
        system="local-test",
        title="Local",
        paper="",
        licence="",
        detect=lambda state: False,
        config_from_state_dict=lambda state: {},
        build=lambda config: LocalNetwork(),
        scale=lambda config: scale,
        multiple_of=lambda config: multiple,
        receptive_field=lambda config: 3,
    )
    module = LocalNetwork(scale).eval().requires_grad_(False)
    return loaded.wrap(models.Restorer(architecture, {}, module))


def cancel_after(checks: int) -> None:
    """Cancels at the n-th time that somebody asks; for tests that use the fixture `nobody_listens`."""
    asked = iter(range(1_000_000))
    host.set_hooks(interrupt=lambda: next(asked) >= checks)
