"""Linear degradations y = A x + n, with what restoration needs of them: A, its adjoint, its pseudo-inverse.

Images are [B, C, H, W] float32 of any size that the operator takes; the value range does not matter. Every operator is
tested by the same identities: <A x, y> = <x, A' y>, A A+ A = A, and A+ with regularisation solves its normal equations.
Vocabulary as in deepinv; the kinds of DDRM, DDPG, CM4IR and RDMD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..errors import InputError
from . import kernels
from .solvers import conjugate_gradients, least_squares

THRESHOLD = 0.03
"""1-D singular values below this count as zero in the published separable operators."""


class Operator:
    """A linear map from images to measurements.

    A subclass gives `A`, `A_adjoint` and `gram_inverse`; the rest follows. Those without a closed form of the last are
    `Iterative`.
    """

    name = "operator"

    def A(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W] -> measurement [B, C', h, w]. Raises InputError for a size it cannot take."""
        raise NotImplementedError

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """A^T y: measurement -> image."""
        raise NotImplementedError

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        """(A A^T + eta I)^-1 y."""
        raise NotImplementedError

    def A_dagger(self, y: torch.Tensor, eta: float = 0.0) -> torch.Tensor:
        """A^T (A A^T + eta I)^-1 y; eta 0: the pseudo-inverse, what A cannot see stays 0."""
        return self.A_adjoint(self.gram_inverse(y, eta))

    def normal_inverse(self, x: torch.Tensor, eta: float) -> torch.Tensor:
        """(A^T A + eta I)^-1 x, eta > 0."""
        return (x - self.A_dagger(self.A(x), eta)) / eta

    def back_project(self, x: torch.Tensor, y: torch.Tensor, eta: float = 0.0, step: float = 1.0) -> torch.Tensor:
        """x - step A+ (A x - y): moves an estimate onto what was measured."""
        return x - step * self.A_dagger(self.A(x) - y, eta)

    def prox(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
        """argmin_z |A z - y|^2 + weight |z - x|^2."""
        return self.back_project(x, y, weight)

    def gradient(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A^T (A x - y), the gradient of |A x - y|^2 / 2."""
        return self.A_adjoint(self.A(x) - y)

    def fitted(self, height: int, width: int, measured: bool = False) -> Operator:
        """This operator for images (with `measured`: for measurements) of this size: a mask, say, is made anew for it.

        Most operators hold nothing that has a size.
        """
        return self

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the measurement of an image."""
        return height, width

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the image behind a measurement."""
        return height, width


class Iterative(Operator):
    """An operator whose inverses have no closed form: by conjugate gradients, each image of the batch by itself."""

    iterations = 400
    """At most; they end sooner when the residual has fallen to a millionth."""

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        return conjugate_gradients(lambda v: self.A(self.A_adjoint(v)) + eta * v, y, self.iterations)

    def A_dagger(self, y: torch.Tensor, eta: float = 0.0) -> torch.Tensor:
        """As in closed form also for a `y` that no picture gives, and where A A^T is singular."""
        return least_squares(self.A, self.A_adjoint, y, eta, self.iterations)


@dataclass(eq=False)
class Denoising(Operator):
    """A = I."""

    name = "denoising"

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        return y / (1 + eta)

    def normal_inverse(self, x: torch.Tensor, eta: float) -> torch.Tensor:
        return x / (1 + eta)


@dataclass(eq=False)
class Inpainting(Operator):
    """Keeps the pixels where mask [H, W] or [B, 1, H, W] is 1, zeros elsewhere."""

    mask: torch.Tensor
    name = "inpainting"

    def __post_init__(self) -> None:
        self.mask = (self.mask >= 0.5).float()
        if self.mask.ndim == 2:
            self.mask = self.mask[None, None]

    def _known(self, x: torch.Tensor) -> torch.Tensor:
        if len({1, len(self.mask), len(x)}) > 2:
            raise InputError(f"mask: {len(self.mask)} masks for {len(x)} pictures; connect one for all or one for each")
        if self.mask.shape[-2:] != x.shape[-2:]:
            raise InputError(
                f"mask: {tuple(self.mask.shape[-2:])} pixels, the image has {tuple(x.shape[-2:])}; make them the same size"
            )
        return self.mask.to(x)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._known(x)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y * self._known(y)

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        return y * self._known(y) / (1 + eta)

    def normal_inverse(self, x: torch.Tensor, eta: float) -> torch.Tensor:
        known = self._known(x)
        return x * (known / (1 + eta) + (1 - known) / eta)


@dataclass(eq=False)
class Colourisation(Operator):
    """A grey picture: y = sum_c w_c x_c."""

    weights: tuple[float, ...] = (0.3333, 0.3334, 0.3333)
    name = "colourisation"

    def _weights(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device)[:, None, None]

    def A(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != len(self.weights):
            raise InputError(f"image: {x.shape[1]} channels, colourisation needs {len(self.weights)}")
        return (x * self._weights(x)).sum(dim=1, keepdim=True)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y[:, :1] * self._weights(y)

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        return y[:, :1] / (sum(w * w for w in self.weights) + eta)


@dataclass(eq=False)
class AveragePooling(Operator):
    """Mean over factor x factor blocks."""

    factor: int
    name = "average pooling"

    def A(self, x: torch.Tensor) -> torch.Tensor:
        _check_divisible(x, self.factor)
        return F.avg_pool2d(x, self.factor)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return F.interpolate(y, scale_factor=self.factor, mode="nearest") / self.factor**2

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        return y / (self.factor**-2 + eta)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height // self.factor, width // self.factor

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return height * self.factor, width * self.factor


def _check_divisible(x: torch.Tensor, factor: int) -> None:
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise InputError(
            f"image: {x.shape[-1]} x {x.shape[-2]} pixels are not divisible by the factor {factor}; crop it"
        )


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
    """Size of the image behind a measurement; needed where it does not follow from the measurement's."""
    name = "resize"
    _cache: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)

    def _line(self, length: int, like: torch.Tensor) -> torch.Tensor:
        key = (length, like.device)
        if key not in self._cache:
            self._cache[key] = kernels.resize_matrix(length, self.scale, self.equal_margins).to(like)
        return self._cache[key]

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self.size = (x.shape[-2], x.shape[-1])
        return self._line(x.shape[-2], x) @ x @ self._line(x.shape[-1], x).T

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        height, width = self.input_size(*y.shape[-2:])
        return self._line(height, y).T @ y @ self._line(width, y)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return math.ceil(height * self.scale - 1e-9), math.ceil(width * self.scale - 1e-9)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None and self.output_size(*self.size) == (height, width):
            return self.size
        return round(height / self.scale), round(width / self.scale)


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
        _check_divisible(x, self.factor)
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

    def A(self, x: torch.Tensor) -> torch.Tensor:
        k_h, k_w = self.kernel.shape
        if x.shape[-2] <= k_h // 2 or x.shape[-1] <= k_w // 2:
            raise InputError(f"image: {x.shape[-1]} x {x.shape[-2]} pixels are too few for a kernel of {k_w} x {k_h}")
        padded = F.pad(x, (k_w // 2, k_w // 2, k_h // 2, k_h // 2), mode="reflect")
        return F.conv2d(padded, self._weights(x), groups=x.shape[1])

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        k_h, k_w = self.kernel.shape
        spread = F.conv_transpose2d(y, self._weights(y), groups=y.shape[1])
        return _fold_reflection(_fold_reflection(spread, -2, k_h // 2), -1, k_w // 2)


def _fold_reflection(x: torch.Tensor, dim: int, margin: int) -> torch.Tensor:
    """Adjoint of reflection padding by `margin` along one axis."""
    if not margin:
        return x
    size = x.shape[dim] - 2 * margin
    inner = x.narrow(dim, margin, size).clone()
    inner.narrow(dim, 1, margin).add_(x.narrow(dim, 0, margin).flip(dim))
    inner.narrow(dim, size - 1 - margin, margin).add_(x.narrow(dim, margin + size, margin).flip(dim))
    return inner


@dataclass(eq=False)
class WalshHadamard(Operator):
    """Compressed sensing: some coefficients of an orthonormal Walsh-Hadamard transform per channel.

    kept: indices of the coefficients measured, of a square picture whose side is a power of two; a measurement is
    [B, C, 1, len(kept)].
    """

    kept: torch.Tensor
    side: int
    name = "compressed sensing"

    def __post_init__(self) -> None:
        if self.side < 1 or self.side & (self.side - 1):
            raise InputError(f"image: compressed sensing needs a side that is a power of two, not {self.side}")

    def A(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != (self.side, self.side):
            raise InputError(
                f"image: {tuple(x.shape[-2:])} pixels, this operator is made for {self.side} x {self.side}"
            )
        return walsh_hadamard(x.flatten(2))[..., self.kept.to(x.device)][:, :, None]

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        if y.shape[2:] != (1, len(self.kept)):
            raise InputError(
                f"measurement: {tuple(y.shape[2:])}, compressed sensing gives (1, {len(self.kept)}); take it from Measure"
            )
        spectrum = y.new_zeros(*y.shape[:2], self.side**2)
        spectrum[..., self.kept.to(y.device)] = y[:, :, 0]
        return walsh_hadamard(spectrum).unflatten(-1, (self.side, self.side))

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        return y / (1 + eta)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return 1, len(self.kept)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return self.side, self.side


def walsh_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal fast Walsh-Hadamard transform of the last axis (a power of two), natural order; its own inverse."""
    length = x.shape[-1]
    step = 1
    while step < length:
        pairs = x.unflatten(-1, (-1, 2, step))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2).flatten(-3)
        step *= 2
    return x / math.sqrt(length)


@dataclass(eq=False)
class Composition(Iterative):
    """`outer` after `inner`, e.g. a mask after a blur. Exact adjoint; pseudo-inverse by conjugate gradients."""

    outer: Operator
    inner: Operator

    def __post_init__(self) -> None:
        self.name = f"{self.inner.name}, then {self.outer.name}"  # in the order in which they act

    def A(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer.A(self.inner.A(x))

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.inner.A_adjoint(self.outer.A_adjoint(y))

    def fitted(self, height: int, width: int, measured: bool = False) -> Composition:
        between = self.outer.input_size(height, width) if measured else self.inner.output_size(height, width)
        outer, inner = ((height, width), between) if measured else (between, (height, width))
        return Composition(self.outer.fitted(*outer, measured), self.inner.fitted(*inner, measured))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return self.outer.output_size(*self.inner.output_size(height, width))

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return self.inner.input_size(*self.outer.input_size(height, width))
