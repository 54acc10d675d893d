"""Optical flow between two pictures: dense Lucas-Kanade, coarse to fine.

Lucas and Kanade, "An iterative image registration technique with an application to stereo vision" (IJCAI 1981), solved
in a window around every pixel at once, on a pyramid of luma with its local mean taken out, so that a change of
brightness is no motion. Where a window has no texture the motion of the coarser level stays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

LARGEST_SIDE = 512
"""Motion is estimated on pictures reduced to this; it is smooth enough to be scaled up."""
SMALLEST_SIDE = 12
WINDOW = 15
ITERATIONS = 3
DAMPING = 3e-3
"""Squared gradient (of values in 0..1) below which a window counts as flat: noise, left by a restorer, is no texture."""


def luma(image: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] as [B, 1, H, W] by ITU-R BT.601; one channel is taken as it is."""
    if image.shape[1] < 3:
        return image[:, :1]
    return (image[:, :3] * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)


def box(image: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over a square window, [B, C, H, W]; windows are cut off at the border."""
    half = size // 2
    across = F.avg_pool2d(image, (1, size), stride=1, padding=(0, half), count_include_pad=False)
    return F.avg_pool2d(across, (size, 1), stride=1, padding=(half, 0), count_include_pad=False)


def warp(image: torch.Tensor, flow: torch.Tensor, mode: str = "bicubic") -> torch.Tensor:
    """image [B, C, H, W] at x + flow(x); flow [B, 2, H, W] in pixels, horizontal first. Repeats the border."""
    height, width = image.shape[-2:]
    x = torch.arange(width, device=image.device) + flow[:, 0]
    y = torch.arange(height, device=image.device)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(image, grid, mode=mode, padding_mode="border", align_corners=False)


def resize_flow(flow: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Flow [B, 2, h, w] for pictures of another size (height, width)."""
    if tuple(flow.shape[-2:]) == tuple(size):
        return flow
    factor = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]])
    return F.interpolate(flow, size=size, mode="bilinear", align_corners=False) * factor[:, None, None]


def optical_flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Flow [B, 2, H, W] in pixels with first(x) = second(x + flow(x)), for pictures [B, C, H, W] in 0..1."""
    size = first.shape[-2:]
    images = torch.cat([luma(first), luma(second)]).float()
    factor = LARGEST_SIDE / max(size)
    if factor < 1:
        images = F.interpolate(images, size=[max(1, round(s * factor)) for s in size], mode="area")
    pyramid = [images]
    while min(pyramid[-1].shape[-2:]) >= 2 * SMALLEST_SIDE:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    flow = images.new_zeros(len(first), 2, *pyramid[-1].shape[-2:])
    for level in reversed(pyramid):
        level = level - box(level, 2 * WINDOW + 1)
        flow = _refine(*level.chunk(2), resize_flow(flow, level.shape[-2:]))
    return resize_flow(flow, size)


def _refine(first: torch.Tensor, second: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Gauss-Newton steps on sum over the window of (first - second(x + flow))^2."""
    dx, dy = _gradient(first)
    xx, xy, yy = box(torch.cat([dx * dx, dx * dy, dy * dy], dim=1), WINDOW).split(1, dim=1)
    xx, yy = xx + DAMPING, yy + DAMPING
    determinant = xx * yy - xy * xy
    for _ in range(ITERATIONS):
        error = first - warp(second, flow, "bilinear")
        ex, ey = box(torch.cat([dx * error, dy * error], dim=1), WINDOW).split(1, dim=1)
        step = torch.cat([yy * ex - xy * ey, xx * ey - xy * ex], dim=1) / determinant
        flow = box(flow + step.clamp(-2, 2), 5)
    return flow


def _gradient(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Central differences, [B, 1, H, W] each."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return dx, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def visible(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W], true where a pixel of the first picture is seen in the second: there the flow back cancels the flow.

    Sundaram, Brox and Keutzer, "Dense point trajectories by GPU-accelerated large displacement optical flow" (ECCV
    2010), equation 5.
    """
    height, width = forward.shape[-2:]
    returned = warp(backward, forward, "bilinear")
    length = (forward.square() + returned.square()).sum(dim=1, keepdim=True)
    consistent = (forward + returned).square().sum(dim=1, keepdim=True) < 0.01 * length + 0.5
    x = torch.arange(width, device=forward.device) + forward[:, :1]
    y = torch.arange(height, device=forward.device)[:, None] + forward[:, 1:]
    return consistent & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
