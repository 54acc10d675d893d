"""A loaded network together with what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..kernels import use_backend
from .layers.padding import crop, pad_to_multiple
from .registry import Architecture

_OWN_WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


@dataclass
class Restorer:
    """`restorer(image)` restores a batch; everything else says what the network is and where it came from."""

    architecture: Architecture
    config: Mapping[str, Any]
    module: nn.Module
    source: str = ""
    """File name, or "" for a state dict given in memory."""
    notes: list[str] = field(default_factory=list)
    """What was found while loading: wrappers, EMA weights, guessed settings, ignored entries."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Channels of the pictures that the network takes: 1 or 3 for restorers."""
        names = ("inp_channels", "in_chans", "img_channel")  # what the released configurations call them
        return int(next((self.config[name] for name in names if name in self.config), 3))

    @property
    def scale(self) -> int:
        return self.architecture.scale(self.config)

    @property
    def multiple_of(self) -> int:
        return self.architecture.multiple_of(self.config)

    @property
    def minimum_size(self) -> int:
        return self.architecture.minimum_size(self.config)

    @property
    def tasks(self) -> tuple[str, ...]:
        named = self.metadata.get("tasks", "")
        return tuple(t for t in named.split(",") if t) or self.architecture.tasks

    @property
    def licence(self) -> str:
        """Of the weights: as the file says it, else Mend's for the files that come with it, else the official ones'."""
        return self.stated_licence or self.architecture.licence

    @property
    def stated_licence(self) -> str:
        """What is known of these very weights, to be passed on to what is made of them; "" if nothing."""
        own = bool(self.source) and (_OWN_WEIGHTS / self.source).is_file()
        return self.metadata.get("licence") or ("Apache-2.0, as Mend" if own else "")

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def context(self, image: torch.Tensor) -> dict[str, Any]:
        """What the network decides once for a whole picture, to be passed to every tile of it."""
        if self.architecture.context is None:
            return {}
        padded, _ = pad_to_multiple(image, self.multiple_of, self.minimum_size)
        return self.architecture.context(self.module, padded)

    def __call__(self, image: torch.Tensor, *, scan_backend: str = "", **context: Any) -> torch.Tensor:
        """Restores `image` [B, C, H, W] in 0..1 whole, of any size; returns [B, C, scale * H, scale * W].

        scan_backend: how state-space operators compute meanwhile (`kernels.use_backend`); "" leaves that as it is.
        Not clamped. Pictures too large for this go through `engine.tiling`. Raises InputError for a wrong shape.
        """
        if self.architecture.kind != "restorer":
            raise InputError(f"{self.architecture.title} is a {self.architecture.kind}, not an image restorer")
        if image.ndim != 4:
            raise InputError(f"image: expected [B, C, H, W], got {tuple(image.shape)}")
        if min(image.shape) == 0:
            raise InputError(f"image: empty, {tuple(image.shape)}")
        padded, size = pad_to_multiple(image, self.multiple_of, self.minimum_size)
        with use_backend(scan_backend) if scan_backend else nullcontext():
            return crop(self.architecture.restore(self.module, padded, **context), size, self.scale)
