"""The shared convolution."""

from __future__ import annotations

import torch

from comfyui_mend.models.layers.convolution import DilatedConv2d


def test_dilated_depthwise_gradients_in_bfloat16_are_those_in_float32() -> None:
    torch.manual_seed(0)
    convolution = DilatedConv2d(48, 48, 3, padding=4, dilation=4, groups=48).to(memory_format=torch.channels_last)
    x = torch.randn(4, 48, 32, 32).contiguous(memory_format=torch.channels_last)
    (want,) = torch.autograd.grad(convolution(x).square().mean(), convolution.weight)
    for _ in range(8):
        torch.full((10**6,), float("nan"))  # what freed memory may hold
        with torch.autocast("cpu", torch.bfloat16):
            loss = convolution(x.bfloat16()).square().mean()
        (got,) = torch.autograd.grad(loss, convolution.weight)
        assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_models_cast_to_bfloat16_keep_their_dtype() -> None:
    convolution = DilatedConv2d(4, 4, 3, padding=2, dilation=2, groups=4).bfloat16()
    assert convolution(torch.rand(1, 4, 8, 8).bfloat16()).dtype == torch.bfloat16
