"""Operators that filter: blurs and down-sampling, with the borders that each is published with.

Conventions as in operators.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..errors import InputError
from . import kernels
from .operators import Iterative, Operator, check_divisible

THRESHOLD = 0.03
"""1-D singular values below this count as zero in the published separable operators."""


@dataclass(frozen=True)
class _Svd:
    """A line operator as U diag(s) V^T, singular values sorted, small ones zero."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor


@dataclass(eq=False)
class Separable(Operator):
    """A X = A_h X A_w^T per channel, by the SVDs of two small matrices.

    `rows` and `columns` give the matrix [m, n] of a line of n pixels, along the height and the width. With `threshold`, 1-D
    singular values below it are zero in A as well, as published.
    `official_layout` repeats the defect of the released blur classes (singular values laid out by channel, coefficients by
    pixel): only to reproduce published numbers, it is not a blur.
    """

    rows: Callable[[int], torch.Tensor]
    columns: Callable[[int], torch.Tensor]
    name: str = "separable"
    threshold: float = THRESHOLD
    factor: float = 1
    official_layout: bool = False
    _cache: dict[tuple[str, int, torch.device], _Svd] = field(default_factory=dict, repr=False)

    def _line(self, which: str, length: int, device: torch.device) -> _Svd:
        key = (which, length, device)
        if key not in self._cache:
            matrix = (self.rows if which == "rows" else self.columns)(length)
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            s = torch.where(s < max(self.threshold, 1e-12 * float(s.max())), 0.0, s)
            self._cache[key] = _Svd(*(t.to(device, torch.float32) for t in (u, s, vh.T.contiguous())))
        return self._cache[key]

    def _pair(self, x: torch.Tensor) -> tuple[_Svd, _Svd]:
        return self._line("rows", x.shape[-2], x.device), self._line("columns", x.shape[-1], x.device)

    def _pair_for(self, y: torch.Tensor) -> tuple[_Svd, _Svd]:
        height, width = self.input_size(*y.shape[-2:])
        return self._line("rows", height, y.device), self._line("columns", width, y.device)

    def _gain(self, lines: tuple[_Svd, _Svd]) -> torch.Tensor:
        """Singular values of A, [m_h, m_w], or [3, m_h, m_w] in the defective layout."""
        gain = lines[0].s[:, None] * lines[1].s
        if not self.official_layout:
            return gain
        ordered, order = gain.flatten().sort(descending=True)
        count = torch.arange(len(ordered), device=gain.device)
        laid_out = torch.stack([ordered[(3 * count + channel) % len(ordered)] for channel in range(3)])
        return torch.zeros_like(laid_out).scatter(1, order.expand(3, -1), laid_out).unflatten(1, gain.shape)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        h, w = lines = self._pair(x)
        return h.u @ (self._gain(lines) * (h.v.T @ x @ w.v)) @ w.u.T

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        h, w = lines = self._pair_for(y)
        return h.v @ (self._gain(lines) * (h.u.T @ y @ w.u)) @ w.v.T

    def A_dagger(self, y: torch.Tensor, eta: float = 0.0) -> torch.Tensor:
        h, w = lines = self._pair_for(y)
        return h.v @ (_regularised_inverse(self._gain(lines), eta) * (h.u.T @ y @ w.u)) @ w.v.T

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        h, w = lines = self._pair_for(y)
        gain = self._gain(lines) ** 2
        seen = h.u.T @ y @ w.u
        inside = torch.where(gain + eta > 0, 1 / (gain + eta).clamp_min(1e-30), 0.0) * seen
        result = h.u @ inside @ w.u.T
        return result if eta == 0 else result + (y - h.u @ seen @ w.u.T) / eta

    def normal_inverse(self, x: torch.Tensor, eta: float) -> torch.Tensor:
        h, w = lines = self._pair(x)
        seen = h.v.T @ x @ w.v
        return h.v @ (seen / (self._gain(lines) ** 2 + eta) - seen / eta) @ w.v.T + x / eta

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return math.ceil(height / self.factor - 1e-9), math.ceil(width / self.factor - 1e-9)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return round(height * self.factor), round(width * self.factor)


def _regularised_inverse(gain: torch.Tensor, eta: float) -> torch.Tensor:
    """s / (s^2 + eta), 0 where s is 0."""
    return torch.where(gain > 0, gain / (gain**2 + eta).clamp_min(1e-30), 0.0)


def bicubic_downsampling(factor: int) -> Separable:
    """Bicubic down-sampling by a whole factor with symmetric borders (as MATLAB and Pillow, for even factors)."""
    lines = lru_cache(maxsize=8)(lambda length: kernels.decimation_matrix(length, factor))
    return Separable(lines, lines, f"bicubic x{factor}", factor=factor)


def separable_blur(
    vertical: torch.Tensor, horizontal: torch.Tensor, *, drop_last: bool = False, official_layout: bool = False
) -> Separable:
    """Blur by two 1-D kernels with zero borders. drop_last repeats an off-by-one of the published anisotropic blur."""

    def matrix(kernel: torch.Tensor) -> Callable[[int], torch.Tensor]:
        taps = kernel[:-1] if drop_last else kernel
        return lambda length: kernels.filter_matrix(length, taps.double(), -(len(kernel) // 2))

    return Separable(matrix(vertical), matrix(horizontal), "separable blur", official_layout=official_layout)


@dataclass(eq=False)
class Resize(Iterative):
    """MATLAB's imresize by `scale` < 1 (bicubic, antialiased, symmetric borders), any size; exact adjoint."""

    scale: float
    equal_margins: bool = True
    size: tuple[int, int] | None = None
    """Size of the image behind a measurement, which does not follow from the measurement's: `fitted` sets it."""
    name = "resize"
    _cache: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)

    def _line(self, length: int, like: torch.Tensor) -> torch.Tensor:
        key = (length, like.device)
        if key not in self._cache:
            self._cache[key] = kernels.resize_matrix(length, self.scale, self.equal_margins).to(like)
        return self._cache[key]

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return self._line(x.shape[-2], x) @ x @ self._line(x.shape[-1], x).T

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        height, width = self.input_size(*y.shape[-2:])
        return self._line(height, y).T @ y @ self._line(width, y)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return math.ceil(height * self.scale - 1e-9), math.ceil(width * self.scale - 1e-9)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """`size` where it gives such a measurement, else the largest that does."""
        if self.size is not None and self.output_size(*self.size) == (height, width):
            return self.size
        # The tolerance is that of `output_size`: what is rounded up there is rounded down here.
        return math.floor((height + 1e-9) / self.scale), math.floor((width + 1e-9) / self.scale)

    def fitted(self, height: int, width: int, measured: bool = False) -> Resize:
        # A copy: the operator of a node serves pictures of many sizes.
        return replace(self, size=self.input_size(height, width) if measured else (height, width))


@dataclass(eq=False)
class CircularBlur(Operator):
    """Convolution with a kernel [k_h, k_w] and circular borders, then every `factor`-th pixel of both axes.

    The kernel's centre is (k - 1) // 2, or k // 2 with `centre_after` (they differ for even kernels). Exact adjoint;
    `published_adjoint`: the flipped kernel, centred as the kernel is, which is off by a pixel for even kernels; only to
    reproduce published numbers.
    """

    kernel: torch.Tensor
    factor: int = 1
    centre_after: bool = False
    published_adjoint: bool = False
    name = "circular blur"
    _cache: dict[tuple[int, int, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)

    def transfer(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """The optical transfer function, complex [height, width]."""
        key = (height, width, device)
        if key not in self._cache:
            k_h, k_w = self.kernel.shape
            if k_h > height or k_w > width:
                raise InputError(f"kernel: {k_w} x {k_h} pixels are larger than the image, {width} x {height}")
            placed = torch.zeros(height, width, dtype=torch.float64)
            placed[:k_h, :k_w] = self.kernel
            back = [k // 2 if self.centre_after else (k - 1) // 2 for k in (k_h, k_w)]
            placed = placed.roll((-back[0], -back[1]), (0, 1))
            self._cache[key] = torch.fft.fft2(placed).to(device, torch.complex64)
        return self._cache[key]

    def _filter(self, x: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x.float()) * response).real

    def A(self, x: torch.Tensor) -> torch.Tensor:
        check_divisible(x, self.factor)
        blurred = self._filter(x, self.transfer(*x.shape[-2:], x.device))
        return blurred[..., :: self.factor, :: self.factor]

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        spread = y
        if self.factor > 1:
            spread = y.new_zeros(*y.shape[:-2], *self.input_size(*y.shape[-2:]))
            spread[..., :: self.factor, :: self.factor] = y
        size = spread.shape[-2:]
        if self.published_adjoint:
            flipped = CircularBlur(self.kernel.flip(0, 1), centre_after=self.centre_after)
            return self._filter(spread, flipped.transfer(*size, y.device))
        return self._filter(spread, self.transfer(*size, y.device).conj())

    def _power(self, y: torch.Tensor) -> torch.Tensor:
        """Eigenvalues of A A^T: |H|^2 averaged over the frequencies that decimation makes one."""
        power = self.transfer(*self.input_size(*y.shape[-2:]), y.device).abs() ** 2
        return power.unflatten(1, (self.factor, -1)).unflatten(0, (self.factor, -1)).mean(dim=(0, 2))

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        power = self._power(y) + eta
        return self._filter(y, torch.where(power > 1e-10, 1 / power.clamp_min(1e-30), 0.0))

    def normal_inverse(self, x: torch.Tensor, eta: float) -> torch.Tensor:
        if self.factor > 1:
            return super().normal_inverse(x, eta)
        return self._filter(x, 1 / (self.transfer(*x.shape[-2:], x.device).abs() ** 2 + eta))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height // self.factor, width // self.factor

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return height * self.factor, width * self.factor


@dataclass(eq=False)
class ReflectBlur(Iterative):
    """Correlation with an odd kernel [k, k] after reflection padding (edge pixel not repeated): RDMD's blur."""

    kernel: torch.Tensor
    name = "blur"

    def __post_init__(self) -> None:
        if self.kernel.ndim != 2 or not all(k % 2 for k in self.kernel.shape):
            raise InputError(f"kernel: sides must be odd, got {tuple(self.kernel.shape)}")

    def _weights(self, like: torch.Tensor) -> torch.Tensor:
        return self.kernel.to(like)[None, None].expand(like.shape[1], 1, -1, -1).contiguous()

    def _margins(self, image: torch.Tensor) -> tuple[int, int]:
        """How far the kernel reaches beyond the image: a mirror shows no more pixels than the image has."""
        k_h, k_w = self.kernel.shape
        if image.shape[-2] <= k_h // 2 or image.shape[-1] <= k_w // 2:
            raise InputError(
                f"image: {image.shape[-1]} x {image.shape[-2]} pixels are too few for a kernel of {k_w} x {k_h}"
            )
        return k_h // 2, k_w // 2

    def A(self, x: torch.Tensor) -> torch.Tensor:
        vertical, horizontal = self._margins(x)
        padded = F.pad(x, (horizontal, horizontal, vertical, vertical), mode="reflect")
        return F.conv2d(padded, self._weights(x), groups=x.shape[1])

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        vertical, horizontal = self._margins(y)
        spread = F.conv_transpose2d(y, self._weights(y), groups=y.shape[1])
        return _fold_reflection(_fold_reflection(spread, -2, vertical), -1, horizontal)


def _fold_reflection(x: torch.Tensor, dim: int, margin: int) -> torch.Tensor:
    """Adjoint of reflection padding by `margin` along one axis."""
    if not margin:
        return x
    size = x.shape[dim] - 2 * margin
    inner = x.narrow(dim, margin, size).clone()
    inner.narrow(dim, 1, margin).add_(x.narrow(dim, 0, margin).flip(dim))
    inner.narrow(dim, size - 1 - margin, margin).add_(x.narrow(dim, margin + size, margin).flip(dim))
    return inner
