"""`mend bench zero-shot`: zero-shot restoration with a prior, next to what needs no network.

The photographs are those held out of training. Every measurement is made from the central crop of each: noisy
super-resolution, noisy deblurring, scattered and written-over pixels. The simple methods know the operator and the noise
level, as the zero-shot schemes do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..engine import loaded, model_folder, operator_builders, zero_shot
from ..engine.report import psnr, ssim
from ..guidance import cm4ir, operators, schedules, solvers
from ..guidance.measurement import Measurement, measure, task
from ..training.data import central_squares, load_photos
from . import machine, report

Score = tuple[float, float]
Method = Callable[[Measurement], torch.Tensor]
SIMPLE = ("pseudo-inverse", "bicubic", "Wiener")
CM4IR, STILL, RDMD = "CM4IR, 4 evaluations", "the same without noise injection", "RDMD"
PHRASE = "What is written across a photograph hides a part of it. "


def text_mask(size: int) -> torch.Tensor:
    """[1, size, size], 1 where lines of text cover the picture."""
    sheet = Image.new("L", (size, size))
    font, draw = ImageFont.load_default(size=max(8, size // 16)), ImageDraw.Draw(sheet)
    for row in range(0, size, max(8, size // 11)):
        start = row // 7 % len(PHRASE)
        draw.text((4, row), (PHRASE[start:] + PHRASE * 3)[: size // 4], fill=255, font=font)
    return (torch.from_numpy(np.array(sheet, dtype=np.float32)) > 96).float()[None]


def cases(size: int) -> dict[str, tuple[operators.Operator, float]]:
    """Operator and noise level (0..1 scale) of every case. The blur is CM4IR's: 5 x 5, sigma 10, zero borders."""
    nothing = torch.zeros(1, size, size)
    return {
        "super-resolution x4, noise 0.05": (operator_builders.downsampling("bicubic", 4), 0.05),
        "Gaussian deblurring, noise 0.05": (operator_builders.blur("gaussian", 5, 10, 10, 0, "zero"), 0.05),
        "inpainting, half of the pixels": (operator_builders.inpainting(nothing, 0.5, seed=1), 0.0),
        "inpainting, text": (operator_builders.inpainting(text_mask(size)), 0.0),
        "inpainting, half of the pixels, noise 0.05": (operator_builders.inpainting(nothing, 0.5, seed=1), 0.05),
        "inpainting, text, noise 0.025": (operator_builders.inpainting(text_mask(size)), 0.025),
    }


def pseudo_inverse(seen: Measurement) -> torch.Tensor:
    """A+ y; what was not measured stays grey."""
    return seen.operator.A_dagger(seen.y)


def bicubic(seen: Measurement) -> torch.Tensor:
    """Bicubic enlargement; over holes a cubic surface through the known pixels; a blurred picture as it is."""
    kind = task(seen.operator)
    if kind == "super-resolution":
        return F.interpolate(seen.y, size=seen.size, mode="bicubic", align_corners=False)
    return cubic_surface(seen.y, seen.operator.mask[0, 0]) if kind == "inpainting" else seen.y


def cubic_surface(y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Piecewise cubic interpolation (Clough and Tocher) of [1, C, H, W] where mask [H, W] is 0; nearest at the edges."""
    from scipy.interpolate import CloughTocher2DInterpolator, NearestNDInterpolator

    known, missing = (mask > 0.5).nonzero().numpy(), (mask < 0.5).nonzero().numpy()
    values = y[0, :, mask > 0.5].T.double().numpy()
    surface = CloughTocher2DInterpolator(known, values)(missing)
    outside = np.isnan(surface[:, 0])
    surface[outside] = NearestNDInterpolator(known, values)(missing[outside])
    filled = y.clone()
    filled[0, :, mask < 0.5] = torch.from_numpy(surface.T).to(y)
    return filled


def wiener(seen: Measurement, iterations: int = 80, deviation: float = 0.25) -> torch.Tensor:
    """The mean of the posterior under a Gaussian prior with the spectrum of photographs, 1 / frequency^2 in power.

    deviation: the prior's, over all frequencies; 0.25 was the best on training photographs, for blur and down-sampling alike.
    Solves (S^1/2 A'A S^1/2 + sigma^2) z = S^1/2 A'y, x = S^1/2 z, by conjugate gradients, so any operator will do.
    """
    height, width = seen.size
    squares = torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width) ** 2
    spectrum = 1 / (squares + 1 / max(height, width) ** 2)
    root = (spectrum * (deviation**2 / spectrum.mean())).sqrt()

    def coloured(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x) * root).real

    variance, operator = (2 * max(seen.noise, 0.002)) ** 2, seen.operator

    def normal(z: torch.Tensor) -> torch.Tensor:
        return coloured(operator.A_adjoint(operator.A(coloured(z)))) + variance * z

    return coloured(solvers.conjugate_gradients(normal, coloured(operator.A_adjoint(seen.y)), iterations))


def few_steps(prior: zero_shot.Prior, still: bool = False) -> Method:
    """CM4IR with its preset for this prior. still: nothing is added between the evaluations, nor before the first."""

    def restore(seen: Measurement) -> torch.Tensor:
        chosen = zero_shot.cm4ir_preset(zero_shot.AUTOMATIC, seen, prior)
        sigmas = schedules.cm4ir_sigmas(4, chosen.start, chosen.gamma)
        settings = zero_shot.Cm4ir.of(chosen)
        if not still:
            return zero_shot.restore_cm4ir(prior, seen, 0, sigmas, settings) * 2 - 1
        settings = replace(settings, eta=0.0, noise_sign=0.0)

        def body(session: zero_shot.Session) -> torch.Tensor:
            x = cm4ir.start(seen.operator, seen.y, settings.zeta, seen.noise, settings.fill)
            return zero_shot.run_cm4ir(session, seen, sigmas, x, 0, settings)

        return prior.run(zero_shot.picture_size(seen), body)

    return restore


def many_steps(prior: zero_shot.Prior, iterations: int) -> Method:
    """RDMD at tau 0.5."""
    return lambda seen: zero_shot.restore_rdmd(prior, seen, 0, zero_shot.Rdmd(iterations)) * 2 - 1


def methods(prior: zero_shot.Prior, iterations: int) -> dict[str, Method]:
    """All that is compared, by the name of its column."""
    simple = dict(zip(SIMPLE, (pseudo_inverse, bicubic, wiener), strict=True))
    return {**simple, CM4IR: few_steps(prior), STILL: few_steps(prior, True), RDMD: many_steps(prior, iterations)}


@torch.inference_mode()
def compare(
    photos: Sequence[torch.Tensor], size: int, ways: Mapping[str, Method], seed: int = 0
) -> dict[str, dict[str, Score]]:
    """Mean PSNR (dB) and SSIM per case and method over the central crops of photographs, uint8 [3, H, W]."""
    scores: dict[str, dict[str, Score]] = {}
    squares = central_squares(photos, size)
    for name, (operator, noise) in tqdm(cases(size).items(), leave=False):
        found: dict[str, list[Score]] = {way: [] for way in ways}
        for index, clean in enumerate(squares):
            seen = measure(operator, clean, noise, seed + index)
            for way, method in ways.items():
                image = (method(seen) / 2 + 0.5).clamp(0, 1)
                found[way].append((float(np.mean(psnr(image, clean))), float(np.mean(ssim(image, clean)))))
        scores[name] = {way: tuple(np.mean(values, axis=0).tolist()) for way, values in found.items()}
    return scores


def table(scores: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """Markdown rows: PSNR / SSIM of every method, and what CM4IR gains over the best simple one and over standing still."""
    columns = list(next(iter(scores.values())))
    rows = [
        "| measurement | " + " | ".join(columns) + " | CM4IR over the best simple one | over no injection |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, found in scores.items():
        best = max(found[way][0] for way in SIMPLE)
        cells = [f"{p:.2f} / {s:.3f}" for p, s in (found[way] for way in columns)]
        gains = [f"{found[CM4IR][0] - best:+.2f} dB", f"{found[CM4IR][0] - found[STILL][0]:+.2f} dB"]
        rows.append(f"| {name} | " + " | ".join([*cells, *gains]) + " |")
    return rows


def main(arguments: Sequence[str]) -> int:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(prog="mend bench zero-shot", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--model", default="mend-prior-starter.safetensors", help="the prior's file")
    parser.add_argument("--size", type=int, default=256, help="side of the central crop (256)")
    parser.add_argument("--iterations", type=int, default=20, help="of RDMD, two evaluations each (20)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the prior's network")
    parser.add_argument("--limit", type=int, help="only the first pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the table here (.md), and the scores beside it (.json)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    prior = zero_shot.network_prior(loaded.load(model_folder.model_path(args.model)), precision=args.precision)
    photos = load_photos(args.photos, args.limit)
    scores = compare(photos, args.size, methods(prior, args.iterations))
    usable = sum(min(p.shape[1:]) >= args.size for p in photos)
    lines = [
        f"# Zero-shot restoration with {Path(args.model).name}",
        "",
        f"{report.trained(args.model, prior.loaded.restorer)}, central {args.size} x {args.size} crops of {usable} "
        "photographs that were neither trained on nor tuned on. PSNR in dB / SSIM, mean over the photographs.",
        "",
        "Pseudo-inverse: grey where nothing was measured. Bicubic: an enlargement; over holes a cubic surface through the known "
        "pixels; for blur the picture as it is. Wiener: the best linear estimate for pictures with a spectrum of 1 / f^2. "
        f"RDMD: {args.iterations} iterations, tau 0.5.",
        "",
        machine.command(
            f"zero-shot --photos PHOTOS/validation --model {Path(args.model).name} --size {args.size} --iterations {args.iterations} --precision {args.precision}"
        ),
        "",
        *table(scores),
    ]
    report.publish(lines, args.out, scores)
    return 0
