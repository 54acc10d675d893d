"""GenDeg's own parts around Stable Diffusion 1.5: intensity conditioning, structure correction, averaged weights.

Rajagopalan et al., "GenDeg: Diffusion-based Degradation Synthesis for Generalizable All-In-One Image Restoration",
CVPR 2025, arXiv 2411.17687. The diffusion model is an InstructPix2Pix-shaped U-Net, which ComfyUI runs; here are the
two linear layers that bring the wanted intensity into its context, and the NAFNet (Chen et al., ECCV 2022) that repairs
what the autoencoder bent. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.padding import crop
from .nafnet import NAFBlock, Stage, nafnet_config
from .registry import Architecture, State, construct

MU_RANGE, SIGMA_RANGE, BINS = (0.0, 0.7), (0.0, 0.4), 128
"""Mean and standard deviation of |clean - degraded| that can be asked for, and the bins each range is cut into."""
TOKENS = 77


def intensity_bin(value: float, limits: Sequence[float] = MU_RANGE, bins: int = BINS) -> int:
    """Index of the equal bin that holds `value`; the last one from the upper limit on. Raises InputError below 0."""
    low, high = limits
    if not value >= low:
        raise InputError(f"intensity: {value} is below {low}")
    number = int(np.searchsorted(np.linspace(low, high, bins + 1), float(value), side="right"))
    return min(number - 1, bins - 1)


class IntensityConditioner(nn.Module):
    """Appends the two intensities to a text's features and projects both to the U-Net's context.

    Bin number `bins` means "not given".
    """

    def __init__(self, bins: int = BINS, tokens: int = TOKENS, context_dim: int = 768) -> None:
        super().__init__()
        self.bins = bins
        self.stats_proj = nn.Linear(bins + 1, tokens)
        self.cc_projection = nn.Linear(context_dim + 2, context_dim)
        with torch.no_grad():  # starts as the text alone, as for the published training
            self.cc_projection.weight[:, :context_dim] = torch.eye(context_dim)
            self.cc_projection.bias.zero_()

    def bin_indices(
        self,
        mu: Sequence[float],
        sigma: Sequence[float],
        mu_range: Sequence[float] = MU_RANGE,
        sigma_range: Sequence[float] = SIGMA_RANGE,
    ) -> torch.Tensor:
        """[B, 2] from the intensities of B pictures."""
        pairs = zip(mu, sigma, strict=True)
        return torch.tensor(
            [[intensity_bin(m, mu_range, self.bins), intensity_bin(s, sigma_range, self.bins)] for m, s in pairs]
        )

    def null_bins(self, batch: int = 1) -> torch.Tensor:
        """[B, 2]: no intensity given."""
        return torch.full((batch, 2), self.bins)

    def stats_tokens(self, bins: torch.Tensor) -> torch.Tensor:
        """[B, 2] bin indices (mean, standard deviation) -> [B, 77, 2]."""
        columns = self.stats_proj.weight.t()[bins.to(self.stats_proj.weight.device)]  # a one-hot vector times a matrix
        return (columns + self.stats_proj.bias).transpose(1, 2)

    def forward(self, text: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
        """text [B, N, C] (N a multiple of 77), bins [B, 2] -> context [B, N, C].

        Each chunk of 77 tokens, of which ComfyUI makes more than one for long texts, gets the same intensities.
        """
        stats = self.stats_tokens(bins)
        chunks, rest = divmod(text.shape[1], stats.shape[1])
        if rest or not chunks:
            raise InputError(f"conditioning: {text.shape[1]} tokens are no multiple of {stats.shape[1]}")
        if text.shape[2] != self.cc_projection.out_features:
            raise InputError(
                f"conditioning: {text.shape[2]} features per token, this projection takes "
                f"{self.cc_projection.out_features}: use the text encoder of Stable Diffusion 1.5"
            )
        return self.cc_projection(torch.cat([text, stats.repeat(1, chunks, 1).expand(len(text), -1, -1)], dim=-1))


class StructureCorrection(nn.Module):
    """NAFNet that sees the clean and the generated picture and adds what the generated one lacks."""

    def __init__(
        self,
        *,
        width: int = 64,
        enc_blk_nums: Sequence[int] = (2, 2, 4, 8),
        middle_blk_num: int = 12,
        dec_blk_nums: Sequence[int] = (2, 2, 2, 2),
        img_channel: int = 6,
    ) -> None:
        super().__init__()
        levels = len(enc_blk_nums)
        if len(dec_blk_nums) != levels or img_channel % 2:
            raise ConfigError("structure correction: as many encoder as decoder levels, and two pictures, are needed")
        widths = [width * 2**level for level in range(levels + 1)]
        self.multiple = 2**levels
        self.intro = nn.Conv2d(img_channel, width, 3, padding=1)
        self.ending = nn.Conv2d(width, img_channel // 2, 3, padding=1)

        def stage(channels: int, blocks: int) -> Stage:
            return Stage(NAFBlock(channels) for _ in range(blocks))

        deep_first = widths[:0:-1]
        self.encoders = nn.ModuleList(stage(w, n) for w, n in zip(widths[:-1], enc_blk_nums, strict=True))
        self.decoders = nn.ModuleList(stage(w // 2, n) for w, n in zip(deep_first, dec_blk_nums, strict=True))
        self.middle_blks = stage(widths[-1], middle_blk_num)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, w * 2, 1, bias=False), nn.PixelShuffle(2)) for w in deep_first
        )
        self.downs = nn.ModuleList(nn.Conv2d(w, w * 2, 2, 2) for w in widths[:-1])

    def forward(self, clean: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        """Both [B, 3, H, W] in -1..1, any size -> the corrected generated picture, not clamped."""
        if clean.shape != generated.shape:
            raise InputError(
                f"structure correction: the clean picture is {tuple(clean.shape)}, the generated one "
                f"{tuple(generated.shape)}; they must be equal in size"
            )
        size = generated.shape[-2:]
        bottom, right = (-side % self.multiple for side in size)
        # Zeros, not a reflection: the published network was trained and run with them.
        x, skips = self.intro(F.pad(torch.cat([clean, generated], dim=1), (0, right, 0, bottom))), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for decoder, up in zip(self.decoders, self.ups, strict=True):
            x = decoder(up(x) + skips.pop())
        return crop(self.ending(x), size) + generated


def averaged_name(name: str) -> str:
    """Where the averaged copy of the parameter `model.<name>` lies in a checkpoint."""
    return "model_ema." + name.replace(".", "")


def with_averaged_weights(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """A whole latent-diffusion checkpoint with the averaged U-Net in the place of the raw one; how many were moved.

    The published sampling runs the averaged weights; ComfyUI's loader would take the raw ones. A pruned file without
    averaged weights comes back as it is, count 0. Raises CheckpointError if the average is incomplete or misshapen.
    """
    raw = {key: averaged_name(key.removeprefix("model.")) for key in state if key.startswith("model.")}
    found = {key: name for key, name in raw.items() if name in state}
    result = {key: value for key, value in state.items() if not key.startswith("model_ema.")}
    if not found:
        return result, 0
    missing = sorted(raw.keys() - found.keys())
    if missing:
        raise CheckpointError(f"the averaged weights lack {len(missing)} of {len(raw)} tensors, first {missing[0]}")
    for key, name in found.items():
        if state[name].shape != state[key].shape:
            raise CheckpointError(
                f"averaged weight {name} has the shape {tuple(state[name].shape)}, not {tuple(state[key].shape)}"
            )
        result[key] = state[name]
    return result, len(found)


_CONDITIONER = ("stats_proj.weight", "stats_proj.bias", "cc_projection.weight", "cc_projection.bias")


def _conditioner_only(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Out of the whole checkpoint, the two layers that no other latent-diffusion model has."""
    return {key: state[key] for key in _CONDITIONER} if all(key in state for key in _CONDITIONER) else state


def _conditioner_config(state: State) -> dict[str, Any]:
    tokens, columns = state["stats_proj.weight"].shape
    context_dim, wide = state["cc_projection.weight"].shape
    if wide != context_dim + 2 or columns < 2 or tokens > 4096 or context_dim > 1 << 14:
        raise CheckpointError(
            f"intensity conditioner: {columns} bins, {tokens} tokens, {wide} -> {context_dim} make no sense"
        )
    return {"num_bins": columns - 1, "tokens": tokens, "context_dim": context_dim}


def _build_conditioner(config: Mapping[str, Any]) -> IntensityConditioner:
    return IntensityConditioner(config["num_bins"], config.get("tokens", TOKENS), config.get("context_dim", 768))


def _build_correction(config: Mapping[str, Any]) -> StructureCorrection:
    return construct(StructureCorrection, "structure correction", config)


def _is_correction(state: State) -> bool:
    """A NAFNet that returns half as many channels as it takes."""
    if not all(key in state for key in _CORRECTION):
        return False
    return state["intro.weight"].shape[1] == 2 * state["ending.weight"].shape[0]


_CORRECTION = ("intro.weight", "ending.weight", "decoders.0.0.beta", "middle_blks.0.sca.1.weight")
_PAPER = "Rajagopalan et al., GenDeg: Diffusion-based Degradation Synthesis, CVPR 2025, arXiv 2411.17687"
_LICENCE = "none stated for GenDeg's code and weights; derived from SD 1.5 (CreativeML Open RAIL-M)"

ARCHITECTURES = [
    Architecture(
        id="gendeg-conditioner",
        system="gendeg",
        title="GenDeg intensity conditioner",
        paper=_PAPER,
        licence=_LICENCE,
        detect=lambda state: all(key in state for key in _CONDITIONER),
        config_from_state_dict=_conditioner_config,
        build=_build_conditioner,
        matches_config=lambda config: "num_bins" in config,
        kind="embedder",
        tasks=("degradation synthesis",),
        variants={"GenDeg": {"num_bins": BINS, "tokens": TOKENS, "context_dim": 768}},
        signature=_CONDITIONER,
        prepare_state_dict=_conditioner_only,
        global_statistics="works on text features",
    ),
    Architecture(
        id="gendeg-correction",
        system="gendeg",
        title="GenDeg structure correction",
        paper=_PAPER,
        licence=f"{_LICENCE}; network code MIT (megvii)",
        detect=_is_correction,
        config_from_state_dict=lambda state: nafnet_config(state, "structure correction", "decoders."),
        build=_build_correction,
        matches_config=lambda config: "enc_blk_nums" in config,
        kind="helper",
        tasks=("degradation synthesis",),
        variants={
            "GenDeg": {
                "img_channel": 6,
                "width": 64,
                "enc_blk_nums": (2, 2, 4, 8),
                "middle_blk_num": 12,
                "dec_blk_nums": (2, 2, 2, 2),
            }
        },
        signature=_CORRECTION,
        multiple_of=lambda config: 2 ** len(config["enc_blk_nums"]),
        bytes_per_pixel=lambda config: 48.0 * config["width"],
        global_statistics="channel attention averages over the whole picture",
    ),
]
