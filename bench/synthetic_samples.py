"""Do samples of the degradation model make a restorer better at damage that it was not trained on?

    mend bench samples --photos DIR [--steps 2000] [--seeds 3] [--out FILE.md]

The question of GenDeg's paper, small: two equal NAFNets learn from the same photographs for the same number of steps. One
sees only simulated damage, weak and of a single kind at a time; of the other one's pairs, half come from the degradation model,
with the intensities of the published histograms. Both are measured on weak damage as in training, and on what neither saw: strong
damage, mixtures, and kinds that neither the simulation nor the model was asked for. Seeds change weights and crops.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .. import models
from ..models.degradation_model import KINDS
from ..training import make_dataset
from ..training.data import Task, load_photos
from ..training.dataset_sources import clean_folder, manifest
from ..training.datasets import Mixture, Stream
from ..training.degradation_model import SIMULATED
from ..training.degradations import Degradation
from ..training.starters import BLIND
from ..training.trainer import Settings, Stage, Trainer, validate, validation_set
from . import machine, report

CONFIG = {"width": 12, "enc_blk_nums": (1, 1, 2), "middle_blk_num": 2, "dec_blk_nums": (1, 1, 1)}
WEAK, STRONG = 0.4, 1.3
SMALLEST = 0.12
"""Half of the simulated crops come from photographs reduced to as little as this: the samples show whole scenes, too."""
ARMS = ("simulated", "with samples")

Cases = Mapping[str, tuple[Degradation, ...]]


def cases() -> dict[str, Cases]:
    """What is measured, in groups."""
    mixtures = (("haze", "rain"), ("rain", "low-light"), ("snow", "haze"), ("low-light", "motion-blur"))
    other = ("noise", "blur", "defocus", "jpeg", "downsample")
    return {
        "as in training": {kind: (Degradation(SIMULATED[kind], WEAK),) for kind in KINDS},
        "stronger": {kind: (Degradation(SIMULATED[kind], STRONG),) for kind in KINDS},
        "mixtures": {" + ".join(pair): tuple(Degradation(kind, 0.8) for kind in pair) for pair in mixtures},
        "other kinds": {kind: (Degradation(kind, 0.7),) for kind in other},
    }


def train(stream: Stream, steps: int, seed: int, folder: Path) -> torch.nn.Module:
    """The averaged network after `steps` of eight crops of 64 pixels."""
    torch.manual_seed(seed)
    module = models.create("nafnet", CONFIG)
    with torch.no_grad():
        module.ending.weight.mul_(0.1)  # begin near the identity: short runs have no time to find it
    stages = (Stage(0.0, 64, 8),)
    settings = Settings(
        steps=steps,
        seed=seed,
        stages=stages,
        learning_rate=2e-3,
        optimizer="muon",
        autocast=True,
        warmup_steps=50,
        ema_decay=0.99,
        validate_every=0,
    )
    trainer = Trainer(module, stream, settings, folder, BLIND)
    trainer.run(bar=False)
    return trainer.average


def measure(
    photos: Path, steps: int, seeds: int, pairs: int, work: Path, size: int = 128
) -> dict[str, dict[str, list[list[float]]]]:
    """group -> arm (and "damaged") -> for each seed the PSNR of each case, in dB."""
    painter = make_dataset.model(make_dataset.STARTER)
    settings = make_dataset.Settings(painter.name, seed=0, largest=160)
    pictures = make_dataset.from_folder(photos / "train", work)
    make_dataset.make_dataset(pictures, work / "samples", painter, KINDS, settings, pairs)
    tasks = [Task(kind, 1.0, ((Degradation(SIMULATED[kind], WEAK),),), smallest=SMALLEST) for kind in KINDS]
    simulated = clean_folder(photos / "train", tasks)
    arms = {ARMS[0]: simulated, ARMS[1]: Mixture(((simulated, 0.5), (manifest(work / "samples"), 0.5)))}
    held_out = load_photos(photos / "validation")
    sets = {group: validation_set(held_out, size, chains) for group, chains in cases().items()}
    scores: dict[str, dict[str, list[list[float]]]] = {
        group: {"damaged": [list(validate(torch.nn.Identity(), found).values())]} for group, found in sets.items()
    }
    for seed in range(seeds):
        for arm, source in arms.items():
            stream = Stream(source, torch.Generator().manual_seed(seed))
            module = train(stream, steps, seed, work / f"{arm} {seed}")
            for group, found in sets.items():
                scores[group].setdefault(arm, []).append(list(validate(module, found).values()))
    return scores


def markdown(scores: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> list[str]:
    """A row a group: damaged, both arms as mean and spread over the seeds, and the difference seed by seed."""
    lines = ["| damage | damaged | simulated | with samples | difference |", "|---|---|---|---|---|"]
    for group, found in scores.items():
        means = {arm: torch.tensor([sum(row) / len(row) for row in rows]) for arm, rows in found.items()}
        gain = means[ARMS[1]] - means[ARMS[0]]

        def show(values: torch.Tensor) -> str:
            return f"{values.mean():.2f} ± {values.std(correction=0):.2f}"

        cells = [f"{means['damaged'].mean():.2f}", *(show(means[arm]) for arm in ARMS), f"{show(gain)} dB"]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(prog="mend bench samples", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1, help="samples of each kind for each photograph")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where to keep samples and runs, to go on after an interruption")
    parser.add_argument("--out", type=Path, help=".md file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        scores = measure(options.photos, options.steps, options.seeds, options.pairs, work)
    lines = [
        "# Samples of the degradation model in training",
        "",
        "PSNR in dB, mean ± standard deviation over the seeds, mean over kinds and validation photographs. `simulated`: a NAFNet of "
        f"{sum(p.numel() for p in models.create('nafnet', CONFIG).parameters()) / 1e3:.0f} thousand parameters, "
        f"{options.steps} steps of eight 64 x 64 crops with weak simulated damage of six kinds. `with samples`: half of the pairs from "
        "the degradation model instead. The model itself learned from simulations up to strength 1.1, so the samples carry "
        "knowledge of stronger damage than the first arm sees; that is what such samples are for.",
        "",
        machine.command(
            f"samples --photos PHOTOS --steps {options.steps} --seeds {options.seeds} --pairs {options.pairs}"
        ),
        "",
        *markdown(scores),
    ]
    report.publish(lines, options.out)
    return 0
