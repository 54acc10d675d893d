"""OSDFace's visual representation embedder: a face becomes 77 tokens that stand where a text prompt would.

Wang et al., "OSDFace: One-Step Diffusion Model for Face Restoration", CVPR 2025, arXiv 2411.17163. The encoder of a
vector-quantised autoencoder (van den Oord et al. 2017, in the form of Esser et al. 2021), its dictionary, and two
1x1 convolutions. State-dict keys are the released files', with `vre.` and `embedding_change.` in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.state_dict import count_indices
from .registry import Architecture, State


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip. [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        h = self.conv1(F.silu(self.norm1(x)))
        return skip + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """Self-attention over pixels, residual. [B, C, H, W] -> same."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ConfigError(f"attention: {channels} channels cannot be split into {heads} heads")
        self.heads = heads
        self.norm1 = _norm(channels)
        self.norm2 = _norm(channels)  # for a second feature map, which the embedder never has; it is in the files
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        parts = [rearrange(f(h), "b (n c) h w -> b n (h w) c", n=self.heads) for f in (self.q, self.k, self.v)]
        mixed = F.scaled_dot_product_attention(*parts)
        return x + self.proj_out(rearrange(mixed, "b n (h w) c -> b (n c) h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """3x3 convolution with stride 2, padded at the right and bottom only: n pixels become floor(n / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one resolution, each with its attention where the level has one, then the step down."""

    def __init__(self, channels: int, out: int, blocks: int, heads: int | None, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(out if i else channels, out) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(out, heads) for _ in range(blocks if heads else 0))
        if not last:
            self.downsample = Downsample(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = PixelAttention(channels, heads)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[B, in, H, W] -> [B, z, H / 2^(levels - 1), W / 2^(levels - 1)], sizes rounded down at every step."""

    def __init__(
        self,
        in_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        z: int,
        heads: int,
    ) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i - 1] if i else ch, width, blocks, heads if attention[i] else None, i == last)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], heads)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


@dataclass(frozen=True)
class Selection:
    """The dictionary entries chosen for a batch, best match first.

    tokens [B, n, D], zero where a picture has fewer than n different codes; codes [B, n], -1 there; distinct [B]: how
    many different codes the picture's positions hit. Few mean that the picture is unlike the faces of the training.
    """

    tokens: torch.Tensor
    codes: torch.Tensor
    distinct: torch.Tensor


class Dictionary(nn.Module):
    """The learned codes, and how a picture's features choose among them."""

    def __init__(self, entries: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, dim)

    def nearest(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared distance to the nearest code and its index, both [B, positions], for features [B, D, H, W]."""
        f, e = rearrange(features.float(), "b d h w -> b (h w) d"), self.embedding.weight.float()
        distances = f.square().sum(-1, keepdim=True) + e.square().sum(-1) - 2 * f @ e.T
        return distances.min(dim=-1)

    def select(self, features: torch.Tensor, count: int) -> Selection:
        """The `count` different codes nearest to any position, each once, nearest first."""
        distance, code = self.nearest(features)
        entries = len(self.embedding.weight)
        nothing = distance.new_full((len(distance), max(entries, count)), torch.inf)
        best, codes = nothing.scatter_reduce(1, code, distance, "amin").sort(dim=1, stable=True)
        hit = best.isfinite()
        chosen, present = codes[:, :count], hit[:, :count]
        tokens = self.embedding(chosen.clamp(max=entries - 1)) * present[..., None]
        return Selection(tokens, chosen.where(present, -1), hit.sum(dim=1))

    def select_concatenated(self, features: torch.Tensor, count: int) -> torch.Tensor:
        """[B, count, 2 D]: the 2 count nearest positions' codes, with repeats, the second half beside the first."""
        distance, code = self.nearest(features)
        if distance.shape[1] < 2 * count:
            raise InputError(f"image: {distance.shape[1]} positions are too few for {2 * count} tokens; make it larger")
        order = distance.argsort(dim=1, stable=True)[:, : 2 * count]
        first, second = self.embedding(code.gather(1, order)).chunk(2, dim=1)
        return torch.cat([first, second], dim=-1)


class VisualEmbedder(nn.Module):
    """The part that a picture passes: encoder, 1x1 convolution, dictionary."""

    def __init__(
        self,
        *,
        n_embed: int,
        embed_dim: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 512,
        in_channels: int = 3,
        head_size: int = 1,
    ) -> None:
        super().__init__()
        attention = [resolution >> level in attn_resolutions for level in range(len(ch_mult))]
        self.encoder = Encoder(in_channels, ch, ch_mult, num_res_blocks, attention, z_channels, head_size)
        self.quantize = Dictionary(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(x))


class PromptProjection(nn.Module):
    """Tokens [B, N, D] to the prompt [B, N, context]. The second activation is published: values are >= -0.2785."""

    def __init__(self, dim: int, context: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(dim, dim // 2, 1)
        self.conv2 = nn.Conv1d(dim // 2, context, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.conv1(tokens.transpose(1, 2)))
        return F.silu(self.conv2(hidden)).transpose(1, 2)


class FacePrompter(nn.Module):
    """From a degraded face to the prompt of the restoring diffusion model.

    `embedding_change` is None if the weights came without it (the authors publish two files): see `with_projection`.
    """

    def __init__(
        self, *, n_min: int = 77, embedding_change: Sequence[int] | None = None, resolution: int = 512, **vre: Any
    ) -> None:
        super().__init__()
        self.tokens, self.resolution = n_min, resolution
        self.vre = VisualEmbedder(resolution=resolution, **vre)
        self.embedding_change = PromptProjection(*embedding_change) if embedding_change else None

    def with_projection(self, projection: PromptProjection) -> FacePrompter:
        """Takes the projection from the authors' second file. Raises CheckpointError if it does not fit."""
        wanted = self.vre.quantize.embedding.embedding_dim
        if projection.conv1.in_channels != wanted:
            raise CheckpointError(
                f"the projection takes tokens of {projection.conv1.in_channels} numbers, the dictionary has {wanted}: "
                "the two files do not belong together"
            )
        self.embedding_change = projection
        return self

    def prepared(self, image: torch.Tensor) -> torch.Tensor:
        """What the encoder sees of [B, 3, H, W] in 0..1: resized to the square it was trained on, in -3..1.

        The published inference normalises a picture that is already in -1..1 once more; the released weights were
        made with it.
        """
        square = (self.resolution, self.resolution)
        if image.shape[-2:] != square:
            image = F.interpolate(image, square, mode="bilinear", align_corners=False)
        return image * 4 - 3

    def select(self, image: torch.Tensor) -> Selection:
        """The dictionary entries for pictures [B, 3, H, W] in 0..1, each picture by itself."""
        return self.vre.quantize.select(self.vre(self.prepared(image)), self.tokens)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in 0..1 -> prompt [B, tokens, context]. Raises ConfigError without a projection."""
        return self.project(self.select(image).tokens)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, D] -> prompt [B, N, context]."""
        if self.embedding_change is None:
            raise ConfigError(
                "this file holds the face dictionary without its projection to prompts: load "
                "embedding_change_weights.pth as well"
            )
        return self.embedding_change(tokens)


_OFFICIAL = {
    "n_embed": 1024,
    "embed_dim": 512,
    "ch": 64,
    "ch_mult": (1, 2, 2, 2, 4, 8),
    "num_res_blocks": 2,
    "attn_resolutions": (16,),
    "resolution": 512,
    "in_channels": 3,
    "z_channels": 512,
    "head_size": 1,
    "n_min": 77,
}
_SETTINGS = {*_OFFICIAL, "embedding_change"}
_SIGNATURE = ("vre.quantize.embedding.weight", "vre.quant_conv.weight", "vre.encoder.mid.attn_1.norm2.weight")
_PROJECTION = {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
_PARTS = ("encoder.", "quantize.embedding.", "quant_conv.")


def _build(config: Mapping[str, Any]) -> FacePrompter:
    settings = {k: v for k, v in config.get("vre", config).items() if k in _SETTINGS}
    if config.get("double_z") or not config.get("enable_mid", True):
        raise ConfigError("OSDFace's embedder has single latents and a middle block")
    try:
        return FacePrompter(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"OSDFace's embedder: {error}") from None


def _released_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tokenizer for degraded faces out of associate_2.ckpt, which holds two autoencoders and their critics.

    A projection beside it stays.
    """
    prefix = "vqvae_LQ."
    projection = {key: value for key, value in state.items() if key.startswith("embedding_change.")}
    if f"{prefix}quantize.embedding.weight" in state:
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    elif any(key.startswith("decoder.") for key in state):
        return state  # a vector-quantised autoencoder of another method
    if "quantize.embedding.weight" in state:
        return {f"vre.{key}": value for key, value in state.items() if key.startswith(_PARTS)} | projection
    return state


def _projection_config(state: State, prefix: str = "") -> tuple[int, int]:
    hidden, dim = state[f"{prefix}conv1.weight"].shape[:2]
    context, hidden_in = state[f"{prefix}conv2.weight"].shape[:2]
    if hidden != dim // 2 or hidden_in != hidden:
        raise CheckpointError(f"prompt projection {dim} -> {hidden} -> {context}: the middle must be half of the first")
    return dim, context


def _config_from_state_dict(state: State) -> dict[str, Any]:
    entries, dim = state["vre.quantize.embedding.weight"].shape
    ch, in_channels = state["vre.encoder.conv_in.weight"].shape[:2]
    levels = count_indices(state, "vre.encoder.down.")
    widths = [state[f"vre.encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attended = [i for i in range(levels) if f"vre.encoder.down.{i}.attn.0.q.weight" in state]
    # Attention sits where the nominal picture is 16 pixels wide; that picture's size is otherwise not visible.
    resolution = 16 << attended[-1] if attended else 512
    config = {
        "n_embed": entries,
        "embed_dim": dim,
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count_indices(state, "vre.encoder.down.0.block."),
        "attn_resolutions": tuple(resolution >> i for i in attended),
        "resolution": resolution,
        "in_channels": in_channels,
        "z_channels": state["vre.quant_conv.weight"].shape[1],
        "head_size": 1,
        "n_min": 77,
    }
    sizes_make_sense = 1 <= levels <= 8 and 1 <= entries <= 1 << 18 and 1 <= dim <= 1 << 14 and 32 <= ch <= 1024
    if not sizes_make_sense or any(width % ch for width in widths):
        raise CheckpointError(f"OSDFace's embedder: absurd sizes: {config}, widths {widths}")
    if "embedding_change.conv1.weight" in state:
        config["embedding_change"] = _projection_config(state, "embedding_change.")
    return config


def _build_projection(config: Mapping[str, Any]) -> PromptProjection:
    return PromptProjection(config["dim"], config["context"])


_PAPER = "Wang et al., OSDFace: One-Step Diffusion Model for Face Restoration, CVPR 2025, arXiv 2411.17163"
_LICENCE = "none stated for code and weights; used with SD 2.1-base (CreativeML Open RAIL++-M)"

ARCHITECTURES = [
    Architecture(
        id="osdface-prompter",
        system="osdface",
        title="OSDFace visual representation embedder",
        paper=_PAPER,
        licence=_LICENCE,
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "n_embed" in config.get("vre", config),
        kind="embedder",
        tasks=("face restoration",),
        variants={"OSDFace": {**_OFFICIAL, "embedding_change": (512, 1024)}},
        signature=_SIGNATURE,
        prepare_state_dict=_released_names,
        metadata_keys=("head_size", "n_min", "resolution", "attn_resolutions"),
        global_statistics="the whole face becomes one set of tokens",
    ),
    Architecture(
        id="osdface-projection",
        system="osdface",
        title="OSDFace prompt projection",
        paper=_PAPER,
        licence=_LICENCE,
        detect=lambda state: (
            set(state) == _PROJECTION and state["conv1.weight"].shape[-1:] == (1,) and state["conv1.weight"].ndim == 3
        ),
        config_from_state_dict=lambda state: dict(zip(("dim", "context"), _projection_config(state), strict=True)),
        build=_build_projection,
        matches_config=lambda config: "context" in config and "dim" in config,
        kind="embedder",
        tasks=("face restoration",),
        variants={"OSDFace": {"dim": 512, "context": 1024}},
        signature=("conv1.weight", "conv2.weight"),
        global_statistics="works on tokens",
    ),
]
