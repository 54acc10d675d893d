"""`mend train finetune`: train a network that exists already on data of your own."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..engine import host, model_folder
from ..errors import InputError
from . import dataset_sources, datasets, distributed, finetune, task_text
from .objectives.base import Objective, Weighted
from .objectives.recipes import OBJECTIVES, default_objective
from .stopping import stop_request

logger = logging.getLogger(__name__)

_DATA = """data sets (several are mixed, weights after "@"):
  clean:FOLDER        clean pictures, damaged on the fly as --degradations say
  pairs:FOLDER        FOLDER/damaged and FOLDER/clean, by equal names
  manifest:FILE       a manifest.jsonl with clean, damaged, degradation, intensity, seed
objectives (several are added, weights after "@"): KIND or KIND:OPTION=VALUE,OPTION=VALUE
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _DATA + "\n".join(f"  {line}" for line in describe_objectives())
    parser.add_argument(
        "--model", required=True, help=f"the file to begin with, any that Mend loads; {model_folder.NAMES}"
    )
    parser.add_argument("--dataset", action="append", required=True, metavar="KIND:PATH[@WEIGHT]")
    parser.add_argument(
        "--degradations",
        default=task_text.EVERYTHING,
        help='for clean pictures: "noise; rain 0.7 + jpeg @ 2" (%(default)s: all that the starter learned)',
    )
    parser.add_argument("--objective", action="append", default=[], metavar="KIND[:OPTIONS][@WEIGHT]")
    parser.add_argument("--steps", type=int, default=1000, help="batches to learn from (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="at most, after the warm-up (%(default)s)")
    parser.add_argument("--crop", type=int, default=96, help="side of a damaged crop in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="crops per step, over all processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of crops, damage and all that is drawn (%(default)s)")
    parser.add_argument(
        "--validate", type=int, default=0, metavar="STEPS", help="validate every so many steps (a tenth of all)"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.1, help="share of the pictures to validate with (%(default)s)"
    )
    parser.add_argument("--keep", choices=finetune.KEEP, default="best", help="which weights to keep (%(default)s)")
    parser.add_argument(
        "--freeze", default="", metavar="NAMES", help='parts that do not learn: "E", "encoder*, decoder.0"'
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where the network allows it")
    parser.add_argument("--device", default="", help="where to compute (the accelerator, else the CPU)")
    parser.add_argument("--backend", default="", help="for torchrun: gloo or nccl")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run; an earlier one in it goes on")
    parser.set_defaults(run=run)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of `mend train finetune`."""
    parser = argparse.ArgumentParser(prog="mend train finetune", description=__doc__)
    add_arguments(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Trains; returns the exit status. Run again with the same arguments, it goes on where it was stopped."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    restorer = finetune.trainable_copy(models.load(model_folder.model_path(options.model)))
    source = dataset(options.dataset, options.degradations, options.held_out)
    goal = objective(options.objective) or default_objective(restorer.module, restorer.architecture.kind)
    tuner = finetune.FineTuner(
        restorer,
        source,
        goal,
        finetune.settings(
            options.steps,
            learning_rate=options.learning_rate,
            size=options.crop,
            batch=options.batch,
            seed=options.seed,
            autocast=options.bf16,
        ),
        options.out,
        device=host.named_device(options.device) if options.device else _device(),
        validate_steps=options.validate or max(1, options.steps // 10),
        keep=options.keep,
        frozen=options.freeze,
    )
    tuner.resume()
    with stop_request() as should_stop:
        tuner.train(should_stop=should_stop, bar=True)
    if distributed.leads():
        logger.info("%s\nwritten: %s", finetune.report(tuner), options.out / finetune.WEIGHTS)
    return 0


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _weighted(text: str) -> tuple[str, float]:
    body, at, weight = text.rpartition("@")
    try:
        return (body, float(weight)) if at else (text, 1.0)
    except ValueError:
        return text, 1.0  # an @ in a file's name


def dataset(specs: Sequence[str], degradations: str, held_out: float) -> datasets.Source:
    """The data set that KIND:PATH@WEIGHT texts name. Raises InputError for what cannot be read."""
    parts = []
    for spec in specs:
        body, weight = _weighted(spec)
        kind, _, path = body.partition(":")
        if kind == "clean":
            tasks = task_text.tasks_from_text(degradations.replace(";", "\n"))
            made = dataset_sources.clean_folder(Path(path), tasks, held_out)
        elif kind == "pairs":
            made = dataset_sources.paired_folder(Path(path), held_out_share=held_out)
        elif kind == "manifest":
            made = dataset_sources.manifest(Path(path), held_out)
        else:
            raise InputError(f"--dataset {spec}: begin with clean:, pairs: or manifest:")
        parts.append((made, weight))
    return parts[0][0] if len(parts) == 1 else datasets.Mixture(tuple(parts))


def objective(specs: Sequence[str]) -> Objective | None:
    """The objective that KIND:OPTION=VALUE,...@WEIGHT texts name; None for none. Raises InputError."""
    parts = []
    for spec in specs:
        body, weight = _weighted(spec)
        kind, _, text = body.partition(":")
        if kind not in OBJECTIVES:
            raise InputError(f"--objective {kind}: unknown; one of {', '.join(OBJECTIVES)}")
        options = dict(item.partition("=")[::2] for item in text.split(",") if item)
        known = {f.name: f for f in fields(OBJECTIVES[kind])}
        for name in options:
            if name not in known:
                raise InputError(f"--objective {kind}: no option {name!r}; it has {', '.join(known)}")
        parts.append((OBJECTIVES[kind](**{n: _value(str(known[n].type), v, n) for n, v in options.items()}), weight))
    if not parts:
        return None
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else Weighted(tuple(parts))


def _value(kind: str, text: str, name: str) -> Any:
    """`text` as the type that a field's annotation names."""
    try:
        if kind.startswith("bool"):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (KeyError, ValueError):
        raise InputError(f"--objective: {name}={text} is no {kind}") from None


def describe_objectives() -> list[str]:
    """A line for each objective with its options and their defaults."""
    return [f"{kind}: " + ", ".join(f"{f.name}={f.default}" for f in fields(made)) for kind, made in OBJECTIVES.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `mend train finetune`; returns the exit status."""
    return run(parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
