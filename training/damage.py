"""What goes wrong with pictures, as functions: noise, blur, weather, darkness, compression.

They take an image [B, C, H, W] (C 1 or 3, values 0..1, any size from 1x1), explicit physical parameters and, where something
is random, a `torch.Generator` on the CPU; they return the same shape, dtype and device. Random fields (noise, streaks,
flakes) are drawn on the CPU for every image of the batch, so that a seed gives the same picture on every device. Everything
but `jpeg` is differentiable with respect to the image; `jpeg` has a differentiable twin.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image

Generator = torch.Generator


# --- random fields and filters ----------------------------------------------------------------------------------------


def _normal(shape: Sequence[int], like: torch.Tensor, generator: Generator | None) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator).to(like)


def _uniform(shape: Sequence[int], like: torch.Tensor, generator: Generator | None) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=generator).to(like)


def between(low: float, high: float, generator: Generator | None) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def filter2d(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Correlates every channel of [B, C, H, W] with `kernel` [k, l] (odd sizes), borders repeated."""
    channels, (height, width) = image.shape[1], kernel.shape
    padded = F.pad(image, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    return F.conv2d(padded, kernel.to(image).expand(channels, 1, height, width), groups=channels)


def line_kernel(length: float, angle: float) -> torch.Tensor:
    """Path of a point that moves `length` pixels in direction `angle` (degrees, 0 = along the rows), sum 1."""
    radius = max(1, math.ceil(length / 2))
    steps = max(2, 4 * math.ceil(length)) + 1
    along = torch.linspace(-length / 2, length / 2, steps)
    x = along * math.cos(math.radians(angle)) + radius
    y = -along * math.sin(math.radians(angle)) + radius
    size = 2 * radius + 1
    # Each sample is shared bilinearly among four pixels: a hat function per axis.
    grid = torch.arange(size, dtype=torch.float32)
    hat_x = (1 - (x[:, None] - grid).abs()).clamp_min(0)
    hat_y = (1 - (y[:, None] - grid).abs()).clamp_min(0)
    kernel = hat_y.T @ hat_x
    return kernel / kernel.sum()


def disk_kernel(radius: float) -> torch.Tensor:
    """Uniform disk with a soft rim, sum 1: an out-of-focus point."""
    size = math.ceil(radius + 0.5)
    axis = torch.arange(-size, size + 1, dtype=torch.float32)
    kernel = (radius + 0.5 - torch.hypot(axis[:, None], axis[None, :])).clamp(0, 1)
    return kernel / kernel.sum()


def smooth_field(
    size: tuple[int, int], batch: int, cells: int, like: torch.Tensor, generator: Generator | None
) -> torch.Tensor:
    """Random hills [batch, 1, H, W] in 0..1, about `cells` across."""
    coarse = _uniform((batch, 1, cells + 1, cells + 1), like, generator)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).clamp(0, 1)


# --- noise ------------------------------------------------------------------------------------------------------------


def gaussian_noise(image: torch.Tensor, sigma: float | Sequence[float], generator: Generator | None) -> torch.Tensor:
    """Adds white noise of standard deviation `sigma`, in units of 0..255; one value or one a channel. Not clamped."""
    scale = torch.as_tensor(sigma, dtype=image.dtype, device=image.device).reshape(1, -1, 1, 1) / 255
    return image + _normal(image.shape, image, generator) * scale


def poisson_noise(image: torch.Tensor, photons: float, generator: Generator | None) -> torch.Tensor:
    """Shot noise of a sensor that counts `photons` in a white pixel: variance image / photons.

    The normal approximation of the Poisson law (differentiable, and close from some ten photons on). Not clamped.
    """
    return image + _normal(image.shape, image, generator) * (image.clamp_min(0) / photons + 1e-12).sqrt()


# --- blur and resolution ----------------------------------------------------------------------------------------------


def gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of standard deviation `sigma` pixels."""
    radius = max(1, math.ceil(3 * sigma))
    axis = torch.arange(-radius, radius + 1, dtype=torch.float32)
    row = torch.exp(-0.5 * (axis / max(sigma, 1e-3)) ** 2)
    row = row / row.sum()
    return filter2d(filter2d(image, row[None, :]), row[:, None])


def motion_blur(image: torch.Tensor, length: float, angle: float) -> torch.Tensor:
    """Camera moved `length` pixels in direction `angle` (degrees) during the exposure."""
    return filter2d(image, line_kernel(length, angle))


def defocus_blur(image: torch.Tensor, radius: float) -> torch.Tensor:
    """Every point becomes a disk of `radius` pixels."""
    return filter2d(image, disk_kernel(radius))


def downsample(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Reduced `factor` times and brought back to the old size, both bicubic: the detail of a smaller picture."""
    height, width = image.shape[-2:]
    small = (max(1, round(height / factor)), max(1, round(width / factor)))
    reduced = F.interpolate(image, size=small, mode="bicubic", antialias=True)
    return F.interpolate(reduced, size=(height, width), mode="bicubic")


# --- weather ----------------------------------------------------------------------------------------------------------


def _impulses(image: torch.Tensor, density: float, margin: int, generator: Generator | None) -> torch.Tensor:
    """Scattered points of brightness 0.4..1, [B, 1, H + 2 margin, W + 2 margin]: `density` of all pixels."""
    shape = (image.shape[0], 1, image.shape[2] + 2 * margin, image.shape[3] + 2 * margin)
    chance = torch.rand(shape, generator=generator)
    return torch.where(chance < density, 0.4 + 0.6 * chance / max(density, 1e-9), 0.0).to(image)


def rain_streaks(
    image: torch.Tensor,
    density: float,
    length: float,
    angle: float,
    opacity: float,
    generator: Generator | None,
    width: float = 1.0,
    brightness: float = 0.9,
    screen: float = 0.0,
) -> torch.Tensor:
    """Falling drops drawn long by the exposure.

    density: drops a pixel (0.0005..0.01); length, width: pixels; angle: degrees from upright, positive leans right;
    opacity: 0..1; brightness: of the drops; screen: 0 the drops cover the picture, 1 they add their light to it.
    """
    kernel = line_kernel(length, 90 - angle)
    if width > 1:
        kernel = gaussian_blur(kernel[None, None], 0.5 * width)[0, 0]
    kernel = kernel / kernel.max()
    margin = kernel.shape[0] // 2
    streaks = F.conv2d(_impulses(image, density, margin, generator), kernel.to(image)[None, None])
    cover = opacity * streaks.clamp(0, 1)
    return image * (1 - (1 - screen) * cover) + cover * brightness


def snow(
    image: torch.Tensor,
    density: float,
    size: float,
    opacity: float,
    generator: Generator | None,
    drift: float = 0.0,
    angle: float = 0.0,
    veil: float = 0.0,
) -> torch.Tensor:
    """White flakes on three distances, the nearer the larger and rarer, and a veil of those too far to see.

    density: of the middle layer, flakes a pixel; size: its flakes' radius in pixels; drift: their trace's length and
    `angle` its direction from upright; opacity and veil: 0..1.
    """
    cover = torch.zeros_like(image[:, :1])
    for scale in (0.5, 1.0, 2.0):
        kernel = disk_kernel(max(0.3, size * scale))
        kernel = kernel / kernel.max()
        trace = drift * scale
        if trace > 1:
            line = line_kernel(trace, 90 - angle)
            pad = line.shape[0] // 2
            kernel = F.conv2d(F.pad(kernel[None, None], (2 * pad,) * 4), line[None, None])[0, 0]
            kernel = kernel / kernel.max()
        margin = kernel.shape[0] // 2
        flakes = F.conv2d(_impulses(image, density / scale**2, margin, generator), kernel.to(image)[None, None])
        cover = torch.maximum(cover, flakes.clamp(0, 1))
    image = image + veil * (0.85 - image)
    return image + opacity * cover * (0.98 - image)


def raindrops(
    image: torch.Tensor, count: float, radius: float, blur: float, generator: Generator | None
) -> torch.Tensor:
    """Drops on the window: lens-shaped spots that show the scene blurred (`blur` pixels) and a little brighter.

    count: drops on 256 x 256 pixels; radius: pixels.
    """
    height, width = image.shape[-2:]
    number = max(1, round(count * height * width / 256**2))
    rows = torch.arange(height, dtype=torch.float32)[:, None] + 0.5
    columns = torch.arange(width, dtype=torch.float32)[None, :] + 0.5
    masks = []
    for _ in range(image.shape[0]):
        mask = torch.zeros(height, width)
        for x, y, size, stretch in torch.rand(number, 4, generator=generator).tolist():
            reach = radius * (0.5 + size)
            distance = torch.hypot((columns - x * width) / reach, (rows - y * height) / (reach * (1 + 0.6 * stretch)))
            mask = torch.maximum(mask, ((1.15 - distance) / 0.3).clamp(0, 1))
        masks.append(mask)
    mask = torch.stack(masks)[:, None].to(image)
    seen = gaussian_blur(image, blur) * 0.9 + 0.1
    return image + mask * (seen - image)


def synthetic_depth(
    size: tuple[int, int], batch: int, like: torch.Tensor, generator: Generator | None, zoom: float = 1.0
) -> torch.Tensor:
    """A plausible distance map [batch, 1, H, W] in 0..1: ground that recedes towards a horizon, and hills.

    zoom < 1 gives a random part of the map, as a crop of a larger picture would show.
    """
    height, width = size
    maps = []
    for _ in range(batch):
        top, left = (between(0, 1 - zoom, generator) for _ in range(2))
        y = torch.linspace(top, top + zoom, height)[:, None].expand(height, width)
        x = torch.linspace(left, left + zoom, width)[None, :].expand(height, width)
        horizon = between(-0.2, 0.6, generator)
        # Distance of a ground plane seen from above it grows like 1 / (rows below the horizon).
        ground = (0.15 / (y - horizon).clamp_min(0.05)).clamp(max=1.0)
        tilt = between(-0.4, 0.4, generator) * (x - 0.5) + between(-0.6, 0.2, generator) * (y - 0.5)
        flat = between(0.0, 1.0, generator)
        maps.append((1 - flat) * ground + flat * (0.6 + tilt))
    hills = smooth_field(size, batch, max(1, round(4 * zoom)), torch.zeros(()), generator)
    depth = torch.stack(maps)[:, None] + between(0.0, 0.5, generator) * (hills - 0.5)
    return depth.clamp(0.03, 1).to(like)


def haze(image: torch.Tensor, density: float, airlight: float | Sequence[float], depth: torch.Tensor) -> torch.Tensor:
    """Koschmieder's law: image * t + airlight * (1 - t), t = exp(-density * depth). depth [B, 1, H, W] in 0..1."""
    light = torch.as_tensor(airlight, dtype=image.dtype, device=image.device).reshape(1, -1, 1, 1)
    transmission = torch.exp(-density * depth.to(image))
    return light + (image - light) * transmission


# --- exposure and compression -----------------------------------------------------------------------------------------


def low_light(
    image: torch.Tensor, gamma: float, gain: float, sigma: float, generator: Generator | None
) -> torch.Tensor:
    """Too dark: gain * image^gamma, with read noise of `sigma` (units of 0..255) and as much shot noise at white."""
    dark = gain * image.clamp_min(1e-4) ** gamma
    noise = _normal(image.shape, image, generator)
    return dark + noise * (sigma / 255) * (0.5 + dark.detach()).sqrt()


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Through the real codec (Pillow), 4:2:0 as cameras and the web use it. Not differentiable. quality 1..95."""
    pixels = (image.detach().clamp(0, 1) * 255).round().byte().cpu()
    decoded = []
    for picture in pixels:
        array = picture.permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "JPEG", quality=int(quality))
        data = torch.frombuffer(bytearray(Image.open(buffer).tobytes()), dtype=torch.uint8)
        decoded.append(data.reshape(array.shape).permute(2, 0, 1))
    return torch.stack(decoded).to(image) / 255


def jpeg_differentiable(image: torch.Tensor, quality: float) -> torch.Tensor:
    """kornia's differentiable JPEG (Reich et al., WACV 2024) for RGB images; borders are repeated to 16 pixels."""
    from kornia.enhance import jpeg_codec_differentiable

    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % 16, 0, -height % 16), mode="replicate").clamp(0, 1)
    level = torch.tensor([float(quality)], dtype=image.dtype, device=image.device)
    return jpeg_codec_differentiable(padded, level)[..., :height, :width]
