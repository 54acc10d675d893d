"""MoCE-IR's complexity experts, and the router that chooses among them (section 3.2 of the paper).

Experts grow in rank and in the patch of their FFT attention. State-dict keys are the released checkpoints'.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import ConfigError
from .layers.layout import fastest_layout
from .layers.norm import NormBody


def expert_rank(expert: int, dim: int, experts: int, rank_type: str, rank: int) -> int:
    """Channels inside expert number `expert` (supplementary material; "spread" is what the released weights use)."""
    rules = {
        "spread": lambda: dim // 2 ** (experts - 1 - expert),
        "constant": lambda: rank,
        "lin": lambda: rank + expert,
        "double": lambda: rank + 2 * expert,
        "exp": lambda: rank ** (expert + 1),
        "fact": lambda: math.factorial(rank + expert),
    }
    if rank_type not in rules:
        raise ConfigError(f"rank_type {rank_type!r} is unknown; one of {', '.join(rules)}")
    width = rules[rank_type]()
    if width < 1:
        raise ConfigError(f"expert {expert} would have no channels: dim {dim}, rank_type {rank_type}, rank {rank}")
    return width


def expert_parameters(dim: int, rank: int) -> int:
    """Parameters of one expert: its complexity in the balance loss."""
    return 3 * dim * rank + 4 * rank * rank + 113 * rank


class FFTAttention(nn.Module):
    """An expert's body: queries and keys are convolved circularly patch by patch, the result gates the values.

    [B, C, H, W] -> same, any H and W. The FFT runs in float32 whatever the working precision.
    """

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.q = nn.Conv2d(dim, dim, 1, bias=False)
        self.q_dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.kv = nn.Conv2d(dim, dim * 2, 1, bias=False)
        self.kv_dwconv = nn.Conv2d(dim * 2, dim * 2, 7, padding=3, groups=dim * 2)
        self.norm = NormBody(dim)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.q_dwconv(self.q(x))
        key, value = self.kv_dwconv(self.kv(x)).chunk(2, dim=1)
        mixed = circular_convolution(query, key, self.patch).to(value.dtype)
        return self.proj_out(self.norm(mixed) * value)


def circular_convolution(a: torch.Tensor, b: torch.Tensor, patch: int) -> torch.Tensor:
    """Circular convolution of `a` and `b` [B, C, H, W] in non-overlapping patches, zero-padded; float32 result."""
    height, width = a.shape[-2:]
    pad = (0, -width % patch, 0, -height % patch)
    layout = "b c (h p) (w q) -> b c h w p q"
    with torch.autocast(a.device.type, enabled=False):
        spectra = [torch.fft.rfft2(rearrange(F.pad(t.float(), pad), layout, p=patch, q=patch)) for t in (a, b)]
        mixed = torch.fft.irfft2(spectra[0] * spectra[1], s=(patch, patch))
    return fastest_layout(rearrange(mixed, "b c h w p q -> b c (h p) (w q)")[..., :height, :width])


class Expert(nn.Module):
    """One complexity expert (eq. 3): x + W2(body(W0 x) * SiLU(W1 shared)), on `rank` channels."""

    def __init__(self, dim: int, rank: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.ModuleList(
            [
                nn.Conv2d(dim, rank, 1, bias=False),
                nn.Conv2d(dim, rank, 1, bias=False),
                nn.Conv2d(rank, dim, 1, bias=False),
            ]
        )
        self.body = FFTAttention(rank, patch)

    def forward(self, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return x + self.proj[2](self.body(self.proj[0](x)) * F.silu(self.proj[1](shared)))


class Router(nn.Module):
    """Chooses experts per image from the block's features and the frequency embedding (section 3.2)."""

    def __init__(self, dim: int, freq_dim: int, complexity: torch.Tensor) -> None:
        super().__init__()
        experts = complexity.shape[0]
        self.register_buffer("complexity", complexity)
        # Index 2: the published gate has pooling and a reshape, without parameters, before its linear layer.
        self.gate = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(dim, experts, bias=False))
        self.freq_gate = nn.Linear(freq_dim, experts, bias=False)

    def forward(self, x: torch.Tensor, freq_emb: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], freq_emb [B, D] -> logits [B, experts]."""
        return self.gate(x.mean(dim=(2, 3))) + self.freq_gate(freq_emb)


class Adapter(nn.Module):
    """The mixture of experts of one decoder block."""

    def __init__(self, dim: int, freq_dim: int, ranks: list[int], complexity_scale: str) -> None:
        super().__init__()
        sizes = torch.tensor([expert_parameters(dim, rank) for rank in ranks], dtype=torch.float32)
        complexity = sizes / (sizes.max() if complexity_scale == "max" else sizes.min())
        # The released keys have one more level: an expert is a list with a single member.
        self.experts = nn.ModuleList(
            [nn.ModuleList([Expert(dim, rank, 2 ** (index + 2))]) for index, rank in enumerate(ranks)]
        )
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False)
        self.routing = Router(dim, freq_dim, complexity)

    def forward(self, x: torch.Tensor, shared: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """x, shared [B, C, H, W], gates [B, experts]: sum over experts of gate * expert, each on its images only."""
        if len(gates) == 1 or bool(
            (gates.count_nonzero(dim=0) == len(gates)).logical_or(gates.any(dim=0).logical_not()).all()
        ):
            # Every image takes the same experts: no gather, no scatter.
            mixed: torch.Tensor | float = 0.0
            for index in gates[0].nonzero().flatten().tolist():
                mixed = mixed + self.experts[index][0](x, shared) * gates[:, index, None, None, None].to(x.dtype)
        else:
            mixed = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                images = gates[:, index].nonzero().flatten()
                if len(images):
                    result = expert[0](x[images], shared[images]) * gates[images, index, None, None, None].to(x.dtype)
                    mixed = mixed.index_add(0, images, result.to(x.dtype))
        if not isinstance(mixed, torch.Tensor):  # all experts banned by an edited routing
            mixed = torch.zeros_like(x)
        return self.proj_out(mixed)
