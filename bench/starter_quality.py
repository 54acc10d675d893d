"""`mend bench quality`: what a restorer makes of damaged photographs, next to classical methods.

The photographs are those held out of training (`mend train photos` writes them to validation/), the damage is
`training.data.VALIDATION`. The classical methods are the usual ones, told what a person would know: BM3D its noise
level, the others what kind of damage it is. BM3D needs the `bm3d` package (not free for commercial use, so only here);
without it non-local means of scikit-image take its place, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from .. import models
from ..engine import host
from ..engine.report import psnr, ssim
from ..training.damage import gaussian_blur
from ..training.data import VALIDATION, load_photos
from ..training.trainer import validation_set
from . import machine, report

Method = Callable[[torch.Tensor], torch.Tensor]
Score = tuple[float, float]
STARTER = host.PACK / "weights" / "mend-moce-ir-starter.safetensors"


def denoise(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """BM3D for colour at a known level (0..255), or non-local means where it is not installed. [1, 3, H, W]."""
    array = image[0].permute(1, 2, 0).double().numpy()
    if importlib.util.find_spec("bm3d"):
        import bm3d

        result = bm3d.bm3d_rgb(array, sigma / 255)
    else:
        from skimage.restoration import denoise_nl_means

        level = sigma / 255
        result = denoise_nl_means(array, 5, 6, 0.8 * level, fast_mode=True, sigma=level, channel_axis=-1)
    return torch.from_numpy(np.asarray(result)).permute(2, 0, 1)[None].float()


def dehaze(image: torch.Tensor, patch: int = 15, omega: float = 0.95, floor: float = 0.1) -> torch.Tensor:
    """Dark-channel prior (He et al., CVPR 2009) with a guided filter (He et al., ECCV 2010) on the transmission."""

    def dark(x: torch.Tensor) -> torch.Tensor:
        return -F.max_pool2d(-x.amin(dim=1, keepdim=True), patch, 1, patch // 2)

    channel = dark(image)
    brightest = channel.flatten().topk(max(1, channel.numel() // 1000)).indices
    light = image.flatten(2)[0][:, brightest].mean(dim=1)[None, :, None, None].clamp_min(0.05)
    rough = 1 - omega * dark(image / light)
    guide, radius, epsilon = image.mean(dim=1, keepdim=True), 20, 1e-3

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)

    variance = mean(guide * guide) - mean(guide) ** 2
    slope = (mean(guide * rough) - mean(guide) * mean(rough)) / (variance + epsilon)
    transmission = mean(slope) * guide + mean(mean(rough) - slope * mean(guide))
    return (image - light) / transmission.clamp_min(floor) + light


def _median(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    padded = F.pad(image, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows.flatten(-2).median(dim=-1).values


def derain(image: torch.Tensor) -> torch.Tensor:
    """Directional median: across the streaks, along the rows."""
    return _median(image, 1, 9)


def desnow(image: torch.Tensor) -> torch.Tensor:
    """Median of 5 x 5."""
    return _median(image, 5, 5)


def noise_level(image: torch.Tensor) -> float:
    """Standard deviation of the noise, 0..255, from the response to a Laplacian difference (Immerkaer, CVIU 1996)."""
    mask = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]])[None, None]
    response = F.conv2d(image.transpose(0, 1), mask).abs()
    return float(response.median()) / 0.6745 / 6 * 255


def brighten(image: torch.Tensor) -> torch.Tensor:
    """Denoise at the estimated level, then a gain that brings the mean to 0.45."""
    sigma = noise_level(image)
    clean = denoise(image, sigma) if sigma > 0.5 else image
    return clean * (0.45 / clean.mean().clamp_min(0.02))


def deblock(image: torch.Tensor) -> torch.Tensor:
    """Total variation (Chambolle)."""
    from skimage.restoration import denoise_tv_chambolle

    result = denoise_tv_chambolle(image[0].permute(1, 2, 0).numpy(), weight=0.02, channel_axis=-1)
    return torch.from_numpy(result).permute(2, 0, 1)[None].float()


def sharpen(image: torch.Tensor) -> torch.Tensor:
    """Unsharp mask, radius 1.6, amount 1."""
    return 2 * image - gaussian_blur(image, 1.6)


CLASSICAL: dict[str, tuple[str, Method]] = {
    "noise 15": ("BM3D told 15", lambda x: denoise(x, 15)),
    "noise 25": ("BM3D told 25", lambda x: denoise(x, 25)),
    "noise 50": ("BM3D told 50", lambda x: denoise(x, 50)),
    "haze": ("dark-channel prior", dehaze),
    "rain": ("directional median", derain),
    "snow": ("median", desnow),
    "low light": ("denoise, then gain", brighten),
    "JPEG 10": ("total variation", deblock),
    "blur 1.6": ("unsharp mask", sharpen),
    "motion 15": ("unsharp mask", sharpen),
    "haze + noise 25": ("BM3D, dark-channel prior", lambda x: dehaze(denoise(x, 25))),
    "low light + rain": ("median, then gain", lambda x: brighten(derain(x))),
}


def _score(images: Sequence[torch.Tensor], clean: torch.Tensor) -> Score:
    batch = torch.cat(list(images)).clamp(0, 1)
    return float(np.mean(psnr(batch, clean))), float(np.mean(ssim(batch, clean)))


def _cell(score: Score | None) -> str:
    return "" if score is None else f"{score[0]:.2f} / {score[1]:.3f}"


@torch.inference_mode()
def measure(
    restorer: models.Restorer,
    photos: Sequence[torch.Tensor],
    size: int,
    classical: bool = True,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    only: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """PSNR and SSIM per case of the damaged pictures, of the classical method, which is named, and of the restorer.

    known: what was returned for the same pictures before: the classical scores do not change with the weights. only: the
    names of the cases to measure; empty: all.
    """
    scores: dict[str, dict[str, Any]] = {}
    cases = {name: chain for name, chain in VALIDATION.items() if not only or name in only}
    for name, (damaged, clean) in tqdm(validation_set(photos, size, cases).items(), leave=False):
        images = damaged.split(1)
        scores[name] = {
            "damaged": _score(images, clean),
            "restored": _score([restorer(x) for x in images], clean),
        }
        before = (known or {}).get(name, {})
        if "classical" in before:
            scores[name] |= {"method": before["method"], "classical": tuple(before["classical"])}
        elif classical and name in CLASSICAL:
            scores[name] |= {
                "method": _method(name),
                "classical": _score([CLASSICAL[name][1](x) for x in images], clean),
            }
    return scores


def _method(name: str) -> str:
    """What the classical method of a case is called, as it is here."""
    title = CLASSICAL[name][0]
    return title if importlib.util.find_spec("bm3d") else title.replace("BM3D", "non-local means")


def table(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown rows: damage, PSNR / SSIM of the damaged picture, of the classical method and of the restorer, gains."""
    rows = [
        "| damage | damaged | classical method | | Mend | over damaged | over classical |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in scores.items():
        title = found.get("method", "")
        before, other, restored = found["damaged"], found.get("classical"), found["restored"]
        over = "" if name == "clean" else f"{restored[0] - before[0]:+.2f} dB"
        versus = "" if other is None else f"{restored[0] - other[0]:+.2f} dB"
        shown = "unharmed" if before[0] > 90 else _cell(before)
        rows.append(f"| {name} | {shown} | {title} | {_cell(other)} | {_cell(restored)} | {over} | {versus} |")
    return rows


def _chosen(args: argparse.Namespace) -> str:
    """The arguments that say what is measured, as they are typed, where they are not the usual ones."""
    model = "" if args.model == STARTER else f"--model {args.model.name} "
    kinds = "".join(f'"{kind}" ' if " " in kind else f"{kind} " for kind in args.only)
    return model + (f"--only {kinds}" if kinds else "")


def main(arguments: Sequence[str]) -> int:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(prog="mend bench quality", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--model", type=Path, default=STARTER)
    parser.add_argument("--size", type=int, default=256, help="side of the central crop (256)")
    parser.add_argument("--limit", type=int, help="only the first pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-classical", action="store_true", help="leave the slow classical methods out")
    parser.add_argument("--only", nargs="*", default=[], choices=list(VALIDATION), help="only these kinds of damage")
    parser.add_argument("--known", type=Path, help="take the classical scores from this .json of an earlier run")
    parser.add_argument("--out", type=Path, help="also write the table here (.md), and the scores beside it (.json)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    restorer = models.load(args.model)
    photos = load_photos(args.photos, args.limit)
    usable = sum(min(p.shape[1:]) >= args.size for p in photos)
    known = json.loads(args.known.read_text()) if args.known else None
    scores = measure(restorer, photos, args.size, not args.no_classical, known, args.only)
    lines = [
        "# Starter weights against classical methods",
        "",
        f"{report.trained(args.model.name, restorer)}, central {args.size} x {args.size} crops of {usable} "
        "photographs that were not trained on. PSNR in dB / SSIM, mean over the photographs, results clipped to 0..1.",
        "",
        machine.command(f"quality --photos PHOTOS/validation {_chosen(args)}--size {args.size}"),
        "",
        *table(scores),
    ]
    report.publish(lines, args.out, scores)
    return 0
