"""The pixel-space U-Net of OpenAI's diffusion and consistency models: the prior behind RDMD and CM4IR.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, arXiv 2105.05233 (ADM); Song et al.,
"Consistency Models", ICML 2023, arXiv 2303.01469 (CM, whose attention orders its channels differently). State-dict
keys are the released checkpoints'.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.state_dict import count_indices
from .registry import Architecture, State, construct


class GroupNorm32(nn.GroupNorm):
    """Group norm with 32 groups, computed in float32 whatever the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding of t [B] (any real numbers) as [B, dim]: cosines first, then sines."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))


class ResBlock(nn.Module):
    """Residual block with time embedding; resamples between the first activation and the first convolution."""

    def __init__(
        self, channels: int, embedding: int, out_channels: int, dropout: float, scale_shift: bool, resample: str = ""
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels * (2 if scale_shift else 1)))
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.out_layers = nn.Sequential(GroupNorm32(out_channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        h = self.in_layers[2](_resample(h, self.resample))
        shift = self.emb_layers(embedding).to(h.dtype)[..., None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + shift)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(_resample(x, self.resample)) + h


def _resample(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else x


class Downsample(nn.Module):
    """3x3 convolution with stride 2, for networks whose residual blocks do not resample."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour times 2 and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(_resample(x, "up"))


class AttentionBlock(nn.Module):
    """Self-attention over pixels, residual. [B, C, H, W] -> same.

    convolution: 1 or 2, the dimensions of the released 1x1 weights (ADM 1, CM 2). heads_outermost: the order of qkv's
    channels is [head][q, k, v][dim] (ADM's default) instead of [q, k, v][head][dim].
    """

    def __init__(self, channels: int, heads: int, convolution: int, heads_outermost: bool) -> None:
        super().__init__()
        if channels % heads:
            raise ConfigError(f"attention: {channels} channels cannot be split into {heads} heads")
        make = nn.Conv1d if convolution == 1 else nn.Conv2d
        self.heads, self.flat, self.heads_outermost = heads, convolution == 1, heads_outermost
        self.norm = GroupNorm32(channels)
        self.qkv = make(channels, channels * 3, 1)
        self.proj_out = make(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        h = self.norm(x)
        qkv = self.qkv(h.flatten(2) if self.flat else h).flatten(2)
        outer = ("heads", "three") if self.heads_outermost else ("three", "heads")
        sizes = {"heads": self.heads, "three": 3}
        qkv = qkv.unflatten(1, (sizes[outer[0]], sizes[outer[1]], -1))
        query, key, value = (t.transpose(-2, -1) for t in qkv.unbind(dim=outer.index("three") + 1))
        h = F.scaled_dot_product_attention(query, key, value).transpose(-2, -1).flatten(1, 2)
        h = self.proj_out(h if self.flat else h.unflatten(-1, shape[2:]))
        return x + h.reshape(shape)


class Stage(nn.Sequential):
    """Layers of one resolution step; residual blocks among them also get the embedding."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class GuidedDiffusionUNet(nn.Module):
    """x [B, in, H, W] (about -1..1), t [B] -> [B, out, H, W]; sides are multiples of 2^(levels - 1).

    `attention_resolutions` are down-sampling rates; `heads_outermost` and `convolution` as in AttentionBlock. A class y
    [B] is needed if and only if the network has classes.
    """

    def __init__(
        self,
        *,
        model_channels: int,
        num_res_blocks: int,
        channel_mult: Sequence[float],
        attention_resolutions: Sequence[int],
        in_channels: int = 3,
        out_channels: int = 3,
        num_classes: int | None = None,
        dropout: float = 0.0,
        num_heads: int = 4,
        num_heads_upsample: int = -1,
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        convolution: int = 1,
        heads_outermost: bool = True,
    ) -> None:
        super().__init__()
        self.model_channels, self.num_classes, self.in_channels = model_channels, num_classes, in_channels
        self.levels = len(channel_mult)
        width = [int(mult * model_channels) for mult in channel_mult]
        if any(w % 32 or w < 32 for w in width):
            raise ConfigError(f"widths {width} must be multiples of 32, the groups of the normalisation")
        embedding = model_channels * 4

        def block(channels: int, out: int, resample: str = "") -> ResBlock:
            return ResBlock(channels, embedding, out, dropout, use_scale_shift_norm, resample)

        def attention(channels: int, number: int = num_heads) -> AttentionBlock:
            heads = number if num_head_channels == -1 else channels // num_head_channels
            return AttentionBlock(channels, max(1, heads), convolution, heads_outermost)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embedding)

        channels = width[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, out in enumerate(width):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(channels, out)]
                channels = out
                if 2**level in attention_resolutions:
                    layers.append(attention(channels))
                self.input_blocks.append(Stage(*layers))
                skips.append(channels)
            if level < self.levels - 1:
                down = block(channels, channels, "down") if resblock_updown else Downsample(channels)
                self.input_blocks.append(Stage(down))
                skips.append(channels)
        self.middle_block = Stage(block(channels, channels), attention(channels), block(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(width))):
            for index in range(num_res_blocks + 1):
                layers = [block(channels + skips.pop(), out)]
                channels = out
                if 2**level in attention_resolutions:
                    layers.append(attention(channels, num_heads if num_heads_upsample == -1 else num_heads_upsample))
                if level and index == num_res_blocks:
                    layers.append(block(channels, channels, "up") if resblock_updown else Upsample(channels))
                self.output_blocks.append(Stage(*layers))
        last = nn.Conv2d(channels, out_channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), last)

    def half_torso(self) -> GuidedDiffusionUNet:
        """Casts the convolutions of the torso to float16, as the published evaluation does; the rest stays float32."""
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for layer in part.modules():
                if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                    layer.half()
        return self

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if (y is None) != (self.num_classes is None):
            raise InputError(
                "class: this network needs a class index per picture"
                if y is None
                else "class: this network knows no classes"
            )
        embedding = self.time_embed(timestep_embedding(t, self.model_channels).to(self.time_embed[0].weight.dtype))
        if y is not None:
            embedding = embedding + self.label_emb(y)
        h, skips = x.to(self.input_blocks[0][0].weight.dtype), []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h.to(x.dtype))


_ADM = {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 64, "num_classes": None}
_WIDE = {"model_channels": 256, "num_res_blocks": 2, "channel_mult": (1, 1, 2, 2, 4, 4)}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "ImageNet 256 unconditional (ADM)": {
        "unet": {**_ADM, **_WIDE, "attention_resolutions": (8, 16, 32), "out_channels": 6}
    },
    "FFHQ 256 (ADM)": {
        "unet": {
            **_ADM,
            **_WIDE,
            "model_channels": 128,
            "num_res_blocks": 1,
            "attention_resolutions": (16,),
            "out_channels": 6,
        }
    },
    "LSUN 256 (CM)": {
        "unet": {**_ADM, **_WIDE, "attention_resolutions": (8, 16, 32), "use_scale_shift_norm": False},
        "wrapper": "karras",
    },
    "ImageNet 64 (CM)": {
        "unet": {
            **_ADM,
            "model_channels": 192,
            "num_res_blocks": 3,
            "channel_mult": (1, 2, 3, 4),
            "attention_resolutions": (2, 4, 8),
            "num_classes": 1000,
        },
        "wrapper": "karras",
    },
}

_SIGNATURE = ("input_blocks.0.0.weight", "time_embed.0.weight", "middle_block.1.qkv.weight", "out.2.weight")
# Training or evaluation switches of the published constructors that do not change the network.
_IGNORED = {"image_size", "use_checkpoint", "use_fp16", "use_new_attention_order", "wrapper"}


def _build(config: Mapping[str, Any]) -> GuidedDiffusionUNet:
    settings = dict(config)
    if "unet" in config:  # beside it stand the sampler's settings, and a user's for the network, which come first
        known = {*inspect.signature(GuidedDiffusionUNet).parameters, *_IGNORED}
        settings = {**config["unet"], **{key: value for key, value in config.items() if key in known}}
    consistency = config.get("wrapper") == "karras"
    heads_outermost = not consistency and not settings.get("use_new_attention_order", False)

    def network(**settings: Any) -> GuidedDiffusionUNet:
        return GuidedDiffusionUNet(**settings, convolution=2 if consistency else 1, heads_outermost=heads_outermost)

    return construct(network, "guided-diffusion U-Net", settings, without=_IGNORED)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    model_channels = state["time_embed.0.weight"].shape[1]
    outputs = count_indices(state, "output_blocks.")
    ups = sum(
        any(f"output_blocks.{k}.{i}.{part}" in state for i in (1, 2) for part in ("in_layers.0.weight", "conv.weight"))
        for k in range(outputs)
    )
    levels = ups + 1
    blocks = outputs // levels - 1
    if outputs != levels * (blocks + 1) or blocks < 1:
        raise CheckpointError(f"guided-diffusion U-Net: {outputs} output blocks do not make {levels} levels")
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    widths = [state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
    mults = tuple(w // model_channels if w % model_channels == 0 else w / model_channels for w in widths)
    attention = tuple(2**level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state)
    embedding = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    unet = {
        "model_channels": model_channels,
        "num_res_blocks": blocks,
        "channel_mult": mults,
        "attention_resolutions": attention,
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "num_classes": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        "use_scale_shift_norm": embedding == 2 * state["input_blocks.1.0.in_layers.2.weight"].shape[0],
        "resblock_updown": not any(key.endswith((".op.weight", ".conv.weight")) for key in state),
        "num_head_channels": 64 if state["middle_block.1.qkv.weight"].shape[1] % 64 == 0 else -1,
    }
    consistency = state["middle_block.1.qkv.weight"].ndim == 4
    return {"unet": unet, "wrapper": "karras"} if consistency else {"unet": unet}


def _detect(state: State) -> bool:
    latent = any("transformer_blocks" in key for key in state) or "middle_block.1.proj_in.weight" in state
    return not latent and all(key in state for key in _SIGNATURE)


ARCHITECTURES = [
    Architecture(
        id="guided-diffusion-unet",
        system="guided-diffusion-unet",
        title="Guided-diffusion U-Net",
        paper="Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, NeurIPS 2021, arXiv 2105.05233; "
        "Song et al., Consistency Models, ICML 2023, arXiv 2303.01469",
        licence="code MIT (OpenAI); weights: see each file's page",
        detect=_detect,
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        kind="prior",
        tasks=("prior",),
        variants=VARIANTS,
        signature=_SIGNATURE,
        metadata_keys=("unet",),
        multiple_of=lambda config: 2 ** (len(config["unet"]["channel_mult"]) - 1),
        global_statistics="self-attention sees the whole picture",
        bytes_per_pixel=lambda config: 60.0 * config["unet"]["model_channels"],
    )
]
