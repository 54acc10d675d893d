"""A small noise-conditioned U-Net for photographs of any size: the prior that Mend trained for itself.

It follows EDM (Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, arXiv
2206.00364): the network is F in x0 = c_skip x + c_out F(c_in x, c_noise), and the scalings lie outside of it, in
`guidance/parametrisation.py`. The body is that of DRUNet (Zhang et al., TPAMI 2021, arXiv 2008.13751), plain residual
convolutions without normalisation, on a picture that is folded to half its size first: no layer looks at the whole
picture, so that one of any size can be done in parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError
from .layers.state_dict import count_indices
from .registry import Architecture, State, construct

_FREQUENCIES = 8


class NoiseEmbedding(nn.Sequential):
    """Features [B, dim] of the noise level from t = 250 ln(sigma), the time input of the released EDM networks [B]."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(2 * _FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # From a wave far longer than the range of ln(sigma) / 4, about -1.6 .. 1.3, to one of a fifth of it.
        rates = torch.logspace(math.log10(0.5), 1, _FREQUENCIES, device=t.device)
        angles = (t.float() / 1000)[:, None] * rates
        return super().forward(torch.cat([angles.cos(), angles.sin()], dim=1).to(self[0].weight.dtype))


class ConditionedBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the noise level scales and shifts what lies between them."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(embedding)[..., None, None].chunk(2, dim=1)
        return x + self.conv2(F.relu(torch.addcmul(shift, self.conv1(x), 1 + scale)))


class NoiseUNet(nn.Module):
    """F(c_in x, t) -> [B, channels, H, W] for x [B, channels, H, W]; H and W multiples of 2 ** len(widths).

    widths: channels at 1/2, 1/4, ... of the picture's size. blocks: residual blocks at each of these sizes on the way
    down and, but for the smallest, on the way up.
    """

    form = "EDM"
    """What its output means to those who make a prior of it."""

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (48, 80, 128),
        blocks: Sequence[int] = (1, 2, 2),
        embedding: int = 64,
    ) -> None:
        super().__init__()
        if len(widths) != len(blocks) or not widths or min(*widths, *blocks, channels, embedding) < 1:
            raise ConfigError(f"noise U-Net: widths {list(widths)} and blocks {list(blocks)} do not fit together")
        self.levels = 1 + len(widths)
        self.embed = NoiseEmbedding(embedding)

        def stage(width: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(ConditionedBlock(width, embedding) for _ in range(count))

        self.head = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(stage(w, n) for w, n in zip(widths, blocks, strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:], strict=False))
        self.enlarge = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.up = nn.ModuleList(stage(w, n) for w, n in zip(widths[:-1], blocks, strict=False))
        self.tail = nn.Conv2d(widths[0], 4 * channels, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: None = None) -> torch.Tensor:
        embedding = self.embed(t)
        h = self.head(F.pixel_unshuffle(x, 2))
        skips = []
        for level, stage in enumerate(self.down):
            if level:
                skips.append(h)
                h = self.shrink[level - 1](h)
            for block in stage:
                h = block(h, embedding)
        for level in reversed(range(len(self.up))):
            h = F.pixel_shuffle(self.enlarge[level](h), 2) + skips[level]
            for block in self.up[level]:
                h = block(h, embedding)
        return F.pixel_shuffle(self.tail(h), 2)


_SIGNATURE = ("head.weight", "embed.0.weight", "down.0.0.modulation.weight", "tail.weight")


def _config_from_state_dict(state: State) -> dict[str, Any]:
    levels = count_indices(state, "down.")
    widths = [state[f"down.{k}.0.conv1.weight"].shape[0] for k in range(levels)]
    channels, rest = divmod(state["head.weight"].shape[1], 4)
    if rest or state["head.weight"].shape[0] != widths[0] or state["tail.weight"].shape[0] != 4 * channels:
        raise CheckpointError(f"noise U-Net: a head of shape {tuple(state['head.weight'].shape)} does not fit the rest")
    return {
        "channels": channels,
        "widths": widths,
        "blocks": [count_indices(state, f"down.{k}.") for k in range(levels)],
        "embedding": state["embed.0.weight"].shape[0],
    }


def _build(config: Mapping[str, Any]) -> NoiseUNet:
    return construct(NoiseUNet, "noise U-Net", config)


def _factor(config: Mapping[str, Any]) -> int:
    return 2 ** len(config["widths"])


def _receptive_field(config: Mapping[str, Any]) -> int:
    # A block's two convolutions reach 2 of its pixels; all but the smallest size are passed twice. Head and tail: one each.
    last = len(config["widths"]) - 1
    reach = sum((1 if k == last else 2) * 2 * n * 2 ** (k + 1) for k, n in enumerate(config["blocks"]))
    return 4 + reach + _factor(config)


ARCHITECTURES = [
    Architecture(
        id="noise-unet",
        system="noise-unet",
        title="Mend's small denoiser",
        paper="own design, with the scalings of Karras et al., Elucidating the Design Space of Diffusion-Based Generative "
        "Models, NeurIPS 2022, arXiv 2206.00364",
        licence="Apache-2.0, weights included",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        kind="prior",
        tasks=("prior",),
        variants={"starter": {"channels": 3, "widths": (48, 80, 128), "blocks": (1, 2, 2), "embedding": 64}},
        signature=_SIGNATURE,
        multiple_of=_factor,
        minimum_size=_factor,
        receptive_field=_receptive_field,
        bytes_per_pixel=lambda config: 24.0 * config["widths"][0],
    )
]
