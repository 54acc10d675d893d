"""MaIR: restoration by state-space blocks that read the picture along nested S-shaped paths.

Li et al., "MaIR: A Locality- and Continuity-Preserving Mamba for Image Restoration", CVPR 2025, arXiv 2412.20066.
A flat network for super-resolution and denoising, a U-Net for deblurring, dehazing and real noise. State-dict keys are
the released checkpoints'. The width of the stripes, `scan_len`, is in no checkpoint and no shape: see `_SCAN_LEN`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import nn

from ..errors import InputError
from .layers.feed_forward import FeedForward
from .layers.residual_groups import WITHOUT_EFFECT, ResidualGroupNetwork, frame_config
from .layers.state_dict import expansion_factor
from .layers.state_space import (
    GatedStateSpace2d,
    StateSpaceBlock,
    cached_orders,
    dt_rank,
    initialise_linear,
    scan_sizes,
)
from .layers.state_space_unet import STAGES, StateSpaceUNet, unet_config
from .registry import Architecture, State, construct

_UNET_STATES = dict(zip(STAGES, (4, 8, 16, 32, 16, 8, 8, 8), strict=True))
"""State size of every stage of the U-Net, fixed in the published code."""


def nested_s_steps(height: int, width: int, scan_len: int, shift: int) -> torch.Tensor:
    """[height, width]: the step at which the nested S-shaped path reads each pixel (section 3.2 of the paper).

    Stripes of `scan_len` columns, the first one `shift` wide if that is not zero, are walked down and up in turn, the
    rows of a stripe forwards and backwards in turn. A picture narrower than the shift is read row by row, as the
    published generator does.
    """
    if 0 < shift and width < shift:
        return torch.arange(height * width).view(height, width)
    row, column = torch.arange(height)[:, None], torch.arange(width)[None]
    missing = (scan_len - shift) % scan_len  # columns by which the first stripe falls short
    stripe = (column + missing) // scan_len
    start = (stripe * scan_len - missing).clamp_min(0)
    stripe_width = ((stripe + 1) * scan_len - missing).clamp_max(width) - start
    visited_row = torch.where(stripe % 2 == 0, row, height - 1 - row)
    offset = column - start
    offset = torch.where(visited_row % 2 == 0, offset, stripe_width - 1 - offset)
    return start * height + visited_row * stripe_width + offset


@cached_orders
def nested_s_orders(height: int, width: int, scan_len: int, shift: int) -> torch.Tensor:
    """[4, height * width]: the pixel (row-major) that each of the four sequences reads at each step.

    The nested S path, the same on the picture turned by 180 degrees (which is not the path backwards), and both again
    on the transposed picture.
    """
    upright = nested_s_steps(height, width, scan_len, shift).flatten().argsort()
    transposed = nested_s_steps(width, height, scan_len, shift).T.flatten().argsort()
    last = height * width - 1
    return torch.stack([upright, last - upright, transposed, last - transposed])


class SequenceGate(nn.Module):
    """Sequence shuffle attention: weights of the four sequences, per channel, from their means (section 3.3).

    means [B, 4, C] -> [B, 4, C] in 0..1. The convolution's channels are ordered channel outermost, sequence innermost.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1: the published module has the pooling as index 0.
        self.gating = nn.Sequential(nn.Identity(), nn.Conv2d(dim * 4, dim * 4, 1, groups=dim))

    def forward(self, means: torch.Tensor) -> torch.Tensor:
        mixed = self.gating(rearrange(means, "b k c -> b (c k) 1 1"))
        return rearrange(mixed, "b (c k) 1 1 -> b k c", k=4).sigmoid()


class VisualMambaModule(GatedStateSpace2d):
    """Four-path state-space layer whose paths are weighted by `SequenceGate` (VMM). [B, H, W, C] -> same."""

    def __init__(self, dim: int, inner: int, state: int) -> None:
        super().__init__(dim, inner, dt_rank(dim), state)
        self.gating = SequenceGate(inner)

    def merge(self, tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        paths = self.scan(tokens, order, merge=False)
        gate = self.gating(paths.mean(dim=2).to(tokens.dtype)).to(paths.dtype).unsqueeze(2)
        mixed = paths[:, 0] * gate[:, 0]
        for path in range(1, paths.shape[1]):  # an einsum would copy the paths, transposed, first
            mixed = torch.addcmul(mixed, paths[:, path], gate[:, path])
        return mixed


def _block(dim: int, ssm_ratio: float, mlp_ratio: float, state: int, mlp_key: str, path: int = 0) -> StateSpaceBlock:
    attention = VisualMambaModule(dim, int(ssm_ratio * dim), state)
    return StateSpaceBlock(dim, attention, mlp_key, FeedForward(dim, int(dim * mlp_ratio)), path)


def _stripe(scan_len: int | None, default: int) -> int:
    """The stripe width to use: `default`, the network's, unless another is asked for."""
    width = scan_len or default
    if not isinstance(width, int) or not 1 <= width <= 1024:
        raise InputError(
            f"scan_len is {width!r}, must be a whole number of pixels from 1 to 1024 (0: the network's own)"
        )
    return width


class MaIR(ResidualGroupNetwork):
    """The flat network. Odd blocks of a group read along paths shifted by half a stripe."""

    def __init__(
        self,
        *,
        embed_dim: int = 60,
        depths: tuple[int, ...] = (6, 6, 6, 6),
        d_state: int = 16,
        ssm_ratio: float = 1.4,
        mlp_ratio: float = 1.6,
        scan_len: int = 4,
        in_chans: int = 3,
        upscale: int = 2,
        upsampler: str | None = "pixelshuffledirect",
        resi_connection: str = "1conv",
        img_range: float = 1.0,
    ) -> None:
        groups = [
            [_block(embed_dim, ssm_ratio, mlp_ratio, d_state, "conv_blk", path=i % 2) for i in range(depth)]
            for depth in depths
        ]
        super().__init__(
            groups,
            blocks_key="blocks",
            embed_dim=embed_dim,
            in_chans=in_chans,
            upscale=upscale,
            upsampler=upsampler,
            resi_connection=resi_connection,
            img_range=img_range,
        )
        self.scan_len = _stripe(None, scan_len)
        self.apply(initialise_linear)

    def prepare(self, x: torch.Tensor, scan_len: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        width = _stripe(scan_len, self.scan_len)
        size = x.shape[1], x.shape[2], width
        return nested_s_orders(*size, 0, device=x.device), nested_s_orders(*size, width // 2, device=x.device)


class MaIRUNet(StateSpaceUNet):
    """The U-Net. All its blocks read along the unshifted paths (the published constructor never passes a shift)."""

    def __init__(
        self,
        *,
        dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        ssm_ratio: float = 2.0,
        flp_ratio: float = 4.0,
        mlp_ratio: float = 1.5,
        d_states: Mapping[str, int] | None = None,
        scan_len: int = 4,
        inp_channels: int = 3,
        out_channels: int = 3,
        bias: bool = False,
        dual_pixel_task: bool = False,
    ) -> None:
        states = {**_UNET_STATES, **(d_states or {})}

        def block(stage: str, width: int) -> StateSpaceBlock:
            ratio = flp_ratio if stage == "encoder_level1" else mlp_ratio
            return _block(width, ssm_ratio, ratio, states[stage], "mlp")

        super().__init__(
            block,
            inp_channels=inp_channels,
            out_channels=out_channels,
            dim=dim,
            num_blocks=num_blocks,
            num_refinement_blocks=num_refinement_blocks,
            bias=bias,
            dual_pixel_task=dual_pixel_task,
        )
        self.scan_len = _stripe(None, scan_len)
        self.apply(initialise_linear)

    def orders(
        self, height: int, width: int, device: torch.device, scan_len: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        return (nested_s_orders(height, width, _stripe(scan_len, self.scan_len), 0, device=device),)


def _sr(scale: int, **settings: Any) -> dict[str, Any]:
    return {"upscale": scale, **_FLAT, **settings}


_FLAT = {"in_chans": 3, "img_range": 1.0, "resi_connection": "1conv"}
_LIGHT = {"embed_dim": 60, "depths": (6,) * 4, "mlp_ratio": 1.6, "upsampler": "pixelshuffledirect"}
_LARGE = {"embed_dim": 180, "depths": (6,) * 6, "d_state": 16}
FLAT_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{f"T-x{x}": _sr(x, **_LIGHT, d_state=1, ssm_ratio=1.1, scan_len=8) for x in (2, 3, 4)},
    **{f"S-x{x}": _sr(x, **_LIGHT, d_state=16, ssm_ratio=1.4, scan_len=4) for x in (2, 3, 4)},
    **{
        f"SR-x{x}": _sr(x, **_LARGE, ssm_ratio=2.0, mlp_ratio=2.5, upsampler="pixelshuffle", scan_len=8)
        for x in (2, 3, 4)
    },
    "CDN": _sr(1, **_LARGE, ssm_ratio=1.3, mlp_ratio=2.0, upsampler="", scan_len=4),
}
_UNET = {"inp_channels": 3, "out_channels": 3, "bias": False, "dual_pixel_task": False}
UNET_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "deblur, real denoising": {
        **_UNET,
        "dim": 48,
        "num_blocks": (4, 6, 6, 8),
        "num_refinement_blocks": 4,
        "ssm_ratio": 2.0,
        "flp_ratio": 4.0,
        "mlp_ratio": 1.5,
        "scan_len": 4,
    },
    "dehaze": {
        **_UNET,
        "dim": 24,
        "num_blocks": (2, 2, 3, 4),
        "num_refinement_blocks": 2,
        "ssm_ratio": 1.2,
        "flp_ratio": 2.0,
        "mlp_ratio": 2.0,
        "scan_len": 8,
    },
}

_FLAT_SIGNATURE = ("layers.0.residual_group.blocks.0.self_attention.gating.gating.1.weight", "conv_first.weight")
_UNET_SIGNATURE = ("encoder_level1.0.self_attention.gating.gating.1.weight", "patch_embed.proj.weight")


def _flat_scan_len(embed_dim: int, d_state: int, upsampler: str) -> int:
    """The stripe width of the released network with these sizes (its option files); nothing in a file tells it."""
    if d_state == 1 or (embed_dim > 60 and upsampler):
        return 8
    return 4


def _flat_config(state: State) -> dict[str, Any]:
    config = frame_config(state, "blocks")
    block = "layers.0.residual_group.blocks.0"
    dim, hidden = config["embed_dim"], state[f"{block}.conv_blk.fc1.weight"].shape[0]
    inner, d_state = scan_sizes(state, block, "MaIR")
    return {
        **config,
        "d_state": d_state,
        "ssm_ratio": expansion_factor([(dim, inner)]),
        "mlp_ratio": expansion_factor([(dim, hidden)]),
        "scan_len": _flat_scan_len(dim, d_state, config["upsampler"]),
    }


def _unet_config(state: State) -> dict[str, Any]:
    config = unet_config(state)
    first = {stage: f"{stage}.0" for stage in STAGES}
    width = {stage: state[f"{block}.skip_scale"].shape[0] for stage, block in first.items()}
    hidden = {stage: state[f"{block}.mlp.fc1.weight"].shape[0] for stage, block in first.items()}
    scanned = {stage: scan_sizes(state, block, "MaIR") for stage, block in first.items()}
    states = {stage: size for stage, (_, size) in scanned.items()}
    config |= {
        "ssm_ratio": expansion_factor([(width[s], scanned[s][0]) for s in STAGES]),
        "flp_ratio": expansion_factor([(width["encoder_level1"], hidden["encoder_level1"])]),
        "mlp_ratio": expansion_factor([(width[s], hidden[s]) for s in STAGES[1:]]),
        "scan_len": 4 if config["dim"] > 24 else 8,
    }
    return config if states == _UNET_STATES else {**config, "d_states": states}


_COMMON = {
    "system": "mair",
    "paper": "Li et al., MaIR: A Locality- and Continuity-Preserving Mamba for Image Restoration, CVPR 2025, "
    "arXiv 2412.20066",
    "licence": "code and weights: none stated, ask the authors",
    "metadata_keys": ("scan_len", "img_range"),
    "global_statistics": "every path runs through the whole picture and the gate averages over it; a tile sees only "
    "itself (the published results are tiled ones, see the official tiling)",
}

ARCHITECTURES = [
    Architecture(
        id="mair",
        title="MaIR",
        detect=lambda state: all(key in state for key in _FLAT_SIGNATURE),
        config_from_state_dict=_flat_config,
        build=partial(construct, MaIR, "MaIR", without=WITHOUT_EFFECT),
        matches_config=lambda config: "depths" in config or "embed_dim" in config,
        tasks=("super-resolution", "denoise"),
        variants=FLAT_VARIANTS,
        signature=_FLAT_SIGNATURE,
        scale=lambda config: config["upscale"] if config["upsampler"] else 1,
        bytes_per_pixel=lambda config: (50 * config["ssm_ratio"] + 36) * config["embed_dim"],
        **_COMMON,
    ),
    Architecture(
        id="mair-unet",
        title="MaIR U-Net",
        detect=lambda state: all(key in state for key in _UNET_SIGNATURE),
        config_from_state_dict=_unet_config,
        build=partial(construct, MaIRUNet, "MaIR", without=WITHOUT_EFFECT),
        tasks=("deblur", "denoise", "dehaze"),
        variants=UNET_VARIANTS,
        signature=_UNET_SIGNATURE,
        multiple_of=lambda config: 8,
        minimum_size=lambda config: 8,
        bytes_per_pixel=lambda config: 160 * config["ssm_ratio"] * config["dim"],
        **_COMMON,
    ),
]
