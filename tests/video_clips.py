"""Small clips that several test files and the benchmarks use."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comfyui_mend.bench.steady_video import noisy, pan, true_errors, true_flow
from comfyui_mend.engine.video import VideoReader

__all__ = ["frames", "noisy", "pan", "true_errors", "true_flow", "two_shots", "write_clip"]


def two_shots() -> torch.Tensor:
    """A clip [10, 3, 48, 64]: two shots of six and four frames."""
    first = pan("red_panda.jpg", 6, (48, 64), (0.4, 1.3), (100, 200))
    return torch.cat([first, pan("night.jpg", 4, (48, 64), (1, 0), (200, 200))])


def frames(path: Path) -> torch.Tensor:
    """All frames of a video file, [N, 3, H, W]."""
    with VideoReader(path) as reader:
        return torch.stack([frame.image() for frame in reader])


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
