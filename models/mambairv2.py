"""MambaIRv2: window attention and an attentive state-space layer that reads the picture class by class.

Guo et al., "MambaIRv2: Attentive State Space Restoration", CVPR 2025, arXiv 2411.15269. Every pixel is routed to one of
T learned classes; one scan reads the pixels sorted by class, with a prompt of the class added to the output matrix C of
the state-space equation. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.residual_groups import WITHOUT_EFFECT, ResidualGroupNetwork, frame_config
from .layers.state_dict import expansion_factor
from .layers.state_space import StateSpace, convolve, dt_rank, initialise_linear
from .registry import Architecture, State, construct

_MASKED = -100.0
"""What the published code adds to attention across the wrapped border (not minus infinity)."""

ROUTE_MODES = ("argmax", "sample", "mean")

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Chooses classes [B, L] from route logits [B, L, T]; called once a layer, in order of execution."""


@dataclass(frozen=True)
class RouteMode:
    """How pixels get their class.

    "argmax": the most probable one, deterministic. "sample": drawn, as the published code does at every run, here from
    `seed`. "mean": the mean of the results of `samples` draws (slower by that factor).
    """

    mode: str = "argmax"
    seed: int = 0
    samples: int = 4

    def __post_init__(self) -> None:
        if self.mode not in ROUTE_MODES:
            raise InputError(f"route mode is {self.mode!r}, must be one of {', '.join(ROUTE_MODES)}")
        if not 1 <= self.samples <= 64:
            raise InputError(f"route samples is {self.samples}, must be 1 to 64")

    def choosers(self) -> list[Choose]:
        """One for every forward pass whose results are to be averaged."""
        if self.mode == "argmax":
            return [most_probable]
        return [sampled(self.seed + index) for index in range(self.samples if self.mode == "mean" else 1)]


def most_probable(logits: torch.Tensor) -> torch.Tensor:
    """The class with the largest logit."""
    return logits.argmax(dim=-1)


def sampled(seed: int) -> Choose:
    """Draws classes with the probabilities of a softmax.

    The distribution is that of the published Gumbel draws, from one uniform number a pixel instead of T. The numbers
    are drawn on the CPU and are the same for all pictures of a batch: equal on every device, steady over a video.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
        draws = torch.rand(1, logits.shape[1], 1, generator=generator).to(logits.device)
        classes = torch.searchsorted(cumulative, draws.expand(len(logits), -1, -1).contiguous(), right=True)
        return classes.squeeze(-1).clamp_max(logits.shape[-1] - 1)  # rounding can leave the last sum below the draw

    return choose


def perturbed(noise: list[torch.Tensor]) -> Choose:
    """Chooses with given Gumbel noise, one tensor [B, L, T] a layer: argmax(log-probability + noise)."""
    remaining = iter(noise)
    return lambda logits: (logits.log_softmax(dim=-1) + next(remaining)).argmax(dim=-1)


@dataclass
class _Prepared:
    """What the layers share during one forward pass."""

    position_index: torch.Tensor
    choose: Choose | None
    classes: list[torch.Tensor] | None = field(default=None)


@lru_cache(maxsize=8)
def _edge_masks(window: int, device: torch.device) -> torch.Tensor:
    """[4, window^2, window^2]: what is added to attention in shifted windows inside, at the right, bottom and corner.

    After the cyclic shift the last window of an axis holds pixels from both ends of the picture, which must not see
    each other.
    """
    with torch.inference_mode(False):
        wrapped = torch.arange(window, device=device) >= window - window // 2
        row, column = (t.flatten() for t in torch.meshgrid(wrapped, wrapped, indexing="ij"))
        apart_rows, apart_columns = row[:, None] != row, column[:, None] != column
        apart = torch.stack([torch.zeros_like(apart_rows), apart_columns, apart_rows, apart_rows | apart_columns])
        return apart * _MASKED


def relative_position_index(window: int) -> torch.Tensor:
    """[window^2, window^2] int64: row of the bias table for every pair of pixels of a window."""
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


class WindowAttention(nn.Module):
    """Attention in (shifted) windows with a relative position bias. qkv [B, H, W, 3C], projected -> [B, H, W, C]."""

    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, qkv: torch.Tensor, position_index: torch.Tensor) -> torch.Tensor:
        if self.shift:
            qkv = qkv.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = rearrange(
            qkv,
            "b (h p) (w q) (three heads d) -> three b h w heads (p q) d",
            p=self.window,
            q=self.window,
            three=3,
            heads=self.heads,
        )
        bias = self.relative_position_bias_table.T[:, position_index]  # contiguous: attention would copy it a window
        mixed = self._attend(windows, bias.to(qkv.dtype))
        mixed = rearrange(mixed, "b h w heads (p q) d -> b (h p) (w q) (heads d)", p=self.window)
        if self.shift:
            mixed = mixed.roll((self.shift, self.shift), dims=(1, 2))
        return self.proj(mixed)

    def _attend(self, windows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """windows [3, B, rows, columns, heads, pixels, d] -> the same without the first axis."""
        if not self.shift:
            return _attention(windows, bias)
        masks = _edge_masks(self.window, bias.device).to(bias.dtype)
        mixed = torch.empty_like(windows[0])
        inner, last = slice(None, -1), slice(-1, None)
        for mask, (rows, columns) in zip(
            masks, ((inner, inner), (inner, last), (last, inner), (last, last)), strict=True
        ):
            mixed[:, rows, columns] = _attention(windows[:, :, rows, columns], bias + mask)
        return mixed


def _attention(windows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for windows [3, B, rows, columns, heads, pixels, d], bias [heads, pixels, pixels]."""
    width = windows.shape[-1]
    # Fused kernels want rows of whole 16-byte vectors; the published head widths (29, 33) are none.
    vector = 16 // windows.element_size()
    query, key, value = F.pad(windows, (0, -width % vector)).flatten(1, 3)
    mask = bias.expand(len(query), -1, -1, -1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=width**-0.5)
    return mixed[..., :width].unflatten(0, windows.shape[1:4])


class AttentiveStateSpace(nn.Module):
    """Attentive state-space module (ASSM, section 3.2). x [B, H, W, C] normalised -> same."""

    def __init__(self, dim: int, hidden: int, state: int, tokens: int, inner_rank: int) -> None:
        super().__init__()
        self.selectiveScan = StateSpace(1, hidden, dt_rank(hidden), state)
        self.out_norm = nn.LayerNorm(hidden)
        self.out_proj = nn.Linear(hidden, dim)
        self.in_proj = nn.Sequential(nn.Conv2d(dim, hidden, 1))
        self.CPE = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.embeddingB = nn.Embedding(tokens, inner_rank)
        self.route = nn.Sequential(nn.Linear(dim, dim // 3), nn.GELU(), nn.Linear(dim // 3, tokens))
        nn.init.uniform_(self.embeddingB.weight, -1 / tokens, 1 / tokens)

    def forward(self, x: torch.Tensor, factor: torch.Tensor, prepared: _Prepared) -> torch.Tensor:
        """`factor` [inner_rank, N]: the layer's share of the prompts, which are embeddingB @ factor."""
        prompts = self.embeddingB.weight @ factor
        logits = self.route(x).flatten(1, 2)
        if self.training and prepared.choose is None:  # straight through: the choice has the gradient of the soft one
            policy = F.gumbel_softmax(logits, hard=True)
            prompt, classes = policy @ prompts, policy.detach().argmax(dim=-1)
        else:
            classes = (prepared.choose or most_probable)(logits)
            prompt = prompts[classes]
        if prepared.classes is not None:
            prepared.classes.append(classes)
        order = classes.argsort(dim=-1, stable=True)
        projection = self.in_proj[0]  # a 1x1 convolution
        tokens = F.linear(x, projection.weight.flatten(1), projection.bias)
        tokens = tokens * convolve(self.CPE, tokens).sigmoid()
        # The prompt is not sorted with the pixels: step t gets the prompt of raster pixel t, as the released weights
        # were trained. Norm and projection work per pixel, so they may follow the way back to raster order.
        mixed = self.selectiveScan.scan(tokens.flatten(1, 2), order[:, None], prompt=prompt)
        return self.out_proj(self.out_norm(mixed.to(x.dtype))).view(x.shape)


class ConvolutionFeedForward(nn.Module):
    """Feed-forward with a depth-wise convolution of the hidden map added to it. [B, H, W, C] -> same."""

    def __init__(self, dim: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        convolution = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.dwconv = nn.ModuleDict({"depthwise_conv": nn.Sequential(convolution, nn.GELU())})
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + convolve(self.dwconv["depthwise_conv"], x))


class GatedFeedForward(nn.Module):
    """Feed-forward of the light networks: one half of the hidden map gates the other. [B, H, W, C] -> same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        if hidden % 2:
            raise ConfigError(f"MambaIRv2 light: the hidden width is {hidden}, must be even")
        self.fc1 = nn.Linear(dim, hidden)
        convolution = nn.Conv2d(hidden // 2, hidden // 2, 5, padding=2, groups=hidden // 2)
        self.sg = nn.ModuleDict({"norm": nn.LayerNorm(hidden // 2), "conv": convolution})
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = F.gelu(self.fc1(x)).chunk(2, dim=-1)
        return self.fc2(value * convolve(self.sg["conv"], self.sg["norm"](gate)))


class AttentiveLayer(nn.Module):
    """Window attention and feed-forward, then ASSM and feed-forward, with scaled shortcuts. [B, H, W, C] -> same."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        shift: int,
        hidden: int,
        state: int,
        tokens: int,
        inner_rank: int,
        kernel: int,
        light: bool,
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        self.scale1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.scale2 = nn.Parameter(torch.full((dim,), 1e-4))
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))
        self.wqkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.win_mhsa = WindowAttention(dim, heads, window, shift)
        self.assm = AttentiveStateSpace(dim, hidden, state, tokens, inner_rank)
        feed_forward = (GatedFeedForward, (dim, hidden)) if light else (ConvolutionFeedForward, (dim, hidden, kernel))
        self.convffn1, self.convffn2 = (feed_forward[0](*feed_forward[1]) for _ in range(2))
        self.embeddingA = nn.Embedding(inner_rank, state)
        nn.init.uniform_(self.embeddingA.weight, -1 / inner_rank, 1 / inner_rank)

    def forward(self, x: torch.Tensor, prepared: _Prepared) -> torch.Tensor:
        attended = self.win_mhsa(self.wqkv(self.norm1(x)), prepared.position_index) + x
        attended = attended + self.convffn1(self.norm2(attended))
        x = x * self.scale1 + attended
        mixed = self.assm(self.norm3(x), self.embeddingA.weight, prepared) + x
        return x * self.scale2 + mixed + self.convffn2(self.norm4(mixed))


class MambaIRv2(ResidualGroupNetwork):
    """The network. [B, C, H, W] in 0..1, any size -> [B, C, scale * H, scale * W], not clamped.

    `light` chooses the gated feed-forward of the light models (by default, with the upsampler "pixelshuffledirect").
    Without `choose`, evaluation routes by argmax and training by straight-through Gumbel draws.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 174,
        depths: tuple[int, ...] = (6,) * 6,
        num_heads: tuple[int, ...] = (6,) * 6,
        d_state: int = 16,
        mlp_ratio: float = 2.0,
        inner_rank: int = 64,
        num_tokens: int = 128,
        window_size: int = 16,
        convffn_kernel_size: int = 5,
        light: bool | None = None,
        qkv_bias: bool = True,
        in_chans: int = 3,
        upscale: int = 2,
        upsampler: str | None = "pixelshuffle",
        resi_connection: str = "1conv",
        img_range: float = 1.0,
    ) -> None:
        if len(num_heads) != len(depths) or any(heads < 1 or embed_dim % heads for heads in num_heads):
            raise ConfigError(
                f"MambaIRv2: num_heads {tuple(num_heads)} needs one entry a group, each a divisor of {embed_dim}"
            )
        if embed_dim < 3 or window_size < 2:
            raise ConfigError("MambaIRv2: at least 3 channels and windows of 2 pixels")
        settings = {
            "hidden": int(embed_dim * mlp_ratio),
            "state": d_state,
            "tokens": num_tokens,
            "inner_rank": inner_rank,
            "kernel": convffn_kernel_size,
            "light": upsampler == "pixelshuffledirect" if light is None else light,
            "qkv_bias": qkv_bias,
        }
        groups = [
            [
                AttentiveLayer(embed_dim, heads, window_size, window_size // 2 if i % 2 else 0, **settings)
                for i in range(depth)
            ]
            for depth, heads in zip(depths, num_heads, strict=True)
        ]
        super().__init__(
            groups,
            blocks_key="layers",
            embed_dim=embed_dim,
            in_chans=in_chans,
            upscale=upscale,
            upsampler=upsampler,
            resi_connection=resi_connection,
            img_range=img_range,
        )
        self.window_size = window_size
        self.register_buffer("relative_position_index_SA", relative_position_index(window_size))
        self.apply(initialise_linear)

    def prepare(
        self, x: torch.Tensor, choose: Choose | None = None, classes: list[torch.Tensor] | None = None
    ) -> _Prepared:
        return _Prepared(self.relative_position_index_SA, choose, classes)

    def forward(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        height, width = image.shape[-2:]
        restored = super().forward(_mirror_to_multiple(image, self.window_size), **options)
        return restored[..., : height * self.scale, : width * self.scale]

    def routes(self, image: torch.Tensor, choose: Choose | None = None) -> torch.Tensor:
        """The class of every pixel in every layer: [layers, B, H, W], for an image [B, C, H, W] in 0..1."""
        padded = _mirror_to_multiple(image, self.window_size)
        classes: list[torch.Tensor] = []
        self.features((padded - self.mean) * self.img_range, choose=choose, classes=classes)
        routes = torch.stack(classes).unflatten(-1, padded.shape[-2:])
        return routes[..., : image.shape[-2], : image.shape[-1]]


def _mirror_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pads at the bottom and right to a multiple by mirroring, the border pixel included, as often as need be."""
    for dim in (-2, -1):
        size = image.shape[dim]
        if size % multiple:
            index = torch.arange(size + -size % multiple, device=image.device) % (2 * size)
            image = image.index_select(dim, torch.minimum(index, 2 * size - 1 - index))
    return image


def _restore(module: MambaIRv2, image: torch.Tensor, route: RouteMode | None = None) -> torch.Tensor:
    """Runs the network as `route` says (None: argmax)."""
    choosers = (route or RouteMode()).choosers()
    total = module(image, choose=choosers[0])
    for choose in choosers[1:]:
        total = total + module(image, choose=choose)
    return total / len(choosers) if len(choosers) > 1 else total


_COMMON = {
    "img_range": 1.0,
    "resi_connection": "1conv",
    "window_size": 16,
    "convffn_kernel_size": 5,
    "in_chans": 3,
}
_LARGE = {**_COMMON, "d_state": 16, "inner_rank": 64, "num_tokens": 128, "mlp_ratio": 2.0, "light": False}


def _size(groups: int, depth: int, embed_dim: int, heads: int, **settings: Any) -> dict[str, Any]:
    return {
        **_LARGE,
        "embed_dim": embed_dim,
        "depths": (depth,) * groups,
        "num_heads": (heads,) * groups,
        **settings,
    }


_LIGHT = {"d_state": 8, "inner_rank": 32, "num_tokens": 64, "mlp_ratio": 1.0, "light": True}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{f"light-x{x}": _size(4, 5, 48, 4, **_LIGHT, upsampler="pixelshuffledirect", upscale=x) for x in (2, 3, 4)},
    **{f"small-x{x}": _size(6, 4, 132, 4, upsampler="pixelshuffle", upscale=x) for x in (2, 3, 4)},
    **{f"base-x{x}": _size(6, 6, 174, 6, upsampler="pixelshuffle", upscale=x) for x in (2, 3, 4)},
    **{f"large-x{x}": _size(9, 6, 174, 6, upsampler="pixelshuffle", upscale=x) for x in (2, 3, 4)},
    "CDN": _size(6, 6, 174, 6, upsampler="", upscale=1),
    "CAR": _size(6, 6, 174, 6, upsampler="", upscale=1, in_chans=1),
}

_LAYER = "layers.0.residual_group.layers.0"
_SIGNATURE = (f"{_LAYER}.assm.selectiveScan.A_logs", f"{_LAYER}.win_mhsa.relative_position_bias_table")
_ARCH_LIGHT = {"MambaIRv2": False, "MambaIRv2Light": True}


def _build(config: Mapping[str, Any]) -> MambaIRv2:
    settings = dict(config)
    arch = settings.pop("arch", None)  # the official class, as parity cases name it
    if arch is not None:
        if arch not in _ARCH_LIGHT:
            raise ConfigError(f"MambaIRv2: arch is {arch!r}, must be one of {', '.join(_ARCH_LIGHT)}")
        settings.setdefault("light", _ARCH_LIGHT[arch])
    return construct(MambaIRv2, "MambaIRv2", settings, without=WITHOUT_EFFECT)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    config = frame_config(state, "layers")
    dim = config["embed_dim"]
    hidden, d_state = state[f"{_LAYER}.assm.selectiveScan.A_logs"].shape
    tokens, inner_rank = state[f"{_LAYER}.assm.embeddingB.weight"].shape
    table = [
        state[f"layers.{i}.residual_group.layers.0.win_mhsa.relative_position_bias_table"].shape
        for i in range(len(config["depths"]))
    ]
    window = (round(table[0][0] ** 0.5) + 1) // 2
    light = f"{_LAYER}.convffn1.sg.conv.weight" in state
    kernel = "sg.conv.weight" if light else "dwconv.depthwise_conv.0.weight"
    if (2 * window - 1) ** 2 != table[0][0] or not 2 <= window <= 64:
        raise CheckpointError(f"MambaIRv2: a bias table of {table[0][0]} rows belongs to no window")
    if not (1 <= d_state <= 256 and 1 <= tokens <= 65536 and 1 <= inner_rank <= 4096 and 1 <= hidden <= 16 * dim):
        raise CheckpointError(
            f"MambaIRv2: absurd sizes: {d_state} states, {tokens} classes, rank {inner_rank}, {hidden} hidden channels"
        )
    return {
        **config,
        "num_heads": tuple(heads for _, heads in table),
        "d_state": d_state,
        "mlp_ratio": expansion_factor([(dim, hidden)]),
        "inner_rank": inner_rank,
        "num_tokens": tokens,
        "window_size": window,
        "convffn_kernel_size": state[f"{_LAYER}.convffn1.{kernel}"].shape[-1],
        "light": light,
        "qkv_bias": f"{_LAYER}.wqkv.bias" in state,
    }


ARCHITECTURES = [
    Architecture(
        id="mambairv2",
        system="mambairv2",
        title="MambaIRv2",
        paper="Guo et al., MambaIRv2: Attentive State Space Restoration, CVPR 2025, arXiv 2411.15269",
        licence="code Apache-2.0; weights: no separate licence stated",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        tasks=("super-resolution", "denoise", "jpeg"),
        variants=VARIANTS,
        metadata_keys=("img_range",),
        signature=_SIGNATURE,
        computed_buffers=(r"^relative_position_index_SA$",),
        scale=lambda config: config["upscale"] if config["upsampler"] else 1,
        bytes_per_pixel=lambda config: 120 * config["embed_dim"],
        restore=_restore,
        global_statistics="the scan reads all pixels of the picture sorted by class; a tile sorts and sees only its own "
        "(the published results are tiled ones, see the official tiling)",
    )
]
