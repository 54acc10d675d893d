"""A folder of clean photographs becomes a data set of pairs, with a manifest that training reads.

    python -m comfyui_mend.training.make_dataset PHOTOS --out DIR [--by model|simulation] [--degradations "haze, rain"]

DIR gets clean/, damaged/, dataset.json (the settings) and manifest.jsonl, a line a pair (docs/dataset-manifest.md). Each
pair has a seed of its own, made of the run's seed and its name, so that it does not matter in which order, in how many
sittings and beside which other photographs it is made. Files appear whole or not at all, a pair's line after its files:
a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from .. import models
from ..errors import InputError
from ..guidance import gendeg, synthesis
from ..guidance.measurement import draw
from ..models.degradation_model import KINDS, DegradationModel
from . import degradations
from .data import SUFFIXES
from .dataset_sources import MANIFEST
from .degradation_model import SIMULATED

logger = logging.getLogger(__name__)

SETTINGS = "dataset.json"
STARTER = Path(__file__).resolve().parent.parent / "weights" / "mend-degradation-model.safetensors"

Paint = Callable[[torch.Tensor, str, float, float, int], torch.Tensor]
"""(clean [1, 3, H, W] in 0..1, degradation, mu, sigma, seed) -> damaged, likewise."""


Photo = tuple[str, Callable[[], torch.Tensor]]
"""A name, and what gives the picture [1, 3, H, W] in 0..1."""


@dataclass(frozen=True)
class Painter:
    """What makes the damage: its name, the degradations it knows, and whether it is told intensities."""

    name: str
    kinds: Sequence[str]
    paint: Paint
    told: bool = True


@dataclass(frozen=True)
class Settings:
    """What every pair of a data set depends on, beside its photograph. largest: longest side in pixels, 0 for any."""

    by: str
    seed: int = 0
    largest: int = 512


@dataclass
class Report:
    """What a run did: how many pairs it made, found done, and which photographs it could not read."""

    made: int = 0
    found: int = 0
    unreadable: list[str] = field(default_factory=list)
    kinds: dict[str, list[float]] = field(default_factory=dict)
    """The mean intensities of every degradation's pairs, made and found."""

    def text(self) -> str:
        """For people, a line a degradation."""
        lines = [f"{self.made} pairs made, {self.found} were there already"]
        for kind, values in sorted(self.kinds.items()):
            lines.append(f"{kind}: {len(values)} pairs, mean intensity {sum(values) / len(values):.3f}")
        return "\n".join(lines + [f"not readable: {name}" for name in self.unreadable])


def make_dataset(
    photos: Sequence[Photo],
    out: Path,
    painter: Painter,
    kinds: Sequence[str],
    settings: Settings,
    per_photo: int = 1,
    tell: Callable[[int, int, torch.Tensor | None], None] = lambda done, total, damaged: None,
) -> Report:
    """Makes the pairs that are missing: `per_photo` of every kind for every photograph.

    tell(done, total, last damaged picture [1, 3, H, W]) is called for every pair and may raise to stop. Intensities are
    drawn as the published training pairs have them (`guidance.gendeg.draw_intensity`); the manifest has those measured
    on the files. Raises InputError for kinds the painter does not know, and an `out` that holds a data set made with
    other settings.
    """
    unknown = [kind for kind in kinds if kind not in painter.kinds]
    if unknown or not kinds:
        raise InputError(
            f"degradations: {', '.join(unknown) or 'none given'}; {painter.name} knows {', '.join(painter.kinds)}"
        )
    for folder in ("clean", "damaged"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _same_settings(out / SETTINGS, settings)
    done, report, total = read_manifest(out), Report(), len(photos) * len(kinds) * per_photo
    for row in done.values():
        report.kinds.setdefault(row["degradation"], []).append(row["intensity"]["mu"])
    number = 0
    with (out / MANIFEST).open("a", encoding="utf-8", newline="\n") as manifest:
        for name, read in photos:
            missing = [
                (kind, copy, f"damaged/{name}_{kind.replace(' ', '-')}_{copy}.png")
                for kind in kinds
                for copy in range(per_photo)
            ]
            missing = [job for job in missing if job[2] not in done]
            found = len(kinds) * per_photo - len(missing)
            report.found, number = report.found + found, number + found
            if not missing:
                continue
            try:
                clean = _shrunk(read(), settings.largest)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                logger.warning("%s cannot be read: %s", name, error)
                report.unreadable.append(name)
                number += len(missing)
                continue
            if not (out / f"clean/{name}.png").is_file():
                _write(clean, out / f"clean/{name}.png")
            for kind, copy, file in missing:
                tell(number, total, None)
                row, damaged = _pair(clean, f"clean/{name}.png", file, kind, copy, painter, settings)
                _write(damaged, out / file)
                manifest.write(json.dumps(row) + "\n")
                manifest.flush()
                os.fsync(manifest.fileno())
                report.made, number = report.made + 1, number + 1
                report.kinds.setdefault(kind, []).append(row["intensity"]["mu"])
                tell(number, total, damaged)
    return report


def _pair(
    clean: torch.Tensor, clean_file: str, file: str, kind: str, copy: int, painter: Painter, settings: Settings
) -> tuple[dict[str, Any], torch.Tensor]:
    seed = int.from_bytes(sha256(f"{settings.seed} {file}".encode()).digest()[:4], "big")
    asked = gendeg.draw_intensity(kind, seed, copy) if painter.told else None
    mu, sigma = (asked.mu, asked.sigma) if asked else (0.0, 0.0)
    wanted = asked.ask_for(kind, painter.kinds) if asked else kind
    damaged = painter.paint(clean, wanted, mu, sigma, seed).clamp(0, 1).mul(255).round() / 255
    found = synthesis.measured(clean, damaged)
    row: dict[str, Any] = {
        "clean": clean_file,
        "damaged": file,
        "degradation": kind,
        "intensity": {"mu": round(found[0], 5), "sigma": round(found[1], 5)},
        "seed": seed,
        "by": painter.name,
    }
    if asked:
        row["asked"] = {"degradation": wanted, "mu": round(mu, 5), "sigma": round(sigma, 5)}
    return row, damaged


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The pairs of a data set whose files are there, by the damaged file; cuts off a last line that was not finished."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows: dict[str, dict[str, Any]] = {}
    for line in whole.decode("utf-8").splitlines():
        try:
            row = json.loads(line)
            if all((folder / row[side]).is_file() for side in ("clean", "damaged")):
                rows[row["damaged"]] = row
        except (ValueError, KeyError, TypeError):
            raise InputError(f"data set: {path} has a line that is no pair: {line[:80]!r}") from None
    return rows


def _same_settings(path: Path, settings: Settings) -> None:
    now = {"by": settings.by, "seed": settings.seed, "largest": settings.largest}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != now:
            raise InputError(
                f"data set: {path.parent} was begun with {before}, not {now}; choose another name, or the same settings"
            )
        return
    part = path.with_suffix(".part")
    part.write_text(json.dumps(now), encoding="utf-8")
    os.replace(part, path)


def from_folder(folder: Path, out: Path) -> list[Photo]:
    """Every picture below `folder`, in order, without those of the data set `out` itself. Raises InputError.

    Its name is the file's stem, with a piece of a hash where two share one.
    """
    if not folder.is_dir():
        raise InputError(f"photos: there is no folder {folder}")
    paths = [
        p for p in sorted(folder.rglob("*"))
        if p.suffix.lower() in SUFFIXES and p.is_file() and not p.resolve().is_relative_to(out.resolve())
    ]  # fmt: skip
    if not paths:
        raise InputError(f"photos: {folder} holds no pictures ({', '.join(SUFFIXES)})")
    twins = Counter(path.stem for path in paths)

    def name(path: Path) -> str:
        place = path.relative_to(folder).as_posix()
        return f"{path.stem}-{sha256(place.encode()).hexdigest()[:6]}" if twins[path.stem] > 1 else path.stem

    return [(name(path), partial(_read, path)) for path in paths]


def from_images(images: torch.Tensor) -> list[Photo]:
    """The pictures [B, 3, H, W] of a graph, named by their content, so that the same one is not made twice."""
    eight = [image[None].clamp(0, 1).mul(255).round() for image in images]
    names = [sha256(image.byte().cpu().contiguous().numpy().tobytes()).hexdigest()[:12] for image in eight]
    return [(f"image-{name}", partial(torch.div, image, 255)) for name, image in zip(names, eight, strict=True)]


def _read(path: Path) -> torch.Tensor:
    """[1, 3, H, W] in 0..1, turned as the camera says."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def _shrunk(image: torch.Tensor, largest: int) -> torch.Tensor:
    """With a longest side of at most `largest` (0: any), in whole steps of 1/255, as a file holds it."""
    factor = largest / max(image.shape[-2:]) if largest else 1.0
    if factor < 1:
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True)
    return image.clamp(0, 1).mul(255).round() / 255


def _write(image: torch.Tensor, path: Path) -> None:
    """As PNG, whole or not at all."""
    pixels = image[0].mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    part = path.with_suffix(".part")
    Image.fromarray(pixels).save(part, "PNG", compress_level=4)
    os.replace(part, path)


def simulation() -> Painter:
    """`training/degradations.py` as a painter: GenDeg's six kinds, and its own under their names. Strengths are drawn."""
    named = {**SIMULATED, **{kind: kind for kind in degradations.KINDS if kind not in SIMULATED.values()}}

    def paint(clean: torch.Tensor, kind: str, mu: float, sigma: float, seed: int) -> torch.Tensor:
        strength = 0.5 + 0.6 * float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        return degradations.degrade(clean, [degradations.Degradation(named[kind], strength)], seed)[0]

    return Painter("simulation", tuple(named), paint, told=False)


def model(path: Path, steps: int = 12) -> Painter:
    """Mend's degradation model from a file, on the CPU, as a painter. Raises InputError for another network."""
    module = models.load(path).module
    if not isinstance(module, DegradationModel):
        raise InputError(f"{path}: no degradation model")

    def paint(clean: torch.Tensor, kind: str, mu: float, sigma: float, seed: int) -> torch.Tensor:
        return synthesis.synthesise(module, clean, kind, mu, sigma, draw(clean.shape, seed, 0), steps)

    return Painter(path.stem, module.kinds, paint)


def kinds_from_text(text: str, known: Sequence[str]) -> list[str]:
    """Degradations separated by commas; nothing or "all" stands for GenDeg's six, as far as they are known."""
    named = [part.strip() for part in text.split(",") if part.strip()]
    return [kind for kind in KINDS if kind in known] if named in ([], ["all"]) else list(dict.fromkeys(named))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options; `parser.set_defaults(run=run)` is done here too."""
    parser.add_argument("photos", type=Path, help="folder with clean photographs, looked through with its subfolders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; goes on if it is there")
    parser.add_argument("--by", choices=("model", "simulation"), default="model", help="what makes the damage")
    parser.add_argument("--model", type=Path, default=STARTER, help="degradation model (the one that comes with Mend)")
    parser.add_argument("--degradations", default="all", help='names with commas between, or "all" (the six of GenDeg)')
    parser.add_argument("--per-photo", type=int, default=1, help="pairs of every degradation for each photograph")
    parser.add_argument("--largest", type=int, default=512, help="longest side in pixels; 0: as large as they are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12, help="steps of the model")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0 if every photograph was read, 1 if one was not; the others' pairs are made all the same."""
    painter = simulation() if options.by == "simulation" else model(options.model, options.steps)
    settings = Settings(painter.name, options.seed, options.largest)
    kinds = kinds_from_text(options.degradations, painter.kinds)

    def tell(done: int, total: int, damaged: torch.Tensor | None) -> None:
        if damaged is not None and (done % 20 == 0 or done == total):
            logger.info("%d of %d pairs", done, total)

    report = make_dataset(
        from_folder(options.photos, options.out), options.out, painter, kinds, settings, options.per_photo, tell
    )
    logger.info("%s", report.text())
    return 1 if report.unreadable else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `mend train make-dataset` is the same."""
    parser = argparse.ArgumentParser(prog="mend train make-dataset", description=__doc__.splitlines()[0])
    add_arguments(parser)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
