"""Memory layout of feature maps."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend.models.layers.attention import TransposedAttention, transposed_attention
from comfyui_mend.models.layers.layout import fastest_layout, is_channels_last
from comfyui_mend.models.layers.norm import NormBody


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_layers_compute_the_same_in_both_layouts_and_keep_the_layout(batch: int, heads: int) -> None:
    norm, attention = NormBody(8).double(), TransposedAttention(8, heads, bias=True).double()
    x = torch.randn(batch, 8, 5, 7, dtype=torch.float64)
    last = x.contiguous(memory_format=torch.channels_last)
    assert is_channels_last(last) and not is_channels_last(x)
    for layer in (norm, attention):
        assert torch.allclose(layer(last), layer(x), atol=1e-6)
        assert layer(last).is_contiguous(memory_format=torch.channels_last)
        assert layer(x).is_contiguous()


def test_projecting_inside_the_attention_is_projecting_after_it() -> None:
    query, key, value = torch.randn(3, 2, 8, 4, 6, dtype=torch.float64)
    project, temperature = torch.nn.Conv2d(8, 8, 1, dtype=torch.float64), torch.rand(2, 1, 1, dtype=torch.float64)
    together = transposed_attention(query, key, value, temperature, project=project)
    assert torch.allclose(together, project(transposed_attention(query, key, value, temperature)), atol=1e-6)


def test_attention_to_a_black_picture_has_finite_gradients() -> None:
    x = fastest_layout(torch.zeros(1, 8, 4, 4)).requires_grad_()
    TransposedAttention(8, 2, bias=False)(x).sum().backward()
    assert torch.isfinite(x.grad).all()
