"""Channel ("transposed") attention and the gated feed-forward network of Restormer, as several networks use them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .layout import is_channels_last


def transposed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    temperature: torch.Tensor,
    activation: str = "softmax",
    project: nn.Conv2d | None = None,
) -> torch.Tensor:
    """Attention over channels. query, key, value [B, C, H, W]; temperature [heads, 1, 1]; returns [B, C, H, W].

    softmax(norm(q) norm(k)^T * temperature) v with q and k L2-normalised along the pixels (Restormer, section 3.1);
    `activation` "relu" takes the place of the softmax where a network was trained so.
    The normalisation is applied to the small [C/heads, C/heads] product instead of to the two feature maps; the
    sums over pixels run in float32. `project`, a 1x1 convolution of the result, is applied with the attention in one
    product, and the layout of `value` is kept.
    """
    heads, width, feature_map = temperature.shape[0], query.shape[-1], value
    query, key, value = (rearrange(t, "b (heads c) h w -> b heads c (h w)", heads=heads) for t in (query, key, value))
    query_norm, key_norm = _norm(query), _norm(key)
    if query.dtype in (torch.float16, torch.bfloat16):  # a raw product of thousands of pixels overflows half precision
        query, key = (query / query_norm).to(query.dtype), (key / key_norm).to(key.dtype)
        scores = (query @ key.transpose(-2, -1)).float()
    else:
        scores = (query @ key.transpose(-2, -1)) / (query_norm * key_norm.transpose(-2, -1))
    scores = scores * temperature
    attention = scores.relu() if activation == "relu" else scores.softmax(dim=-1)
    if project is not None:
        return _mix(attention, feature_map, project)
    attention = attention.to(value.dtype)
    return rearrange(attention @ value, "b heads c (h w) -> b (heads c) h w", w=width)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm along the last axis, kept, at least 1e-12, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.stride(-1) == 1:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).clamp_min(1e-12)
    # Along a strided axis vector_norm adds thousands of squares one by one; sum adds them pairwise.
    return x.to(dtype).square().sum(dim=-1, keepdim=True).clamp_min(1e-24).sqrt()


def _mix(attention: torch.Tensor, value: torch.Tensor, project: nn.Conv2d) -> torch.Tensor:
    """project(attention value) as (project attention) value: saves a pass over the feature map.

    attention [B, heads, c, c], value [B, heads c, H, W].
    """
    weight = rearrange(project.weight, "o (heads c) 1 1 -> heads o c", heads=attention.shape[1])
    mixing = rearrange(weight.to(attention.dtype) @ attention, "b heads o c -> b o (heads c)").to(value.dtype)
    height, width = value.shape[-2:]
    if is_channels_last(value):
        mixed = value.flatten(2).transpose(1, 2) @ mixing.transpose(1, 2)
        mixed = rearrange(mixed, "b (h w) c -> b c h w", h=height, w=width)
    else:
        mixed = rearrange(mixing @ value.flatten(2), "b c (h w) -> b c h w", h=height, w=width)
    return mixed if project.bias is None else mixed + project.bias[:, None, None].to(mixed.dtype)


class TransposedAttention(nn.Module):
    """Multi-head channel self-attention (MDTA). [B, C, H, W] -> [B, C, H, W]. Keys as in released checkpoints."""

    def __init__(self, dim: int, heads: int, bias: bool, activation: str = "softmax") -> None:
        super().__init__()
        self.activation = activation
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, groups=dim * 3, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        return transposed_attention(query, key, value, self.temperature, self.activation, self.project_out)


class GatedFeedForward(nn.Module):
    """Gated depth-wise convolution feed-forward (GDFN). [B, C, H, W] -> [B, C, H, W]. Keys as released."""

    def __init__(self, dim: int, expansion: float, bias: bool) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, hidden * 2, 1, bias=bias)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, bias=bias)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)
