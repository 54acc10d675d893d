"""MoCE-IR: all-in-one restoration by a mixture of complexity experts.

Zamfir et al., "Complexity Experts are Task-Discriminative Learners for Any Image Restoration", CVPR 2025,
arXiv 2411.18466. A four-level U-shaped transformer with channel attention; every decoder block picks, per image, one of
four FFT-based experts of growing rank and patch size. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from .layers.attention import GatedFeedForward, TransposedAttention, transposed_attention
from .layers.layout import fastest_layout
from .layers.norm import NormBody
from .layers.state_dict import count_indices, expansion_factor
from .moce_experts import Adapter, Router, expert_rank
from .registry import Architecture, State, construct


@dataclass(frozen=True)
class Routing:
    """The experts a batch takes: one decision per decoder block (in order of execution), image and expert.

    logits, probabilities, gates: [blocks, B, experts]; probabilities are noise-free; gates are what is applied (zero
    for experts that are not run). noisy_logits is None unless routing noise was drawn. names: the blocks' modules.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    gates: torch.Tensor
    noisy_logits: torch.Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def choice(self) -> torch.Tensor:
        """[blocks, B]: index of the strongest expert."""
        return self.gates.argmax(dim=-1)

    def __len__(self) -> int:
        return self.gates.shape[1]

    def __getitem__(self, images: slice) -> Routing:
        """The routing of some images of the batch."""
        noisy = None if self.noisy_logits is None else self.noisy_logits[:, images]
        parts = (t[:, images] for t in (self.logits, self.probabilities, self.gates))
        return Routing(*parts, noisy, self.names)

    def to(self, *args: Any, **kwargs: Any) -> Routing:
        """As Tensor.to, for every tensor of it."""
        noisy = None if self.noisy_logits is None else self.noisy_logits.to(*args, **kwargs)
        moved = (t.to(*args, **kwargs) for t in (self.logits, self.probabilities, self.gates))
        return Routing(*moved, noisy, self.names)


class TransformerBlock(nn.Module):
    """Encoder block: channel attention, then gated feed-forward, both residual. [B, C, H, W] -> same."""

    def __init__(self, dim: int, heads: int, expansion: float, norm_bias: bool, bias: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([NormBody(dim, norm_bias), NormBody(dim, norm_bias)])
        self.mixer = TransposedAttention(dim, heads, bias)
        self.ffn = GatedFeedForward(dim, expansion, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


class CrossChannelAttention(nn.Module):
    """Channel attention with queries from one feature map and keys and values from another, both [B, C, H, W]."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q = nn.Conv2d(dim, dim, 1, bias=bias)
        self.q_dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=bias)
        self.kv = nn.Conv2d(dim, dim * 2, 1, bias=bias)
        self.kv_dwconv = nn.Conv2d(dim * 2, dim * 2, 7, padding=3, groups=dim * 2, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        query = self.q_dwconv(self.q(x))
        key, value = self.kv_dwconv(self.kv(shared)).chunk(2, dim=1)
        return transposed_attention(query, key, value, self.temperature, project=self.project_out)


class DecoderBlock(nn.Module):
    """Shared channel attention and routed experts, fused by cross attention (section 3.1), then feed-forward."""

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: float,
        norm_bias: bool,
        bias: bool,
        freq_dim: int,
        ranks: list[int],
        scale: str,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList([NormBody(dim, norm_bias), NormBody(dim, norm_bias)])
        self.proj = nn.ModuleList([nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)])
        self.shared = TransposedAttention(dim, heads, bias)
        self.mixer = CrossChannelAttention(dim, heads, bias)
        self.ffn = GatedFeedForward(dim, expansion, bias)
        self.adapter = Adapter(dim, freq_dim, ranks, scale)

    def forward(self, x: torch.Tensor, decide: _Decision) -> torch.Tensor:
        x = self._attend(self.norms[0](x), decide) + x
        return x + self.ffn(self.norms[1](x))

    def _attend(self, x: torch.Tensor, decide: _Decision) -> torch.Tensor:
        # A function of its own, so that its feature maps are gone when the feed-forward needs the memory.
        shared = self.shared(self.proj[0](x))
        routed = self.proj[1](x)
        routed = self.adapter(routed, shared, decide(self.adapter.routing, routed))
        return self.mixer(routed, shared)


class _Decision:
    """Hands every decoder block its gates, in order of execution, and keeps what was decided."""

    def __init__(self, freq_emb: torch.Tensor | None, topk: int, noise: torch.Tensor | None, fixed: Routing | None):
        self.freq_emb, self.topk, self.noise, self.fixed = freq_emb, topk, noise, fixed
        self.logits: list[torch.Tensor] = []
        self.noisy: list[torch.Tensor] = []
        self.gates: list[torch.Tensor] = []
        self.block = 0

    def __call__(self, router: Router, x: torch.Tensor) -> torch.Tensor:
        block, self.block = self.block, self.block + 1
        if self.fixed is not None:
            gates = self.fixed.gates[block]
            return gates.expand(x.shape[0], -1) if len(gates) == 1 else gates
        with torch.autocast(x.device.type, enabled=False):
            pooled = x.float().mean(dim=(2, 3))
            logits = F.linear(pooled, router.gate[2].weight.float())
            logits = logits + F.linear(self.freq_emb.float(), router.freq_gate.weight.float())
            noisy = logits if self.noise is None else logits + self.noise[block] / logits.shape[1]
            self.logits.append(logits)
            self.noisy.append(noisy)
            scores = noisy.softmax(dim=-1)
            values, experts = scores.topk(self.topk, dim=-1)
            self.gates.append(torch.zeros_like(scores).scatter(1, experts, values))
        return self.gates[-1]

    def routing(self) -> Routing:
        if self.fixed is not None:
            return self.fixed
        logits = torch.stack(self.logits)
        noisy = None if self.noise is None else torch.stack(self.noisy)
        return Routing(logits, logits.softmax(dim=-1), torch.stack(self.gates), noisy)


class FrequencyEmbedding(nn.Module):
    """High-frequency content of the bottleneck as a vector: [B, C, H, W] -> [B, C].

    The depth-wise filter starts as a Laplacian and, in the published code, is trained: it is loaded, never rebuilt.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        laplacian = torch.full((1, 1, 3, 3), -1.0)
        laplacian[..., 1, 1] = 8.0
        with torch.no_grad():
            convolution.weight.copy_(laplacian.expand_as(convolution.weight))
        self.high_conv = nn.Sequential(nn.ModuleDict({"conv": convolution}))
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(), nn.Linear(dim * 2, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(F.gelu(self.high_conv[0]["conv"](x)).mean(dim=(2, 3)))


class Blocks(nn.Module):
    """A run of blocks, under the released key `layers`."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, *args)
        return x


class Resample(nn.Module):
    """3x3 convolution and pixel (un)shuffle: halves the size and doubles the channels, or the other way round."""

    def __init__(self, dim: int, up: bool) -> None:
        super().__init__()
        channels, shuffle = (dim * 2, nn.PixelShuffle(2)) if up else (dim // 2, nn.PixelUnshuffle(2))
        self.body = nn.Sequential(nn.Conv2d(dim, channels, 3, padding=1, bias=False), shuffle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class PatchEmbed(nn.Module):
    """The first convolution, under the released key `proj`."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class MoCEIR(nn.Module):
    """The network. [B, 3, H, W] in 0..1, H and W multiples of 2^(levels-1) -> same shape, not clamped.

    `num_blocks` and `heads` go from shallow to deep, the last entry of `num_blocks` is the bottleneck;
    `num_dec_blocks` goes from shallow to deep as well. One route is decided per image.
    """

    def __init__(
        self,
        *,
        dim: int = 32,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_dec_blocks: tuple[int, ...] = (2, 4, 4),
        heads: tuple[int, ...] = (1, 2, 4, 8),
        num_refinement_blocks: int = 4,
        ffn_expansion_factor: float = 2,
        LayerNorm_type: str = "WithBias",
        bias: bool = False,
        rank: int = 2,
        rank_type: str = "spread",
        num_experts: int = 4,
        topk: int = 1,
        with_complexity: bool = False,
        complexity_scale: str = "max",
        inp_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        if not 1 <= topk <= num_experts:
            raise ConfigError(f"topk is {topk}, must lie between 1 and num_experts = {num_experts}")
        levels = len(num_blocks)
        if len(heads) != levels or len(num_dec_blocks) != levels - 1 or levels < 2:
            raise ConfigError("num_blocks and heads need one entry a level (at least 2), num_dec_blocks one less")
        self.topk, self.with_complexity = topk, with_complexity
        norm_bias, factor = LayerNorm_type == "WithBias", ffn_expansion_factor
        width = [dim * 2**level for level in range(levels)]
        freq_dim = width[-1]

        def encoder(level: int, count: int) -> Blocks:
            return Blocks([TransformerBlock(width[level], heads[level], factor, norm_bias, True) for _ in range(count)])

        def decoder(level: int) -> Blocks:
            ranks = [expert_rank(e, width[level], num_experts, rank_type, rank) for e in range(num_experts)]
            return Blocks(
                [
                    DecoderBlock(width[level], heads[level], factor, norm_bias, bias, freq_dim, ranks, complexity_scale)
                    for _ in range(num_dec_blocks[level])
                ]
            )

        self.patch_embed = PatchEmbed(inp_channels, dim)
        self.freq_embed = FrequencyEmbedding(freq_dim)
        self.enc = nn.ModuleList(
            [
                nn.ModuleList([encoder(level, num_blocks[level]), Resample(width[level], up=False)])
                for level in range(levels - 1)
            ]
        )
        self.latent = encoder(levels - 1, num_blocks[-1])
        self.dec = nn.ModuleList(
            [
                nn.ModuleList(
                    [
                        Resample(width[level + 1], up=True),
                        nn.Conv2d(width[level + 1], width[level], 1, bias=bias),
                        decoder(level),
                    ]
                )
                for level in reversed(range(levels - 1))
            ]
        )
        self.refinement = encoder(0, num_refinement_blocks)
        self.output = nn.Conv2d(dim, out_channels, 3, padding=1, bias=bias)

    @property
    def decoder_blocks(self) -> list[str]:
        """Name of every routed block in order of execution, e.g. "dec.0.2.layers.1"."""
        return [f"dec.{i}.2.layers.{j}" for i, stage in enumerate(self.dec) for j in range(len(stage[2].layers))]

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of every level, shallow to deep; the last one is the bottleneck."""
        x, features = self.patch_embed(fastest_layout(x)), []
        for blocks, down in self.enc:
            x = blocks(x)
            features.append(x)
            x = down(x)
        return [*features, self.latent(x)]

    def decode(self, features: list[torch.Tensor], decide: _Decision) -> torch.Tensor:
        """From the feature maps of `encode` to the features before refinement."""
        *skips, x = features
        for (up, fuse, blocks), skip in zip(self.dec, reversed(skips), strict=True):
            x = blocks(fuse(torch.cat([up(x), skip], dim=1)), decide)
        return x

    def forward_with_routing(
        self, x: torch.Tensor, routing_noise: torch.Tensor | None = None, routing: Routing | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """The restored image and the routing it took.

        routing_noise: standard normal [blocks, B, experts], scaled here by 1 / experts as published; None: noise off
        (the published evaluation draws it). routing: take this one; its batch is 1 or B.
        """
        blocks = len(self.decoder_blocks)
        if routing is not None and (routing.gates.shape[0] != blocks or len(routing) not in (1, x.shape[0])):
            raise InputError(
                f"routing: made for {routing.gates.shape[0]} decoder blocks and {len(routing)} images, "
                f"this network has {blocks} and the batch {x.shape[0]}"
            )
        return self._finish(self.encode(x), x, routing_noise, routing)

    def reconstruct(
        self, features: list[torch.Tensor], x: torch.Tensor, routing: Routing | None = None
    ) -> torch.Tensor:
        """The restored image from the feature maps of `encode` and the image they were made from."""
        return self._finish(features, x, None, routing)[0]

    def _finish(
        self,
        features: list[torch.Tensor],
        x: torch.Tensor,
        routing_noise: torch.Tensor | None,
        routing: Routing | None,
    ) -> tuple[torch.Tensor, Routing]:
        embedding = self.freq_embed(features[-1]) if routing is None else None
        decide = _Decision(embedding, self.topk, routing_noise, routing)
        restored = self.output(self.refinement(self.decode(features, decide)))
        if restored.shape == x.shape:
            restored = restored + x
        return restored, decide.routing()

    def forward(
        self, x: torch.Tensor, routing_noise: torch.Tensor | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        return self.forward_with_routing(x, routing_noise, routing)[0]

    def route(self, x: torch.Tensor, routing_noise: torch.Tensor | None = None) -> Routing:
        """Only the routing: skips what comes after the last router."""
        features = self.encode(x)
        decide = _Decision(self.freq_embed(features[-1]), self.topk, routing_noise, None)
        self.decode(features, decide)
        return decide.routing()

    def balance_loss(self, routing: Routing) -> torch.Tensor:
        """Auxiliary loss of the routers (section 3.3), mean over decoder blocks; a scalar.

        Half the squared coefficient of variation of the experts' importance (weighted by complexity if the network
        was made with `with_complexity`), half that of their load.
        """
        noisy = routing.logits if routing.noisy_logits is None else routing.noisy_logits
        importance = routing.logits.softmax(dim=-1).sum(dim=1)
        if self.with_complexity:
            complexity = [b.adapter.routing.complexity for _, _, stage in self.dec for b in stage.layers]
            importance = importance * torch.stack(complexity)
        sigma = 1.0 / routing.logits.shape[-1]
        threshold = noisy.topk(self.topk, dim=-1).values[..., -1:]
        load = (1.0 - torch.special.ndtr((threshold - routing.logits) / sigma)).mean(dim=1)
        return (0.5 * _squared_variation(importance) + 0.5 * _squared_variation(load)).mean()


def _squared_variation(values: torch.Tensor) -> torch.Tensor:
    """(std / mean)^2 over the last axis, Bessel-corrected."""
    return (values.std(dim=-1) / (values.mean(dim=-1) + 1e-8)) ** 2


_RELEASED = {
    "num_blocks": (4, 6, 6, 8),
    "num_dec_blocks": (2, 4, 4),
    "heads": (1, 2, 4, 8),
    "num_refinement_blocks": 4,
    "ffn_expansion_factor": 2,
    "LayerNorm_type": "WithBias",
    "num_experts": 4,
    "topk": 1,
    "rank_type": "spread",
    "rank": 2,
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "S": {"dim": 32, **_RELEASED},
    "base": {"dim": 48, **_RELEASED},
}

_SIGNATURE = ("freq_embed.high_conv.0.conv.weight", "dec.0.2.layers.0.adapter.routing.freq_gate.weight")
_IGNORED = {"levels", "mode", "depth_type", "stage_depth"}  # implied by the others, or without effect


def _build(config: Mapping[str, Any]) -> MoCEIR:
    return construct(MoCEIR, "MoCE-IR", config, without=_IGNORED)


def _config_from_state_dict(state: State) -> dict[str, Any]:
    stages = count_indices(state, "enc.")
    dim, inp_channels = state["patch_embed.proj.weight"].shape[:2]
    first = "dec.0.2.layers.0"
    experts = state[f"{first}.adapter.routing.gate.2.weight"].shape[0]
    deepest = dim * 2 ** (stages - 1)
    ranks = [state[f"{first}.adapter.experts.{e}.0.proj.0.weight"].shape[0] for e in range(experts)]
    rank_type, rank = _rank_rule(ranks, deepest)
    runs = [f"enc.{i}.0" for i in range(stages)] + ["latent"]
    feed_forwards = [tuple(state[f"{run}.layers.0.ffn.project_out.weight"].shape[:2]) for run in runs]
    return {
        "dim": dim,
        "num_blocks": tuple(count_indices(state, f"enc.{i}.0.layers.") for i in range(stages))
        + (count_indices(state, "latent.layers."),),
        "num_dec_blocks": tuple(count_indices(state, f"dec.{i}.2.layers.") for i in reversed(range(stages))),
        "heads": tuple(state[f"enc.{i}.0.layers.0.mixer.temperature"].shape[0] for i in range(stages))
        + (state["latent.layers.0.mixer.temperature"].shape[0],),
        "num_refinement_blocks": count_indices(state, "refinement.layers."),
        "ffn_expansion_factor": expansion_factor(feed_forwards),
        "LayerNorm_type": "WithBias" if "latent.layers.0.norms.0.body.bias" in state else "BiasFree",
        "bias": "output.bias" in state,
        "num_experts": experts,
        "rank_type": rank_type,
        "rank": rank,
        "topk": 1,
        "complexity_scale": _complexity_scale(state.get(f"{first}.adapter.routing.complexity")),
        "inp_channels": inp_channels,
        "out_channels": state["output.weight"].shape[0],
    }


def _complexity_scale(complexity: torch.Tensor | None) -> str:
    """What the experts' parameter counts were divided by; "max" where they are all alike or not at hand."""
    known = complexity is not None and not complexity.is_meta and 0 < complexity.numel() <= 1024
    return "min" if known and float(complexity.float().max()) > 1 else "max"


def _rank_rule(ranks: list[int], dim: int) -> tuple[str, int]:
    """The rule (and its argument) that gives these expert ranks at width `dim`."""
    candidates = [("spread", 2)]
    candidates += [(rule, ranks[0]) for rule in ("constant", "lin", "double", "exp")]
    candidates += [("fact", r) for r in range(1, 8)]
    for rule, rank in candidates:
        try:
            if [expert_rank(e, dim, len(ranks), rule, rank) for e in range(len(ranks))] == ranks:
                return rule, rank
        except ConfigError:
            continue
    raise CheckpointError(f"MoCE-IR: no known rule gives experts of rank {ranks} at width {dim}")


def _context(module: MoCEIR, image: torch.Tensor) -> dict[str, Any]:
    return {"routing": module.route(image)}


ARCHITECTURES = [
    Architecture(
        id="moce-ir",
        system="moce-ir",
        title="MoCE-IR",
        paper="Zamfir et al., Complexity Experts are Task-Discriminative Learners for Any Image Restoration, "
        "CVPR 2025, arXiv 2411.18466",
        licence="code Apache-2.0; weights: no separate licence stated",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        tasks=("denoise", "derain", "dehaze", "deblur", "low-light", "desnow"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        computed_buffers=(r"\.adapter\.routing\.complexity$",),
        metadata_keys=("topk", "with_complexity", "complexity_scale"),
        multiple_of=lambda config: 2 ** (len(config["num_blocks"]) - 1),
        context=_context,
        wires=("routing",),
        bytes_per_pixel=lambda config: 72.0 * config["dim"],
        global_statistics="channel attention and expert routing look at the whole picture; the route is decided once "
        "and shared by all tiles, attention is computed per tile",
    )
]
