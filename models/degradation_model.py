"""A small generator of damage: from a clean picture, a kind of degradation and an intensity to a damaged picture.

Of our own design, in the place of GenDeg (Rajagopalan et al., CVPR 2025) where there is no Stable Diffusion: the same
conditions (kind, mean and standard deviation of |clean - degraded|), a diffusion model in pixel space under a million
parameters. It generates the residual, degraded - clean, divided by sqrt(mu^2 + sigma^2): that is its root mean square
by the definition of the two, so every residual has unit power, whatever the intensity. Preconditioning and loss are
those of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, sec. 5, for
data of unit variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError
from .layers.norm import ChannelLayerNorm
from .registry import Architecture, State, construct

KINDS = ("haze", "rain", "snow", "motion blur", "low light", "raindrop")
"""GenDeg's six kinds of degradation."""
_STATISTICS = 6


class ConditionedBlock(nn.Module):
    """norm, 3x3, scale and shift by the condition, SiLU, 3x3; residual. Norms per pixel, so that any size will do."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(condition, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(condition)[..., None, None].chunk(2, dim=1)
        return x + self.conv2(F.silu(self.conv1(self.norm(x)) * (1 + scale) + shift))


class DegradationModel(nn.Module):
    """U-Net on 2x2 pixels at a time. widths: channels at 1/2, 1/4 ... of the picture; one block a level each way."""

    def __init__(self, *, kinds: Sequence[str] = KINDS, widths: Sequence[int] = (40, 64, 96, 112), condition: int = 64):
        super().__init__()
        if not kinds or len(widths) < 2:
            raise ConfigError("degradation model: at least one kind and two widths are needed")
        self.kinds = tuple(kinds)
        self.multiple = 2 ** len(widths)
        # Noise level (3), intensity (2), picture's colours (6), kind.
        self.embed = nn.Sequential(
            nn.Linear(5 + _STATISTICS + len(kinds), condition), nn.SiLU(), nn.Linear(condition, condition), nn.SiLU()
        )
        self.intro = nn.Conv2d(24, widths[0], 3, padding=1)
        steps = list(zip(widths[:-1], widths[1:], strict=True))
        self.encoders = nn.ModuleList(ConditionedBlock(w, condition) for w in widths[:-1])
        self.downs = nn.ModuleList(nn.Conv2d(w, v, 2, 2) for w, v in steps)
        self.middle = ConditionedBlock(widths[-1], condition)
        self.ups = nn.ModuleList(nn.Conv2d(v, w, 1) for w, v in reversed(steps))
        self.decoders = nn.ModuleList(ConditionedBlock(w, condition) for w in reversed(widths[:-1]))
        self.ending = nn.Conv2d(widths[0], 12, 3, padding=1)
        nn.init.zeros_(self.ending.weight)
        nn.init.zeros_(self.ending.bias)

    def condition(
        self, clean: torch.Tensor, kind: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        """What every block is told, [B, condition]; kind [B] is an index into `kinds`, the others are [B]."""
        power = (mu**2 + sigma**2).clamp_min(1e-8)
        log_level = level.log() / 4
        numbers = [log_level, log_level.sin(), (2 * log_level).cos(), power.log() / 4 + 1, mu * power.rsqrt()]
        pixels = clean.flatten(2)
        told = [torch.stack(numbers, dim=1), pixels.mean(dim=2), pixels.std(dim=2, correction=0)]
        return self.embed(torch.cat([*told, F.one_hot(kind, len(self.kinds)).to(clean)], dim=1))

    def raw(self, scaled: torch.Tensor, clean: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The network F itself on residuals scaled to unit variance: [B, 3, H, W], sides multiples of `multiple`."""
        x, skips = self.intro(F.pixel_unshuffle(torch.cat([scaled, 2 * clean - 1], dim=1), 2)), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x, condition)
            skips.append(x)
            x = down(x)
        x = self.middle(x, condition)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(F.interpolate(up(x), scale_factor=2.0, mode="nearest") + skips.pop(), condition)
        return F.pixel_shuffle(self.ending(x), 2)

    def forward(
        self,
        noisy: torch.Tensor,
        clean: torch.Tensor,
        kind: torch.Tensor,
        mu: torch.Tensor,
        sigma: torch.Tensor,
        level: torch.Tensor,
    ) -> torch.Tensor:
        """The residual of unit power in `noisy` = residual + level * noise; both pictures [B, 3, H, W], clean in 0..1.

        kind [B] int64, mu and sigma [B] as `guidance.gendeg.measure_intensity`, level [B] > 0 (Karras et al., eq. 7).
        """
        out = self.raw(noisy * _view(level**2 + 1).rsqrt(), clean, self.condition(clean, kind, mu, sigma, level))
        return noisy / _view(level**2 + 1) + out * _view(level * (level**2 + 1).rsqrt())

    def loss(
        self,
        residual: torch.Tensor,
        clean: torch.Tensor,
        kind: torch.Tensor,
        mu: torch.Tensor,
        sigma: torch.Tensor,
        level: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """Mean squared error of F for each picture [B] (Karras et al., eq. 8: the weighted error of the residual)."""
        noisy = residual + _view(level) * noise
        target = (residual - noisy / _view(level**2 + 1)) / _view(level * (level**2 + 1).rsqrt())
        out = self.raw(noisy * _view(level**2 + 1).rsqrt(), clean, self.condition(clean, kind, mu, sigma, level))
        return (out - target).square().mean(dim=(1, 2, 3))


def _view(value: torch.Tensor) -> torch.Tensor:
    return value[:, None, None, None]


def _config(state: State) -> dict[str, Any]:
    levels = len([key for key in state if key.startswith("downs.") and key.endswith(".weight")])
    condition, columns = state["embed.0.weight"].shape
    widths = (state["intro.weight"].shape[0], *(state[f"downs.{i}.weight"].shape[0] for i in range(levels)))
    count = columns - 5 - _STATISTICS
    if not (1 <= levels <= 6 and 1 <= count <= 256 and max(widths) <= 2048 and condition <= 4096):
        raise CheckpointError(f"degradation model: absurd sizes: {widths}, {count} kinds, condition {condition}")
    kinds = KINDS if count == len(KINDS) else tuple(f"kind {i}" for i in range(count))
    return {"kinds": kinds, "widths": widths, "condition": condition}


def _build(config: Mapping[str, Any]) -> DegradationModel:
    return construct(DegradationModel, "degradation model", config)


_SIGNATURE = ("embed.0.weight", "intro.weight", "middle.film.weight", "encoders.0.film.weight", "ending.weight")

ARCHITECTURES = [
    Architecture(
        id="mend-degradation-model",
        system="gendeg",
        title="Mend degradation model",
        paper="this project; conditions after GenDeg (CVPR 2025), diffusion after Karras et al., NeurIPS 2022",
        licence="Apache-2.0",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config,
        build=_build,
        matches_config=lambda config: "kinds" in config,
        kind="helper",
        tasks=("degradation synthesis",),
        variants={"Mend": {"kinds": KINDS, "widths": (40, 64, 96, 112), "condition": 64}},
        signature=_SIGNATURE,
        metadata_keys=("kinds",),
        multiple_of=lambda config: 2 ** len(config["widths"]),
        bytes_per_pixel=lambda config: 16.0 * config["widths"][0],
        global_statistics="is told the mean and spread of the whole picture's colours",
    ),
]
