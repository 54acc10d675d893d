"""AirNet: all-in-one restoration guided by a contrastive degradation encoder.

Li et al., "All-In-One Image Restoration for Unknown Corruption", CVPR 2022, with the uncertainty head of Wu et al.,
"Debiased All-in-one Image Restoration with Task Uncertainty Regularization", AAAI 2025. The encoder's first residual
block describes the degradation per pixel; it steers every block of the restorer through a deformable convolution and
a feature-wise affine transform. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError
from .layers.state_dict import count_indices
from .layers.uncertainty import UncertaintyHead
from .registry import Architecture, State, construct

_SLOPE = 0.1  # of every leaky ReLU
_EMBEDDING = 256  # width of the contrastive embedding
_STRIP_BYTES = {"cpu": 4 << 20}  # sampled taps that stay in cache
_STRIP_BYTES_ACCELERATOR = 256 << 20


def modulated_deformable_convolution(
    x: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Deformable convolution v2 (Zhu et al., CVPR 2019), k x k, stride 1, "same" padding, one offset group, no bias.

    x [B, C, H, W], weight [D, C, k, k], offset [B, 2 k k, H, W] in pixels (vertical, horizontal; taps row by row),
    mask [B, k k, H, W] -> [B, D, H, W]. Pixels outside the picture count as zero. Works in strips of rows, so that the
    k k sampled copies of `x` never exist at once; positions and sampling have at least float32.
    """
    batch, channels, height, width = x.shape
    kernel = weight.shape[-1]
    taps = kernel * kernel
    precise = torch.promote_types(x.dtype, torch.float32)
    positions = _sampling_positions(offset.to(precise), kernel)
    limit = _STRIP_BYTES.get(x.device.type, _STRIP_BYTES_ACCELERATOR)
    rows = max(1, limit // (batch * channels * taps * width * 4))
    # PyTorch's CPU sampler runs batch entries in parallel, nothing else: channel groups pose as batch entries.
    groups = 4 if x.device.type == "cpu" and channels % 4 == 0 else 1
    source = rearrange(x.to(precise), "b (g c) h w -> (b g) c h w", g=groups)
    linear, strips = weight.flatten(1), []
    for positions_strip, mask_strip in zip(positions.split(rows, dim=2), mask.split(rows, dim=2), strict=True):
        grid = positions_strip.flatten(1, 2)
        if groups > 1:
            grid = grid[:, None].expand(-1, groups, -1, -1, -1).flatten(0, 1)
        sampled = F.grid_sample(source, grid, padding_mode="zeros", align_corners=False)
        sampled = sampled.view(batch, channels, taps, -1, width) * mask_strip[:, None]
        sampled = rearrange(sampled.to(weight.dtype), "b c t h w -> b (c t) (h w)")
        strips.append((linear @ sampled).unflatten(-1, (-1, width)))
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)


def _sampling_positions(offset: torch.Tensor, kernel: int) -> torch.Tensor:
    """Where every tap reads, in grid_sample's coordinates: [B, k k, H, W, 2] (horizontal, vertical)."""
    height, width = offset.shape[-2:]
    device = offset.device
    dy, dx = rearrange(offset, "b (t d) h w -> d b t h w", d=2)
    tap = torch.arange(kernel * kernel, device=device)[:, None, None]
    # + 0.5: grid_sample measures from the picture's edge, pixel centres lie half a pixel inside.
    y = dy + (torch.arange(height, device=device)[:, None] + tap // kernel - kernel // 2 + 0.5)
    x = dx + (torch.arange(width, device=device) + tap % kernel - kernel // 2 + 0.5)
    return torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), dim=-1)


class DeformableConvolution(nn.Module):
    """3x3 modulated deformable convolution of features, displaced as features and degradation map ask for."""

    def __init__(self, features: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, features, kernel, kernel))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.taps = kernel * kernel
        self.conv_offset_mask = nn.Conv2d(2 * features, 3 * self.taps, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv_offset_mask.weight)
        nn.init.zeros_(self.conv_offset_mask.bias)

    def forward(self, x: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        offset, mask = self.conv_offset_mask(torch.cat([x, degradation], dim=1)).split([2 * self.taps, self.taps], 1)
        return modulated_deformable_convolution(x, self.weight, offset, mask.sigmoid())


class SpatialFeatureTransform(nn.Module):
    """x * gamma + beta, both [B, C, H, W], read off the degradation map pixel by pixel."""

    def __init__(self, features: int) -> None:
        super().__init__()

        def projection() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(features, features, 1, bias=False),
                nn.LeakyReLU(_SLOPE, inplace=True),
                nn.Conv2d(features, features, 1, bias=False),
            )

        self.conv_gamma = projection()
        self.conv_beta = projection()

    def forward(self, x: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        return x * self.conv_gamma(degradation) + self.conv_beta(degradation)


class DegradationGuidedModule(nn.Module):
    """DGM: both ways of steering, added to the features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.dcn = DeformableConvolution(features)
        self.sft = SpatialFeatureTransform(features)

    def forward(self, x: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        return x + (self.dcn(x, degradation) + self.sft(x, degradation))


class DegradationGuidedBlock(nn.Module):
    """DGB: two guided modules, each followed by a convolution; residual."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.dgm1 = DegradationGuidedModule(features)
        self.dgm2 = DegradationGuidedModule(features)
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        y = F.leaky_relu(self.dgm1(x, degradation), _SLOPE)
        y = F.leaky_relu(self.conv1(y), _SLOPE)
        y = F.leaky_relu(self.dgm2(y, degradation), _SLOPE)
        return self.conv2(y) + x


class DegradationGuidedGroup(nn.Module):
    """DGG: blocks and a convolution; residual."""

    def __init__(self, features: int, blocks: int) -> None:
        super().__init__()
        self.body = nn.ModuleList([DegradationGuidedBlock(features) for _ in range(blocks)])
        self.body.append(nn.Conv2d(features, features, 3, padding=1))

    def forward(self, x: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        *blocks, last = self.body
        y = x
        for block in blocks:
            y = block(y, degradation)
        return last(y) + x


class DegradationGuidedRestorer(nn.Module):
    """DGRN: the restorer `R`. There is no residual connection with the picture itself."""

    def __init__(self, groups: int, blocks: int, features: int, uncertainty: bool) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, features, 3, padding=1))
        self.body = nn.ModuleList([DegradationGuidedGroup(features, blocks) for _ in range(groups)])
        self.body.append(nn.Conv2d(features, features, 3, padding=1))
        self.tail = nn.Sequential(nn.Conv2d(features, 3, 3, padding=1))
        self.var_conv = UncertaintyHead(features) if uncertainty else None

    def features(self, x: torch.Tensor, degradation: torch.Tensor) -> torch.Tensor:
        """What tail and uncertainty head read, [B, features, H, W]."""
        shallow = y = self.head(x)
        *groups, last = self.body
        for group in groups:
            y = group(y, degradation)
        return last(y) + shallow


class ResidualBlock(nn.Module):
    """Encoder block with batch normalisation, [B, in, H, W] -> [B, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.backbone(x) + self.shortcut(x), _SLOPE)


class DegradationEncoder(nn.Module):
    """The encoder of the contrastive training. Restoration uses `E_pre` alone; `contrastive` adds the rest."""

    def __init__(self, features: int, contrastive: bool) -> None:
        super().__init__()
        self.E_pre = ResidualBlock(3, features, 1)
        if contrastive:
            self.E = nn.Sequential(ResidualBlock(features, 128, 2), ResidualBlock(128, _EMBEDDING, 2))
            self.mlp = nn.Sequential(
                nn.Linear(_EMBEDDING, _EMBEDDING),
                nn.LeakyReLU(_SLOPE, inplace=True),
                nn.Linear(_EMBEDDING, _EMBEDDING),
            )

    def embed(self, degradation: torch.Tensor) -> torch.Tensor:
        """The contrastive embedding [B, 256] of a degradation map [B, features, H, W] (only with `contrastive`)."""
        return self.mlp(self.E(degradation).mean(dim=(2, 3)))


class MomentumContrast(nn.Module):
    """The two encoders and the queue of MoCo, as checkpoints store them (`E.E`); only `encoder_q.E_pre` restores."""

    def __init__(self, features: int, queue: int | None) -> None:
        super().__init__()
        if queue is not None:
            self.register_buffer("queue", F.normalize(torch.randn(_EMBEDDING, queue), dim=0))
            self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.encoder_q = DegradationEncoder(features, queue is not None)
        if queue is not None:
            self.encoder_k = DegradationEncoder(features, True)


class _Encoder(nn.Module):
    """One level of the released keys."""

    def __init__(self, features: int, queue: int | None) -> None:
        super().__init__()
        self.E = MomentumContrast(features, queue)


class AirNet(nn.Module):
    """AirNet. [B, 3, H, W] in 0..1 -> restored [B, 3, H, W], any size.

    n_groups, n_blocks, n_feats: size of the restorer. if_uncertainty: with TUR's head. batch_size: of the contrastive
    training, gives the length of its queue (256 * batch_size). contrastive: False leaves out everything that only
    the contrastive training needs.
    """

    def __init__(
        self,
        n_groups: int = 5,
        n_blocks: int = 5,
        n_feats: int = 64,
        if_uncertainty: bool = True,
        batch_size: int = 32,
        contrastive: bool = True,
    ) -> None:
        super().__init__()
        if min(n_groups, n_blocks, n_feats, batch_size) < 1:
            raise ConfigError("AirNet: n_groups, n_blocks, n_feats and batch_size must be at least 1")
        self.R = DegradationGuidedRestorer(n_groups, n_blocks, n_feats, if_uncertainty)
        self.E = _Encoder(n_feats, _EMBEDDING * batch_size if contrastive else None)

    def degradation(self, x: torch.Tensor) -> torch.Tensor:
        """What the encoder sees in a picture [B, 3, H, W]: a map [B, n_feats, H, W]."""
        return self.E.E.encoder_q.E_pre(x)

    def forward_with_uncertainty(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The restored picture and its uncertainty, both [B, 3, H, W]; ConfigError without an uncertainty head."""
        if self.R.var_conv is None:
            raise ConfigError("AirNet: this network has no uncertainty head (R.var_conv.*)")
        features = self.R.features(x, self.degradation(x))
        return self.R.tail(features), self.R.var_conv(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.R.tail(self.R.features(x, self.degradation(x)))


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "TUR 3 tasks": {"n_groups": 5, "n_blocks": 5, "n_feats": 64, "if_uncertainty": True, "batch_size": 32},
    "original": {"n_groups": 5, "n_blocks": 5, "n_feats": 64, "if_uncertainty": False},
}

_SIGNATURE = ("R.head.0.weight", "E.E.encoder_q.E_pre.backbone.0.weight")
# Without effect on the network: gradient columns that the training case asks for.
_IGNORED = {"grads", "fix_E"}


def _build(config: Mapping[str, Any]) -> AirNet:
    return construct(AirNet, "AirNet", config, without=_IGNORED)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    n_feats, channels = state["R.head.0.weight"].shape[:2]
    # The last entry of either list is a convolution, not a group or block.
    n_groups, n_blocks = count_indices(state, "R.body.") - 1, count_indices(state, "R.body.0.body.") - 1
    if channels != 3 or not (1 <= n_groups <= 64 and 1 <= n_blocks <= 64 and 1 <= n_feats <= 1024):
        raise CheckpointError(
            f"AirNet: {n_groups} groups of {n_blocks} blocks, {n_feats} features of {channels} channels: not an AirNet"
        )
    config = {
        "n_groups": n_groups,
        "n_blocks": n_blocks,
        "n_feats": n_feats,
        "if_uncertainty": "R.var_conv.0.weight" in state,
        "contrastive": "E.E.queue" in state,
    }
    if config["contrastive"]:
        queue = state["E.E.queue"].shape[-1]
        if queue % _EMBEDDING or not 0 < queue <= _EMBEDDING * 4096:
            raise CheckpointError(f"AirNet: E.E.queue has {queue} columns, expected a multiple of {_EMBEDDING}")
        config["batch_size"] = queue // _EMBEDDING
    return config


ARCHITECTURES = [
    Architecture(
        id="airnet",
        system="tur",
        title="AirNet",
        paper="Li et al., All-In-One Image Restoration for Unknown Corruption, CVPR 2022; retrained by Wu et al., "
        "Debiased All-in-one Image Restoration with Task Uncertainty Regularization (TUR), AAAI 2025",
        licence="TUR: none stated for code and weights; AirNet's own repository was not examined",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "n_groups" in config,
        tasks=("denoise", "derain", "dehaze"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        # The contrastive training's part: files without it, or with an incomplete one, restore just as well.
        computed_buffers=(r"^E\.E\.(queue|encoder_k\.|encoder_q\.(E|mlp)\.)", r"\.num_batches_tracked$"),
        bytes_per_pixel=lambda config: 3700.0,
        restore_with_uncertainty=lambda module, image: module.forward_with_uncertainty(image),
        global_statistics="nothing global, but deformable convolutions may read from anywhere: an overlap of 64 pixels "
        "or more between tiles reproduces the whole picture closely",
    )
]
