"""MambaIR (first version): residual groups of a four-direction state-space layer and a convolution with attention.

Guo et al., "MambaIR: A Simple Baseline for Image Restoration with State-Space Model", ECCV 2024. All generations of the
released code: three light convolution blocks (2 is current), two U-Nets. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .layers.convolution import DilatedConv2d
from .layers.residual_groups import WITHOUT_EFFECT, ResidualGroupNetwork, frame_config
from .layers.state_dict import expansion_factor
from .layers.state_space import (
    GatedStateSpace2d,
    StateSpaceBlock,
    cached_orders,
    convolve,
    dt_rank,
    initialise_linear,
    scan_sizes,
)
from .layers.state_space_unet import STAGES, StateSpaceUNet, unet_config
from .registry import Architecture, State, construct

_SQUEEZE = 30
_CURRENT_LIGHT = 2
_UNET_STATES = dict.fromkeys(STAGES, 16)
_LEGACY_UNET_STATES = dict(zip(STAGES, (4, 8, 16, 32, 16, 8, 8, 8), strict=True))


@cached_orders
def raster_orders(height: int, width: int) -> torch.Tensor:
    """[4, height * width]: the pixel read at each step, row by row, column by column, and both backwards."""
    rows = torch.arange(height * width)
    columns = rows.view(height, width).T.flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


class ChannelAttention(nn.Module):
    """Scales channels by a gate made from their means. [B, C, H, W] -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim // _SQUEEZE
        if hidden < 1:
            raise ConfigError(f"MambaIR: {dim} channels are too few for its channel attention, at least {_SQUEEZE}")
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.attention(x)


class ConvolutionBlock(nn.Module):
    """Convolutions and channel attention (CAB). [B, H, W, C] -> same.

    `light` None: through C / `ratio` channels, the normal form. Light forms by generation: 0 is one depth-wise
    convolution, 1 the normal form with ratio 6, 2 depth-wise separable with a dilated second convolution.
    """

    def __init__(self, dim: int, light: int | None = None, ratio: int = 3) -> None:
        super().__init__()

        def depthwise(dilation: int = 1, channels: int = dim) -> nn.Module:
            return DilatedConv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=channels)

        if light == 0:
            steps = [depthwise()]
        elif light == 2:
            half = dim // 2
            steps = [
                nn.Conv2d(dim, half, 1),
                depthwise(channels=half),
                nn.GELU(),
                nn.Conv2d(half, dim, 1),
                depthwise(2),
            ]
        elif light in (None, 1):
            inner = dim // (6 if light == 1 else ratio)
            steps = [nn.Conv2d(dim, inner, 3, padding=1), nn.GELU(), nn.Conv2d(inner, dim, 3, padding=1)]
        else:
            raise ConfigError(f"MambaIR: light block generation {light!r} is unknown, must be 0, 1 or 2")
        self.cab = nn.Sequential(*steps, ChannelAttention(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return convolve(self.cab, x)


def _block(dim: int, expansion: float, state: int, light: int | None = None) -> StateSpaceBlock:
    attention = GatedStateSpace2d(dim, int(expansion * dim), dt_rank(dim), state)
    return StateSpaceBlock(dim, attention, "conv_blk", ConvolutionBlock(dim, light))


class MambaIR(ResidualGroupNetwork):
    """The flat network. `mlp_ratio` is, as in the published code, the expansion of the state-space layer.

    `light` is the generation of the light convolution block; it is used with the upsampler "pixelshuffledirect" only.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 180,
        depths: tuple[int, ...] = (6,) * 6,
        d_state: int = 16,
        mlp_ratio: float = 2.0,
        light: int = _CURRENT_LIGHT,
        in_chans: int = 3,
        upscale: int = 2,
        upsampler: str | None = "pixelshuffle",
        resi_connection: str = "1conv",
        img_range: float = 1.0,
    ) -> None:
        generation = light if upsampler == "pixelshuffledirect" else None
        super().__init__(
            [[_block(embed_dim, mlp_ratio, d_state, generation) for _ in range(depth)] for depth in depths],
            blocks_key="blocks",
            embed_dim=embed_dim,
            in_chans=in_chans,
            upscale=upscale,
            upsampler=upsampler,
            resi_connection=resi_connection,
            img_range=img_range,
        )
        self.apply(initialise_linear)

    def prepare(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (raster_orders(x.shape[1], x.shape[2], device=x.device),)


class MambaIRUNet(StateSpaceUNet):
    """The U-Net for real noise. `d_states` gives the state size of stages that differ from 16."""

    def __init__(
        self,
        *,
        dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        mlp_ratio: float = 1.5,
        d_states: Mapping[str, int] | None = None,
        inp_channels: int = 3,
        out_channels: int = 3,
        bias: bool = False,
        dual_pixel_task: bool = False,
    ) -> None:
        states = {**_UNET_STATES, **(d_states or {})}
        super().__init__(
            lambda stage, width: _block(width, mlp_ratio, states[stage]),
            inp_channels=inp_channels,
            out_channels=out_channels,
            dim=dim,
            num_blocks=num_blocks,
            num_refinement_blocks=num_refinement_blocks,
            bias=bias,
            dual_pixel_task=dual_pixel_task,
        )
        self.apply(initialise_linear)

    def orders(self, height: int, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        return (raster_orders(height, width, device=device),)


_FLAT = {"in_chans": 3, "img_range": 1.0, "resi_connection": "1conv"}
_LARGE = {**_FLAT, "embed_dim": 180, "depths": (6,) * 6, "d_state": 16}
_LIGHT = {**_FLAT, "embed_dim": 60, "depths": (6,) * 4, "upsampler": "pixelshuffledirect"}
FLAT_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{f"SR-x{x}": {**_LARGE, "mlp_ratio": 2, "upsampler": "pixelshuffle", "upscale": x} for x in (2, 3, 4)},
    **{f"light-x{x}": {**_LIGHT, "upscale": x, "light": 2, "d_state": 10, "mlp_ratio": 1.2} for x in (2, 3, 4)},
    **{f"light-x{x}-gen1": {**_LIGHT, "upscale": x, "light": 1, "d_state": 16, "mlp_ratio": 1.5} for x in (2, 3, 4)},
    **{f"light-x{x}-gen0": {**_LIGHT, "upscale": x, "light": 0, "d_state": 16, "mlp_ratio": 1.2} for x in (2, 3, 4)},
    "CDN": {**_LARGE, "mlp_ratio": 1.2, "upsampler": "", "upscale": 1},
    "CAR": {**_LARGE, "mlp_ratio": 1.2, "upsampler": "", "upscale": 1, "in_chans": 1},
}
_UNET = {
    "inp_channels": 3,
    "out_channels": 3,
    "dim": 48,
    "num_blocks": (4, 6, 6, 8),
    "num_refinement_blocks": 4,
    "bias": False,
    "dual_pixel_task": False,
}
UNET_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "real denoising": {**_UNET, "mlp_ratio": 1.5},
    "real denoising, legacy": {**_UNET, "mlp_ratio": 2.0, "d_states": _LEGACY_UNET_STATES},
}

_FLAT_SIGNATURE = ("layers.0.residual_group.blocks.0.conv_blk.cab.0.weight", "conv_first.weight")
_UNET_SIGNATURE = ("encoder_level1.0.conv_blk.cab.0.weight", "patch_embed.proj.weight")
_ARCH_LIGHT = {"MambaIR": 2, "MambaIR_gen1": 1, "MambaIR_gen0": 0}


def _flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`arch` (the generation's class, as parity cases name it) as `light`; the official option files carry neither.

    Without both, the two older light models are told by their released sizes.
    """
    settings = dict(config)
    arch = settings.pop("arch", None)
    if arch is not None and arch not in _ARCH_LIGHT:
        raise ConfigError(f"MambaIR: arch is {arch!r}, must be one of {', '.join(_ARCH_LIGHT)}")
    if "light" not in settings and settings.get("upsampler") == "pixelshuffledirect":
        sizes = tuple(settings.get(name) for name in ("embed_dim", "d_state", "mlp_ratio"))
        released = {(60, 16, 1.5): 1, (60, 16, 1.2): 0}.get(sizes, _CURRENT_LIGHT)
        settings["light"] = released if arch is None else _ARCH_LIGHT[arch]
    return settings


def _unet_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """As `_flat_settings`: the legacy U-Net expands by 2 and has other state sizes."""
    settings = dict(config)
    arch = settings.pop("arch", "MambaIRUNet_legacy" if settings.get("mlp_ratio") == 2 else "MambaIRUNet")
    if arch not in ("MambaIRUNet", "MambaIRUNet_legacy"):
        raise ConfigError(f"MambaIR: arch is {arch!r}, must be 'MambaIRUNet' or 'MambaIRUNet_legacy'")
    settings.setdefault("d_states", _LEGACY_UNET_STATES if arch.endswith("legacy") else _UNET_STATES)
    return settings


def _build(network: type[nn.Module], settings_of: Any) -> Any:
    def of_settings(**settings: Any) -> nn.Module:
        return network(**settings_of(settings))

    return partial(construct, of_settings, "MambaIR", without=WITHOUT_EFFECT)


def _light_generation(state: State, block: str) -> int:
    """Which light convolution block a state dict has."""
    if state[f"{block}.conv_blk.cab.0.weight"].shape[1] == 1:
        return 0
    return 2 if f"{block}.conv_blk.cab.1.weight" in state else 1


def _flat_config(state: State) -> dict[str, Any]:
    config = frame_config(state, "blocks")
    block = "layers.0.residual_group.blocks.0"
    inner, d_state = scan_sizes(state, block, "MambaIR")
    config |= {"d_state": d_state, "mlp_ratio": expansion_factor([(config["embed_dim"], inner)])}
    if config["upsampler"] == "pixelshuffledirect":
        config["light"] = _light_generation(state, block)
    return config


def _unet_config(state: State) -> dict[str, Any]:
    config = unet_config(state)
    scanned = {stage: scan_sizes(state, f"{stage}.0", "MambaIR") for stage in STAGES}
    widths = [(state[f"{stage}.0.skip_scale"].shape[0], inner) for stage, (inner, _) in scanned.items()]
    return {
        **config,
        "mlp_ratio": expansion_factor(widths),
        "d_states": {stage: states for stage, (_, states) in scanned.items()},
    }


_COMMON = {
    "system": "mambair",
    "paper": "Guo et al., MambaIR: A Simple Baseline for Image Restoration with State-Space Model, ECCV 2024",
    "licence": "code Apache-2.0; weights: no separate licence stated",
    "global_statistics": "every scan runs through the whole picture and the channel attention averages over it; a tile "
    "sees only itself (the published results are tiled ones, see the official tiling)",
}

ARCHITECTURES = [
    Architecture(
        id="mambair",
        title="MambaIR",
        detect=lambda state: all(key in state for key in _FLAT_SIGNATURE),
        config_from_state_dict=_flat_config,
        build=_build(MambaIR, _flat_settings),
        matches_config=lambda config: "depths" in config or "embed_dim" in config,
        tasks=("super-resolution", "denoise", "jpeg"),
        variants=FLAT_VARIANTS,
        metadata_keys=("img_range",),
        signature=_FLAT_SIGNATURE,
        scale=lambda config: config["upscale"] if config["upsampler"] else 1,
        bytes_per_pixel=lambda config: (50 * config["mlp_ratio"] + 10) * config["embed_dim"],
        **_COMMON,
    ),
    Architecture(
        id="mambair-unet",
        title="MambaIR U-Net",
        detect=lambda state: all(key in state for key in _UNET_SIGNATURE),
        config_from_state_dict=_unet_config,
        build=_build(MambaIRUNet, _unet_settings),
        tasks=("denoise",),
        variants=UNET_VARIANTS,
        signature=_UNET_SIGNATURE,
        multiple_of=lambda config: 8,
        minimum_size=lambda config: 8,
        bytes_per_pixel=lambda config: 125 * config["mlp_ratio"] * config["dim"],
        **_COMMON,
    ),
]
