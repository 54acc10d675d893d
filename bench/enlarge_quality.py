"""`mend bench enlarge`: an enlarger against interpolation, on photographs shrunk bicubically, as is usual."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import models
from ..engine import host
from ..engine.pictures import from_pil, to_pil
from ..engine.report import psnr, ssim
from ..training.data import load_photos, shrink
from ..training.trainer import validation_set
from . import machine, report

Method = Callable[[torch.Tensor], torch.Tensor]


def _resample(filter: Image.Resampling, scale: int) -> Method:
    def enlarge(image: torch.Tensor) -> torch.Tensor:
        picture = to_pil(image[0])
        enlarged = picture.resize((picture.width * scale, picture.height * scale), filter)
        return from_pil(enlarged).reshape(1, 3, enlarged.height, enlarged.width)

    return enlarge


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(prog="mend bench enlarge", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--model", type=Path, default=host.PACK / "weights" / "mend-mair-x2-starter.safetensors")
    parser.add_argument("--size", type=int, default=192, help="side of the central crop, before it is shrunk (192)")
    parser.add_argument("--out", type=Path, help="also write the table here (.md)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    restorer = models.load(args.model)
    scale = restorer.scale
    clean = validation_set(load_photos(args.photos), args.size, {"clean": ()})["clean"][1]
    methods: dict[str, Method] = {
        "bicubic (Pillow)": _resample(Image.Resampling.BICUBIC, scale),
        "Lanczos (Pillow)": _resample(Image.Resampling.LANCZOS, scale),
        args.model.stem: restorer,
    }
    border = (..., slice(scale, -scale), slice(scale, -scale))  # as papers do: the border has no neighbours
    lines = [
        "# Enlarging against interpolation",
        "",
        f"{report.trained(args.model.name, restorer, unit='k')}, central {args.size} x {args.size} crops of {len(clean)} "
        f"photographs that were not trained on, shrunk {scale} times bicubically and enlarged again. RGB, {scale} pixels of "
        "border left out.",
        "",
        machine.command(f"enlarge --photos PHOTOS/validation --size {args.size}"),
        "",
        "| method | PSNR | SSIM |",
        "|---|---|---|",
    ]
    for name, method in methods.items():
        results = torch.cat([method(image).clamp(0, 1) for image in shrink(clean, scale).split(1)])[border]
        figures = np.mean(psnr(results, clean[border])), np.mean(ssim(results, clean[border]))
        lines.append(f"| {name} | {figures[0]:.2f} dB | {figures[1]:.3f} |")
    report.publish(lines, args.out)
    return 0
