"""`mend train`: the command line of training."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import models
from . import photos
from .accelerate import accelerate
from .data import STARTER_TASKS, PairStream, PhotoCrops, load_photos
from .objectives.restoration import Restoration
from .trainer import Settings, Trainer, export, read_export, validation_set

logger = logging.getLogger(__name__)

STARTER_CONFIG: dict[str, Any] = {
    "dim": 16,
    "num_blocks": [1, 1, 2, 3],
    "num_dec_blocks": [1, 1, 1],
    "heads": [1, 2, 4, 8],
    "num_refinement_blocks": 1,
    "ffn_expansion_factor": 2,
    "LayerNorm_type": "WithBias",
    "num_experts": 4,
    "topk": 1,
    "rank_type": "spread",
    "rank": 2,
}
# Under the paper's L1, a hazy or dark crop, whose error has one sign everywhere, drowns the gradients of all others: in an
# hour nothing else improves. The logarithm of each crop's error weighs all of them alike; the spectra keep detail in sight.
STARTER_OBJECTIVE = Restoration(pixel=0.0, log=0.25, fft=0.1)
STARTER_NAME = "mend-moce-ir-starter.safetensors"
STARTER_RESTORES = ("denoise", "deblur", "derain", "dehaze", "desnow", "low-light", "jpeg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sub-commands of `mend train`."""
    commands = parser.add_subparsers(dest="train_command", required=True)
    prepare = commands.add_parser("photos", help="take the photographs out of unpacked Debian packages")
    prepare.add_argument("unpacked", type=Path, help="folder with one folder for each unpacked package")
    prepare.add_argument("--out", type=Path, required=True, help="where to write train/ and validation/")
    prepare.set_defaults(run=_photos)

    starter = commands.add_parser("starter", help="train the starter weights (MoCE-IR); goes on where it stopped")
    starter.add_argument("--photos", type=Path, required=True, help="folder with train/ and validation/")
    starter.add_argument("--out", type=Path, required=True, help="folder of this run: log, checkpoint, weights")
    starter.add_argument("--minutes", type=float, default=100, help="training time (100); the schedule follows it")
    starter.add_argument("--steps", type=int, help="a number of steps instead of a time")
    starter.add_argument("--workers", type=int, default=2, help="threads that share out a batch")
    starter.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    starter.add_argument("--seed", type=int, default=0)
    starter.add_argument("--initial", type=Path, help="weights to begin with: a file that `mend train export` wrote")
    starter.add_argument("--config", type=json.loads, default=STARTER_CONFIG, help="another MoCE-IR, as JSON")
    starter.set_defaults(run=_starter)

    snapshot = commands.add_parser("export", help="write the averaged weights of a run as it stands")
    snapshot.add_argument("folder", type=Path, help="folder of the run")
    snapshot.add_argument("file", type=Path, help="the .safetensors file to write")
    snapshot.set_defaults(run=_export)


def _photos(arguments: argparse.Namespace) -> int:
    photos.prepare(arguments.unpacked, arguments.out)
    return 0


def _starter(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # the workers are the parallelism
    torch.manual_seed(arguments.seed)
    settings = Settings(
        minutes=None if arguments.steps else arguments.minutes,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    pairs = PairStream(
        PhotoCrops(load_photos(arguments.photos / "train")),
        STARTER_TASKS,
        torch.Generator().manual_seed(arguments.seed),
    )
    held_out = load_photos(arguments.photos / "validation")
    module = models.create("moce-ir", arguments.config)
    with torch.no_grad():
        module.output.weight.mul_(0.1)  # begin near the identity: short runs have no time to find it
    if arguments.initial:
        module.load_state_dict(read_export(arguments.initial).state_dict())
    trainer = Trainer(
        accelerate(module),
        pairs,
        settings,
        arguments.out,
        STARTER_OBJECTIVE,
        validation=validation_set(held_out, settings.validation_size),
    )
    provenance = {"config": dict(arguments.config), "photos": len(pairs.crops.photos), "seed": arguments.seed}
    (arguments.out / "run.json").write_text(json.dumps(provenance))
    trainer.resume()
    with _stop_request() as should_stop:
        trainer.run(should_stop)
    return _export(argparse.Namespace(folder=arguments.out, file=arguments.out / STARTER_NAME))


@contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Tells whether the process was asked to end (Ctrl-C or SIGTERM), so that the run can save where it stands."""
    asked = threading.Event()
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, lambda *_: asked.set()) for n in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _export(arguments: argparse.Namespace) -> int:
    provenance = json.loads((arguments.folder / "run.json").read_text())
    state = torch.load(arguments.folder / "last.pt", map_location="cpu", weights_only=True)
    config = provenance.pop("config")
    module = models.create("moce-ir", config)
    module.load_state_dict(state["average"])
    progress = state["progress"]
    training = {**provenance, "steps": progress["step"], "minutes": round(progress["seconds"] / 60, 1)}
    export(module, arguments.file, "moce-ir", config, STARTER_RESTORES, {**training, "psnr": progress["scores"]})
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `mend train`; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="mend train")
    add_arguments(parser)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)
