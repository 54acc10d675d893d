"""All-in-one compression and restoration: a variable-rate codec whose decoder also removes the degradation.

Zeng et al., "All-in-One Image Compression and Restoration", WACV 2025, arXiv 2502.03649. State-dict keys are the released
checkpoints'. This file is the network and its rate estimate; real bitstreams are made by the package `codec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .aio_codec_layers import AnalysisTransform, DepthConvBlock, HybridBlock, Stage, SynthesisTransform, UpsampleBlock
from .aio_codec_rates import LARGEST_SYMBOL, BitEstimator, LowerBound, bits_of, float64_device, gaussian_bits
from .layers.state_dict import indices
from .registry import Architecture, State, construct

QUALITIES = 64
"""Quality indices run from 0 (lowest rate) to 63."""
LATENT_STRIDE, HYPER_STRIDE = 16, 4


def checkerboard(
    height: int, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where row + column is even, and its complement; [height, width]."""
    parity = (torch.arange(height, device=device)[:, None] + torch.arange(width, device=device)) % 2
    return (1 - parity).to(dtype), parity.to(dtype)


@dataclass(frozen=True)
class Latent:
    """What one image is coded as: integers z_hat, and y's integers in two planes of half the channels each.

    planes[k] and scales[k]: [B, N/2, h, w], of coding step k. y_q, scales_hat, y_hat: [B, N, h, w].
    """

    z_hat: torch.Tensor
    planes: tuple[torch.Tensor, torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor]
    y_q: torch.Tensor
    scales_hat: torch.Tensor
    y_hat: torch.Tensor
    y_res: torch.Tensor
    """Before rounding."""


class AllInOneCodec(nn.Module):
    """The network. Images [B, 3, H, W] in 0..1, sides multiples of 16 (`pad` makes them so).

    prior_widths: channels inside `y_prior_fusion` (one) and inside `y_spatial_prior` (two); published: 2, 3 and 2 times
    N_ch. Together with prior_expansion, of the feed-forward parts in there, it decides how large a small codec is: these
    two networks grow with the square of N_ch.
    """

    def __init__(
        self,
        *,
        dim: int = 32,
        N_ch: int = 256,
        z_ch: int = 128,
        num_blocks: Sequence[int] = (2, 3, 3, 4),
        heads: Sequence[int] = (4, 4, 4, 4),
        ffn_expansion_factor: float = 2.66,
        bias: bool = False,
        LayerNorm_type: str = "BiasFree",
        sigmoid: bool = False,
        prior_widths: Sequence[int] | None = None,
        prior_expansion: float = 4.0,
    ) -> None:
        super().__init__()
        if z_ch != 4 * dim:
            raise ConfigError(f"z_ch is {z_ch}, must be 4 * dim = {4 * dim}")
        if N_ch % 2:
            raise ConfigError(f"N_ch is {N_ch}, must be even: the latent is coded in two halves")
        if len(num_blocks) != 4 or len(heads) != 4:
            raise ConfigError("num_blocks and heads need four entries")
        widths = tuple(prior_widths or (2 * N_ch, 3 * N_ch, 2 * N_ch))
        if len(widths) != 3:
            raise ConfigError(f"prior_widths are {widths}, must be three")

        def make(level: int, count: int) -> list[nn.Module]:
            settings = (dim * 2**level, heads[level], ffn_expansion_factor, bias, LayerNorm_type == "WithBias", sigmoid)
            return [HybridBlock(*settings) for _ in range(count)]

        for side in ("enc", "dec"):
            setattr(self, f"q_basic_{side}", nn.Parameter(torch.ones(1, 4 * dim, 1, 1)))
            setattr(self, f"q_scale_{side}", nn.Parameter(torch.ones(2, 1, 1, 1)))
        self.bit_estimator_z = BitEstimator(z_ch)
        self.enc = AnalysisTransform(dim, num_blocks, make)
        self.dec = SynthesisTransform(dim, num_blocks, make)
        self.N_dim_compress = nn.Conv2d(16 * dim, N_ch, 3, padding=1)
        self.N_dim_decompress = nn.Conv2d(N_ch, 16 * dim, 3, padding=1)
        self.hyper_enc = Stage(
            [
                DepthConvBlock(N_ch, z_ch),
                nn.Conv2d(z_ch, z_ch, 3, stride=2, padding=1),
                nn.LeakyReLU(0.01),
                nn.Conv2d(z_ch, z_ch, 3, stride=2, padding=1),
            ]
        )
        self.hyper_dec = Stage([UpsampleBlock(z_ch), UpsampleBlock(z_ch), DepthConvBlock(z_ch, N_ch)])
        fusion, first, second = widths
        self.y_prior_fusion = nn.Sequential(
            DepthConvBlock(N_ch, fusion, expansion=prior_expansion),
            DepthConvBlock(fusion, 3 * N_ch, expansion=prior_expansion),
        )
        self.y_spatial_prior = nn.Sequential(
            DepthConvBlock(4 * N_ch, first, True, prior_expansion),
            DepthConvBlock(first, second, True, prior_expansion),
            DepthConvBlock(second, 2 * N_ch, True, prior_expansion),
        )
        self.refine = nn.Conv2d(dim, 3, 3, padding=1)
        self.reset_convolutions()

    @torch.no_grad()
    def reset_convolutions(self) -> None:
        """The published initialisation of every convolution: Xavier normal, no offset."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def quality_gain(self, side: str, quality: torch.Tensor) -> torch.Tensor:
        """Feature gains [B, 4 d, 1, 1] of the encoder ("enc") or decoder ("dec") for quality indices [B] in 0..63."""
        low, high = getattr(self, f"q_scale_{side}").log()
        position = quality.to(low).reshape(-1, 1, 1, 1) / (QUALITIES - 1)
        return getattr(self, f"q_basic_{side}") * torch.exp(low + (high - low) * position)

    def analyse(self, image: torch.Tensor, quality: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latent y [B, N, H/16, W/16] and the hyper-latent z, not rounded."""
        y = self.N_dim_compress(self.enc(image, self.quality_gain("enc", quality)))
        return y, self.hyper_enc(self._pad_latent(y))

    @staticmethod
    def _pad_latent(y: torch.Tensor) -> torch.Tensor:
        bottom, right = -y.shape[-2] % HYPER_STRIDE, -y.shape[-1] % HYPER_STRIDE
        return F.pad(y, (0, right, 0, bottom), mode="replicate")

    def common_parameters(self, z_hat: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Quantisation steps, scales and means [B, 3 N, h, w] from z alone; size: (h, w) of y."""
        return self.y_prior_fusion(self.hyper_dec(z_hat))[..., : size[0], : size[1]]

    def spatial_parameters(self, first: torch.Tensor, common: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(scales 0, means 0, scales 1, means 1) of the second step, from the values of the first [B, N, h, w]."""
        return self.y_spatial_prior(torch.cat([first, common], dim=1)).chunk(4, dim=1)

    def quantise(
        self,
        y: torch.Tensor,
        z: torch.Tensor,
        *,
        portable: bool = False,
        rounding: Callable[[torch.Tensor], torch.Tensor] = torch.round,
    ) -> Latent:
        """Rounds y and z to what is coded, at most LARGEST_SYMBOL (dual spatial prior, section 3.3).

        portable: the entropy parameters are computed in float64, so that another machine finds the same ones; the
        latent is then float64, on the CPU where the device has no such numbers.
        rounding: another one, such as one that gradients pass.
        """
        z_hat = rounding(z).clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL)
        with entropy_precision(self, portable) as convert:
            common = self.common_parameters(convert(z_hat), y.shape[-2:])
            return self._quantise(convert(y), z_hat, common, rounding)

    def _quantise(
        self,
        y: torch.Tensor,
        z_hat: torch.Tensor,
        common: torch.Tensor,
        rounding: Callable[[torch.Tensor], torch.Tensor],
    ) -> Latent:
        step, scales, means = common.chunk(3, dim=1)
        step = LowerBound.apply(step, 0.5)
        halves, scale_halves, mean_halves = (t.chunk(2, dim=1) for t in (y / step, scales, means))
        even, odd = checkerboard(*y.shape[-2:], y.device, y.dtype)

        def code(half: int, mask: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, ...]:
            residual = (halves[half] - mean * mask) * mask
            symbols = rounding(residual).clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL)
            return residual, symbols, symbols + mean * mask, scale * mask

        first = [code(0, even, scale_halves[0], mean_halves[0]), code(1, odd, scale_halves[1], mean_halves[1])]
        context = torch.cat([first[0][2], first[1][2]], dim=1)
        scale0, mean0, scale1, mean1 = self.spatial_parameters(context, common)
        second = [code(0, odd, scale0, mean0), code(1, even, scale1, mean1)]
        residual, symbols, values, scale = (
            torch.cat([first[half][i] + second[half][i] for half in (0, 1)], dim=1) for i in range(4)
        )
        return Latent(
            z_hat=z_hat,
            planes=(first[0][1] + first[1][1], second[0][1] + second[1][1]),
            scales=(first[0][3] + first[1][3], second[0][3] + second[1][3]),
            y_q=symbols,
            scales_hat=scale,
            y_hat=values * step,
            y_res=residual,
        )

    def first_scales(self, common: torch.Tensor) -> torch.Tensor:
        """Scales [B, N/2, h, w] of the first plane, which need z alone."""
        scale0, scale1 = common.chunk(3, dim=1)[1].chunk(2, dim=1)
        even, odd = checkerboard(*common.shape[-2:], common.device, common.dtype)
        return scale0 * even + scale1 * odd

    def second_scales(self, first_plane: torch.Tensor, common: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales of the second plane, and its parameters [B, 2 N, h, w], once the first is known."""
        means = common.chunk(3, dim=1)[2].chunk(2, dim=1)
        even, odd = checkerboard(*common.shape[-2:], common.device, common.dtype)
        plane = first_plane.to(common.dtype)
        context = torch.cat([(plane + means[0]) * even, (plane + means[1]) * odd], dim=1)
        parameters = self.spatial_parameters(context, common)
        return parameters[0] * odd + parameters[2] * even, torch.cat(parameters, dim=1)

    def dequantise(self, planes: Sequence[torch.Tensor], common: torch.Tensor, spatial: torch.Tensor) -> torch.Tensor:
        """y_hat [B, N, h, w] from both planes of integers and the parameters that `second_scales` gave."""
        step, _, means = common.chunk(3, dim=1)
        mean0, mean1 = means.chunk(2, dim=1)
        _, mean2, _, mean3 = spatial.chunk(4, dim=1)
        even, odd = checkerboard(*common.shape[-2:], common.device, common.dtype)
        first, second = (p.to(common.dtype) for p in planes)
        half0 = (first + mean0) * even + (second + mean2) * odd
        half1 = (first + mean1) * odd + (second + mean3) * even
        return torch.cat([half0, half1], dim=1) * step.clamp_min(0.5)

    def synthesise(self, y_hat: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
        """The restored image [B, 3, 16 h, 16 w], not clamped."""
        weight = self.N_dim_decompress.weight
        features = self.N_dim_decompress(y_hat.to(weight.dtype).to(weight.device))
        return self.refine(self.dec(features, self.quality_gain("dec", quality)))

    def estimate_bits(self, latent: Latent) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits per symbol of y [B, N, h, w] and z [B, z, ., .]: what all published rates are made of."""
        return gaussian_bits(latent.y_q, latent.scales_hat), self.hyper_bits(latent.z_hat)

    def hyper_bits(self, z: torch.Tensor) -> torch.Tensor:
        """Bits of each value of the hyper-latent, rounded or not."""
        return bits_of(self.bit_estimator_z(z + 0.5) - self.bit_estimator_z(z - 0.5))

    def forward(self, image: torch.Tensor, quality: torch.Tensor | int = 63) -> tuple[torch.Tensor, Latent]:
        """(restored image, latent) of a batch; quality: an index in 0..63, or one per image."""
        quality = check_quality(quality, len(image), image.device)
        latent = self.quantise(*self.analyse(image, quality))
        return self.synthesise(latent.y_hat, quality), latent


@contextmanager
def entropy_precision(codec: AllInOneCodec, portable: bool) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Within it the entropy model's modules compute in float64 (`portable`) or as they are; gives what converts inputs.

    Decoding needs the very parameters that encoding had: in float32 two devices differ often enough to break a stream.
    """
    modules = (codec.hyper_dec, codec.y_prior_fusion, codec.y_spatial_prior)
    home, own = codec.N_dim_compress.weight.device, codec.N_dim_compress.weight.dtype
    device, dtype = (float64_device(home), torch.float64) if portable else (home, own)
    with torch.autocast(device.type, enabled=False):
        try:
            # Devices and precisions change one after the other: no tensor is ever float64 where that does not exist.
            for module in modules if portable else ():
                module.to(device).to(dtype)
            yield lambda tensor: tensor.to(device).to(dtype)
        finally:
            for module in modules if portable else ():
                module.to(own).to(home)


def check_quality(quality: torch.Tensor | int, batch: int, device: torch.device) -> torch.Tensor:
    """Quality indices [batch]. Raises InputError outside 0..63."""
    index = torch.as_tensor(quality, device=device).reshape(-1)
    if len(index) not in (1, batch) or int(index.min()) < 0 or int(index.max()) >= QUALITIES:
        raise InputError(f"quality: {index.tolist()}; one index, or one per image, in 0..{QUALITIES - 1}")
    return index.expand(batch)


def rate_weight(quality: torch.Tensor) -> torch.Tensor:
    """The published lambda of quality indices: 128 to 2048, geometric."""
    return torch.exp(math.log(128) + math.log(16) * quality.float() / (QUALITIES - 1))


_COMMON = {"ffn_expansion_factor": 2.66, "bias": False, "LayerNorm_type": "BiasFree", "sigmoid": False}
_BLOCKS = {"num_blocks": (2, 3, 3, 4), "heads": (4, 4, 4, 4), **_COMMON}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "S": {"dim": 32, "N_ch": 256, "z_ch": 128, **_BLOCKS},
    "L": {"dim": 48, "N_ch": 288, "z_ch": 192, **_BLOCKS},
}
_SIGNATURE = ("bit_estimator_z.f1.h", "enc.encoder_x16.blocks.0.attn_s.a.0.weight")
_PRIOR_BLOCKS = ("y_prior_fusion.0", "y_spatial_prior.0", "y_spatial_prior.1")
_STAGES = ("encoder_x2", "encoder_x4", "encoder_x8", "encoder_x16")


def _build(config: Mapping[str, Any]) -> nn.Module:
    return construct(AllInOneCodec, "all-in-one codec", config)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    counts = [
        sum(f"enc.{stage}.blocks.{i}.attn.temperature" in state for i in indices(state, f"enc.{stage}.blocks."))
        for stage in _STAGES
    ]
    firsts = {level: f"enc.{_STAGES[level]}.blocks.0" for level, count in enumerate(counts) if count}
    missing = [first for first in firsts.values() if f"{first}.attn.temperature" not in state]
    if missing or not firsts:
        raise CheckpointError(f"all-in-one codec: no blocks at {missing[0] if missing else 'any level'}")
    first = firsts[max(firsts)]
    dim = state["enc.patch_embed.proj.weight"].shape[0]
    hidden = [(state[f"{first}.ffn.project_out.weight"].shape[1], dim * 2**level) for level, first in firsts.items()]
    factor = next(
        (f for f in (2.66, 2.0, 4.0) if all(int(w * f) == h for h, w in hidden)), hidden[-1][0] / hidden[-1][1]
    )
    return {
        "dim": dim,
        "N_ch": state["N_dim_compress.weight"].shape[0],
        "z_ch": state["q_basic_enc"].shape[1],
        "num_blocks": tuple(counts),
        "heads": tuple(
            state[f"{firsts[level]}.attn.temperature"].shape[0] if level in firsts else 1 for level in range(4)
        ),
        "ffn_expansion_factor": factor,
        "bias": f"{first}.attn.qkv.bias" in state,
        "LayerNorm_type": "WithBias" if f"{first}.norm1.body.bias" in state else "BiasFree",
        "sigmoid": False,
        **_prior_from_state_dict(state),
    }


def _prior_from_state_dict(state: State) -> dict[str, Any]:
    """Sizes of the entropy model where they are not the published ones."""
    outputs = [state[f"{_PRIOR_BLOCKS[i]}.block.0.conv2.weight"].shape[0] for i in range(3)]
    half = state[f"{_PRIOR_BLOCKS[0]}.block.1.conv_out.weight"].shape[1]
    channels = state["N_dim_compress.weight"].shape[0]
    published = outputs == [2 * channels, 3 * channels, 2 * channels] and half == 2 * outputs[0]
    return {} if published else {"prior_widths": tuple(outputs), "prior_expansion": 2 * half / outputs[0]}


def _prepare(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The generator of a released file, which holds the training's discriminator and counters as well."""
    inside = {key: value for key, value in state.items() if ".generator." in f".{key}"}
    return {key.replace("generator.", ""): value for key, value in (inside or state).items()}


class EntropyTables(nn.Module):
    """The part of the codec that its coding tables come from, under the released key."""

    def __init__(self, z_channel: int) -> None:
        super().__init__()
        self.bit_estimator_z = BitEstimator(z_channel)


ARCHITECTURES = [
    Architecture(
        id="aio-codec",
        system="aio-codec",
        title="All-in-one codec",
        paper="Zeng et al., All-in-One Image Compression and Restoration, WACV 2025, arXiv 2502.03649",
        licence="none stated for code or weights",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "dim" in config,
        kind="codec",
        tasks=("compress", "denoise", "dehaze", "desnow", "derain"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        prepare_state_dict=_prepare,
        metadata_keys=("sigmoid",),
        multiple_of=lambda config: LATENT_STRIDE,
        global_statistics="channel attention looks at the whole picture (or tile)",
        bytes_per_pixel=lambda config: 80.0 * config["dim"],
    ),
    Architecture(
        id="aio-codec-tables",
        system="aio-codec",
        title="All-in-one codec: hyper-latent distribution",
        paper="Zeng et al., WACV 2025",
        licence="none stated for code or weights",
        detect=lambda state: set(state) == {k for k in state if k.startswith("bit_estimator_z.")} and bool(state),
        config_from_state_dict=lambda state: {"z_channel": state["bit_estimator_z.f1.h"].shape[1]},
        build=lambda config: EntropyTables(config["z_channel"]),
        matches_config=lambda config: "z_channel" in config,
        kind="helper",
    ),
]
