"""Linear attention: equal to its quadratic form, in float32, trainable."""

from __future__ import annotations

import pytest
import torch
from scans import assert_near

from comfyui_mend.errors import InputError
from comfyui_mend.kernels import linear_attention as attention


def quadratic_attention(query, key, value, heads, angles):
    """The same written as an L x L matrix, float64."""
    query, key, value = query.double(), key.double(), value.double()
    query, key = (torch.nn.functional.elu(t) + 1 for t in (query, key))

    def turn(t):
        even, odd = t[..., 0::2], t[..., 1::2]
        cos, sin = angles.double().cos(), angles.double().sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def split(t):
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    length = query.shape[1]
    scores = split(turn(query)) @ split(turn(key)).transpose(-2, -1) / length
    norm = (split(query) @ split(key).transpose(-2, -1)).sum(dim=-1, keepdim=True) / length + 1e-6
    return (scores @ split(value) / norm).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize(("height", "width", "channels", "heads"), [(6, 10, 16, 2), (1, 1, 4, 1), (7, 3, 24, 3)])
def test_linear_attention_is_the_quadratic_form(height, width, channels, heads):
    q, k, v = torch.randn(3, 2, height * width, channels, generator=torch.Generator().manual_seed(0))
    angles = attention.rotary_angles(height, width, channels)
    assert_near(
        attention.linear_attention(q, k, v, heads, height, width), quadratic_attention(q, k, v, heads, angles), 1e-5
    )
    plain = quadratic_attention(q, k, v, heads, torch.zeros_like(angles))
    assert_near(attention.linear_attention(q, k, v, heads, height, width, rotary=False), plain, 1e-5)


def test_linear_attention_computes_in_float32_under_autocast_and_in_half():
    q, k, v = torch.randn(3, 1, 400, 16, generator=torch.Generator().manual_seed(0))
    want = attention.linear_attention(q, k, v, 2, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.linear_attention(q, k, v, 2, 20, 20), want)
    half = attention.linear_attention(q.half(), k.half(), v.half() * 1000, 2, 20, 20)
    assert half.dtype == torch.float16 and torch.isfinite(half).all()


def test_linear_attention_can_be_trained_after_inference_mode():
    with torch.inference_mode():
        attention.linear_attention(*torch.randn(3, 1, 6, 8), 1, 2, 3)
    q = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 1, 6, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: attention.linear_attention(q, k, v, 1, 2, 3, rotary=False), (q,))
    attention.linear_attention(q.float(), k.float(), v.float(), 1, 2, 3).sum().backward()
    assert torch.isfinite(q.grad).all()


def test_linear_attention_refuses_wrong_shapes():
    with pytest.raises(InputError, match="multiple of 4"):
        attention.linear_attention(*torch.zeros(3, 1, 6, 6), 1, 2, 3)
    with pytest.raises(InputError, match="B, 6, C"):
        attention.linear_attention(*torch.zeros(3, 1, 5, 8), 1, 2, 3)
