"""Linear systems by conjugate gradients, each image of a batch by itself: no map is ever written out as a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch


class _Hooks:
    """Who listens to the loops."""

    interrupt: Callable[[], None] | None = None


def set_interrupt(check: Callable[[], None] | None) -> None:
    """`check` is called before every iteration and raises to end the loop; the host's, as soon as there is a host.

    One for all and no argument: between a node and these loops lie operators and schemes, which know nothing of a host.
    """
    _Hooks.interrupt = check


def check_interrupt() -> None:
    """To be called before every iteration of a long loop."""
    if _Hooks.interrupt is not None:
        _Hooks.interrupt()


def _dot(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Inner product of every two images, [B, 1, 1, 1]."""
    return (p.double() * q.double()).sum(dim=tuple(range(1, p.ndim)), keepdim=True)


def _ratio(top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    """top / bottom, 0 where there is nothing left to divide."""
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-300), 0.0)


def least_squares(
    apply: Callable[[torch.Tensor], torch.Tensor],
    adjoint: Callable[[torch.Tensor], torch.Tensor],
    y: torch.Tensor,
    eta: float,
    iterations: int,
    tolerance: float = 1e-6,
) -> torch.Tensor:
    """argmin_x |A x - y|^2 + eta |x|^2, the smallest such x, for a linear map A: conjugate gradients on the normal
    equations (CGLS).

    Björck, Numerical Methods for Least Squares Problems, 1996, algorithm 7.4.1. Ends when A^T (y - A x) - eta x is below
    `tolerance` times A^T y.
    """
    unseen = y.clone()
    gradient = adjoint(unseen)
    x, direction = torch.zeros_like(gradient), gradient.clone()
    energy = _dot(gradient, gradient)
    target = energy * tolerance**2
    for _ in range(iterations):
        if bool((energy <= target).all()):
            break
        check_interrupt()
        image = apply(direction)
        step = _ratio(energy, _dot(image, image) + eta * _dot(direction, direction))
        x = x + (step * direction).to(y.dtype)
        unseen = unseen - (step * image).to(y.dtype)
        gradient = adjoint(unseen) - eta * x
        new_energy = _dot(gradient, gradient)
        direction = gradient + (_ratio(new_energy, energy) * direction).to(y.dtype)
        energy = new_energy
    return x


def conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor], b: torch.Tensor, iterations: int, tolerance: float = 1e-6
) -> torch.Tensor:
    """Solves apply(v) = b for a symmetric positive (semi-)definite map, each image of the batch by itself."""
    v = torch.zeros_like(b)
    residual = b.clone()
    direction = residual.clone()
    energy = _dot(residual, residual)
    target = energy * tolerance**2
    for _ in range(iterations):
        if bool((energy <= target).all()):
            break
        check_interrupt()
        image = apply(direction)
        step = _ratio(energy, _dot(direction, image))
        v = v + (step * direction).to(b.dtype)
        residual = residual - (step * image).to(b.dtype)
        new_energy = _dot(residual, residual)
        direction = residual + (_ratio(new_energy, energy) * direction).to(b.dtype)
        energy = new_energy
    return v
