"""What was observed: y = A x + noise, with everything a restoration needs to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F

from ..errors import InputError
from .filters import CircularBlur, ReflectBlur, Resize, Separable
from .operators import AveragePooling, Colourisation, Composition, Inpainting, Operator, WalshHadamard


@dataclass(frozen=True, eq=False)
class Measurement:
    """y [B, C', h, w] of pictures in -1..1 seen through `operator`.

    `noise` is the standard deviation of its Gaussian noise on the 0..1 scale, `size` the height and width of the picture
    to find.
    """

    operator: Operator
    y: torch.Tensor
    noise: float
    size: tuple[int, int]

    def to(self, device: torch.device) -> Measurement:
        """The same with y on `device`."""
        return Measurement(self.operator, self.y.to(device), self.noise, self.size)

    def picture(self) -> torch.Tensor:
        """[B, 3, H, W] in 0..1 to look at: y itself, or its pseudo-inverse where y is no picture."""
        y = self.operator.A_dagger(self.y) if isinstance(self.operator, WalshHadamard) else self.y
        return (y / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)


def draw(
    shape: tuple[int, ...] | torch.Size, seed: int, index: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal numbers, draw number `index` of `seed`: the same on every device and in every chain of steps."""
    generator = torch.Generator().manual_seed((seed + index * 0x9E3779B97F4A7C15) % 2**64)
    return torch.randn(tuple(shape), generator=generator).to(device)


def measure(operator: Operator, image: torch.Tensor, noise: float = 0.0, seed: int = 0) -> Measurement:
    """Sees image [B, 3, H, W] in 0..1 through `operator`, fitted to it, and adds Gaussian noise of `noise` (0..1 scale)."""
    operator = operator.fitted(*image.shape[-2:])
    clean = operator.A(image.float() * 2 - 1)
    # Noise of a masked-out pixel would be a measurement that was never made.
    added = seen_noise(operator, 2 * noise * draw(clean.shape, seed, 0, clean.device)) if noise > 0 else 0.0
    return Measurement(operator, clean + added, noise, (image.shape[-2], image.shape[-1]))


def seen_noise(operator: Operator, noise: torch.Tensor) -> torch.Tensor:
    """`noise` without what lies on pixels that the operator does not measure."""
    *_, last = operator.chain()
    return last.A(noise) if isinstance(last, Inpainting) else noise


def from_picture(operator: Operator, image: torch.Tensor, noise: float) -> Measurement:
    """A real damaged picture [B, 3, H, W] in 0..1 as a measurement by `operator`, fitted to it.

    Raises InputError where a picture cannot be one.
    """
    operator = operator.fitted(*image.shape[-2:], measured=True)
    y = _observed(operator, image.float() * 2 - 1)
    return Measurement(operator, y, noise, operator.input_size(y.shape[-2], y.shape[-1]))


def _observed(operator: Operator, picture: torch.Tensor) -> torch.Tensor:
    if isinstance(operator, WalshHadamard):
        raise InputError("operator: the measurement of compressed sensing is no picture; make one with Measure")
    if isinstance(operator, Composition):
        return _observed(operator.outer, picture)
    return operator.A(picture) if isinstance(operator, (Inpainting, Colourisation)) else picture


def task(operator: Operator) -> str:
    """ "super-resolution", "deblurring", "inpainting" or "other"."""
    if isinstance(operator, (Resize, AveragePooling)) or getattr(operator, "factor", 1) > 1:
        return "super-resolution"
    if isinstance(operator, (Separable, CircularBlur, ReflectBlur)):
        return "deblurring"
    return "inpainting" if isinstance(operator, Inpainting) else "other"


def footprint(operator: Operator, side: int = 96) -> torch.Tensor:
    """[3, 240, 240] in 0..1: what one measured value looks at, the kernel; the mask where masking comes last."""
    *_, last = chain = operator.chain()
    if isinstance(last, Inpainting):
        return last.mask[:1, 0].expand(3, -1, -1).clone()
    # masks in between fit their own pictures only
    seeing = [part for part in chain if not isinstance(part, Inpainting)]
    operator = reduce(lambda inner, outer: Composition(outer, inner), seeing)
    values = _values_across(seeing, side)
    blank = torch.zeros(1, 3, *operator.input_size(values, values))
    operator = operator.fitted(*blank.shape[-2:])
    y = torch.zeros_like(operator.A(blank))
    y[..., y.shape[-2] // 2, y.shape[-1] // 2] = 1.0
    seen = operator.A_adjoint(y)[0]
    seen = seen / seen.abs().max().clamp_min(1e-12)
    if not isinstance(last, WalshHadamard):
        seen = _trim(seen)
    seen = seen / 2 + 0.5 if float(seen.min()) < -0.02 else seen.clamp_min(0)
    return F.interpolate(seen[None], size=(240, 240), mode="nearest")[0]


def _values_across(chain: list[Operator], side: int) -> int:
    """Measured values a side for a picture of `side` pixels or more, in which every kernel of `chain` has room."""
    seen, values = 1, 1  # pixels that one measured value stands for, from the last operator to the first
    for operator in reversed(chain):
        seen = max(operator.input_size(seen, seen))
        kernel = max(operator.kernel.shape) if isinstance(operator, (CircularBlur, ReflectBlur)) else 1
        values = max(values, -(-kernel // seen))
    return max(values, -(-side // seen))


def _trim(seen: torch.Tensor) -> torch.Tensor:
    """The centred square that holds everything visible, at least 8 pixels wide."""
    visible = (seen.abs() > 0.005).any(dim=0).nonzero()
    middle = seen.shape[-1] // 2
    reach = 4 if len(visible) == 0 else max(4, int((visible - middle).abs().max()) + 1)
    return seen[:, max(0, middle - reach) : middle + reach + 1, max(0, middle - reach) : middle + reach + 1]
