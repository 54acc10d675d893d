"""Restormer, in the edition of DCPT and the original one.

Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022, arXiv 2111.09881;
DCPT: Hu et al., "Universal Image Restoration Pre-training via Degradation Classification", ICLR 2025, arXiv 2501.15510.
A four-level U-shaped transformer whose attention runs over channels. DCPT's edition takes ReLU where the original has a
softmax, another epsilon in the norms, and stores its stages under one more key, `body`: the only trace of all that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from .layers.layout import fastest_layout
from .layers.restormer import Downsample, OverlapPatchEmbed, RestormerBlock, Upsample, norm_type, restormer_config
from .registry import Architecture, State, construct


class Stage(nn.Module):
    """A run of blocks under DCPT's key `body`."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Restormer(nn.Module):
    """The network. [B, C, H, W] in 0..1, H and W multiples of 8 -> same shape, not clamped.

    `num_blocks` and `heads` go from shallow to deep. `edition` is "dcpt" or "original".
    """

    def __init__(
        self,
        *,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        LayerNorm_type: str = "BiasFree",
        inp_channels: int = 3,
        out_channels: int = 3,
        edition: str = "dcpt",
    ) -> None:
        super().__init__()
        if len(num_blocks) != 4 or len(heads) != 4:
            raise ConfigError("Restormer: num_blocks and heads need four entries, shallow to deep")
        if inp_channels != out_channels:
            raise ConfigError(f"Restormer: {inp_channels} channels in and {out_channels} out; they must be the same")
        if any(dim * 2**level % count for level, count in enumerate(heads)):
            raise ConfigError(f"Restormer: dim {dim} does not divide into {tuple(heads)} heads")
        dcpt = edition == "dcpt"

        def stage(channels: int, blocks: int, heads: int) -> nn.Module:
            return (Stage if dcpt else nn.Sequential)(
                *(
                    RestormerBlock(
                        channels,
                        heads,
                        ffn_expansion_factor,
                        norm_bias=LayerNorm_type == "WithBias",
                        eps=1e-6 if dcpt else 1e-5,
                        activation="relu" if dcpt else "softmax",
                    )
                    for _ in range(blocks)
                )
            )

        def merge(channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels * 2, channels, 1, bias=False)

        one, two, three, four = (dim * 2**level for level in range(4))
        self.patch_embed = OverlapPatchEmbed(inp_channels, dim)
        self.encoder_level1 = stage(one, num_blocks[0], heads[0])
        self.down1_2 = Downsample(one)
        self.encoder_level2 = stage(two, num_blocks[1], heads[1])
        self.down2_3 = Downsample(two)
        self.encoder_level3 = stage(three, num_blocks[2], heads[2])
        self.down3_4 = Downsample(three)
        self.latent = stage(four, num_blocks[3], heads[3])
        self.up4_3 = Upsample(four)
        self.reduce_chan_level3 = merge(three)
        self.decoder_level3 = stage(three, num_blocks[2], heads[2])
        self.up3_2 = Upsample(three)
        self.reduce_chan_level2 = merge(two)
        self.decoder_level2 = stage(two, num_blocks[1], heads[1])
        self.up2_1 = Upsample(two)
        # No reduction at full resolution: the decoder there works on both halves.
        self.decoder_level1 = stage(two, num_blocks[0], heads[0])
        self.refinement = stage(two, num_refinement_blocks, heads[0])
        self.output = nn.Conv2d(two, out_channels, 3, padding=1, bias=False)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the four levels, shallow to deep; the last one is the bottleneck."""
        level1 = self.encoder_level1(self.patch_embed(fastest_layout(x)))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        return [level1, level2, level3, self.latent(self.down3_4(level3))]

    def decode(self, features: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Output of every decoder stage in turn, deep to shallow, from the maps of `encode`."""
        level1, level2, level3, x = features
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(x), level3], dim=1)))
        yield x
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), level2], dim=1)))
        yield x
        yield self.decoder_level1(torch.cat([self.up2_1(x), level1], dim=1))

    def decoder_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What a degradation classifier looks at: the decoder stages' maps, highest resolution first."""
        return list(self.decode(self.encode(x)))[::-1]

    def reconstruct(self, features: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The restored image from the maps of `encode` and the image they were made from."""
        (decoded,) = deque(self.decode(features), maxlen=1)  # the earlier maps are freed on the way
        return self.output(self.refinement(decoded)) + x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reconstruct(self.encode(x), x)


_OFFICIAL = {
    "dim": 48,
    "num_blocks": (4, 6, 6, 8),
    "num_refinement_blocks": 4,
    "heads": (1, 2, 4, 8),
    "ffn_expansion_factor": 2.66,
    "inp_channels": 3,
    "out_channels": 3,
}
_TOP_LEVEL = {
    *("patch_embed", "latent", "refinement", "output", "down1_2", "down2_3", "down3_4", "up4_3", "up3_2", "up2_1"),
    *("encoder_level1", "encoder_level2", "encoder_level3", "reduce_chan_level3", "reduce_chan_level2"),
    *("decoder_level3", "decoder_level2", "decoder_level1"),
}
_ORIGINAL_ONLY = {"skip_conv"}  # dual-pixel defocus deblurring


def _detect(state: State, first_block: str) -> bool:
    # Descendants share most keys: only a file with exactly these modules is a Restormer.
    names = {key.split(".", 1)[0] for key in state}
    return f"{first_block}.attn.temperature" in state and _TOP_LEVEL <= names <= _TOP_LEVEL | _ORIGINAL_ONLY


def _build(config: Mapping[str, Any], edition: str) -> Restormer:
    if config.get("dual_pixel_task", False) or config.get("scale", 1) != 1:
        raise ConfigError("Restormer: only restoration of one picture at its own size is built here")
    if config.get("bias", False) and edition == "original":
        raise ConfigError("Restormer: no released file has convolutions with bias")
    without = ("bias", "dual_pixel_task", "scale")
    return construct(Restormer, "Restormer", {"edition": edition, **config}, without)


def _config_from_state_dict(state: State, body: str, edition: str) -> dict[str, Any]:
    if "skip_conv.weight" in state:
        raise CheckpointError(
            "Restormer: this file restores dual-pixel pairs (defocus); it takes two pictures, not one"
        )
    config = {**restormer_config(state, body), "LayerNorm_type": norm_type(state, body), "edition": edition}
    dim, channels, expansion = config["dim"], config["inp_channels"], config["ffn_expansion_factor"]
    if not (1 <= dim <= 1024 and 1 <= channels <= 64 and 0 < expansion <= 64):
        raise CheckpointError(f"Restormer: absurd sizes: {config}")
    return config


def _matches(config: Mapping[str, Any]) -> bool:
    """PromptIR's configurations have the same names; its dim is always 48 and its norm never spelt out."""
    if "num_refinement_blocks" not in config or config.get("edition", "dcpt") != "dcpt":
        return False
    return config.get("dim", 48) != 48 or "LayerNorm_type" in config or "ffn_expansion_factor" in config


_PAPER = (
    "Zamir et al., Restormer: Efficient Transformer for High-Resolution Image Restoration, CVPR 2022, arXiv 2111.09881"
)
_GLOBAL = "channel attention correlates channels over the whole picture; with tiles, over each tile"

ARCHITECTURES = [
    Architecture(
        id="dcpt-restormer",
        system="dcpt",
        title="Restormer (DCPT)",
        paper=f"{_PAPER}; edited and pre-trained by Hu et al., Universal Image Restoration Pre-training via "
        "Degradation Classification, ICLR 2025, arXiv 2501.15510",
        licence="network code MIT; DCPT code and weights: none stated, ask the authors",
        detect=lambda state: _detect(state, "encoder_level1.body.0"),
        config_from_state_dict=lambda state: _config_from_state_dict(state, ".body", "dcpt"),
        build=lambda config: _build(config, "dcpt"),
        matches_config=_matches,
        tasks=("derain", "denoise", "dehaze", "low-light", "deblur"),
        variants={"dcpt-5d": {**_OFFICIAL, "LayerNorm_type": "BiasFree", "edition": "dcpt"}},
        signature=("encoder_level1.body.0.attn.temperature", "reduce_chan_level3.weight"),
        multiple_of=lambda config: 8,
        bytes_per_pixel=lambda config: 220.0 * config["dim"],
        global_statistics=_GLOBAL,
    ),
    Architecture(
        id="restormer",
        system="restormer",
        title="Restormer",
        paper=_PAPER,
        licence="code MIT; weights: no separate licence stated",
        detect=lambda state: _detect(state, "encoder_level1.0"),
        config_from_state_dict=lambda state: _config_from_state_dict(state, "", "original"),
        build=lambda config: _build(config, "original"),
        tasks=("derain", "deblur", "denoise"),
        variants={
            "deraining": {**_OFFICIAL, "LayerNorm_type": "WithBias", "edition": "original"},
            "denoising": {**_OFFICIAL, "LayerNorm_type": "BiasFree", "edition": "original"},
        },
        signature=("encoder_level1.0.attn.temperature", "reduce_chan_level3.weight", "refinement.0.attn.temperature"),
        multiple_of=lambda config: 8,
        bytes_per_pixel=lambda config: 220.0 * config["dim"],
        global_statistics=_GLOBAL,
    ),
]
