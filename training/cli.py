"""`mend train`: the command line of training."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .. import models
from ..errors import InputError
from . import cli_finetune, finetune, make_dataset, photos
from .accelerate import accelerate, compile_blocks
from .data import PhotoCrops, load_photos
from .starters import STARTERS
from .stopping import stop_request
from .trainer import OWN_LICENCE, Progress, Settings, Stage, Trainer, average_exports, export, read_export
from .warm_start import begin_with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sub-commands of `mend train`."""
    commands = parser.add_subparsers(dest="train_command", required=True, metavar="COMMAND")
    prepare = commands.add_parser("photos", help="take the photographs out of unpacked Debian packages")
    prepare.add_argument("unpacked", type=Path, help="folder with one folder for each unpacked package")
    prepare.add_argument("--out", type=Path, required=True, help="where to write train/ and validation/")
    prepare.set_defaults(run=_photos)

    starter = commands.add_parser("starter", help="train weights that come with Mend; goes on where it stopped")
    starter.add_argument("--which", choices=STARTERS, default="moce-ir", help="which of them (moce-ir)")
    starter.add_argument("--photos", type=Path, required=True, help="folder with train/ and validation/")
    starter.add_argument("--out", type=Path, required=True, help="folder of this run: log, checkpoint, weights")
    starter.add_argument("--minutes", type=float, default=100, help="training time (100); the schedule follows it")
    starter.add_argument("--steps", type=int, help="a number of steps instead of a time")
    starter.add_argument("--workers", type=int, default=2, help="threads that share out a batch")
    starter.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    starter.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    starter.add_argument("--float32", action="store_true", help="do not multiply in bfloat16")
    starter.add_argument("--compile", action="store_true", help="compile the blocks; on CPUs with a C++ compiler")
    starter.add_argument("--stages", type=_stages, help='crops from a share of the run on, as "0:128x4 0.8:192x2"')
    starter.add_argument("--seed", type=int, default=0)
    starter.add_argument("--initial", type=Path, help="weights to begin with: an exported file, of fewer blocks too")
    starter.add_argument("--config", type=json.loads, help="another configuration of the network, as JSON")
    starter.set_defaults(run=_starter)

    cli_finetune.add_arguments(commands.add_parser("finetune", help="train any network further, on data of your own"))
    make_dataset.add_arguments(
        commands.add_parser("make-dataset", help="turn clean photographs into damaged and clean pairs with a manifest")
    )

    snapshot = commands.add_parser("export", help="write the averaged weights of a run as it stands")
    snapshot.add_argument("folder", type=Path, help="folder of the run")
    snapshot.add_argument("file", type=Path, help="the .safetensors file to write")
    snapshot.set_defaults(run=_export)

    average = commands.add_parser("average", help="write the weighted mean of two exported files of one network")
    average.add_argument("first", type=Path)
    average.add_argument("second", type=Path)
    average.add_argument("file", type=Path, help="the .safetensors file to write")
    average.add_argument("--share", type=float, default=0.5, help="of the second, 0..1 (0.5)")
    average.set_defaults(run=_average)


def _stages(text: str) -> tuple[Stage, ...]:
    """The stages that a text like "0:128x4 0.8:192x2" names: crops of 128 pixels, four a step, and so on."""
    stages = []
    for part in text.split():
        found = re.fullmatch(r"([0-9.]+):([0-9]+)x([0-9]+)", part)
        if not found:
            raise argparse.ArgumentTypeError(f'{part!r} is not of the form SHARE:SIZExBATCH, as in "0:128x4"')
        stages.append(Stage(float(found[1]), int(found[2]), int(found[3])))
    if not stages or stages[0].start or stages != sorted(stages, key=lambda stage: stage.start):
        raise argparse.ArgumentTypeError("the first stage begins at 0, every other later than the one before")
    if any(stage.size < 16 or stage.size % 8 or not stage.batch for stage in stages):
        raise argparse.ArgumentTypeError("crops are multiples of 8 from 16 pixels on, one or more a step")
    return tuple(stages)


def _photos(arguments: argparse.Namespace) -> int:
    photos.prepare(arguments.unpacked, arguments.out)
    return 0


def _starter(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # the workers are the parallelism
    torch.manual_seed(arguments.seed)
    recipe = STARTERS[arguments.which]
    settings = Settings(
        minutes=None if arguments.steps else arguments.minutes,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        workers=arguments.workers,
        optimizer=arguments.optimizer,
        autocast=not arguments.float32,
        clip_each=recipe.clip_each,
    )
    if stages := arguments.stages or recipe.stages:
        settings = replace(settings, stages=stages)
    crops = PhotoCrops(load_photos(arguments.photos / "train"))
    pairs = recipe.pairs(crops, torch.Generator().manual_seed(arguments.seed))
    config = dict(arguments.config or recipe.config)
    module = models.create(recipe.system, config)
    if recipe.initialise:
        with torch.no_grad():
            recipe.initialise(module)
    if arguments.initial:
        begin_with(module, read_export(arguments.initial).state_dict(), recipe.closing)
    validation = recipe.validation_set(load_photos(arguments.photos / "validation"), settings.validation_size)
    restorer = partial(models.Restorer, models.registry.get(recipe.system), config)
    module = accelerate(module)
    if arguments.compile:
        compile_blocks(module)
    trainer = Trainer(module, pairs, settings, arguments.out, recipe.objective, validation, restorer)
    provenance = {"which": arguments.which, "config": config, "photos": len(crops.photos), "seed": arguments.seed}
    (arguments.out / "run.json").write_text(json.dumps(provenance))
    trainer.resume()
    with stop_request() as should_stop:
        trainer.run(should_stop)
    return _export(argparse.Namespace(folder=arguments.out, file=arguments.out / recipe.file))


def _export(arguments: argparse.Namespace) -> int:
    if not (arguments.folder / "last.pt").is_file() or not (arguments.folder / "run.json").is_file():
        raise InputError(
            f"{arguments.folder}: this is not the folder of a run; last.pt and run.json are not both in it"
        )
    provenance = json.loads((arguments.folder / "run.json").read_text())
    state = torch.load(arguments.folder / "last.pt", map_location="cpu", weights_only=True)
    if "config" not in provenance:
        raise InputError(f"{arguments.folder}: a fine-tuning run has its weights in {finetune.WEIGHTS} already")
    config, recipe = provenance.pop("config"), STARTERS[provenance.pop("which", "moce-ir")]
    module = models.create(recipe.system, config)
    module.load_state_dict(state["average"])
    progress = Progress(**state["progress"])
    training = {**provenance, **progress.spent(), "psnr": progress.scores}
    export(module, arguments.file, recipe.system, config, recipe.restores, training, licence=OWN_LICENCE)
    return 0


def _average(arguments: argparse.Namespace) -> int:
    average_exports(arguments.first, arguments.second, arguments.share, arguments.file)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `mend train`; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="mend train")
    add_arguments(parser)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)
