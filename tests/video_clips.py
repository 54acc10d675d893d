"""Small clips that several test files and the benchmarks use."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from comfyui_mend.engine import folders
from comfyui_mend.engine.photos import read_photo


def pan(
    name: str, frames: int, size: tuple[int, int], step: tuple[float, float], start: tuple[float, float]
) -> torch.Tensor:
    """A camera moving over a shipped photo, [frames, 3, *size]: `step` (down, right) pixels a frame, from `start`."""
    photo = read_photo(folders.SHIPPED_INPUTS / name)
    height, width = photo.shape[-2:]
    shots = []
    for t in range(frames):
        y = (torch.arange(size[0]) + start[0] + t * step[0] + 0.5) / height * 2 - 1
        x = (torch.arange(size[1]) + start[1] + t * step[1] + 0.5) / width * 2 - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
        shots.append(F.grid_sample(photo, grid, mode="bicubic", padding_mode="border", align_corners=False))
    return torch.cat(shots).clamp(0, 1)


def noisy(images: torch.Tensor, sigma: float, seed: int = 0) -> torch.Tensor:
    """Gaussian noise, sigma in grey levels of 255, new in every frame."""
    generator = torch.Generator().manual_seed(seed)
    return (images + torch.randn(images.shape, generator=generator) * sigma / 255).clamp(0, 1)


def true_flow(images: torch.Tensor, step: tuple[float, float]) -> torch.Tensor:
    """The flow from a frame of `pan` to the one before it, [1, 2, H, W]."""
    return torch.tensor([step[1], step[0]])[None, :, None, None].expand(1, 2, *images.shape[-2:])


def write_clip(path: Path, images: torch.Tensor, sound: bool = False, **settings: Any) -> Path:
    """A video file. settings: rate, times (in 1/30000 s), codec, pixels, rotation, aspect, colourspace."""
    import av

    rate = settings.get("rate", Fraction(25))
    times = settings.get("times") or [round(30000 / rate) * i for i in range(len(images))]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(settings.get("codec", "libx264"), rate=rate)
        stream.width, stream.height, stream.pix_fmt = *images.shape[:-3:-1], settings.get("pixels", "yuv420p")
        stream.time_base = stream.codec_context.time_base = Fraction(1, 30000)
        stream.codec_context.options = {"crf": "4"} if "264" in settings.get("codec", "libx264") else {}
        if "aspect" in settings:
            stream.codec_context.sample_aspect_ratio = settings["aspect"]
        if "rotation" in settings:
            stream.set_display_rotation(settings["rotation"])
        matrix = settings.get("colourspace", 5)
        stream.codec_context.colorspace = {5: 6}.get(matrix, matrix)
        track = container.add_stream("aac", rate=48000, layout="mono") if sound else None
        for image, time in zip(images, times, strict=True):
            pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix)
            frame.pts, frame.time_base = time, Fraction(1, 30000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for block in range(20 if sound else 0):
            wave = np.sin(np.arange(1024) * 0.05).astype(np.float32)[None] * 0.3
            samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 48000, 1024 * block
            container.mux(track.encode(samples))
        if track is not None:
            container.mux(track.encode(None))
    return path
