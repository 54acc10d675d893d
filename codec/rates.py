"""How large files are at which fidelity: the codec against JPEG and WebP on one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, features

from ..engine import host
from ..engine.loaded import LoadedRestorer
from ..engine.pictures import curves, from_pil, to_pil
from ..engine.report import match_size, psnr
from ..errors import InputError
from ..models.aio_codec import QUALITIES
from . import compress

PILLOW_QUALITIES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)


@dataclass(frozen=True)
class Point:
    """One file: the quality it was made with, its bytes, and the decibels (PSNR, 8 bit) of what comes out of it."""

    quality: int
    size: int
    psnr: float


Curve = Sequence[Point]


def _psnr(decoded: torch.Tensor, reference: torch.Tensor) -> float:
    """Between the 8-bit versions of two pictures [3, H, W]; 99 for equal ones."""
    rounded = [(i.clamp(0, 1) * 255).round()[None] / 255 for i in (decoded, reference)]
    return min(99.0, psnr(rounded[0], rounded[1])[0])


def spread_qualities(count: int) -> list[int]:
    """`count` qualities over the whole range, as the published tests choose them."""
    if count < 1:
        raise InputError(f"qualities: {count}; ask for at least one")
    return sorted({int(k * (QUALITIES - 1) / max(1, count - 1) + 0.5) for k in range(count)})


def codec_curve(
    codec: LoadedRestorer, image: torch.Tensor, reference: torch.Tensor, qualities: Sequence[int]
) -> list[Point]:
    """Real files of `image` [3, H, W] at these qualities, decoded and compared with `reference`."""
    points = []
    for number, quality in enumerate(qualities):
        with host.part_of_progress(2 * number, 2 * len(qualities)):
            stream = compress.compress(codec, image, quality)
        with host.part_of_progress(2 * number + 1, 2 * len(qualities)):
            decoded = compress.decompress(codec, stream)
        points.append(Point(quality, stream.size, _psnr(decoded, reference)))
    return points


def pillow_curve(
    image: torch.Tensor, reference: torch.Tensor, form: str, qualities: Sequence[int] = PILLOW_QUALITIES
) -> list[Point]:
    """The same for "JPEG" or "WEBP" as Pillow writes them."""
    picture, points = to_pil(image), []
    for quality in qualities:
        file = io.BytesIO()
        picture.save(file, form, quality=quality, **({"optimize": True} if form == "JPEG" else {"method": 4}))
        points.append(Point(quality, file.tell(), _psnr(from_pil(Image.open(file)), reference)))
    return points


def size_at(curve: Curve, decibels: float) -> float | None:
    """Bytes that a curve needs for a PSNR, logarithmically between its points; None where it does not reach."""
    ordered = sorted(curve, key=lambda p: p.psnr)
    for low, high in zip(ordered, ordered[1:], strict=False):
        if low.psnr <= decibels <= high.psnr:
            share = (decibels - low.psnr) / (high.psnr - low.psnr) if high.psnr > low.psnr else 0.0
            return math.exp(math.log(low.size) * (1 - share) + math.log(high.size) * share)
    return None


def compare(
    codec: LoadedRestorer, image: torch.Tensor, reference: torch.Tensor | None = None, count: int = 8
) -> dict[str, list[Point]]:
    """Curves of the codec, of JPEG and of WebP (where Pillow has it) for a picture [1..4, H, W].

    reference: the undamaged picture; without one, results are compared with the picture itself.
    """
    image = compress.rgb(image)
    reference = image if reference is None else match_size(compress.rgb(reference)[None], image[None])[0]
    found = {"codec": codec_curve(codec, image, reference, spread_qualities(count))}
    for form, name in (("JPEG", "JPEG"), ("WEBP", "WebP")):
        if form == "JPEG" or features.check("webp"):
            found[name] = pillow_curve(image, reference, form)
    return found


def describe(found: Mapping[str, Curve], pixels: int) -> str:
    """A line for each file of the codec: rate, PSNR, and what the others need for the same PSNR."""
    codec, others = next(iter(found.values())), list(found.items())[1:]
    lines = []
    for point in codec:
        line = f"quality {point.quality}: {point.size:,} bytes, {8 * point.size / pixels:.3f} bpp, {point.psnr:.2f} dB"
        for name, curve in others:
            other = size_at(curve, point.psnr)
            line += f"; {name} {'has no such file' if other is None else f'{other:,.0f} bytes for the same'}"
        lines.append(line)
    return "\n".join(lines)


def plot(found: Mapping[str, Curve], pixels: int, against: str) -> Image.Image:
    """The curves as a picture: bits per pixel to the right, PSNR upwards."""
    largest = 2 * max(
        p.size for p in next(iter(found.values()))
    )  # beyond it the others would squeeze the codec's curve
    series = {name: [(8 * p.size / pixels, p.psnr) for p in c if p.size <= largest] for name, c in found.items()}
    series = {name: points for name, points in series.items() if points}
    return curves(series, "bits per pixel", "dB", f"PSNR to the {against} against file size")
