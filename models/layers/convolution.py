"""Convolutions whose gradients are right in bfloat16 on a CPU too."""

from __future__ import annotations

import torch
from torch import nn


class DilatedConv2d(nn.Conv2d):
    """nn.Conv2d that takes a dilated convolution through float32 where it is trained on a CPU. [B, C, H, W].

    PyTorch 2.13's bfloat16 CPU kernel leaves parts of the weight gradient of a dilated depth-wise convolution unwritten
    in the channels-last layout: what comes back is whatever the memory held.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dilation == (1, 1) or x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
