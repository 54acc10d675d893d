"""DA-RCOT: restoration as an optimal transport map that is conditioned on its own transport residual.

Tang et al., "Degradation-Aware Residual-Conditioned Optimal Transport for Unified Image Restoration", IEEE TPAMI 47(8),
2025, arXiv 2411.01656. The map restores twice: once unconditioned; then what it removed (the residual) is encoded at
three scales and added to the features of a second pass through the same decoder. A potential network, the critic of the
transport problem, scores how clean a patch looks. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.padding import crop, pad_to_multiple
from .layers.restormer import Downsample, OverlapPatchEmbed, RestormerBlock, Upsample, norm_type, restormer_config
from .registry import Architecture, State, construct

STRENGTH = 0.8
"""Weight of the residual's embeddings in the published second pass."""
_STEPS = (8, 4, 2)
"""Input pixels to a step of each embedding."""


@dataclass(frozen=True)
class Residual:
    """What a restoration removed, and what the network sees in it.

    image [B, 3, H, W]: degraded minus restored, signed. embeddings, once encoded: [B, 8C, H/8, W/8], [B, 4C, H/4, W/4]
    and [B, 2C, H/2, W/2] for C = `dim` of the network, H and W rounded up to multiples of 8.
    """

    image: torch.Tensor
    embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.image.shape[0]

    def __getitem__(self, images: slice) -> Residual:
        """The residuals of some images of the batch."""
        return self._map(lambda t: t[images])

    def to(self, *args: Any, **kwargs: Any) -> Residual:
        """As Tensor.to, for every tensor of it."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def expand(self, batch: int) -> Residual:
        """One residual for `batch` images; itself if it has that many. Raises InputError for any other number."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise InputError(f"residual: made for {len(self)} images, the batch has {batch}")
        return self._map(lambda t: t.expand(batch, -1, -1, -1))

    def at(self, top: int, left: int) -> Residual:
        """What lies to the right of and below a pixel whose coordinates are multiples of 8; `fit` takes the rest off."""

        def shift(t: torch.Tensor, factor: int) -> torch.Tensor:
            return t[..., top // factor :, left // factor :]

        if self.embeddings is None:
            return Residual(shift(self.image, 1))
        return Residual(shift(self.image, 1), tuple(shift(t, f) for t, f in zip(self.embeddings, _STEPS, strict=True)))

    def fit(self, height: int, width: int) -> Residual:
        """The part over a picture of this size, which starts where this residual does. Raises InputError if smaller."""
        image = crop(self.image, (height, width))
        if any(size - has >= 8 for size, has in zip((height, width), image.shape[-2:], strict=True)):
            raise InputError(
                f"residual: made for {self.image.shape[-1]}x{self.image.shape[-2]} pixels, "
                f"the picture has {width}x{height}"
            )
        if self.embeddings is None:
            return Residual(image)
        return Residual(
            image, tuple(crop(t, (height // f, width // f)) for t, f in zip(self.embeddings, _STEPS, strict=True))
        )

    def _map(self, function: Any) -> Residual:
        embeddings = self.embeddings
        return Residual(function(self.image), None if embeddings is None else tuple(map(function, embeddings)))


class MRCNet(nn.Module):
    """The transport map. [B, 3, H, W] in 0..1, H and W multiples of 8 -> (restored image, residual embedding).

    Nineteen groups of weights sit in every released file and are never used (`res_patch_embed`, `chnl_reduce*`, ...);
    they are kept because the keys are the checkpoint's. `patch_embed`, `down3_4`, `up3_2`, `reduce_chan_level2` and
    `decoder_level2` serve both the image and the residual, although `res...` twins exist.
    """

    def __init__(
        self,
        *,
        dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: tuple[int, ...] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        layer_norm: str = "WithBias",
        bias: bool = False,
        inp_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(num_blocks) != 4 or len(heads) != 4:
            raise ConfigError("DA-RCOT: num_blocks and heads need four entries, from shallow to deep")
        if dim < 1 or any(dim * 2**level % heads[level] for level in range(4)) or dim * 2 % heads[2]:
            raise ConfigError(f"DA-RCOT: dim {dim} cannot be split into heads {tuple(heads)}")

        def block(width: int, its_heads: int) -> RestormerBlock:
            return RestormerBlock(width, its_heads, ffn_expansion_factor, bias, layer_norm == "WithBias")

        def level(index: int, width: int | None = None, count: int | None = None) -> nn.Sequential:
            blocks = range(num_blocks[index] if count is None else count)
            return nn.Sequential(*(block(width or dim * 2**index, heads[index]) for _ in blocks))

        def mix(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1, bias=bias)

        self.patch_embed = OverlapPatchEmbed(inp_channels, dim)
        self.res_patch_embed = OverlapPatchEmbed(inp_channels, dim)
        self.chnl_reduce1, self.chnl_reduce2, self.chnl_reduce3 = mix(64, 64), mix(128, 128), mix(320, 256)
        self.reduce_noise_channel_1 = mix(dim + 64, dim)
        self.encoder_level1, self.resencoder_level1 = level(0), level(0)
        self.down1_2, self.resdown1_2 = Downsample(dim), Downsample(dim)
        self.reduce_noise_channel_2 = mix(dim * 2 + 128, dim * 2)
        self.encoder_level2, self.resencoder_level2 = level(1), level(1)
        self.down2_3, self.resdown2_3 = Downsample(dim * 2), Downsample(dim * 2)
        self.reduce_noise_channel_3 = mix(dim * 4 + 256, dim * 4)
        self.encoder_level3, self.resencoder_level3 = level(2), level(2)
        self.down3_4, self.resdown3_4 = Downsample(dim * 4), Downsample(dim * 4)
        self.latent, self.reslatent = level(3), level(3)
        self.up4_3, self.resup4_3 = Upsample(dim * 4), Upsample(dim * 4)
        self.reduce_chan_level3, self.resreduce_chan_level3 = mix(dim * 6, dim * 4), mix(dim * 6, dim * 4)
        self.noise_level3, self.resnoise_level3 = block(dim * 8, heads[2]), block(dim * 8, heads[2])
        self.reduce_noise_level3, self.resreduce_noise_level3 = mix(dim * 8, dim * 4), mix(dim * 8, dim * 4)
        self.decoder_level3, self.resdecoder_level3 = level(2), level(2)
        self.up3_2, self.reduce_chan_level2 = Upsample(dim * 4), mix(dim * 4, dim * 2)
        self.resup3_2, self.resreduce_chan_level2 = Upsample(dim * 4), mix(dim * 4, dim * 2)
        self.noise_level2, self.reduce_noise_level2 = block(dim * 4, heads[2]), mix(dim * 4, dim * 4)
        self.decoder_level2, self.resdecoder_level2 = level(1), level(1)
        self.up2_1, self.resup2_1 = Upsample(dim * 2), Upsample(dim * 2)
        self.noise_level1, self.reduce_noise_level1 = block(dim * 2, heads[2]), mix(dim * 2, dim * 2)
        self.decoder_level1, self.resdecoder_level1 = level(0, dim * 2), level(0, dim * 2)
        self.refinement = level(0, dim * 2, num_refinement_blocks)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=bias)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the image at the four levels, shallow to deep."""
        e1 = self.encoder_level1(self.patch_embed(x))
        e2 = self.encoder_level2(self.down1_2(e1))
        e3 = self.encoder_level3(self.down2_3(e2))
        return [e1, e2, e3, self.latent(self.down3_4(e3))]

    def decode(
        self,
        features: list[torch.Tensor],
        embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        strength: float = STRENGTH,
    ) -> torch.Tensor:
        """From the feature maps of `encode` to what is added to the image; conditioned if `embeddings` are given."""
        e1, e2, e3, x = features
        if embeddings is not None:
            x = x + strength * embeddings[0]
        x = self.up4_3(self.reduce_noise_level3(self.noise_level3(x)))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([x, e3], dim=1)))
        if embeddings is not None:
            x = x + strength * embeddings[1]
        x = self.up3_2(self.reduce_noise_level2(self.noise_level2(x)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([x, e2], dim=1)))
        if embeddings is not None:
            x = x + strength * embeddings[2]
        x = self.up2_1(self.reduce_noise_level1(self.noise_level1(x)))
        return self.output(self.refinement(self.decoder_level1(torch.cat([x, e1], dim=1))))

    def embed(self, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The embeddings of a residual image [B, 3, H, W] at H/8, H/4 and H/2 (section 4.3, MRC)."""
        f1 = self.resencoder_level1(self.patch_embed(residual))
        f2 = self.resencoder_level2(self.resdown1_2(f1))
        f3 = self.resencoder_level3(self.resdown2_3(f2))
        z = self.reslatent(self.down3_4(f3))
        x = self.resup4_3(self.resreduce_noise_level3(self.resnoise_level3(z)))
        g3 = self.resdecoder_level3(self.resreduce_chan_level3(torch.cat([x, f3], dim=1)))
        g2 = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(g3), f2], dim=1)))
        return z, g3, g2

    def first_pass(self, x: torch.Tensor) -> torch.Tensor:
        """The unconditioned restoration of [B, 3, H, W]."""
        return self.decode(self.encode(x)) + x

    def restore(
        self, x: torch.Tensor, residual: Residual | None = None, strength: float = STRENGTH, iterations: int = 1
    ) -> tuple[torch.Tensor, Residual | None]:
        """The conditioned restoration and the residual that conditioned it.

        x [B, 3, H, W]. `residual`: condition on this one (batch 1 or B) instead of the first pass's; it is encoded
        unless it already is. Each further iteration takes the residual of the result before. strength 0 or
        iterations 0 is the first pass itself, 0.8 and 1 are published. Raises InputError if sizes do not fit.
        """
        return self._conditioned(self.encode(x), x, residual, strength, iterations)

    def reconstruct(self, features: list[torch.Tensor], x: torch.Tensor, **context: Any) -> torch.Tensor:
        """From the feature maps of `encode` to the restored image; `context` as for `restore`."""
        return self._conditioned(features, x, **context)[0]

    def _conditioned(
        self,
        features: list[torch.Tensor],
        x: torch.Tensor,
        residual: Residual | None = None,
        strength: float = STRENGTH,
        iterations: int = 1,
    ) -> tuple[torch.Tensor, Residual | None]:
        if strength == 0 or iterations < 1:
            return self.decode(features) + x, residual
        if residual is None:
            residual = Residual(-self.decode(features))
        residual = residual.expand(x.shape[0]).fit(*x.shape[-2:])
        if residual.embeddings is None:
            residual = self.encode_residual(residual)
        if residual.embeddings[0].shape != features[-1].shape:
            raise InputError(
                f"residual: its embedding is {tuple(residual.embeddings[0].shape[1:])}, "
                f"this picture and network need {tuple(features[-1].shape[1:])}"
            )
        change = self.decode(features, residual.embeddings, strength)
        for _ in range(iterations - 1):
            residual = self.encode_residual(Residual(-change))
            change = self.decode(features, residual.embeddings, strength)
        return change + x, residual

    def encode_residual(self, residual: Residual) -> Residual:
        """The residual with its embeddings; any size, padded to a multiple of 8 as the picture is."""
        padded, _ = pad_to_multiple(residual.image, 8)
        return Residual(residual.image, self.embed(padded.to(self.patch_embed.proj.weight)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As published: the restored image and the residual's deepest embedding [B, 8 dim, H/8, W/8]."""
        restored, residual = self.restore(x)
        return restored, residual.embeddings[0]


class Potential(nn.Module):
    """The critic F: patches [B, 3, patch, patch] in 0..1 -> scores [B], larger for cleaner ones.

    Works at one patch size only. Keys and the lack of an activation between `fc` and `fc1` are the published ones, as
    are 64 channels in the first layer (`width`).
    """

    def __init__(self, *, patch_size: int = 128, width: int = 64) -> None:
        super().__init__()
        if patch_size < 32 or patch_size % 32:
            raise ConfigError(f"DA-RCOT potential: patch_size is {patch_size}, must be a multiple of 32")
        if width < 1:
            raise ConfigError(f"DA-RCOT potential: width is {width}, must be at least 1")
        self.patch_size = patch_size
        layers: list[nn.Module] = [nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(0.2)]
        growth = (1, 1, 2, 2, 4, 4, 8, 8, 8, 8)
        for index, (inputs, outputs) in enumerate(pairwise(growth)):
            halve, bias = index % 2 == 0, index < 5
            layers += [
                nn.Conv2d(
                    inputs * width, outputs * width, 4 if halve else 3, stride=2 if halve else 1, padding=1, bias=bias
                ),
                nn.LeakyReLU(0.2),
            ]
        self.features = nn.Sequential(*layers)
        flat = 8 * width * (patch_size // 32) ** 2
        self.fc = nn.Linear(flat, flat // 4)
        self.fc1 = nn.Linear(flat // 4, 64)
        self.fc2 = nn.Linear(64, 1)
        for layer in self.features[::2]:
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if patches.shape[-2:] != (self.patch_size, self.patch_size):
            raise InputError(
                f"potential: patches must be {self.patch_size}x{self.patch_size}, got {tuple(patches.shape[-2:])}"
            )
        x = self.fc1(self.fc(self.features(patches).flatten(1)))
        return self.fc2(F.leaky_relu(x, 0.2)).squeeze(1)

    def score_map(self, image: torch.Tensor) -> torch.Tensor:
        """Scores of evenly spaced patches that cover [B, 3, H, W]: [B, rows, columns]. Small pictures are padded."""
        image, _ = pad_to_multiple(image, 1, self.patch_size)
        tops, lefts = (_spread(size, self.patch_size) for size in image.shape[-2:])
        side = self.patch_size
        rows = [[self(image[..., t : t + side, u : u + side]) for u in lefts] for t in tops]
        return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)


def _spread(size: int, patch: int) -> list[int]:
    """Offsets of the fewest equally spaced patches that cover `size`."""
    count = -(-size // patch)
    return [round(i * (size - patch) / max(count - 1, 1)) for i in range(count)]


_RELEASED = {
    "kind": "transport_map",
    "dim": 48,
    "num_blocks": (4, 6, 6, 8),
    "num_refinement_blocks": 4,
    "heads": (1, 2, 4, 8),
    "ffn_expansion_factor": 2.66,
    "layer_norm": "WithBias",
    "bias": False,
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {"MRCNet": _RELEASED}
POTENTIAL_VARIANTS: Mapping[str, Mapping[str, Any]] = {"patch 128": {"kind": "potential", "patch_size": 128}}

_SIGNATURE = (
    "resencoder_level1.0.attn.qkv.weight",
    "resdecoder_level3.0.attn.qkv.weight",
    "resnoise_level3.attn.qkv.weight",
)
_POTENTIAL_SIGNATURE = ("features.18.weight", "fc.weight", "fc1.weight", "fc2.weight")


def _is_potential(config: Mapping[str, Any]) -> bool:
    return config.get("kind") == "potential" or "patch_size" in config


def _build_map(config: Mapping[str, Any]) -> MRCNet:
    if not config.get("decoder", True):
        raise ConfigError("DA-RCOT: decoder=False does not exist in a working form")
    return construct(MRCNet, "DA-RCOT", config, without=("kind", "decoder"))


def _build_potential(config: Mapping[str, Any]) -> Potential:
    return Potential(**{key: config[key] for key in ("patch_size", "width") if key in config})


def _map_config(state: State) -> dict[str, Any]:
    return {
        "kind": "transport_map",
        **restormer_config(state),
        "layer_norm": norm_type(state),
        "bias": "output.bias" in state,
    }


def _potential_config(state: State) -> dict[str, Any]:
    flat, width = state["fc.weight"].shape[1], state["features.0.weight"].shape[0]
    patch = 32 * math.isqrt(flat // (8 * width))
    if 8 * width * (patch // 32) ** 2 != flat or not 32 <= patch <= 1024:
        raise CheckpointError(f"DA-RCOT potential: fc.weight has {flat} inputs, which no patch size gives")
    return {"kind": "potential", "patch_size": patch, "width": width}


def _part(*prefixes: str) -> Any:
    """Picks one network out of a trainer's file, which holds map and potential side by side."""

    def prepare(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for prefix in prefixes:
            found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if found:
                return found
        return state

    return prepare


def _restore(module: MRCNet, image: torch.Tensor, **context: Any) -> torch.Tensor:
    return module.restore(image, **context)[0]


_PAPER = (
    "Tang et al., Degradation-Aware Residual-Conditioned Optimal Transport for Unified Image Restoration, "
    "IEEE TPAMI 47(8), 2025, arXiv 2411.01656"
)
_LICENCE = "code MIT; weights: no separate licence stated"

ARCHITECTURES = [
    Architecture(
        id="da-rcot",
        system="da-rcot",
        title="DA-RCOT",
        paper=_PAPER,
        licence=_LICENCE,
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_map_config,
        build=_build_map,
        matches_config=lambda config: not _is_potential(config),
        tasks=("denoise", "derain", "dehaze", "deblur", "low-light"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        prepare_state_dict=_part("Tnet.", "model."),
        multiple_of=lambda config: 8,
        bytes_per_pixel=lambda config: 230.0 * config["dim"],
        restore=_restore,
        global_statistics="channel attention looks at the whole picture; in tiles, attention and residual are computed "
        "per tile",
    ),
    Architecture(
        id="da-rcot-potential",
        system="da-rcot",
        title="DA-RCOT potential",
        paper=_PAPER,
        licence=_LICENCE,
        detect=lambda state: all(key in state for key in _POTENTIAL_SIGNATURE),
        config_from_state_dict=_potential_config,
        build=_build_potential,
        matches_config=_is_potential,
        kind="critic",
        variants=POTENTIAL_VARIANTS,
        signature=_POTENTIAL_SIGNATURE,
        prepare_state_dict=_part("Fnet.", "discr."),
        multiple_of=lambda config: 1,
        minimum_size=lambda config: config["patch_size"],
    ),
]
