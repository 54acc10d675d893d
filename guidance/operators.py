"""Linear degradations y = A x + n, with what restoration needs of them: A, its adjoint, its pseudo-inverse.

Images are [B, C, H, W] float32 of any size that the operator takes; the value range does not matter. Every operator is
tested by the same identities: <A x, y> = <x, A' y>, A A+ A = A, and A+ with regularisation solves its normal equations.
Vocabulary as in deepinv; the kinds of DDRM, DDPG, CM4IR and RDMD. Blurs and down-sampling are in filters.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import InputError
from .solvers import conjugate_gradients, least_squares


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

    def chain(self) -> list[Operator]:
        """The operators that it is made of, in the order in which they act."""
        return [self]

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
        check_divisible(x, self.factor)
        return F.avg_pool2d(x, self.factor)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return F.interpolate(y, scale_factor=self.factor, mode="nearest") / self.factor**2

    def gram_inverse(self, y: torch.Tensor, eta: float) -> torch.Tensor:
        return y / (self.factor**-2 + eta)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return height // self.factor, width // self.factor

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return height * self.factor, width * self.factor


def check_divisible(x: torch.Tensor, factor: int) -> None:
    """Raises InputError for a picture whose sides `factor` does not divide."""
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise InputError(
            f"image: {x.shape[-1]} x {x.shape[-2]} pixels are not divisible by the factor {factor}; crop it"
        )


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

    def chain(self) -> list[Operator]:
        return [*self.inner.chain(), *self.outer.chain()]

    def fitted(self, height: int, width: int, measured: bool = False) -> Composition:
        between = self.outer.input_size(height, width) if measured else self.inner.output_size(height, width)
        outer, inner = ((height, width), between) if measured else (between, (height, width))
        return Composition(self.outer.fitted(*outer, measured), self.inner.fitted(*inner, measured))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return self.outer.output_size(*self.inner.output_size(height, width))

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return self.inner.input_size(*self.outer.input_size(height, width))
