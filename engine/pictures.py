"""Small pictures with text, for reports: labelled comparisons, bar charts, heat maps, curves. All with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, ACCENT, FAINT = (24, 26, 30), (232, 234, 238), (255, 159, 67), (70, 75, 84)
LINES = (ACCENT, (104, 184, 255), (140, 220, 130), (230, 130, 220), INK)


def to_pil(image: torch.Tensor) -> Image.Image:
    """[C, H, W] with 1, 3 or 4 channels in 0..1 as an 8-bit picture."""
    values = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(values[0] if values.shape[0] == 1 else np.moveaxis(values, 0, -1))


def from_pil(picture: Image.Image) -> torch.Tensor:
    """A picture as [3, H, W] in 0..1."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, which needs no file."""
    return ImageFont.load_default(size)


def labelled(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = 0) -> Image.Image:
    """Pictures of one size in a row (or rows of `columns`), each under its label."""
    columns = columns or len(pictures)
    width, height = pictures[0].size
    size = max(11, min(32, width // 16))
    bar = size + size // 2 + 4
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 4) - 4, rows * (height + bar + 4) - 4), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = index % columns * (width + 4), index // columns * (height + bar + 4)
        draw.text((x + 6, y + size // 4), label, INK, font(size))
        sheet.paste(picture.convert("RGB"), (x, y + bar))
    return sheet


def bars(values: Sequence[float], labels: Sequence[str], title: str = "", width: int = 512) -> Image.Image:
    """Horizontal bars for values in 0..1, the largest accented."""
    row, top = 26, 34 if title else 8
    sheet = Image.new("RGB", (width, top + row * len(values) + 8), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 8), title, INK, font(16))
    left, right = int(width * 0.34), width - 62
    best = max(range(len(values)), key=lambda i: values[i]) if len(values) else -1
    for index, (value, label) in enumerate(zip(values, labels, strict=True)):
        y = top + row * index
        draw.text((8, y + 4), str(label)[: left // 8], INK, font(14))
        draw.rectangle((left, y + 4, right, y + row - 6), FAINT)
        end = left + (right - left) * min(1.0, max(0.0, float(value)))
        draw.rectangle((left, y + 4, end, y + row - 6), ACCENT if index == best else INK)
        draw.text((right + 8, y + 4), f"{100 * float(value):.1f}%", INK, font(14))
    return sheet


def heat_map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str = "", marks: np.ndarray | None = None
) -> Image.Image:
    """Values in 0..1 [rows, columns] as coloured cells with their numbers; `marks` (bool, same shape) are framed."""
    cell_w, cell_h, left, top = 84, 30, 190, 64
    size = (left + cell_w * len(columns) + 12, top + cell_h * len(rows) + 12)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), title, INK, font(16))
    for index, name in enumerate(columns):
        draw.text((left + cell_w * index + 6, 40), str(name), INK, font(14))
    for i, name in enumerate(rows):
        draw.text((10, top + cell_h * i + 6), str(name), INK, font(14))
        for j in range(len(columns)):
            value = min(1.0, max(0.0, float(values[i, j])))
            x, y = left + cell_w * j, top + cell_h * i
            shade = tuple(round(a + (b - a) * value) for a, b in zip(FAINT, ACCENT, strict=True))
            draw.rectangle((x, y, x + cell_w - 3, y + cell_h - 3), shade)
            if marks is not None and marks[i, j]:
                draw.rectangle((x, y, x + cell_w - 3, y + cell_h - 3), outline=(255, 255, 255), width=3)
            draw.text((x + 24, y + 5), f"{value:.2f}", BACKGROUND if value > 0.5 else INK, font(14))
    return sheet


def difference_map(a: torch.Tensor, b: torch.Tensor, gain: float = 5.0) -> torch.Tensor:
    """|a - b| averaged over channels, [C, H, W] each, times `gain`, in false colour: black, red, yellow, white."""
    return false_colour((a.float() - b.float()).abs().mean(dim=0) * gain)


def false_colour(level: torch.Tensor) -> torch.Tensor:
    """[H, W] in 0..1 as [3, H, W]: black, red, yellow, white."""
    level = level.clamp(0, 1) * 3
    return torch.stack([level.clamp(0, 1), (level - 1).clamp(0, 1), (level - 2).clamp(0, 1)])


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, title: str = "", width: int = 720
) -> Image.Image:
    """Lines through points (x, y), one a name, with axes and a legend; the first is accented."""
    height, left, top, bottom, right = round(width * 0.62), 60, 44, 52, 16
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((left, 10), title, INK, font(16))
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    (x0, x1, x_step), (y0, y1, y_step) = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    for k in range(round((x1 - x0) / x_step) + 1):
        x, _ = place(x0 + k * x_step, y0)
        draw.line((x, top, x, height - bottom), FAINT)
        draw.text((x, height - bottom + 6), f"{x0 + k * x_step:.4g}", INK, font(13), anchor="ma")
    for k in range(round((y1 - y0) / y_step) + 1):
        _, y = place(x0, y0 + k * y_step)
        draw.line((left, y, width - right, y), FAINT)
        draw.text((left - 8, y), f"{y0 + k * y_step:.4g}", INK, font(13), anchor="rm")
    draw.text(((left + width - right) / 2, height - 22), x_label, INK, font(14), anchor="ma")
    draw.text((8, top - 20), y_label, INK, font(14))
    for index, (name, points) in enumerate(series.items()):
        colour = LINES[index % len(LINES)]
        spots = [place(*point) for point in sorted(points)]
        draw.line(spots, colour, 3)
        for x, y in spots:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        y = height - bottom - 22 * (len(series) - index)
        draw.line((width - right - 150, y + 8, width - right - 126, y + 8), colour, 3)
        draw.text((width - right - 118, y), name, colour, font(14))
    return sheet


def _ticks(low: float, high: float) -> tuple[float, float, float]:
    """Ends and step of an axis of round numbers that holds both values."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(f for f in (1, 2, 5, 10) if span / (f * step) <= 8)
    return math.floor(low / step) * step, max(math.ceil(high / step), math.floor(low / step) + 1) * step, step
