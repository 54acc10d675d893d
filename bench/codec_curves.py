"""`mend bench codec`: real files of the codec against JPEG, WebP and JPEG 2000, and against restoring first; its speed.

The photographs are those held out of training (`mend train photos` writes them to validation/); `RULES` says how curves are
compared.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from tqdm import tqdm

from .. import models
from ..codec import compress
from ..codec.entropy import Decoder, Encoder
from ..codec.rates import Point, codec_curve, pillow_curve, spread_qualities
from ..engine import host
from ..engine.loaded import LoadedRestorer
from ..engine.pictures import curves, from_pil, to_pil
from ..engine.report import psnr
from ..training.data import VALIDATION, load_photos
from ..training.trainer import validation_set
from . import machine, report

RATES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Bits per pixel at which curves are compared."""
DEGRADED = ("noise 25", "noise 50", "rain", "haze")
RULES = (
    "Rates count whole files, headers included, as each program writes them. At a rate PSNR is interpolated between the files "
    "on both sides of it, on a logarithmic scale of rates; photographs for which one of the two compared has no file on one "
    "side are left out of that comparison. In brackets: photographs compared. In the plot, which takes all photographs, a "
    "curve stays where it is beyond its last file."
)
CODEC, CHAIN = "Mend codec", "restore, then JPEG"
JPEG_2000_RATIOS = (400, 240, 160, 110, 80, 56, 40, 28, 20, 14, 10)
Curves = dict[str, list[list[Point]]]
"""Per method a curve for each photograph."""


def jpeg_2000_curve(image: torch.Tensor, reference: torch.Tensor) -> list[Point]:
    """As `pillow_curve`: JPEG 2000 (OpenJPEG, irreversible) at fixed compression ratios."""
    picture, points = to_pil(image), []
    for ratio in JPEG_2000_RATIOS:
        file = io.BytesIO()
        picture.save(file, "JPEG2000", irreversible=True, mct=1, quality_mode="rates", quality_layers=[ratio])
        decoded = from_pil(Image.open(file))
        points.append(Point(ratio, file.tell(), psnr(decoded[None], reference[None])[0]))
    return points


def psnr_at(curve: Sequence[Point], size: float) -> float | None:
    """Decibels of a file of `size` bytes, between its neighbours on the curve; None outside of it."""
    ordered = sorted(curve, key=lambda p: p.size)
    if not ordered[0].size <= size <= ordered[-1].size:
        return None
    return float(np.interp(math.log(size), [math.log(p.size) for p in ordered], [p.psnr for p in ordered]))


def rate_difference(curve: Sequence[Point], other: Sequence[Point]) -> float | None:
    """Mean difference of the logarithm of the rates over the PSNR that both reach (Bjontegaard, piecewise linear)."""
    lines = [sorted((p.psnr, math.log(p.size)) for p in c) for c in (curve, other)]
    low, high = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    if high - low < 0.5:
        return None
    at = np.linspace(low, high, 64)
    ours, theirs = (np.interp(at, *zip(*line, strict=True)) for line in lines)
    return float(np.mean(ours - theirs))


def conventional(image: torch.Tensor, reference: torch.Tensor) -> dict[str, list[Point]]:
    """Curves of what Pillow can write, for a picture [3, H, W]."""
    found = {"JPEG": pillow_curve(image, reference, "JPEG")}
    if features.check("webp"):
        found["WebP"] = pillow_curve(image, reference, "WEBP")
    if features.check("jpg_2000"):
        found["JPEG 2000"] = jpeg_2000_curve(image, reference)
    return found


def baselines(case: str, damaged: torch.Tensor, clean: torch.Tensor, restorer: models.Restorer | None) -> Curves:
    """What the codec is compared with on one case, [B, 3, H, W] each."""
    found: Curves = {}
    for image, reference in zip(tqdm(damaged, leave=False, desc=f"{case}, others"), clean, strict=True):
        if case == "clean":
            per_picture = conventional(image, reference)
        else:
            per_picture = {"JPEG": pillow_curve(image, reference, "JPEG")}
            if restorer is not None:
                with torch.inference_mode():
                    restored = restorer(image[None])[0].clamp(0, 1)
                per_picture[CHAIN] = pillow_curve(restored, reference, "JPEG")
        for name, curve in per_picture.items():
            found.setdefault(name, []).append(curve)
    return found


def _mean(values: Sequence[float | None]) -> str:
    kept = [v for v in values if v is not None]
    return f"{np.mean(kept):.2f} ({len(kept)})" if kept else "–"


def _leads(ours: Sequence[Sequence[Point]], theirs: Sequence[Sequence[Point]], size: float) -> list[float | None]:
    pairs = [(psnr_at(a, size), psnr_at(b, size)) for a, b in zip(ours, theirs, strict=True)]
    return [None if a is None or b is None else a - b for a, b in pairs]


def table(found: Curves, pixels: int) -> list[str]:
    """Markdown: PSNR of the codec at each rate, and its leads over the others, with numbers of photographs."""
    others = [name for name in found if name != CODEC]
    lines = [
        f"| bits per pixel | {CODEC}, dB | " + " | ".join(f"over {name}" for name in others) + " |",
        "|---" * (len(others) + 2) + "|",
    ]
    for rate in RATES:
        size = rate * pixels / 8
        cells = [_mean([psnr_at(curve, size) for curve in found[CODEC]])]
        for name in others:
            leads = [v for v in _leads(found[CODEC], found[name], size) if v is not None]
            cells.append(
                f"{np.mean(leads):+.2f} ({len(leads)}, ahead on {sum(v > 0 for v in leads)})" if leads else "–"
            )
        lines.append(f"| {rate} | " + " | ".join(cells) + " |")
    differences = []
    for name in others:
        pairs = zip(found[CODEC], found[name], strict=True)
        kept = [d for d in (rate_difference(a, b) for a, b in pairs) if d is not None]
        differences.append(f"{100 * (math.exp(np.mean(kept)) - 1):+.0f} % ({len(kept)})" if kept else "–")
    lines.append("| bytes for equal PSNR | | " + " | ".join(differences) + " |")
    return lines


def plot(found: Curves, pixels: int, title: str) -> Image.Image:
    """Mean PSNR over all photographs against the rate; beyond its last file a curve stays where it is."""
    series = {}
    largest = max(RATES)
    for name, per_picture in found.items():
        lowest = max(min(p.size for p in curve) for curve in per_picture) * 8 / pixels
        grid = [r for r in np.geomspace(0.08, largest, 12) if r >= lowest * 0.999]
        points = []
        for rate in grid:
            values = []
            for curve in per_picture:
                ordered = sorted(curve, key=lambda p: p.size)
                sizes, decibels = [math.log(p.size) for p in ordered], [p.psnr for p in ordered]
                values.append(np.interp(math.log(rate * pixels / 8), sizes, decibels))
            points.append((float(rate), float(np.mean(values))))
        if points:
            series[name] = points
    return curves(series, "bits per pixel", "dB", title, width=640)


@contextmanager
def _watched(owner: type, names: Sequence[str], spent: list[float]) -> Iterator[None]:
    """Within it the processor time of these methods is added up in `spent`."""
    before = {name: getattr(owner, name) for name in names}

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.process_time()
            try:
                return method(*arguments)
            finally:
                spent.append(time.process_time() - begin)

        return call

    for name, method in before.items():
        setattr(owner, name, timed(method))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(owner, name, method)


def speed(codec: LoadedRestorer, image: torch.Tensor, quality: int = 32, repeat: int = 5) -> list[str]:
    """Markdown: seconds of encoding and decoding a picture [3, H, W], and what part of it is entropy coding."""
    lines = ["| | best wall time, s | processor time, s | entropy coding, share of it |", "|---|---|---|---|"]
    stream = compress.compress(codec, image, quality)
    jobs = {
        "encode": (lambda: compress.compress(codec, image, quality), Encoder, ("plane", "finish")),
        "decode": (lambda: compress.decompress(codec, stream), Decoder, ("__init__", "plane")),
    }
    for name, (job, owner, methods) in jobs.items():
        walls, processor, coding = [], [], []
        for _ in range(repeat):
            spent: list[float] = []
            wall, cpu = time.perf_counter(), time.process_time()
            with _watched(owner, methods, spent):
                job()
            walls.append(time.perf_counter() - wall)
            processor.append(time.process_time() - cpu)
            coding.append(sum(spent))
        cpu = float(np.median(processor))
        lines.append(f"| {name} | {min(walls):.2f} | {cpu:.2f} | {100 * float(np.median(coding)) / cpu:.1f} % |")
    return lines


def _to_json(found: Mapping[str, Curves]) -> str:
    return json.dumps(
        {
            case: {
                n: [[[p.quality, p.size, round(p.psnr, 3)] for p in curve] for curve in c] for n, c in curves_.items()
            }
            for case, curves_ in found.items()
        }
    )


def _from_json(text: str) -> dict[str, Curves]:
    return {
        case: {name: [[Point(*p) for p in curve] for curve in c] for name, c in curves_.items()}
        for case, curves_ in json.loads(text).items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mend bench codec", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--model", type=Path, default=host.PACK / "weights" / "mend-aio-codec-starter.safetensors")
    parser.add_argument("--restorer", type=Path, default=host.PACK / "weights" / "mend-moce-ir-starter.safetensors")
    parser.add_argument("--size", type=int, default=384, help="side of the central crop (384)")
    parser.add_argument("--count", type=int, default=7, help="qualities for clean pictures (7)")
    parser.add_argument("--degraded-count", type=int, default=5, help="qualities for damaged ones (5)")
    parser.add_argument("--limit", type=int, help="only the first pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--others", type=Path, help="keep the curves of the other methods in this .json, or take them from it"
    )
    parser.add_argument("--out", type=Path, help="also write the tables here (.md) and a plot beside them (.png)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Prints the tables, and writes them where asked."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    photos = load_photos(args.photos, args.limit)
    cases = validation_set(photos, args.size, {"clean": (), **{name: VALIDATION[name] for name in DEGRADED}})
    # The picture as a file holds it: what is compressed and what is compared with have 8 bits.
    cases = {n: tuple((t.clamp(0, 1) * 255).round() / 255 for t in pair) for n, pair in cases.items()}
    known = _from_json(args.others.read_text()) if args.others and args.others.exists() else None
    if known is None:
        restorer = models.load(args.restorer)
        known = {name: baselines(name, *pair, restorer) for name, pair in cases.items()}
        if args.others:
            args.others.write_text(_to_json(known))
    codec, pixels = compress.load(args.model), args.size**2
    found: dict[str, Curves] = {}
    for name, (damaged, clean) in cases.items():
        qualities = spread_qualities(args.count if name == "clean" else args.degraded_count)
        pairs = zip(tqdm(damaged, leave=False, desc=name), clean, strict=True)
        found[name] = {CODEC: [codec_curve(codec, image, target, qualities) for image, target in pairs], **known[name]}
    lines = [
        "# The starter codec against JPEG, WebP, JPEG 2000, and against restoring first",
        "",
        f"{report.trained(args.model.name, codec.restorer)}, central {args.size} x {args.size} crops of "
        f"{len(cases['clean'][0])} photographs that were not trained on. {RULES}",
        "",
        machine.command(f"codec --photos PHOTOS/validation --size {args.size}"),
    ]
    for name in found:
        if name == "clean":
            lines += ["", "## Clean photographs", ""]
        else:
            lines += [
                "",
                f"## {name.capitalize()}",
                "",
                f"PSNR to the clean photograph. {CHAIN}: by `{args.restorer.name}`.",
                "",
            ]
        lines += table(found[name], pixels)
    photo = max(photos, key=lambda p: p[0].numel())[:, :512, :768].float() / 255
    lines += ["", f"## Speed, {photo.shape[2]} x {photo.shape[1]}, quality 32", "", *speed(codec, photo)]
    report.publish(lines)
    if args.out:
        drawing = args.out.with_suffix(".png")
        report.write([*lines, "", f"![curves]({drawing.name})"], args.out)
        sheets = [plot(found[n], pixels, f"PSNR to the clean photograph: {n}") for n in ("clean", "noise 25")]
        sheet = Image.new("RGB", (sum(s.width for s in sheets), sheets[0].height))
        for index, picture in enumerate(sheets):
            sheet.paste(picture, (index * sheets[0].width, 0))
        sheet.quantize(32).save(drawing, optimize=True)
        args.out.with_suffix(".json").write_text(_to_json(found) + "\n")
    return 0
