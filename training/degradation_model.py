"""Mend's degradation model: learns what damage looks like from pairs of a clean and a damaged picture.

    python -m comfyui_mend.training.degradation_model --photos DIR --out RUN --minutes 60

The pairs here are photographs damaged by `training/degradations.py`; the model itself needs nothing but pairs and the
kind of each. A run goes on where it stopped. RUN gets the log, last.pt, the weights; --report makes damage and judges it.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..errors import Cancelled
from ..guidance import synthesis
from ..guidance.gendeg import measure_intensity
from ..guidance.measurement import draw
from ..models.dcpt_classifier import classify
from ..models.degradation_model import KINDS, DegradationModel
from .data import PairStream, PhotoCrops, Task, central_squares, load_photos
from .degradations import Degradation, degrade
from .stopping import stop_request
from .trainer import OWN_LICENCE, Settings, Stage, Trainer, export

logger = logging.getLogger(__name__)

NAME = "mend-degradation-model.safetensors"
CLASSIFIER = Path(__file__).resolve().parent.parent / "weights" / "mend-degradation-classifier.safetensors"
ARCHITECTURE = "mend-degradation-model"
CONFIG: dict[str, Any] = {"kinds": KINDS, "widths": (40, 64, 96, 112), "condition": 64}
SIMULATED = {
    "haze": "haze",
    "rain": "rain",
    "snow": "snow",
    "motion blur": "motion-blur",
    "low light": "low-light",
    "raindrop": "raindrops",
}
"""GenDeg's names and those of training/degradations.py."""
STRENGTHS = (0.5, 0.8, 1.1)
FAINT = 0.012
"""Root mean square below which a pair teaches nothing but rounding."""
STAGES = (Stage(0.0, 64, 16), Stage(0.55, 96, 8), Stage(0.85, 128, 6))
LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Noise levels at which validation looks."""


def tasks() -> list[Task]:
    """One a kind, all equally likely."""
    return [Task(kind, 1.0, tuple((Degradation(SIMULATED[kind], s),) for s in STRENGTHS)) for kind in KINDS]


class LabelledPairs(PairStream):
    """The damaged batch gets a fourth plane: the number of its kind. A trainer's objective sees pictures only."""

    def batch(self, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        damaged, clean, names = super().batch(count, size)
        labels = torch.tensor([KINDS.index(name) for name in names], dtype=damaged.dtype)
        return torch.cat([damaged, labels[:, None, None, None].expand(-1, 1, size, size)], dim=1), clean, names


def conditions(clean: torch.Tensor, damaged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The residual of unit power [B, 3, H, W], mu [B] and sigma [B] of pairs in 0..1."""
    mu, sigma = measure_intensity(clean, damaged)
    power = (mu**2 + sigma**2).sqrt().clamp_min(1e-4)
    return (damaged - clean) / power[:, None, None, None], mu, sigma


class Denoising:
    """Objective: the model's loss at noise levels drawn log-normally around 0.8, spread 1.6."""

    def __call__(
        self, module: nn.Module, damaged: torch.Tensor, clean: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        kind, damaged = damaged[:, 3, 0, 0].long(), damaged[:, :3].clamp(0, 1)
        residual, mu, sigma = conditions(clean, damaged)
        seen = (mu**2 + sigma**2).sqrt() > FAINT
        level = (torch.randn(len(clean), generator=generator) * 1.6 - 0.2).exp()
        noise = torch.randn(clean.shape, generator=generator)
        losses = module.loss(residual, clean, kind, mu, sigma, level, noise)
        return (losses * seen).sum() / seen.sum().clamp_min(1), {}


class DegradationTrainer(Trainer):
    """Validates by the model's own loss at fixed levels; 1 is what a model that knows nothing has."""

    def evaluate(self) -> dict[str, float]:
        return mean_losses(self.average, self.validation)


def validation_pairs(photos: Sequence[torch.Tensor], size: int = 128) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each kind damaged and clean central crops [N, 3, size, size], always the same."""
    crops, pairs = central_squares(photos, size), {}
    for kind in KINDS:
        chain = [Degradation(SIMULATED[kind], 0.8)]
        pairs[kind] = (torch.cat([degrade(c, chain, 500 + i)[0] for i, c in enumerate(crops)]), torch.cat(crops))
    return pairs


@torch.inference_mode()
def mean_losses(
    module: DegradationModel, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], levels: Sequence[float] = LEVELS
) -> dict[str, float]:
    """Mean loss of every kind over pairs and noise levels, with the same noise each time."""
    scores = {}
    for kind, (damaged, clean) in pairs.items():
        residual, mu, sigma = conditions(clean, damaged)
        seen = (mu**2 + sigma**2).sqrt() > FAINT
        index = torch.full((len(clean),), KINDS.index(kind))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
        losses = [
            module.loss(residual, clean, index, mu, sigma, torch.full((len(clean),), level), noise)[seen].mean()
            for level in levels
        ]
        scores[kind] = float(torch.stack(losses).mean())
    return scores


@torch.inference_mode()
def report(
    module: DegradationModel, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], classifier: Path = CLASSIFIER
) -> list[str]:
    """A table: for each kind, damage is made with the intensities of `pairs`, and compared with theirs.

    Loss: `mean_losses`; then the mean of sigma asked for and found (mu is met by construction), and how often the starter
    classifier names the kind, on the simulated pictures and on those of the model.
    """
    judge = models.load(classifier)
    labels, losses = list(judge.config["labels"]), mean_losses(module, pairs)
    lines = [
        "| kind | loss | sigma asked | found | named right, simulated | named right, model |",
        "|---|---|---|---|---|---|",
    ]
    for kind, (simulated, clean) in pairs.items():
        mu, sigma = measure_intensity(clean, simulated)
        made = [
            synthesis.synthesise(module, picture[None], kind, float(m), float(s), draw((1, *picture.shape), 9, number))
            for number, (picture, m, s) in enumerate(zip(clean, mu, sigma, strict=True))
        ]
        found = measure_intensity(clean, torch.cat(made))[1]
        named = ["–", "–"]
        if kind in labels:
            shares = [
                float((_verdicts(judge, x) == labels.index(kind)).float().mean()) for x in (simulated, torch.cat(made))
            ]
            named = [f"{100 * share:.0f} %" for share in shares]
        cells = [f"{losses[kind]:.3f}", f"{sigma.mean():.3f}", f"{found.mean():.3f}", *named]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def _verdicts(judge: models.Restorer, images: torch.Tensor) -> torch.Tensor:
    network, config, eight = judge.module, judge.config, (images * 255).round() / 255
    found = classify(
        eight, network.net_g, network.net_dc, config["labels"], multiple_of=8, window=config["window"], grid=5
    )
    return found.probabilities.argmax(dim=1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=60.0, help="training time (60); pauses do not count")
    length.add_argument("--steps", type=int, help="a number of steps instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--export", action="store_true", help="only write the weights of the run as it stands")
    parser.add_argument("--report", type=Path, help="also make damage and judge it, and write a table here (minutes)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    settings = Settings(
        minutes=None if options.steps else options.minutes,
        steps=options.steps,
        learning_rate=options.learning_rate,
        stages=STAGES,
        seed=options.seed,
        autocast=True,
        validate_every=600.0,
    )
    crops = PhotoCrops(load_photos(options.photos / "train"))
    pairs = LabelledPairs(crops, tasks(), torch.Generator().manual_seed(options.seed))
    held_out = validation_pairs(load_photos(options.photos / "validation"))
    trainer = DegradationTrainer(
        models.create(ARCHITECTURE, CONFIG), pairs, settings, options.out, Denoising(), held_out
    )
    trainer.resume()
    if not options.export:
        try:
            with stop_request() as should_stop:
                trainer.run(should_stop)
        except Cancelled as error:
            logger.info("%s", error)
            return 1
    if not trainer.progress.scores:
        trainer.score()
    write(trainer, options.out / NAME, len(crops.photos))
    if options.report:
        options.report.write_text("\n".join(report(trainer.average, held_out)) + "\n")
    return 0


def write(trainer: Trainer, path: Path, photos: int) -> None:
    """The averaged weights in half precision, with how they were trained."""
    progress = trainer.progress
    provenance = {
        "photos": photos,
        **progress.spent(),
        "validation loss": {k: round(v, 4) for k, v in progress.scores.items()},
    }
    config = json.loads(json.dumps(CONFIG))
    export(trainer.average, path, ARCHITECTURE, config, ("degradation synthesis",), provenance, licence=OWN_LICENCE)


if __name__ == "__main__":
    raise SystemExit(main())
