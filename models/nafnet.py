"""NAFNet, in the edition of DCPT and the original one.

Chen et al., "Simple Baselines for Image Restoration", ECCV 2022, arXiv 2204.04676; DCPT: Hu et al., "Universal Image
Restoration Pre-training via Degradation Classification", ICLR 2025, arXiv 2501.15510. A U-shaped convolutional network
without activations; its only global operation is the mean of the channel attention, which test-time local converting
(TLSC: Chu et al., "Improving Image Restoration by Revisiting Global Information Aggregation", ECCV 2022) replaces by a
mean over the window seen in training. State-dict keys are DCPT's; the original's differ by name only.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError
from .layers.layout import fastest_layout
from .layers.norm import ChannelLayerNorm
from .layers.pooling import local_mean
from .layers.state_dict import count_indices
from .registry import Architecture, State, construct

Window = tuple[int, int] | None


def simple_gate(x: torch.Tensor) -> torch.Tensor:
    """[B, 2C, H, W] -> [B, C, H, W]: the first half of the channels times the second."""
    first, second = x.chunk(2, dim=1)
    return first * second


class NAFBlock(nn.Module):
    """Depth-wise convolution with gate and channel attention, then a gated feed-forward. [B, C, H, W] -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels * 2, 1)
        self.conv2 = nn.Conv2d(channels * 2, channels * 2, 3, padding=1, groups=channels * 2)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        # Index 1: the published attention has its pooling, without parameters, before the convolution.
        self.sca = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 1))
        self.conv4 = nn.Conv2d(channels, channels * 2, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.norm1 = ChannelLayerNorm(channels, eps=1e-6)
        self.norm2 = ChannelLayerNorm(channels, eps=1e-6)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: torch.Tensor, window: Window = None) -> torch.Tensor:
        """window: (height, width) of the local mean in the channel attention; None: mean over the whole map."""
        x = x + self._mix(x, window) * self.beta
        return x + self.conv5(simple_gate(self.conv4(self.norm2(x)))) * self.gamma

    def _mix(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        x = simple_gate(self.conv2(self.conv1(self.norm1(x))))
        return self.conv3(x * self._attention(x, window))

    def _attention(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        if window is None:
            return self.sca(x.mean(dim=(2, 3), keepdim=True))
        # The 1x1 convolution comes before the padding: same values, fewer pixels.
        scores = self.sca(local_mean(x, window))
        missing = [full - have if have > 1 else 0 for full, have in zip(x.shape[2:], scores.shape[2:], strict=True)]
        if not any(missing):
            return scores
        left, top = missing[1] // 2, missing[0] // 2
        return F.pad(scores, (left, missing[1] - left, top, missing[0] - top), mode="replicate")


class Stage(nn.ModuleList):
    """A run of blocks that share a pooling window."""

    def forward(self, x: torch.Tensor, window: Window = None) -> torch.Tensor:
        for block in self:
            x = block(x, window)
        return x


class NAFNet(nn.Module):
    """The network. [B, C, H, W] in 0..1, H and W multiples of 2^levels -> same shape, not clamped.

    `train_size` (height, width) turns on local pooling: every global mean becomes a mean over 1.5 times that size.
    On pictures up to 1.5 times `train_size` both give the same result. The methods' `local_pooling` overrules it:
    0 for global means, n for a training size of n x n, None as built.
    """

    def __init__(
        self,
        *,
        img_channel: int = 3,
        width: int = 64,
        enc_blk_nums: Sequence[int] = (1, 1, 1, 28),
        middle_blk_num: int = 1,
        dec_blk_nums: Sequence[int] = (1, 1, 1, 1),
        train_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        levels = len(enc_blk_nums)
        if len(dec_blk_nums) != levels or levels < 1:
            raise ConfigError("NAFNet: enc_blk_nums and dec_blk_nums need the same number of entries, at least one")
        self.levels = levels
        self.train_size = None if train_size is None else tuple(train_size[-2:])
        channels = [width * 2**level for level in range(levels + 1)]

        def stage(level: int, blocks: int) -> Stage:
            return Stage(NAFBlock(channels[level]) for _ in range(blocks))

        self.intro = nn.Conv2d(img_channel, width, 3, padding=1)
        self.ending = nn.Conv2d(width, img_channel, 3, padding=1)
        self.encoders = nn.ModuleList(stage(level, blocks) for level, blocks in enumerate(enc_blk_nums))
        self.middle_blks = stage(levels, middle_blk_num)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels[level], channels[level] * 2, 1, bias=False), nn.PixelShuffle(2))
            for level in range(levels, 0, -1)
        )
        self.downs = nn.ModuleList(nn.Conv2d(channels[i], channels[i + 1], 2, 2) for i in range(levels))
        for index, blocks in enumerate(dec_blk_nums):
            self.add_module(f"decoder{index}", stage(levels - 1 - index, blocks))

    def window(self, level: int, local_pooling: int | None = None) -> Window:
        """Height and width of the local mean `level` halvings below full resolution; None: whole map."""
        train_size = self.train_size if local_pooling is None else (local_pooling, local_pooling)
        if not train_size or 0 in train_size:
            return None
        return tuple(max(1, (side >> level) * int(1.5 * side) // side) for side in train_size)

    def encode(self, x: torch.Tensor, local_pooling: int | None = None) -> list[torch.Tensor]:
        """Feature maps of every level, shallow to deep; the last one is the bottleneck."""
        x, features = self.intro(fastest_layout(x)), []
        for level, (encoder, down) in enumerate(zip(self.encoders, self.downs, strict=True)):
            x = encoder(x, self.window(level, local_pooling))
            features.append(x)
            x = down(x)
        return [*features, self.middle_blks(x, self.window(self.levels, local_pooling))]

    def decode(self, features: list[torch.Tensor], local_pooling: int | None = None) -> Iterator[torch.Tensor]:
        """Output of every decoder stage in turn, deep to shallow, from the maps of `encode`."""
        *skips, x = features
        for index, (up, skip) in enumerate(zip(self.ups, reversed(skips), strict=True)):
            window = self.window(self.levels - 1 - index, local_pooling)
            x = self.get_submodule(f"decoder{index}")(up(x) + skip, window)
            yield x

    def decoder_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What a degradation classifier looks at: the decoder stages' maps, highest resolution first."""
        return list(self.decode(self.encode(x)))[::-1]

    def reconstruct(
        self, features: list[torch.Tensor], x: torch.Tensor, local_pooling: int | None = None
    ) -> torch.Tensor:
        """The restored image from the maps of `encode` and the image they were made from."""
        (decoded,) = deque(self.decode(features, local_pooling), maxlen=1)  # the earlier maps are freed on the way
        return self.ending(decoded) + x

    def forward(self, x: torch.Tensor, local_pooling: int | None = None) -> torch.Tensor:
        return self.reconstruct(self.encode(x, local_pooling), x, local_pooling)


_OFFICIAL = {
    "img_channel": 3,
    "width": 64,
    "enc_blk_nums": (1, 1, 1, 28),
    "middle_blk_num": 1,
    "dec_blk_nums": (1, 1, 1, 1),
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "dcpt-5d": {**_OFFICIAL, "train_size": None},
    "dcpt-cdd": {**_OFFICIAL, "train_size": (128, 128)},
    "sidd-width32": {
        "img_channel": 3,
        "width": 32,
        "enc_blk_nums": (2, 2, 4, 8),
        "middle_blk_num": 12,
        "dec_blk_nums": (2, 2, 2, 2),
        "train_size": None,
    },
}
_SIGNATURE = ("intro.weight", "decoder0.0.beta", "middle_blks.0.sca.1.weight")


def _build(config: Mapping[str, Any]) -> NAFNet:
    # window_size is the padding of the published runner: always 2^levels.
    return construct(NAFNet, "NAFNet", config, without=("window_size",))


def _dcpt_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's `decoders.0.` is DCPT's `decoder0.`."""
    if not any(key.startswith("decoders.") for key in state) or "intro.weight" not in state:
        return state
    return {re.sub(r"^decoders\.(\d+)\.", r"decoder\1.", key): tensor for key, tensor in state.items()}


def nafnet_config(state: State, title: str, decoder: str) -> dict[str, Any]:
    """Channels and numbers of blocks of a NAFNet whose decoder stages are named `decoder` and a number.

    Raises CheckpointError in the name of `title` for absurd ones.
    """
    width, img_channel = state["intro.weight"].shape[:2]
    levels = count_indices(state, "downs.")
    config = {
        "img_channel": img_channel,
        "width": width,
        "enc_blk_nums": tuple(count_indices(state, f"encoders.{i}.") for i in range(levels)),
        "middle_blk_num": count_indices(state, "middle_blks."),
        "dec_blk_nums": tuple(count_indices(state, f"{decoder}{i}.") for i in range(levels)),
    }
    if not (1 <= levels <= 8 and 1 <= width <= 1024 and 1 <= img_channel <= 64):
        raise CheckpointError(f"{title}: absurd sizes: {config}")
    return config


ARCHITECTURES = [
    Architecture(
        id="nafnet",
        system="dcpt",
        title="NAFNet",
        paper="Chen et al., Simple Baselines for Image Restoration, ECCV 2022, arXiv 2204.04676; pre-trained by Hu et "
        "al., Universal Image Restoration Pre-training via Degradation Classification, ICLR 2025, arXiv 2501.15510",
        licence="network code MIT (megvii); DCPT code and weights: none stated, ask the authors",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=lambda state: {**nafnet_config(state, "NAFNet", "decoder"), "train_size": None},
        build=_build,
        matches_config=lambda config: "enc_blk_nums" in config,
        tasks=("derain", "denoise", "dehaze", "low-light", "deblur"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        prepare_state_dict=_dcpt_names,
        metadata_keys=("train_size",),
        multiple_of=lambda config: 2 ** len(config["enc_blk_nums"]),
        bytes_per_pixel=lambda config: 48.0 * config["width"],
        global_statistics="channel attention averages over the whole picture (per tile when tiled), or over windows of "
        "1.5 x 128 pixels with local pooling (train_size)",
    )
]
