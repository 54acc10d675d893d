"""Means over windows."""

from __future__ import annotations

import torch


def local_mean(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Mean over every window of `window` (height, width) pixels, stride 1; a larger window is cut to the map.

    [B, C, H, W] -> [B, C, H - kh + 1, W - kw + 1]. One running sum an axis, so the cost does not grow with the window;
    in float32, with the mean of the map taken out first, which keeps the sums small (an integral image's are not).
    """
    kernel = [min(k, side) for k, side in zip(window, x.shape[2:], strict=True)]
    centre = x.mean(dim=(2, 3), keepdim=True, dtype=torch.float32)
    if kernel == list(x.shape[2:]):
        return centre.to(x.dtype)
    mean = x.float() - centre
    for dim, k in zip((2, 3), kernel, strict=True):
        size = mean.shape[dim]
        if k == size:
            mean = mean.mean(dim=dim, keepdim=True)
            continue
        total = mean.cumsum(dim=dim)
        windows = total.narrow(dim, k - 1, size - k + 1).clone()
        windows.narrow(dim, 1, size - k).sub_(total.narrow(dim, 0, size - k))
        mean = windows / k
    return (mean + centre).to(x.dtype)
