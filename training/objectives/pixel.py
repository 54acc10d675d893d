"""The plain objective: the difference between a restored picture and the clean one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import ConfigError
from .base import Method, Network, Objective, Parts, Pass
from .restoration import charbonnier, fft_loss, log_error

PIXEL_LOSSES = {
    "Charbonnier": charbonnier,
    "L1": lambda restored, clean: (restored.float() - clean.float()).abs().mean(),
    "squared": lambda restored, clean: (restored.float() - clean.float()).square().mean(),
    "log error": log_error,
}


@dataclass(frozen=True)
class PixelObjective(Objective):
    """The difference to the clean picture, and that of the spectra times `fft` (0.1 in MoCE-IR)."""

    kind: ClassVar[str] = "pixel"
    loss: str = "Charbonnier"
    fft: float = 0.1

    def __post_init__(self) -> None:
        if self.loss not in PIXEL_LOSSES:
            raise ConfigError(f"objective: loss {self.loss!r} is unknown; one of {', '.join(PIXEL_LOSSES)}")

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        network.require_restorer("pixel objective")
        return _Pixel(self)


class _Pixel(Method):
    def __init__(self, settings: PixelObjective) -> None:
        super().__init__()
        self.settings = settings

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        pixel = PIXEL_LOSSES[self.settings.loss](run.restored, run.batch.clean)
        if not self.settings.fft:
            return pixel, {"pixel": pixel}
        spectrum = fft_loss(run.restored, run.batch.clean)
        return pixel + self.settings.fft * spectrum, {"pixel": pixel, "fft": spectrum}
