"""MPMF-Net: one network against fog, rain, snow and night, by learned prompts along several axes.

Yuanbo Wen's group (Chang'an University), "Multi-axis Prompt and Multi-dimension Fusion Network for All-in-one
Weather-degraded Image Restoration", AAAI 2025. A quarter-size branch guesses a coarse clean image; the main U-net sees
the input beside it. State-dict keys are the released checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.padding import crop
from .layers.state_dict import count_indices, expansion_factor, layer_widths
from .mpmf_fusion import MultiDimensionFusion, RescaleNorm
from .registry import Architecture, State, construct


@lru_cache(maxsize=8)
def _window_offsets(window: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-scaled offsets [(2w-1)^2, 2] between pixels of a window, and which one each pair [w^2 * w^2] has."""
    with torch.inference_mode(False):  # what is cached must serve training as well
        axis = torch.arange(1 - window, window, device=device)
        offsets = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
        pixels = torch.stack(torch.meshgrid(*[torch.arange(window, device=device)] * 2, indexing="ij")).flatten(1)
        row, column = pixels[:, :, None] - pixels[:, None, :] + window - 1
        return offsets.sign() * (1.0 + offsets.abs()).log(), (row * (2 * window - 1) + column).flatten()


class WindowAttention(nn.Module):
    """Attention in windows [N, w^2, 3C] -> [N, w^2, C], with a bias learned as a function of the offset."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        offsets, pairs = _window_offsets(window, torch.empty(0).device)
        self.register_buffer("relative_positions", offsets[pairs].view(window**2, window**2, 2))
        self.meta = nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, heads))

    def bias(self) -> torch.Tensor:
        """[heads, w^2, w^2], computed once for every different offset."""
        like = self.meta[0].weight
        offsets, pairs = _window_offsets(self.window, like.device)
        return rearrange(self.meta(offsets.to(like))[pairs], "(q k) heads -> heads q k", q=self.window**2)

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        query, key, value = rearrange(qkv, "n p (three h d) -> three n h p d", three=3, h=self.heads)
        return rearrange(
            F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias()), "n h p d -> n p (h d)"
        )


class ConvolutionalAttention(nn.Module):
    """A depth-wise convolution of the values, plus attention in (shifted) windows if `heads` > 0. [B, C, H, W]."""

    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift, self.uses_attention = window, shift, heads > 0
        self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, padding_mode="reflect")
        self.V = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        if self.uses_attention:
            self.QK = nn.Conv2d(dim, dim * 2, 1)
            self.attn = WindowAttention(dim, heads, window)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.V(x)
        mixed = self.conv(value)
        if self.uses_attention:
            mixed = mixed + self._windows(torch.cat([self.QK(x), value], dim=1))
        return self.proj(mixed)

    def _windows(self, qkv: torch.Tensor) -> torch.Tensor:
        window, shift = self.window, self.shift
        height, width = qkv.shape[-2:]
        bottom, right = ((-size - shift) % window for size in (height, width))
        qkv = F.pad(qkv, (shift, right, shift, bottom), mode="reflect")
        rows = qkv.shape[-2] // window
        cut = rearrange(qkv, "b c (y p) (x q) -> (b y x) (p q) c", p=window, q=window)
        merged = rearrange(
            self.attn(cut), "(b y x) (p q) c -> b c (y p) (x q)", b=qkv.shape[0], y=rows, p=window, q=window
        )
        return merged[..., shift : shift + height, shift : shift + width]


class MLP(nn.Module):
    """Two 1x1 convolutions, under the released key `mlp`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class TransformerBlock(nn.Module):
    """[B, C, H, W] -> same. Without attention there is no norm either, and the MLP is never normalised."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, window: int, shift: int) -> None:
        super().__init__()
        self.norm1 = RescaleNorm(dim) if heads else None
        self.attn = ConvolutionalAttention(dim, heads, window, shift)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def initialise(self, gain: float) -> None:
        """As published: weights of the convolutions shrink with the depth of the network, but for queries and keys."""
        for name, module in (*self.attn.named_modules(), *self.mlp.named_modules()):
            if isinstance(module, nn.Conv2d):
                outputs, inputs, *kernel = module.weight.shape
                std = math.sqrt(2 / ((inputs + outputs) * math.prod(kernel)))
                nn.init.trunc_normal_(module.weight, std=std if name.endswith("QK") else gain * std)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm1 is None:
            x = x + self.attn(x)
        else:
            normalised, rescale, rebias = self.norm1(x)
            x = x + torch.addcmul(rebias, self.attn(normalised), rescale)
        return x + self.mlp(x)


def _first_attending(depth: int, attention_ratio: float) -> int:
    """The first of `depth` blocks that has attention."""
    return math.ceil(depth - attention_ratio * depth)


def _attention_ratio(depth: int, attending: int) -> float:
    """The ratio that gives attention to the last `attending` blocks."""
    exact = attending / max(depth, 1)
    if depth - _first_attending(depth, exact) == attending:
        return exact
    return expansion_factor([(depth, attending)])  # the product of the exact one rounds down


class Layer(nn.Module):
    """`depth` blocks, the last `attention_ratio` of them with attention, every second one shifted."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: float, attention_ratio: float, window: int) -> None:
        super().__init__()
        first = _first_attending(depth, attention_ratio)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(dim, heads if i >= first else 0, mlp_ratio, window, window // 2 * (i % 2))
                for i in range(depth)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class ImplicitMLP(nn.Module):
    """The coordinate network, under the released key `layers`.

    As published, every query lies exactly on a feature pixel: the encoded relative coordinates are zero and the cell
    is 2, whatever the picture. What remains is a 3x3 convolution (columns of `layers.0` for the coordinates are dead
    weights) and three 1x1 ones.
    """

    FREQUENCIES = 4

    def __init__(self, dim: int, hidden: int = 256) -> None:
        super().__init__()
        inputs = 9 * dim + 2 + 4 * self.FREQUENCIES + 2
        layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, 3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        first = self.layers[0]
        columns = 9 * features.shape[1]
        kernel = first.weight[:, :columns].unflatten(1, (features.shape[1], 3, 3))
        x = F.conv2d(features, kernel, first.bias + 2.0 * first.weight[:, -2:].sum(dim=1), padding=1)
        for linear in self.layers[2::2]:
            x = F.conv2d(x.relu(), linear.weight[..., None, None], linear.bias)
        return x


class ImplicitBranch(nn.Module):
    """The coordinate network under the released key `imnet`. [B, C, h, w] -> coarse clean image [B, 3, h, w]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.imnet = ImplicitMLP(dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.imnet(features)


class MultiAxisPrompt(nn.Module):
    """Learned maps over (H, W), (C, H) and (C, W), each weighting a third of the channels (MPLB). [B, C, H, W]."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        third = dim // 3
        self.hw = nn.Parameter(torch.ones(1, third, size, size))
        self.ch = nn.Parameter(torch.ones(1, 1, third, size))
        self.cw = nn.Parameter(torch.ones(1, 1, third, size))
        self.conv_hw = nn.Conv2d(third, third, 3, padding=1, groups=third, bias=False)
        self.conv_ch = nn.Conv1d(third, third, 3, padding=1, groups=third, bias=False)
        self.conv_cw = nn.Conv1d(third, third, 3, padding=1, groups=third, bias=False)
        self.conv_4 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        plane, column, row = x.chunk(3, dim=1)
        hw = self.conv_hw(F.interpolate(self.hw, (height, width), mode="bilinear", align_corners=True))
        ch = self.conv_ch(F.interpolate(self.ch[0], height, mode="linear", align_corners=True))
        cw = self.conv_cw(F.interpolate(self.cw[0], width, mode="linear", align_corners=True))
        return self.conv_4(torch.cat([plane * hw, column * ch[..., None], row * cw[:, :, None]], dim=1)) + x


class PatchEmbed(nn.Module):
    """A convolution under the released key `proj`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        padding, mode = (kernel // 2, "reflect") if stride == 1 else (0, "zeros")
        self.proj = nn.Conv2d(inputs, outputs, kernel, stride, padding, padding_mode=mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class PatchUnembed(nn.Module):
    """A convolution and a pixel shuffle under the released key `proj`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, factor: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(inputs, outputs * factor**2, kernel, padding=kernel // 2, padding_mode="reflect")
        self.proj = nn.Sequential(convolution, nn.PixelShuffle(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


@dataclass(frozen=True)
class CoarseImage:
    """A coarse clean image [B, 3, H/4, W/4] of whole pictures, which follows their tiles."""

    image: torch.Tensor

    def __len__(self) -> int:
        return self.image.shape[0]

    def __getitem__(self, images: slice) -> CoarseImage:
        """Those of some pictures of the batch."""
        return CoarseImage(self.image[images])

    def to(self, *args: Any, **kwargs: Any) -> CoarseImage:
        """As Tensor.to."""
        return CoarseImage(self.image.to(*args, **kwargs))

    def at(self, top: int, left: int) -> CoarseImage:
        """What lies to the right of and below a pixel whose coordinates are multiples of 4."""
        return CoarseImage(self.image[..., top // 4 :, left // 4 :])

    def over(self, image: torch.Tensor) -> torch.Tensor:
        """The part over `image` [B, 3, H, W], which starts where this one does; its border repeated if too small."""
        height, width = image.shape[-2] // 4, image.shape[-1] // 4
        part = crop(self.image, (height, width))
        missing = (0, width - part.shape[-1], 0, height - part.shape[-2])
        return F.pad(part, missing, mode="replicate") if any(missing) else part


class MPMFNet(nn.Module):
    """The network. [B, 3, H, W] in 0..1, H and W multiples of 4, at least 28 -> (restored, coarse [B, 3, H/4, W/4]).

    Neither is clamped. `forward(x, coarse, blend)` takes a coarse clean image from elsewhere: `blend` of it and
    1 - `blend` of the network's own.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        out_chans: int = 3,
        window_size: int = 8,
        embed_dims: tuple[int, ...] = (24, 48, 96, 48, 24),
        mlp_ratios: tuple[float, ...] = (2.0, 4.0, 4.0, 2.0, 2.0),
        depths: tuple[int, ...] = (8, 16, 17, 9, 9, 8),
        num_heads: tuple[int, ...] = (2, 4, 6, 1, 1),
        attn_ratio: tuple[float, ...] = (0.25, 0.5, 0.75, 0, 0),
        conv_type: tuple[str, ...] = ("DWConv",) * 5,
    ) -> None:
        super().__init__()
        if [len(v) for v in (embed_dims, mlp_ratios, num_heads, attn_ratio, depths)] != [5, 5, 5, 5, 6]:
            raise ConfigError("MPMF-Net: five entries a list are needed, six in depths")
        if any(kind != "DWConv" for kind in conv_type):
            raise ConfigError(f"MPMF-Net: conv_type {conv_type} is not supported; only DWConv was released")
        if embed_dims[3:] != embed_dims[1::-1] or any(dim % 3 for dim in embed_dims):
            raise ConfigError(f"MPMF-Net: embed_dims {embed_dims} must be a mirror image and divisible by 3")
        if any(ratio and dim % heads for dim, heads, ratio in zip(embed_dims, num_heads, attn_ratio, strict=True)):
            raise ConfigError(f"MPMF-Net: embed_dims {embed_dims} cannot be split into heads {num_heads}")
        if min(depths[2:5]) < 1:
            raise ConfigError(f"MPMF-Net: depths {depths}: the third to fifth must be at least 1")

        def layer(stage: int, depth: int, widen: int = 1) -> Layer:
            return Layer(
                embed_dims[stage] * widen, depth, num_heads[stage], mlp_ratios[stage], attn_ratio[stage], window_size
            )

        first, second, third, fourth, fifth = embed_dims
        self.patch_embed_inr = PatchEmbed(in_chans, first, 3)
        self.layer_inr = layer(0, depths[0])
        self.inr = ImplicitBranch(first)
        self.patch_embed = PatchEmbed(in_chans + 3, first, 3)
        self.layer1 = layer(0, depths[0])
        self.patch_merge1 = PatchEmbed(first, second, 2, stride=2)
        self.skip1 = nn.Conv2d(first, first, 1)
        self.layer2 = layer(1, depths[1])
        self.patch_merge2 = PatchEmbed(second, third, 2, stride=2)
        self.skip2 = nn.Conv2d(second, second, 1)
        self.layer3 = layer(2, depths[2] - 1)
        self.layer3_prompts = MultiAxisPrompt(third, 16)
        self.layer3_mixer = layer(2, 1, widen=2)
        self.layer3_reduce_channel = nn.Conv2d(third * 2, third, 1)
        self.patch_split1 = PatchUnembed(third, fourth, 1, 2)
        self.fusion1 = MultiDimensionFusion(fourth)
        self.layer4 = layer(3, depths[3] - 1)
        self.layer4_prompts = MultiAxisPrompt(fourth, 32)
        self.layer4_last = layer(3, 1, widen=2)
        self.layer4_reduce_channel = nn.Conv2d(fourth * 2, fourth, 1)
        self.patch_split2 = PatchUnembed(fourth, fifth, 1, 2)
        self.fusion2 = MultiDimensionFusion(fifth)
        self.layer5 = layer(4, depths[4] - 1)
        self.layer5_prompts = MultiAxisPrompt(fifth, 64)
        self.layer5_last = layer(4, 1, widen=2)
        self.layer5_reduce_channel = nn.Conv2d(fifth * 2, fifth, 1)
        self.refinement = layer(4, depths[5])
        self.patch_unembed = PatchUnembed(fifth, out_chans, 3, 1)
        gain = (8 * sum(depths)) ** -0.25
        for block in self.modules():
            if isinstance(block, TransformerBlock):
                block.initialise(gain)

    def coarse(self, x: torch.Tensor) -> torch.Tensor:
        """The coarse clean image [B, 3, H/4, W/4] of [B, 3, H, W]: what the main network is shown beside the input."""
        return self.inr(self.layer_inr(self.patch_embed_inr(x[:, :, ::4, ::4])))

    def forward(
        self, x: torch.Tensor, coarse: torch.Tensor | None = None, blend: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if coarse is None:
            coarse = self.coarse(x)
        elif blend < 1:
            coarse = torch.lerp(self.coarse(x), coarse.to(x), blend)
        if coarse.shape[-2:] != (x.shape[-2] // 4, x.shape[-1] // 4):
            raise InputError(f"coarse: {tuple(coarse.shape[-2:])} is not a quarter of {tuple(x.shape[-2:])}")
        coarse = coarse.to(x).expand(x.shape[0], -1, -1, -1)
        f = self.patch_embed(torch.cat([x, F.interpolate(coarse, scale_factor=4, mode="nearest")], dim=1))
        s1 = self.layer1(f)
        s2 = self.layer2(self.patch_merge1(s1))
        f = self.layer3(self.patch_merge2(s2))
        f = self.layer3_reduce_channel(self.layer3_mixer(torch.cat([f, self.layer3_prompts(f)], dim=1)))
        f = self.layer4(self.fusion1(self.patch_split1(f), self.skip2(s2)))
        f = self.layer4_reduce_channel(self.layer4_last(torch.cat([f, self.layer4_prompts(f)], dim=1)))
        f = self.layer5(self.fusion2(self.patch_split2(f), self.skip1(s1)))
        f = self.layer5_reduce_channel(self.layer5_last(torch.cat([f, self.layer5_prompts(f)], dim=1)))
        return self.patch_unembed(self.refinement(f)) + x, coarse


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "weather": {
        "in_chans": 3,
        "out_chans": 3,
        "window_size": 8,
        "embed_dims": (24, 48, 96, 48, 24),
        "mlp_ratios": (2.0, 4.0, 4.0, 2.0, 2.0),
        "depths": (8, 16, 17, 9, 9, 8),
        "num_heads": (2, 4, 6, 1, 1),
        "attn_ratio": (0.25, 0.5, 0.75, 0.0, 0.0),
        "conv_type": ("DWConv",) * 5,
    },
}

_SIGNATURE = ("inr.imnet.layers.0.weight", "layer3_prompts.hw", "fusion1.pconv_qkv_u.weight")
_STAGES = ("layer1", "layer2", "layer3", "layer4", "layer5")


def _build(config: Mapping[str, Any]) -> MPMFNet:
    return construct(MPMFNet, "MPMF-Net", config)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    dim, in_chans = state["patch_embed_inr.proj.weight"].shape[:2]
    merged = [state[f"patch_merge{i}.proj.weight"].shape[0] for i in (1, 2)]
    dims = (dim, *merged, merged[0], dim)
    if "layer1.blocks.0.attn.conv.weight" not in state:
        raise CheckpointError("MPMF-Net: convolutions of another type than DWConv, which was never released")
    if state[_SIGNATURE[0]].shape[1] != 9 * dim + 4 * ImplicitMLP.FREQUENCIES + 4:
        raise CheckpointError(f"MPMF-Net: {_SIGNATURE[0]} does not fit {dim} channels")
    depths = [count_indices(state, f"{name}.blocks.") for name in _STAGES]
    heads, ratios, window = [], [], 8
    for stage, depth in zip(_STAGES, depths, strict=True):
        attending = sum(f"{stage}.blocks.{i}.attn.QK.weight" in state for i in range(depth))
        ratios.append(_attention_ratio(depth, attending))
        last = f"{stage}.blocks.{depth - 1}.attn.attn"
        heads.append(state[f"{last}.meta.2.weight"].shape[0] if f"{last}.meta.2.weight" in state else 1)
        if f"{last}.relative_positions" in state:
            window = math.isqrt(state[f"{last}.relative_positions"].shape[0])
    return {
        "in_chans": in_chans,
        "out_chans": state["patch_unembed.proj.0.weight"].shape[0],
        "window_size": window,
        "embed_dims": dims,
        "mlp_ratios": tuple(expansion_factor(layer_widths(state, _first_mlps(stage))) for stage in _STAGES),
        "depths": (*depths[:2], *(n + 1 for n in depths[2:]), count_indices(state, "refinement.blocks.")),
        "num_heads": tuple(heads),
        "attn_ratio": tuple(ratios),
        "conv_type": ("DWConv",) * 5,
    }


def _first_mlps(stage: str) -> list[str]:
    """The names of the first feed-forward layers of a stage; its last block is twice as wide in some."""
    return [f"{run}.blocks.0.mlp.mlp.0" for run in (stage, f"{stage}_mixer", f"{stage}_last")]


def _restore(
    module: MPMFNet, image: torch.Tensor, coarse: CoarseImage | torch.Tensor | None = None, blend: float = 1.0
) -> torch.Tensor:
    if isinstance(coarse, CoarseImage):
        coarse = coarse.over(image)
    return module(image, coarse, blend)[0]


ARCHITECTURES = [
    Architecture(
        id="mpmf-net",
        system="mpmf-net",
        title="MPMF-Net",
        paper="Multi-axis Prompt and Multi-dimension Fusion Network for All-in-one Weather-degraded Image Restoration, "
        "AAAI 2025 (Yuanbo Wen's group, Chang'an University; the repository names no authors)",
        licence="none stated for code and weights",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        tasks=("dehaze", "derain", "desnow", "low-light"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        computed_buffers=(r"\.relative_positions$",),
        multiple_of=lambda config: 4,
        minimum_size=lambda config: 28,
        bytes_per_pixel=lambda config: 100.0 * config["embed_dims"][0],
        restore=_restore,
        global_statistics="norms, prompts and fusion attention span the whole picture, so tiles differ from it; restore "
        "whole where memory allows, or with a large overlap",
    )
]
