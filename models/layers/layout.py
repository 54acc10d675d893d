"""The memory layout in which a network's feature maps are computed fastest."""

from __future__ import annotations

import torch


def fastest_layout(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] in the layout that convolutions on its device like best; the values stay.

    On CPUs that is channels last: oneDNN's depth-wise convolutions are many times faster there, and layers keep the
    layout they are given. Elsewhere nothing is changed.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of a pixel of x [B, C, H, W] lie side by side, as in a slice of a channels-last tensor."""
    return x.stride(1) == 1 and x.stride(3) >= x.shape[1]
