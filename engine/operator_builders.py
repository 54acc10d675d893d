"""Operators from what a person at the graph knows: a kind of blur, a mask, a label and a noise level."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..guidance import filters, kernels, operators
from ..guidance.operators import Operator
from ..guidance.priors import estimate_noise
from .values import check_image, check_mask

logger = logging.getLogger(__name__)
_told: set[tuple[int, ...]] = set()
"""Sizes of masks and pictures of which the log has told."""

DOWNSAMPLING = ("bicubic", "average", "bicubic, circular", "any scale")
BLURS = ("gaussian", "uniform", "motion", "anisotropic")
BORDERS = ("circular", "zero", "reflect")


def downsampling(kind: str, factor: float) -> Operator:
    """Down-sampling by `factor` > 1. Raises InputError for a broken factor where the kind needs a whole one."""
    if kind == "any scale":
        return filters.Resize(1 / factor)
    if factor != round(factor):
        raise InputError(f"factor: {factor} is not whole; choose the kind 'any scale', or a whole factor")
    whole = round(factor)
    if kind == "average":
        return operators.AveragePooling(whole)
    if kind == "bicubic":
        return filters.bicubic_downsampling(whole)
    if kind == "bicubic, circular":
        return filters.CircularBlur(kernels.bicubic_decimation_2d(whole), whole)
    raise InputError(f"kind: {kind!r} is not one of {', '.join(DOWNSAMPLING)}")


def blur(
    kind: str,
    size: int,
    sigma: float,
    sigma_across: float,
    angle: float,
    borders: str,
    official_layout: bool = False,
) -> Operator:
    """Blur by a kernel of `size` pixels (made odd). Zero borders need a separable kernel, which a motion is not."""
    size = size | 1
    if borders == "zero":
        if kind == "motion":
            raise InputError("borders: zero borders need a separable blur; use circular or reflect for motion")
        if kind == "uniform":
            lines = [kernels.uniform_1d(size)] * 2
        else:
            lines = [kernels.gaussian_1d(size, s) for s in (sigma_across if kind == "anisotropic" else sigma, sigma)]
        return filters.separable_blur(*lines, official_layout=official_layout)
    if kind == "motion":
        kernel = kernels.motion_2d(size, angle)
    elif kind == "uniform":
        kernel = torch.outer(kernels.uniform_1d(size), kernels.uniform_1d(size))
    else:
        vertical = kernels.gaussian_1d(size, sigma_across if kind == "anisotropic" else sigma)
        kernel = torch.outer(vertical, kernels.gaussian_1d(size, sigma))
    return with_borders(kernel, borders)


def with_borders(kernel: torch.Tensor, borders: str) -> Operator:
    """A kernel [k_h, k_w] as an operator with circular or reflecting borders."""
    if borders == "reflect":
        kernel = torch.nn.functional.pad(kernel, (0, 1 - kernel.shape[1] % 2, 0, 1 - kernel.shape[0] % 2))
        return filters.ReflectBlur(kernel)
    return filters.CircularBlur(kernel)


def kernel_from_picture(image: torch.Tensor, borders: str) -> Operator:
    """The first of [B, C, k_h, k_w] in 0..1 as a blur kernel: its brightness, scaled to sum to one."""
    if borders == "zero":
        raise InputError("borders: a kernel picture works with circular or reflect borders")
    check_image(image[:1, :3], "kernel")
    kernel = image[0, :3].double().mean(dim=0).cpu()
    if max(kernel.shape) > 255:
        raise InputError(
            f"kernel: {kernel.shape[1]} x {kernel.shape[0]} pixels; a kernel picture has at most 255 a side, scale it down"
        )
    if float(kernel.sum()) <= 0:
        raise InputError("kernel: the picture is black; its bright pixels are where the light goes")
    return with_borders(kernel / kernel.sum(), borders)


@dataclass(eq=False)
class MaskInpainting(operators.Inpainting):
    """Inpainting by a MASK, with what is needed to make it anew for pictures of another size.

    Enlarging the finished mask would turn scattered pixels into blocks.
    """

    missing: torch.Tensor
    scattered: float
    seed: int

    def fitted(self, height: int, width: int, measured: bool = False) -> Operator:
        mine = self.missing.shape[-2:]
        if mine == (height, width):
            return self
        if (*mine, height, width) not in _told:
            _told.add((*mine, height, width))
            empty = "" if bool((self.missing >= 0.5).any()) else "; it marks nothing as missing"
            logger.warning("mask: %d x %d pixels, resized to %d x %d%s", mine[1], mine[0], width, height, empty)
        resized = F.interpolate(self.missing[:, None], size=(height, width), mode="nearest-exact")[:, 0]
        return inpainting(resized, self.scattered, self.seed)


def inpainting(mask: torch.Tensor, scattered: float = 0.0, seed: int = 0) -> Operator:
    """mask [B, H, W]: 1 where the picture is missing. `scattered`: share of further pixels lost at random."""
    check_mask(mask)
    known = 1 - (mask >= 0.5).float()
    if scattered > 0:
        generator = torch.Generator().manual_seed(seed)
        known = known * (torch.rand(known.shape[-2:], generator=generator) >= scattered).float().to(known.device)
    if not bool(known.any()):
        raise InputError("mask: it covers the whole picture; nothing would be known")
    return MaskInpainting(known[:, None], mask, scattered, seed)


def compressed_sensing(side: int, share: float, seed: int) -> Operator:
    """A share of the Walsh-Hadamard coefficients of side x side pictures, drawn by seed, the mean always."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(side * side, generator=generator)
    order = torch.cat([order.new_zeros(1), order[order != 0]])
    return operators.WalshHadamard(order[: max(1, round(share * side * side))].sort().values, side)


def compose(first: Operator, second: Operator) -> Operator:
    """`second` after `first`. Raises InputError where the first does not leave a picture."""
    if isinstance(first.chain()[-1], operators.WalshHadamard) and not isinstance(second, operators.Denoising):
        raise InputError(
            "first: what compressed sensing measures is no picture, to which more could happen; connect it as second"
        )
    return operators.Composition(second, first)


NOISE, BLUR, SMALL, GREY = "noise", "blur", "small", "grey"
_FAMILIES = {
    NOISE: ("noise", "denois", "grain", "jpeg"),
    BLUR: ("blur", "defocus", "shake"),
    SMALL: ("low resolution", "low-resolution", "downsampl", "super"),
    GREY: ("grey", "gray", "colour", "color"),
}


def family(label: str) -> str | None:
    """What a classifier's label means for an operator; None where no linear operator describes it."""
    return next((name for name, words in _FAMILIES.items() if any(w in label.lower() for w in words)), None)


def blur_width(image: torch.Tensor) -> float:
    """Rough standard deviation, in pixels, of a Gaussian blur that made [B, 3, H, W] so soft.

    Compares mean squared differences of pixels 1 and 4 apart with what a blurred picture with the spectrum of sharp
    photographs, 1 / frequency^2 in power, would have. An honest guess, no measurement: off by a factor of two at times.
    """
    grey = image[:, :3].float().mean(dim=1)
    if min(grey.shape[-2:]) < 16:
        raise InputError("image: estimating a blur needs at least 16 x 16 pixels")
    noise = 2 * float(estimate_noise(grey[:, None]).median()) ** 2
    near, far = (_differences(grey, step) - noise for step in (1, 4))
    ratio = max(near, 1e-12) / max(far, 1e-12)
    sigmas = torch.arange(1, 121, dtype=torch.float64) / 20
    frequency = torch.arange(1, 2001, dtype=torch.float64) / 4000
    spectrum = torch.exp(-((2 * math.pi * sigmas[:, None] * frequency) ** 2)) / frequency**2
    expected = [(spectrum * (1 - torch.cos(2 * math.pi * step * frequency))).sum(dim=1) for step in (1, 4)]
    return float(sigmas[(expected[0] / expected[1] - ratio).abs().argmin()])


def _differences(grey: torch.Tensor, step: int) -> float:
    across = (grey[..., step:] - grey[..., :-step]).square().mean()
    down = (grey[..., step:, :] - grey[..., :-step, :]).square().mean()
    return float(across + down) / 2


def from_label(label: str, image: torch.Tensor, factor: int = 4) -> tuple[Operator, float, str]:
    """(operator, noise level on the 0..1 scale, what was decided) for a picture [B, 3, H, W] with a degradation label."""
    noise = float(estimate_noise(image[:, :3].float()).median())
    kind = family(label)
    if kind == BLUR:
        sigma = max(0.5, blur_width(image))
        size = 2 * max(2, round(3 * sigma)) + 1
        operator: Operator = blur("gaussian", size, sigma, sigma, 0.0, "reflect")
        return operator, noise, f"{label}: Gaussian blur, sigma {sigma:.2f} pixels; noise {noise:.4f}"
    if kind == SMALL:
        return filters.bicubic_downsampling(factor), noise, f"{label}: bicubic x{factor}; noise {noise:.4f}"
    if kind == GREY:
        return operators.Colourisation(), noise, f"{label}: colour lost; noise {noise:.4f}"
    said = label if kind == NOISE else f"{label}: no linear operator describes this, so only its noise is taken away"
    return operators.Denoising(), noise, f"{said}: noise {noise:.4f}"
