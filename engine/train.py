"""Training on the graph: a copy of a loaded network learns, with progress, previews and cancelling."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..errors import InputError, OutOfMemoryError
from ..training import datasets, finetune, picture_files
from ..training.objectives.base import Objective
from ..training.objectives.recipes import default_objective
from . import folders, host, loaded, model_folder
from .loaded import SETTINGS
from .pictures import BACKGROUND, curves, from_pil, labelled, to_pil
from .report import psnr

logger = logging.getLogger(__name__)

RUNS = Path("mend", "training")
"""Below the output folder: a folder for each run."""
PRECISIONS = ("fp32", "bf16")
_CELL = 192
_POINTS = 60
"""Points of a drawn curve; each is the mean of several steps."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training gives: the restorer, pictures [1, 3, H, W] of its validation and its losses, and a report.

    companion: what learned beside it and is of use by itself, DCPT's classifier or DA-RCOT's potential.
    """

    restorer: loaded.LoadedRestorer
    strip: torch.Tensor
    plot: torch.Tensor
    text: str
    companion: loaded.LoadedRestorer | None = None


def input_folder(name: str) -> Path:
    """A folder with pictures: a full path, one in the input folder, or one that comes with Mend. Raises InputError."""
    shipped = (folders.SHIPPED_INPUTS / name.strip()).resolve()
    try:
        return folders.require_input_directory(name)
    except InputError:
        if name.strip() and shipped.is_dir() and shipped.is_relative_to(folders.SHIPPED_INPUTS.resolve()):
            return shipped
        raise


def train(
    given: loaded.LoadedRestorer,
    source: datasets.Source,
    objective: Objective | None = None,
    *,
    steps: int = 500,
    learning_rate: float = 2e-4,
    size: int = 96,
    batch: int = 4,
    seed: int = 0,
    name: str = "restorer",
    resume: bool = False,
    keep: str = "best",
    precision: str = "fp32",
    frozen: str = "",
) -> Trained:
    """Trains a copy of `given`, which is left as it is.

    Everything the run needs to go on, and the weights so far, lie in the folder of the run when it ends, is cancelled or
    fails. objective None: the network's usual one. frozen: parts that do not learn, as for `finetune.freeze`. Raises InputError or ConfigError if things do not fit together.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: {precision!r} is unknown; one of {', '.join(PRECISIONS)}")
    device = host.device()
    folder = finetune.run_folder(folders.output_directory() / RUNS, name, resume)
    settings = finetune.settings(
        steps,
        learning_rate=learning_rate,
        size=size,
        batch=batch,
        seed=seed,
        autocast=precision == "bf16",
        validation_size=max(size, min(192, 2 * size)),
    )
    try:
        # Nodes run in inference mode, in which nothing can be learned; all that follows makes ordinary tensors.
        with torch.inference_mode(False), torch.enable_grad():
            host.make_room(device)
            restorer, options = given.configured()
            restorer = finetune.trainable_copy(restorer)
            for setting in {SETTINGS[name] for name in given.options if name in SETTINGS}:
                setattr(restorer.module, setting, restorer.config[setting])
            tuner = finetune.FineTuner(
                restorer,
                source,
                objective or default_objective(given.restorer.module, given.restorer.architecture.kind),
                settings,
                folder,
                device=device,
                validate_steps=max(25, steps // 8),
                keep=keep,
                frozen=frozen,
            )
            if resume:
                tuner.resume()
            watch = _Watch(tuner, steps)
            try:
                result = tuner.train(watch)
            except BaseException:
                if tuner.progress.step:
                    logger.info(
                        "training stopped at step %d; what it has learned is in %s", tuner.progress.step, folder
                    )
                raise
            companion = next(iter(tuner.companions().values()), None)
            text = "\n".join([finetune.report(tuner), f"saved in {RUNS.as_posix()}/{folder.name}"])
            return Trained(
                loaded.LoadedRestorer(result, host.Managed(result.module), options),
                from_pil(strip(tuner.rows(), 256))[None],
                from_pil(plot(tuner))[None],
                text,
                None if companion is None else loaded.wrap(companion),
            )
    except Exception as error:
        if not host.is_out_of_memory(error):
            raise
        error.__traceback__ = None
        raise OutOfMemoryError(
            f"training: {batch} crops of {size} pixels do not fit into memory; use fewer or smaller ones"
        ) from None
    finally:
        picture_files.pictures.clear()
        restorer = tuner = watch = None
        gc.collect()
        host.release_memory(device)


class _Watch:
    """Told of every step: moves the progress bar, which also cancels, and draws previews as often as they are cheap."""

    def __init__(self, tuner: finetune.FineTuner, steps: int) -> None:
        self.bar = host.progress(steps)
        self.bar.update(min(steps, tuner.progress.step))
        self.rows: list[finetune.Row] = []
        self.due, self.tuner = 0.0, tuner

    def __call__(self, tuner: finetune.FineTuner, values: Mapping[str, float]) -> None:
        self.bar.update(1, preview=lambda: self._picture(tuner))

    def _picture(self, tuner: finetune.FineTuner) -> Image.Image:
        begun = time.monotonic()
        if begun >= self.due:  # at most a tenth of the time goes into looking
            self.rows = tuner.rows(2)
            now = time.monotonic()
            self.due = now + 10 * (now - begun)
        return _stack([strip(self.rows, _CELL), plot(tuner)])


def strip(rows: Sequence[finetune.Row], cell: int = _CELL) -> Image.Image:
    """Validation pairs, a row each: damaged, restored before training, restored now, clean, with their PSNR."""
    pictures, labels = [], []
    for row in rows:
        for name, image in (
            (row.label, row.damaged),
            ("before", row.before),
            ("now", row.now),
            ("clean", row.clean),
        ):
            pictures.append(_cell(to_pil(image), cell))
            same = image.shape == row.clean.shape and name != "clean"
            value = psnr(image.clamp(0, 1)[None], row.clean[None])[0] if same else None
            labels.append(name if value is None else f"{name} {value:.1f} dB")
    if not pictures:
        return Image.new("RGB", (4 * cell, cell), BACKGROUND)
    return labelled(pictures, labels, 4)


def _cell(picture: Image.Image, side: int) -> Image.Image:
    """The picture, as large as fits, in a square."""
    scale = side / max(picture.size)
    picture = picture.resize([max(1, round(s * scale)) for s in picture.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(picture, tuple((side - s) // 2 for s in picture.size))
    return square


def plot(tuner: finetune.FineTuner) -> Image.Image:
    """The loss and, where there is any, the validation over the steps."""
    sheets = []
    if tuner.history:
        sheets.append(curves({"loss": _thin(tuner.history)}, "step", "loss", "training loss"))
    if len(tuner.validations) > 1:
        points = tuner.validations
        if tuner.before:
            points = [(0, sum(tuner.before.values()) / len(tuner.before)), *points]
        sheets.append(curves({"averaged weights": points}, "step", "PSNR, dB", "validation"))
    return _stack(sheets) if sheets else Image.new("RGB", (720, 446), BACKGROUND)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _POINTS points, each the mean of its neighbours."""
    group = -(-len(points) // _POINTS)
    groups = [points[i : i + group] for i in range(0, len(points), group)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures under one another, scaled to the width of the first."""
    width = sheets[0].width
    scaled = [s if s.width == width else s.resize((width, round(s.height * width / s.width))) for s in sheets]
    sheet = Image.new("RGB", (width, sum(s.height for s in scaled)), BACKGROUND)
    top = 0
    for picture in scaled:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def preview(source: datasets.Source, size: int, count: int, seed: int, scale: int = 1) -> torch.Tensor:
    """Pairs as training sees them, damaged above clean, each under its label; [1, 3, H, W]."""
    samples = [source.sample(size, torch.Generator().manual_seed(seed + i), scale) for i in range(count)]
    host.check_interrupt()
    cells = [
        _stack([to_pil(s.damaged).resize(to_pil(s.clean).size, Image.Resampling.NEAREST), to_pil(s.clean)])
        for s in samples
    ]
    cells = [c.resize((c.width * _zoom(c.width), c.height * _zoom(c.width)), Image.Resampling.NEAREST) for c in cells]
    return from_pil(labelled(cells, [s.label for s in samples], min(count, 4)))[None]


def _zoom(width: int) -> int:
    """Small crops are shown enlarged."""
    return max(1, 160 // width)


def save(given: loaded.LoadedRestorer, prefix: str, precision: str = "fp16") -> str:
    """Writes a restorer into the output folder, where Load Restorer finds it; returns its name there.

    Options set on its way are kept as far as its configuration knows them; the others are named in the log.

    Raises InputError for a precision other than fp16 and fp32.
    """
    if precision not in ("fp16", "fp32"):
        raise InputError(f"precision: {precision!r} is unknown; fp16 or fp32")
    base = model_folder.saved_models()
    base.mkdir(parents=True, exist_ok=True)
    target, name, number, _ = folders.save_location(prefix, base)
    path = target / f"{name}_{number:05}_.safetensors"
    restorer, options = given.configured()
    if options:
        logger.warning("%s: a file cannot keep %s; set it again after loading", path.name, ", ".join(options))
    finetune.write(restorer, path, half=precision == "fp16")
    return path.relative_to(base.resolve()).as_posix()
