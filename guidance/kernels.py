"""Blur kernels and resampling weights, as float64 tensors that sum to one."""

from __future__ import annotations

import math

import torch

from ..errors import InputError


def keys_cubic(t: torch.Tensor, a: float = -0.5) -> torch.Tensor:
    """Keys' cubic convolution kernel (1981); a = -0.5 as MATLAB and Pillow have it."""
    t = t.abs()
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def gaussian_1d(taps: int, sigma: float) -> torch.Tensor:
    """`taps` samples of a Gaussian around the middle one."""
    position = torch.arange(taps, dtype=torch.float64) - taps // 2
    weights = torch.exp(-0.5 * (position / sigma) ** 2)
    return weights / weights.sum()


def uniform_1d(taps: int) -> torch.Tensor:
    """A box."""
    return torch.full((taps,), 1.0 / taps, dtype=torch.float64)


def gaussian_2d(size: int, sigma: float, truncate: float = 4.0) -> torch.Tensor:
    """A centred delta of `size` x `size` filtered by a Gaussian cut at `truncate` sigma, half-sample symmetric borders."""
    radius = int(truncate * sigma + 0.5)
    weights = gaussian_1d(2 * radius + 1, sigma)
    line = torch.zeros(size, dtype=torch.float64)
    places = torch.arange(-radius, radius + 1) + size // 2
    line.index_add_(0, mirror(places, size), weights)
    return torch.outer(line, line)


def motion_2d(length: float, angle: float, size: int = 0) -> torch.Tensor:
    """A straight motion of `length` pixels at `angle` degrees (anticlockwise from the right), drawn with soft ends."""
    if length < 1:
        raise InputError(f"length: {length} is shorter than one pixel")
    size = size or 2 * math.ceil(length / 2) + 1
    centre = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(-centre, centre, indexing="ij")
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, across = x * cosine + y * sine, -x * sine + y * cosine
    kernel = (1 - across.abs()).clamp(0, 1) * (length / 2 + 0.5 - along.abs()).clamp(0, 1)
    return kernel / kernel.sum()


def bicubic_decimation_1d(factor: int) -> torch.Tensor:
    """The 4 f taps of the published bicubic down-sampling, sampled at half pixels."""
    taps = torch.arange(4 * factor, dtype=torch.float64)
    weights = keys_cubic((taps - 2 * factor + 0.5) / factor)
    return weights / weights.sum()


def bicubic_decimation_2d(factor: int) -> torch.Tensor:
    """The (4 f + 1)^2 kernel of the circular bicubic down-sampling, sampled at whole pixels."""
    weights = keys_cubic(torch.arange(-2 * factor, 2 * factor + 1, dtype=torch.float64) / factor)
    kernel = torch.outer(weights, weights)
    return kernel / kernel.sum()


def mirror(index: torch.Tensor, length: int) -> torch.Tensor:
    """Indices folded back at half-sample symmetric borders, the edge pixel repeated: -1 -> 0, n -> n - 1."""
    index = index % (2 * length)
    return torch.where(index < length, index, 2 * length - 1 - index)


def filter_matrix(length: int, weights: torch.Tensor, first: int) -> torch.Tensor:
    """Square 1-D filter with zero borders: row i, tap t multiplies pixel i + first + t. [length, length]"""
    matrix = torch.zeros(length, length, dtype=torch.float64)
    rows = torch.arange(length)
    for tap, weight in enumerate(weights.tolist()):
        columns = rows + first + tap
        inside = (columns >= 0) & (columns < length)
        matrix[rows[inside], columns[inside]] += weight
    return matrix


def decimation_matrix(length: int, factor: int) -> torch.Tensor:
    """Published bicubic down-sampling of a line, half-sample symmetric borders. [length / factor, length]

    Row r is centred at r f + floor(f / 2): for odd factors half a pixel before the centre of its block.
    """
    if length % factor:
        raise InputError(f"image: a side of {length} pixels is not divisible by the factor {factor}")
    weights = bicubic_decimation_1d(factor)
    rows = torch.arange(length // factor)
    matrix = torch.zeros(length // factor, length, dtype=torch.float64)
    for tap, weight in enumerate(weights.tolist()):
        columns = mirror(rows * factor + factor // 2 - 2 * factor + tap, length)
        matrix.index_put_((rows, columns), torch.full((len(rows),), weight, dtype=torch.float64), accumulate=True)
    return matrix


def resize_matrix(length: int, scale: float, equal_margins: bool = True) -> torch.Tensor:
    """MATLAB's imresize of a line: bicubic, stretched against aliasing, half-sample symmetric. [ceil(n scale), n]

    equal_margins shifts the grid where the size is not divisible so that both margins are the same.
    """
    output = math.ceil(length * scale - 1e-9)
    point = torch.arange(1, output + 1, dtype=torch.float64)
    margin = (output - length * scale) / 2 if equal_margins else 0.0
    centre = (point - margin) / scale + 0.5 * (1 - 1 / scale)
    stretch = min(scale, 1.0)
    width = 4 / stretch
    left = torch.floor(centre - width / 2)
    index = left[:, None] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)
    weights = stretch * keys_cubic(stretch * (centre[:, None] - index))
    weights = weights / weights.sum(dim=1, keepdim=True)
    matrix = torch.zeros(output, length, dtype=torch.float64)
    return matrix.scatter_add_(1, mirror(index.long() - 1, length), weights)
