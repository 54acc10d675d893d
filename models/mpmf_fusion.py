"""MPMF-Net's multi-dimension fusion (MFIB): cross attention over columns, rows and channels, a chunk at a time.

Columns attend independently of each other, and so do rows, so a few of them at once give the numbers of all at once
without attention maps of gigabytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

ATTENTION_ELEMENTS = 2**25
"""Attention weights that may exist at once in a fusion; columns and rows are independent, so smaller is as exact."""


class RescaleNorm(nn.Module):
    """Norm over channels and pixels together that gives back what it removed, rescaled (RLN, from DehazeFormer).

    [B, C, H, W] -> (normalised [B, C, H, W], rescale [B, C, 1, 1], rebias [B, C, 1, 1]); statistics in float32.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.meta1 = nn.Conv2d(1, dim, 1)
        self.meta2 = nn.Conv2d(1, dim, 1)
        for meta, bias in ((self.meta1, 1.0), (self.meta2, 0.0)):
            nn.init.trunc_normal_(meta.weight, std=0.02)
            nn.init.constant_(meta.bias, bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        variance, mean = torch.var_mean(x.float(), dim=(1, 2, 3), keepdim=True, correction=0)
        std = (variance + self.eps).sqrt()
        scale = self.weight / std
        normalised = torch.addcmul((self.bias - mean * scale).to(x.dtype), x, scale.to(x.dtype))
        return normalised, self.meta1(std.to(x.dtype)), self.meta2(mean.to(x.dtype))


class MultiDimensionFusion(nn.Module):
    """Cross attention between decoder features u and skip d over columns, rows and channels (MFIB). [B, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale_h = nn.Parameter(torch.ones(1))
        self.scale_w = nn.Parameter(torch.ones(1))
        self.scale_c = nn.Parameter(torch.ones(1))
        self.norm_u, self.norm_d = RescaleNorm(dim), RescaleNorm(dim)
        self.pconv_qkv_u, self.pconv_qkv_d = nn.Conv2d(dim, dim * 2, 1), nn.Conv2d(dim, dim * 2, 1)

    def forward(self, u: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        u_hat, u_rescale, u_rebias = self.norm_u(u)
        d_hat, d_rescale, d_rebias = self.norm_d(d)
        query, u_value = (t.chunk(3, dim=1) for t in self.pconv_qkv_u(u_hat).chunk(2, dim=1))
        key, d_value = (t.chunk(3, dim=1) for t in self.pconv_qkv_d(d_hat).chunk(2, dim=1))
        parts = [
            along(query[i], key[i], u_value[i], d_value[i], scale)
            for i, (along, scale) in enumerate(
                ((_along_columns, self.scale_h), (_along_rows, self.scale_w), (_along_channels, self.scale_c))
            )
        ]
        d_to_u, u_to_d = (torch.cat(results, dim=1) for results in zip(*parts, strict=True))
        return torch.addcmul(u_rebias, d_to_u, u_rescale) + u + torch.addcmul(d_rebias, u_to_d, d_rescale) + d


def _along_columns(
    query: torch.Tensor, key: torch.Tensor, u_value: torch.Tensor, d_value: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both directions share one attention matrix; the second takes its transpose, not normalised again."""

    def attend(q: torch.Tensor, k: torch.Tensor, vu: torch.Tensor, vd: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = (q @ k.mT).softmax(dim=-1)
        return weights @ vd, weights.mT @ vu

    return _in_chunks(attend, "b c h w -> (b w) h c", "(b w) h c -> b c h w", query * scale, key, u_value, d_value)


def _along_rows(
    query: torch.Tensor, key: torch.Tensor, u_value: torch.Tensor, d_value: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each direction normalises for itself: two attentions with queries and keys exchanged."""

    def attend(q: torch.Tensor, k: torch.Tensor, vu: torch.Tensor, vd: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attention = F.scaled_dot_product_attention
        return attention(q, k, vd, scale=1.0), attention(k, q, vu, scale=1.0)

    return _in_chunks(attend, "b c h w -> (b h) w c", "(b h) w c -> b c h w", query * scale, key, u_value, d_value)


def _along_channels(
    query: torch.Tensor, key: torch.Tensor, u_value: torch.Tensor, d_value: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both directions use the same matrix, not transposed. Sums over all pixels run in float32."""
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.flatten(2).float(), key.flatten(2).float()
        weights = (query @ key.mT * scale.float()).softmax(dim=-1).to(u_value.dtype)
    return tuple((weights @ value.flatten(2)).view_as(value) for value in (d_value, u_value))


def _in_chunks(attend: Any, cut: str, join: str, *maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` on lines of the maps [B, c, H, W], as many at once as ATTENTION_ELEMENTS allows."""
    batch = maps[0].shape[0]
    lines = [rearrange(t, cut) for t in maps]
    count, length = lines[0].shape[:2]
    step = max(ATTENTION_ELEMENTS // length**2, 1)
    if step >= count:
        results = attend(*lines)
    else:
        pieces = [attend(*(t[i : i + step] for t in lines)) for i in range(0, count, step)]
        results = tuple(torch.cat(piece) for piece in zip(*pieces, strict=True))
    return tuple(rearrange(t, join, b=batch) for t in results)
