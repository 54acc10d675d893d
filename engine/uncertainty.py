"""How sure a network is of every pixel, from an uncertainty head; and maps of it to look at and to blend by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import InputError
from . import tiling
from .loaded import LoadedRestorer
from .pictures import false_colour
from .values import check_image, clamped


def restore(
    loaded: LoadedRestorer,
    image: torch.Tensor,
    *,
    tile: int = 0,
    overlap: int = -1,
    precision: str = "auto",
    context: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Restored [B, C, H, W] (as `tiling.restore`, clamped) and its uncertainty [B, H, W], positive, on no fixed scale.

    Both come from one run of the network. Raises InputError for a network without an uncertainty head.
    """
    architecture = loaded.restorer.architecture
    both = architecture.restore_with_uncertainty
    if both is None or not loaded.restorer.config.get("if_uncertainty", True):
        raise InputError(
            f"restorer: this {architecture.title} has no uncertainty head; load one retrained with TUR "
            "(AirNet, Uformer, TransWeather), or take the spread of Self-Ensemble instead"
        )
    check_image(image)

    def joined(module: torch.nn.Module, picture: torch.Tensor, **given: Any) -> torch.Tensor:
        return torch.cat(both(module, picture, **given), dim=1)

    restorer = replace(loaded.restorer, architecture=replace(architecture, restore=joined))
    six = tiling.run(
        replace(loaded, restorer=restorer),
        tiling.as_rgb(image),
        tile,
        overlap,
        precision,
        {**loaded.options, **(context or {})},
        output_channels=6,
    )
    restored = tiling.as_given(six[:, :3], image, loaded.restorer.scale)
    return clamped(restored, image), six[:, 3:].mean(dim=1)


def white_level(raw: torch.Tensor, white: float = 0.0) -> float:
    """The value shown as white: `white`, or for 0 what 99.5 % of the pixels of `raw` [B, H, W] stay below."""
    if white > 0:
        return white
    values = raw.flatten()[:: max(1, raw.numel() // 1_000_000)].float()
    return max(float(values.quantile(0.995)), 1e-12)


def as_mask(raw: torch.Tensor, white: float) -> torch.Tensor:
    """`raw` [B, H, W] on a scale from 0 to `white`, clamped: masks made with one `white` compare with each other."""
    return (raw / white).clamp(0, 1)


def heat_map(raw: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in false colour, black to white from each picture's own smallest to largest value."""
    low = raw.amin(dim=(1, 2), keepdim=True)
    span = (raw.amax(dim=(1, 2), keepdim=True) - low).clamp_min(1e-12)
    return torch.stack([false_colour(level) for level in (raw - low) / span])


def describe(raw: torch.Tensor, white: float, what: str = "uncertainty") -> str:
    """The raw scale in words, a line a picture."""
    lines = [
        f"picture {i + 1}: {what} {r.mean():.4g} on average, from {r.min():.4g} to {r.max():.4g}"
        for i, r in enumerate(raw)
    ]
    return "\n".join([*lines, f"white in the mask: {white:.4g}"])
