"""Cutting faces out of pictures upright and at one size, and putting them back: similarities, warps, masks.

Coordinates are continuous: the centre of the first pixel is at (0.5, 0.5). A face's similarity maps a picture's pixels
to the unit square of its crop, so that it serves crops of every size.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..errors import InputError

LANDMARKS = (
    (192.98138, 239.94708),
    (318.90277, 240.19360),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)
"""Where eyes, nose and corners of the mouth lie in an aligned face of 512 pixels (FFHQ's alignment)."""
TEMPLATE = torch.tensor(LANDMARKS, dtype=torch.float64) / 512
BOX_CENTRE, BOX_SIDE = (0.5, 0.55), 0.66
"""Where a detected face's box comes to lie in its aligned crop: its centre, and its longer side."""
FINEST = 4
"""Samples per output pixel and axis; a picture that is finer still is halved first."""
MARGIN = 3
"""Output pixels around a warp that its antialiasing looks at: the reach of the Lanczos filter."""


def similarity(points: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The rotation, uniform scale and shift that bring `points` closest to `targets`, both [n, 2]; float64 [2, 3].

    Least squares without reflection (Umeyama 1991), which is linear when points are complex numbers. Raises InputError
    if the points are all the same.
    """
    p, q = (torch.view_as_complex(x.double().contiguous()) for x in (points, targets))
    p_mean, q_mean = p.mean(), q.mean()
    spread = (p - p_mean).abs().square().sum()
    if not spread > 0:
        raise InputError("landmarks: all points of a face are the same; there is no way to align it")
    turn = ((p - p_mean).conj() * (q - q_mean)).sum() / spread
    shift = q_mean - turn * p_mean
    return torch.tensor([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]], dtype=torch.float64)


def upright(box: torch.Tensor) -> torch.Tensor:
    """The similarity, without rotation, of a face known by its box alone: x0, y0, x1, y1 in pixels."""
    x0, y0, x1, y1 = box.double().tolist()
    side = max(x1 - x0, y1 - y0)
    if not side > 0:
        raise InputError(f"box: {x0:g}, {y0:g} to {x1:g}, {y1:g} is empty")
    scale = BOX_SIDE / side
    shift = [
        centre - scale * (low + high) / 2 for centre, low, high in zip(BOX_CENTRE, (x0, y0), (x1, y1), strict=True)
    ]
    return torch.tensor([[scale, 0.0, shift[0]], [0.0, scale, shift[1]]], dtype=torch.float64)


def inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of an affine map [2, 3]."""
    linear = torch.linalg.inv(matrix[:, :2])
    return torch.cat([linear, -linear @ matrix[:, 2:]], dim=1)


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """The affine map x -> outer(inner(x)), [2, 3]."""
    return torch.cat([outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2:] + outer[:, 2:]], dim=1)


def stretch(x: float, y: float, shift_x: float = 0.0, shift_y: float = 0.0) -> torch.Tensor:
    """The affine map (x, y) -> (a x + c, b y + d)."""
    return torch.tensor([[x, 0.0, shift_x], [0.0, y, shift_y]], dtype=torch.float64)


def apply(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """An affine map on points [n, 2], float64."""
    return points.double() @ matrix[:, :2].T + matrix[:, 2]


def corners(width: float, height: float) -> torch.Tensor:
    """The corners of a rectangle at the origin, [4, 2]."""
    return torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)


def warp(image: torch.Tensor, matrix: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    """Draws image [B, C, H, W] at `size` (height, width): output point x shows the image at matrix(x).

    What is finer than the output's pixels is averaged away before it can alias. Beyond its border the image is mirrored.
    """
    height, width = size
    reach = apply(matrix, corners(width + 2 * MARGIN, height + 2 * MARGIN) - MARGIN)
    low, high = reach.amin(0) - 4, reach.amax(0) + 4
    x0, y0 = (
        int(max(0, min(math.floor(v), limit - 1))) for v, limit in zip(low.tolist(), image.shape[:1:-1], strict=True)
    )
    x1, y1 = (int(max(1, min(math.ceil(v), limit))) for v, limit in zip(high.tolist(), image.shape[:1:-1], strict=True))
    image = image[..., y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].float()
    matrix = compose(stretch(1, 1, -x0, -y0), matrix)
    density = math.sqrt(abs(float(torch.linalg.det(matrix[:, :2]))))
    while density > FINEST and min(image.shape[-2:]) > 1:
        half = (math.ceil(image.shape[-2] / 2), math.ceil(image.shape[-1] / 2))
        matrix = compose(stretch(half[1] / image.shape[-1], half[0] / image.shape[-2]), matrix)
        image, density = F.interpolate(image, half, mode="bicubic", antialias=True), density / 2
    fine = min(FINEST, max(1, math.ceil(density - 1e-6)))
    border = MARGIN if fine > 1 else 0
    rows, columns = height + 2 * border, width + 2 * border
    y = (torch.arange(rows * fine, dtype=torch.float64) + 0.5) / fine - border
    x = (torch.arange(columns * fine, dtype=torch.float64) + 0.5) / fine - border
    # Pixels to the -1..1 between the outer edges of the image, which is what align_corners=False means.
    matrix = compose(stretch(2 / image.shape[-1], 2 / image.shape[-2], -1, -1), matrix)
    across, down, shift = matrix[:, 0], matrix[:, 1], matrix[:, 2]
    grid = (x[None, :, None] * across + y[:, None, None] * down + shift).float().to(image.device)
    drawn = F.grid_sample(
        image, grid.expand(len(image), -1, -1, -1), mode=mode, padding_mode="reflection", align_corners=False
    )
    if fine == 1:
        return drawn
    return _decimated(_decimated(drawn, fine).mT, fine).mT


@lru_cache(maxsize=8)
def _lanczos(factor: int) -> torch.Tensor:
    """Taps of a Lanczos-3 filter for every `factor`-th sample, centred on a block of so many."""
    taps = 2 * MARGIN * factor + factor % 2
    x = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) / factor
    weights = torch.sinc(x) * torch.sinc(x / MARGIN)
    return (weights / weights.sum()).float()


def _decimated(image: torch.Tensor, factor: int) -> torch.Tensor:
    """[B, C, (n + 2 MARGIN) factor, m] -> [B, C, n, m]: blocks of rows, filtered so that nothing aliases."""
    taps = _lanczos(factor).to(image.device)
    skipped = MARGIN * factor - (len(taps) - factor) // 2
    wanted = image.shape[-2] - 2 * MARGIN * factor - factor + len(taps)
    rows = image[..., skipped : skipped + wanted, :].flatten(0, 1)[:, None]
    return F.conv2d(rows, taps[None, None, :, None], stride=(factor, 1)).reshape(*image.shape[:2], -1, image.shape[-1])


def soft_square(matrix: torch.Tensor, size: tuple[int, int], feather: float) -> torch.Tensor:
    """[height, width]: 1 where matrix(x) lies in the unit square, falling smoothly to 0 at its border and beyond.

    feather: width of the fall, as a part of the square's side, 0..0.5.
    """
    y = torch.arange(size[0], dtype=torch.float64) + 0.5
    x = torch.arange(size[1], dtype=torch.float64) + 0.5
    place = x[None, :, None] * matrix[:, 0] + y[:, None, None] * matrix[:, 1] + matrix[:, 2]
    depth = torch.minimum(place, 1 - place)
    if feather <= 0:
        return (depth > 0).all(dim=-1).float()
    ramp = (depth / feather).clamp(0, 1)
    return (ramp.square() * (3 - 2 * ramp)).prod(dim=-1).float()
