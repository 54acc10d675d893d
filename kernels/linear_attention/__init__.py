"""Linear attention with two-dimensional rotary positions, as in MILA and ACL.

Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024. Cost is linear in the number of
tokens: the keys and values are summed into one small matrix a head before the queries meet them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange

from ...errors import InputError

ROTARY_BASE = 10000.0  # channel pair i turns by position * base^(-i / pairs)


def feature_map(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 in float32: makes queries and keys positive."""
    return F.elu(x.float() if x.dtype != torch.float64 else x) + 1


def rotary_angles(
    height: int, width: int, channels: int, device: torch.device | str = "cpu", base: float = ROTARY_BASE
) -> torch.Tensor:
    """Angles [H W, C / 2] in float32: the first half turns with the row, the second with the column.

    Channel pair i of a half turns by position * base^(-i / (C / 4)). Cached for a few sizes. Raises InputError if
    `channels` is not a multiple of 4.
    """
    if channels % 4:
        raise InputError(f"rotary positions need a multiple of 4 channels, got {channels}")
    return _angles(height, width, channels, torch.device(device), base)


@lru_cache(maxsize=16)
def _angles(height: int, width: int, channels: int, device: torch.device, base: float) -> torch.Tensor:
    quarter = channels // 4
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        frequency = base ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        rows = torch.arange(height, dtype=torch.float64)[:, None, None] * frequency
        columns = torch.arange(width, dtype=torch.float64)[None, :, None] * frequency
        grid = (height, width, quarter)
        return torch.cat([rows.expand(grid), columns.expand(grid)], dim=-1).flatten(0, 1).float().to(device)


@lru_cache(maxsize=16)
def _rotations(height: int, width: int, channels: int, device: torch.device, base: float) -> torch.Tensor:
    angles = _angles(height, width, channels, device, base)
    with torch.inference_mode(False):
        return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turns the channel pairs (2j, 2j + 1) of x [B, L, C] by angles [L, C / 2]; float32."""
    return _turn(x, torch.polar(torch.ones_like(angles), angles))


def _turn(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2)


def _check(query: torch.Tensor, value: torch.Tensor, heads: int, tokens: int) -> None:
    if query.shape != value.shape or query.ndim != 3 or query.shape[1] != tokens or query.shape[2] % heads:
        raise InputError(
            f"linear_attention: expected [B, {tokens}, C] with C a multiple of {heads}, "
            f"got {tuple(query.shape)} and {tuple(value.shape)}"
        )


def _state(key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, heads, d, d]: mean over tokens of key times value; each factor scaled by L^(-1/2) so that sums stay small."""
    scale = key.shape[1] ** -0.5
    key, value = (rearrange(t, "b l (h d) -> b h l d", h=heads) for t in (key, value))
    return (key * scale).transpose(-2, -1) @ (value * scale)


def key_value_state(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    height: int,
    width: int,
    rotary: bool = True,
    base: float = ROTARY_BASE,
) -> torch.Tensor:
    """[B, heads, d, d] float32: mean over tokens of feature_map(key), rotated (row), times value (column)."""
    _check(key, value, heads, height * width)
    with torch.autocast(key.device.type, enabled=False):
        key = feature_map(key)
        if rotary:
            key = rotate(key, rotary_angles(height, width, key.shape[-1], key.device, base))
        return _state(key, value.to(key.dtype), heads)


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    height: int,
    width: int,
    *,
    rotary: bool = True,
    eps: float = 1e-6,
    base: float = ROTARY_BASE,
) -> torch.Tensor:
    """Attention in which rotated keys meet the values and unrotated keys normalise; O(L C d).

    query, key (before the feature map), value [B, H W, C], tokens in raster order; C a multiple of `heads`, and of 4
    if `rotary`. out_i = q'_i (1/L sum_j k'_j v_j) / (q_i (1/L sum_j k_j) + eps) per head, ' meaning rotated over all
    channels before the split into heads. Computes in float32 also under autocast; returns [B, H W, C] in value's
    dtype. Raises InputError for shapes that do not fit.
    """
    _check(query, value, heads, height * width)
    _check(key, value, heads, height * width)
    with torch.autocast(query.device.type, enabled=False):
        query, key = feature_map(query), feature_map(key)
        mean_key = key.mean(dim=1, keepdim=True)
        normaliser = (query * mean_key).unflatten(-1, (heads, -1)).sum(dim=-1, keepdim=True) + eps
        if rotary:
            if query.shape[-1] % 4:
                raise InputError(f"rotary positions need a multiple of 4 channels, got {query.shape[-1]}")
            rotations = _rotations(height, width, query.shape[-1], query.device, base)
            query, key = _turn(query, rotations), _turn(key, rotations)
        state = _state(key, value.to(key.dtype), heads)
        out = rearrange(query, "b l (h d) -> b h l d", h=heads) @ state
        return (rearrange(out, "b h l d -> b l h d") / normaliser).flatten(-2).to(value.dtype)
