"""TransWeather: one network against rain, haze, snow and raindrops, driven by learned weather-type queries.

Valanarasu, Yasarla and Patel, "TransWeather: Transformer-based Restoration of Images Degraded by Adverse Weather
Conditions", CVPR 2022, arXiv 2111.14813; retrained with an uncertainty head by Wu et al. (TUR, AAAI 2025). A pyramid
transformer encoder with a second, finer patch branch; a decoder whose queries are 48 learned vectors; a convolutional
tail. State-dict keys are the released checkpoints'. Feature maps are [B, H, W, C] inside encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.state_dict import count_indices
from .layers.uncertainty import UncertaintyHead
from .registry import Architecture, State

_EPS_BLOCK = 1e-6
_EPS_EMBED = 1e-5  # of patch embeddings and of the reduced tokens
INPUT_RANGES = ("auto", "0..1", "-1..1", "measure")


class PatchEmbedding(nn.Module):
    """Overlapping patches: strided convolution and layer norm. [B, H, W, C] -> [B, H / s, W / s, D]."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=_EPS_EMBED)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(rearrange(self.proj(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c"))


class SpatialReductionAttention(nn.Module):
    """Attention to a `reduction` times coarser grid of keys and values (PVT). [B, H, W, C] -> same."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim * 2)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim, eps=_EPS_EMBED)
        else:
            self.sr = None

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, N, C / heads] from x [B, H, W, C]."""
        if self.sr is not None:
            x = self.norm(rearrange(self.sr(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c"))
        return tuple(rearrange(self.kv(x), "b h w (two heads d) -> two b heads (h w) d", two=2, heads=self.heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = rearrange(self.q(x), "b h w (heads d) -> b heads (h w) d", heads=self.heads)
        y = F.scaled_dot_product_attention(query, *self.keys_values(x))
        return self.proj(rearrange(y, "b heads (h w) d -> b h w (heads d)", w=x.shape[2]))


@lru_cache(maxsize=64)
def _query_of_token(queries: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Which query each token takes, int64 [tokens]: the published nearest-neighbour resize, rounding included."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
        index = torch.arange(queries, dtype=torch.float32, device="cpu")[None, None]
        return F.interpolate(index, size=tokens, mode="nearest").flatten().long().to(device)


class TaskQueryAttention(SpatialReductionAttention):
    """Attention whose queries are learned weather types, resized to the number of tokens. [B, H, W, C] -> same."""

    def __init__(self, dim: int, heads: int, reduction: int, queries: int) -> None:
        super().__init__(dim, heads, reduction)
        self.task_query = nn.Parameter(torch.randn(1, queries, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, _ = x.shape
        index = _query_of_token(self.task_query.shape[1], height * width, x.device)
        # Tokens that share a query get the same answer: attend once a query, then hand the answers out.
        query = rearrange(self.q(self.task_query), "1 n (heads d) -> heads n d", heads=self.heads)
        few_tokens = len(index) < query.shape[1]
        query = (query[:, index] if few_tokens else query).expand(batch, -1, -1, -1)
        y = self.proj(rearrange(F.scaled_dot_product_attention(query, *self.keys_values(x)), "b h n d -> b n (h d)"))
        return (y if few_tokens else y[:, index]).unflatten(1, (height, width))


class ConvolutionalFeedForward(nn.Module):
    """Linear, depth-wise 3x3, GELU, linear (SegFormer's Mix-FFN). [B, H, W, C] -> same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Sequential()  # one level of the released keys
        self.dwconv.add_module("dwconv", nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dwconv(rearrange(self.fc1(x), "b h w c -> b c h w"))
        return self.fc2(F.gelu(rearrange(x, "b c h w -> b h w c")))


class Block(nn.Module):
    """Transformer block, pre-norm. [B, H, W, C] -> same. queries: None for self-attention."""

    def __init__(self, dim: int, heads: int, ratio: int, reduction: int, queries: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS_BLOCK)
        if queries is None:
            self.attn = SpatialReductionAttention(dim, heads, reduction)
        else:
            self.attn = TaskQueryAttention(dim, heads, reduction, queries)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS_BLOCK)
        self.mlp = ConvolutionalFeedForward(dim, dim * ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _run(blocks: nn.ModuleList, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return norm(x)


class Encoder(nn.Module):
    """`Tenc`: four stages at 1/4 .. 1/32, the first three with a branch of smaller patches inside."""

    def __init__(
        self,
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        patch_heads: Sequence[int],
        mlp_ratio: int,
        depths: Sequence[int],
        sr_ratios: Sequence[int],
        patch_sr: Sequence[int],
        unused_embedding: bool,
    ) -> None:
        super().__init__()
        stages = range(1, 5)
        for i in stages:
            below = 3 if i == 1 else embed_dims[i - 2]
            kernel, stride = (7, 4) if i == 1 else (3, 2)
            self.add_module(f"patch_embed{i}", PatchEmbedding(below, embed_dims[i - 1], kernel, stride))
        for i in stages[:3]:
            self.add_module(f"mini_patch_embed{i}", PatchEmbedding(embed_dims[i - 1], embed_dims[i], 3, 2))
        if unused_embedding:  # in the original files, never called
            self.mini_patch_embed4 = PatchEmbedding(embed_dims[0], embed_dims[3], 3, 2)
        for i in stages:
            dim = embed_dims[i - 1]
            blocks = [Block(dim, num_heads[i - 1], mlp_ratio, sr_ratios[i - 1]) for _ in range(depths[i - 1])]
            self.add_module(f"block{i}", nn.ModuleList(blocks))
            self.add_module(f"norm{i}", nn.LayerNorm(dim, eps=_EPS_BLOCK))
            if i < 4:
                finer = Block(embed_dims[i], patch_heads[i - 1], mlp_ratio, patch_sr[i - 1])
                self.add_module(f"patch_block{i}", nn.ModuleList([finer]))
                self.add_module(f"pnorm{i}", nn.LayerNorm(embed_dims[i], eps=_EPS_BLOCK))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] -> four feature maps [B, h, w, C] at 1/4, 1/8, 1/16, 1/32."""
        features, x, branch = [], rearrange(x, "b c h w -> b h w c"), None
        for i in range(1, 5):
            x = getattr(self, f"patch_embed{i}")(x)
            if branch is not None:
                x = x + branch
            if i < 4:
                branch = getattr(self, f"mini_patch_embed{i}")(x)
            x = _run(getattr(self, f"block{i}"), getattr(self, f"norm{i}"), x)
            if i < 4:
                branch = _run(getattr(self, f"patch_block{i}"), getattr(self, f"pnorm{i}"), branch)
            features.append(x)
        return features


class Decoder(nn.Module):
    """`Tdec`: blocks with learned queries at 1/64. [B, h, w, C] -> [B, h / 2, w / 2, C]."""

    def __init__(
        self, below: int, dim: int, num_heads: int, mlp_ratio: int, depth: int, queries: int, sr_ratio: int
    ) -> None:
        super().__init__()
        self.patch_embed1 = PatchEmbedding(below, dim, 3, 2)
        self.block1 = nn.ModuleList([Block(dim, num_heads, mlp_ratio, sr_ratio, queries) for _ in range(depth)])
        self.norm1 = nn.LayerNorm(dim, eps=_EPS_BLOCK)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _run(self.block1, self.norm1, self.patch_embed1(x))


class _Conv(nn.Module):
    """A convolution under the key `conv2d`."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv2d = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2d(x)


def _upsampling(in_channels: int, out_channels: int) -> _Conv:
    return _Conv(nn.ConvTranspose2d(in_channels, out_channels, 4, 2, padding=1))


class ResidualBlock(nn.Module):
    """x + 0.1 conv(relu(conv x)). [B, C, H, W] -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _Conv(nn.Conv2d(channels, channels, 3, padding=1))
        self.conv2 = _Conv(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.conv2(F.relu(self.conv1(x)))


class ConvolutionalTail(nn.Module):
    """`convtail`: from the decoder's map back to full size, with the encoder's maps as skip connections."""

    def __init__(self, below: int, dims: Sequence[int], unused_output: bool) -> None:
        super().__init__()
        widths = [dims[3], dims[2], dims[1], dims[0], 16, 8]
        for name, source, target in zip(
            ("convd32x", "convd16x", "convd8x", "convd4x", "convd2x", "convd1x"), [below, *widths], widths, strict=False
        ):
            self.add_module(name, _upsampling(source, target))
            if name not in ("convd32x", "convd1x"):
                stage = {"convd16x": 4, "convd8x": 3, "convd4x": 2, "convd2x": 1}[name]
                self.add_module(f"dense_{stage}", nn.Sequential(ResidualBlock(target)))
        if unused_output:  # in the original files, never called
            self.conv_output = _Conv(nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, features: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Maps [B, h, w, C] of the encoder and of the decoder -> [B, 8, H, W]."""
        f1, f2, f3, f4 = (rearrange(f, "b h w c -> b c h w") for f in features)
        x = _cut(self.convd32x(rearrange(x, "b h w c -> b c h w")), f4) + f4
        x = self.dense_4(_cut(self.convd16x(x), f3)) + f3
        x = self.dense_3(self.convd8x(x)) + f2
        x = self.dense_2(self.convd4x(x)) + f1
        return self.convd1x(self.dense_1(self.convd2x(x)))


def _cut(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Drops the last row or column where doubling an odd size rounded up gave one too many."""
    return x[..., : like.shape[-2], : like.shape[-1]]


class TransWeather(nn.Module):
    """TransWeather. [B, 3, H, W] -> [B, 3, H, W] (a tanh); sides multiples of 16, at least 48.

    enc, dec: sizes, see VARIANTS. edition: "tur" or "original" (which carries two layers that it never calls).
    if_uncertainty: with TUR's head (default: in the TUR edition). input_range: what `restore` feeds it; "auto" is
    0..1 for files with an uncertainty head (as TUR's 5-task data loader) and -1..1 for others (as the original);
    "measure" decides per picture. `forward` takes the range that the network was trained on as it is.
    """

    def __init__(
        self,
        enc: Mapping[str, Any],
        dec: Mapping[str, Any],
        edition: str = "tur",
        if_uncertainty: bool | None = None,
        input_range: str = "auto",
    ) -> None:
        super().__init__()
        if edition not in ("tur", "original"):
            raise ConfigError(f"TransWeather: edition {edition!r} is unknown; one of tur, original")
        if input_range not in INPUT_RANGES:
            raise ConfigError(f"TransWeather: input_range {input_range!r} is unknown; one of {', '.join(INPUT_RANGES)}")
        if not all(len(enc[k]) == 4 for k in ("embed_dims", "num_heads", "depths", "sr_ratios")):
            raise ConfigError("TransWeather: enc needs four entries in embed_dims, num_heads, depths and sr_ratios")
        original = edition == "original"
        uncertainty = not original if if_uncertainty is None else if_uncertainty
        self.input_range = ("0..1" if uncertainty else "-1..1") if input_range == "auto" else input_range
        dims = enc["embed_dims"]
        self.Tenc = Encoder(**enc, unused_embedding=original)
        self.Tdec = Decoder(dims[-1], **dec)
        self.convtail = ConvolutionalTail(dec["dim"], dims, unused_output=original)
        self.clean = _Conv(nn.Conv2d(8, 3, 3, padding=1))
        self.var_conv = UncertaintyHead(8) if uncertainty else None

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the output convolution and the uncertainty head read, [B, 8, H, W]."""
        height, width = x.shape[-2:]
        if height % 16 or width % 16 or min(height, width) < 48:
            raise InputError(f"TransWeather: sides must be multiples of 16 and at least 48, got {height} x {width}")
        features = self.Tenc(x)
        return self.convtail(features, self.Tdec(features[-1]))

    def forward_with_uncertainty(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The restored picture and its uncertainty, both [B, 3, H, W]; ConfigError without an uncertainty head."""
        if self.var_conv is None:
            raise ConfigError("TransWeather: this network has no uncertainty head (var_conv.*)")
        features = self.features(x)
        return self.clean(features).tanh(), self.var_conv(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clean(self.features(x)).tanh()


def likely_input_range(module: TransWeather, image: torch.Tensor) -> str:
    """ "0..1" or "-1..1": whichever leaves the coarse colours of `image` [B, 3, H, W] (0..1) closer to themselves.

    A wrong range shows as wrong contrast all over the picture, so 1/8 of its size is compared; runs the network twice.
    """

    def change(scaled: torch.Tensor) -> float:
        return F.avg_pool2d(module(scaled).clamp(0, 1) - image, 8).abs().mean().item()

    return min(("0..1", "-1..1"), key=lambda name: change(image * 2 - 1 if name == "-1..1" else image))


def _scaled(module: TransWeather, image: torch.Tensor, input_range: str | None) -> torch.Tensor:
    chosen = input_range or module.input_range
    if chosen == "measure":
        chosen = likely_input_range(module, image)
    return image * 2 - 1 if chosen == "-1..1" else image


def _restore(module: TransWeather, image: torch.Tensor, input_range: str | None = None) -> torch.Tensor:
    return module(_scaled(module, image, input_range))


def _restore_with_uncertainty(
    module: TransWeather, image: torch.Tensor, input_range: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return module.forward_with_uncertainty(_scaled(module, image, input_range))


def _context(module: TransWeather, image: torch.Tensor) -> dict[str, Any]:
    return {"input_range": likely_input_range(module, image)} if module.input_range == "measure" else {}


_ENCODER = {
    "embed_dims": (64, 128, 320, 512),
    "num_heads": (1, 2, 4, 4),
    "patch_heads": (1, 2, 2),
    "mlp_ratio": 2,
    "depths": (2, 2, 2, 2),
    "sr_ratios": (4, 2, 2, 1),
    "patch_sr": (4, 2, 2),
}
_DECODER = {"dim": 512, "num_heads": 8, "mlp_ratio": 4, "depth": 3, "queries": 48, "sr_ratio": 1}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "TUR": {"enc": _ENCODER, "dec": _DECODER, "edition": "tur", "if_uncertainty": True},
    "original": {"enc": _ENCODER, "dec": _DECODER, "edition": "original", "if_uncertainty": False},
}

_SIGNATURE = ("Tenc.patch_embed1.proj.weight", "Tdec.block1.0.attn.task_query")
# Constants of the layers above that parity cases spell out.
_FIXED = {"ln_eps_blocks": _EPS_BLOCK, "ln_eps_patch_embed_and_sr": _EPS_EMBED}


def _build(config: Mapping[str, Any]) -> TransWeather:
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ConfigError(f"TransWeather: {name} is {value}, {config[name]} was asked for")
    try:
        return TransWeather(**{k: v for k, v in config.items() if k not in _FIXED})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"TransWeather: {error}") from None


def _reduction(state: State, block: str) -> int:
    weight = state.get(f"{block}.attn.sr.weight")
    return 1 if weight is None else weight.shape[-1]


def _ratio(state: State, block: str) -> int:
    hidden, dim = state[f"{block}.mlp.fc1.weight"].shape
    return hidden // dim


def _config_from_state_dict(state: State) -> dict[str, Any]:
    dims = tuple(state[f"Tenc.patch_embed{i}.proj.weight"].shape[0] for i in range(1, 5))
    queries, dim = state["Tdec.block1.0.attn.task_query"].shape[1:]
    if max(*dims, dim) > 4096 or queries > 4096:
        raise CheckpointError(f"TransWeather: widths {dims}, {queries} queries of {dim}: not a TransWeather")
    released = dims == _ENCODER["embed_dims"] and dim == _DECODER["dim"]
    return {
        "enc": {
            "embed_dims": dims,
            # Heads leave no trace in the shapes. Other widths: 64 channels a head, as most of the released ones.
            "num_heads": _ENCODER["num_heads"] if released else tuple(max(1, d // 64) for d in dims),
            "patch_heads": _ENCODER["patch_heads"] if released else tuple(max(1, d // 64) for d in dims[1:]),
            "mlp_ratio": _ratio(state, "Tenc.block1.0"),
            "depths": tuple(count_indices(state, f"Tenc.block{i}.") for i in range(1, 5)),
            "sr_ratios": tuple(_reduction(state, f"Tenc.block{i}.0") for i in range(1, 5)),
            "patch_sr": tuple(_reduction(state, f"Tenc.patch_block{i}.0") for i in range(1, 4)),
        },
        "dec": {
            "dim": dim,
            "num_heads": _DECODER["num_heads"] if released else max(1, dim // 64),
            "mlp_ratio": _ratio(state, "Tdec.block1.0"),
            "depth": count_indices(state, "Tdec.block1."),
            "queries": queries,
            "sr_ratio": _reduction(state, "Tdec.block1.0"),
        },
        "edition": "original" if "convtail.conv_output.conv2d.weight" in state else "tur",
        "if_uncertainty": "var_conv.0.weight" in state,
        "input_range": "auto",
    }


ARCHITECTURES = [
    Architecture(
        id="transweather",
        system="tur",
        title="TransWeather",
        paper="Valanarasu et al., TransWeather: Transformer-based Restoration of Images Degraded by Adverse Weather "
        "Conditions, CVPR 2022, arXiv 2111.14813; retrained by Wu et al. (TUR), AAAI 2025",
        licence="original code MIT; TUR's weights: none stated",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "enc" in config and "dec" in config,
        tasks=("derain", "dehaze", "desnow", "denoise", "deblur", "low-light"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        computed_buffers=(r"^Tenc\.mini_patch_embed4\.", r"^convtail\.conv_output\."),  # there or not: never called
        metadata_keys=("input_range", "enc", "dec"),
        multiple_of=lambda config: 16,
        minimum_size=lambda config: 48,
        bytes_per_pixel=lambda config: 400.0,
        restore=_restore,
        restore_with_uncertainty=_restore_with_uncertainty,
        context=_context,
        global_statistics="attention looks at the whole picture: tiles may differ slightly in tone",
    )
]
