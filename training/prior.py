"""Trains Mend's starter prior, the small denoiser that zero-shot restoration is guided by.

    python -m comfyui_mend.training.prior --photos photos/ready --out runs/prior --minutes 60
    python -m comfyui_mend.training.prior --photos photos/ready --out runs/consistency --consistency \
        --initial runs/prior/mend-prior-starter.safetensors

The second makes a consistency model of it. Stop it as you like (Ctrl-C, SIGTERM); the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..errors import Cancelled
from ..guidance import priors
from ..guidance.parametrisation import SIGMA_MIN, edm_weight
from .data import PhotoCrops, central_squares, load_photos
from .stopping import stop_request
from .trainer import OWN_LICENCE, Settings, Stage, Trainer, export, psnr, read_export

logger = logging.getLogger(__name__)

SYSTEM = "noise-unet"
CONFIG: dict[str, Any] = {"channels": 3, "widths": [48, 80, 128], "blocks": [1, 2, 2], "embedding": 64}
NAME = "mend-prior-starter.safetensors"
CONSISTENCY_NAME = "mend-consistency-starter.safetensors"
STAGES = (Stage(0.0, 64, 8), Stage(0.5, 96, 4), Stage(0.85, 128, 3))
FIRST_AND_LAST = ("head", "tail", "embed")
LEVELS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Noise levels, for pictures in -1..1, at which a run is scored."""
_MEDIAN, _SPREAD = 0.22, 1.2
_WIDEST = (0.002, 160.0)


def draw_sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [count] to train at, for pictures in -1..1.

    Nine in ten are log-normal around 0.22, where zero-shot schemes spend their evaluations; the rest spreads evenly over the
    logarithm from 0.002 to 160, so that a diffusion chain may begin with noise alone. A batch's levels are stratified.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    u = u[torch.randperm(count, generator=generator)].clamp(1e-4, 1 - 1e-4)
    usual = math.log(_MEDIAN) + _SPREAD * torch.special.ndtri(u)
    low, high = map(math.log, _WIDEST)
    anywhere = low + (high - low) * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.9, usual.clamp(low, high), anywhere).exp()


def denoise(module: nn.Module, x: torch.Tensor, sigma: torch.Tensor, *, boundary: bool = False) -> torch.Tensor:
    """x0 of x = x0 + sigma n, [B, C, H, W] in -1..1, not clamped. boundary: as a consistency model, whose x0 at the smallest
    noise level is x itself."""
    return priors.consistency_prior(module, boundary=boundary).unclamped()(x, sigma)


class Denoising:
    """EDM's loss: squared error of x0 over c_out^2, so that all noise levels weigh alike (Karras et al. 2022, table 1)."""

    def __call__(
        self, module: nn.Module, damaged: torch.Tensor, clean: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x0 = clean * 2 - 1
        sigma = draw_sigmas(len(x0), generator)
        x = x0 + sigma.reshape(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator)
        error = (denoise(module, x, sigma) - x0).square().mean(dim=(1, 2, 3))
        return (error * edm_weight(sigma)).mean(), {
            "psnr": (-10 * (error.detach() / 4).clamp_min(1e-10).log10()).mean()
        }


@dataclass(frozen=True)
class Consistency:
    """Equal answers for two noise levels of one picture under one noise: consistency tuning (Geng et al. 2024, "ECT").

    The answer at the lower level is the goal for the higher one. Between them lies a half of the level at first, later a
    quarter, an eighth: denoising, with which a trained prior begins, is the case of all of it. `share`: how much of the
    run is done, 0..1.
    """

    share: Callable[[], float]
    halvings: int = 3

    def __call__(
        self, module: nn.Module, damaged: torch.Tensor, clean: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x0 = clean * 2 - 1
        sigma = draw_sigmas(len(x0), generator).clamp_min(2 * SIGMA_MIN)
        gap = 0.5 ** min(self.halvings, 1 + int(self.halvings * self.share()))
        lower = (sigma * (1 - gap)).clamp_min(SIGMA_MIN)
        noise = torch.randn(x0.shape, generator=generator)
        with torch.no_grad():
            goal = denoise(module, x0 + lower.reshape(-1, 1, 1, 1) * noise, lower, boundary=True)
        found = denoise(module, x0 + sigma.reshape(-1, 1, 1, 1) * noise, sigma, boundary=True)
        error = (found - goal).square().mean(dim=(1, 2, 3))
        apart = (found.detach() - x0).square().mean(dim=(1, 2, 3))
        loss = (error * edm_weight(sigma)).mean() / gap
        return loss, {"gap": loss.new_tensor(gap), "psnr": (-10 * (apart / 4).clamp_min(1e-10).log10()).mean()}


class CleanCrops:
    """Batches of crops in place of the trainer's pairs: what damages them here is noise, drawn by the objective."""

    def __init__(self, crops: PhotoCrops, generator: torch.Generator) -> None:
        self.crops, self.generator = crops, generator

    def batch(self, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        clean = self.crops.batch(count, size, self.generator)
        return clean, clean, []


class PriorTrainer(Trainer):
    """Scored by how well pictures are denoised at fixed levels. `validation`: [N, 3, H, W] in 0..1."""

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        clean, scores = self.validation["clean"], {}
        for level in LEVELS:
            generator, values = torch.Generator().manual_seed(1000), []
            for picture in clean.split(1):
                x = picture * 2 - 1 + level * torch.randn(picture.shape, generator=generator)
                x0 = denoise(self.average, x, torch.tensor([level]))
                values.append(psnr((x0 / 2 + 0.5).clamp(0, 1), picture))
            scores[f"sigma {level}"] = float(torch.cat(values).mean())
        return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m comfyui_mend.training.prior", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run: log, checkpoint, weights")
    parser.add_argument("--minutes", type=float, default=60, help="training time (60); the schedule follows it")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--initial", type=Path, help="begin with the weights of this exported file")
    parser.add_argument(
        "--consistency", action="store_true", help="make a consistency model; begin with a trained prior"
    )
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)  # half the speed of two threads, and the machine stays usable
    torch.manual_seed(chosen.seed)
    module = read_export(chosen.initial) if chosen.initial else models.create(SYSTEM, CONFIG)
    settings = Settings(
        minutes=chosen.minutes,
        learning_rate=chosen.learning_rate,
        stages=STAGES,
        seed=chosen.seed,
        optimizer="muon",  # measured: less than half of AdamW's steps to the same loss, at a quarter more time each
        first_and_last=FIRST_AND_LAST,
        autocast=True,  # measured: 1.7 to 2.2 times the speed of float32 on a CPU with avx512_bf16
        validate_every=600,
    )
    crops = PhotoCrops(load_photos(chosen.photos / "train"))
    held_out = torch.cat(central_squares(load_photos(chosen.photos / "validation"), settings.validation_size))
    trainer = PriorTrainer(
        module,
        CleanCrops(crops, torch.Generator().manual_seed(chosen.seed)),
        settings,
        chosen.out,
        Denoising(),
        validation={"clean": held_out},
    )
    if chosen.consistency:
        trainer.objective = Consistency(lambda: trainer.share)
    trainer.resume()
    try:
        with stop_request() as should_stop:
            trainer.run(should_stop, bar=sys.stderr.isatty())
    except Cancelled as error:
        logger.info("%s", error)
    progress = trainer.progress
    training = {
        "photos": len(crops.photos),
        **progress.spent(),
        "psnr": {name: round(value, 2) for name, value in progress.scores.items()},
    }
    name, tasks = (CONSISTENCY_NAME, ("prior", "consistency")) if chosen.consistency else (NAME, ("prior",))
    export(trainer.average, chosen.out / name, SYSTEM, CONFIG, tasks, training, licence=OWN_LICENCE)
    logger.info("%s", json.dumps(training))
    return 0


if __name__ == "__main__":
    sys.exit(main())
