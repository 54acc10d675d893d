"""Training pairs: random crops of photographs, augmented, and damaged in one of many ways.

The photographs are decoded once into memory (8 bit). Everything random comes from one CPU generator, so that a run can
be resumed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import InputError
from .degradations import Degradation

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def load_photos(folder: Path, limit: int | None = None) -> list[torch.Tensor]:
    """All pictures of a folder as uint8 [3, H, W], in order of their names. Raises InputError if there is none."""
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)[:limit]
    if not paths:
        raise InputError(f"{folder}: no pictures here ({', '.join(SUFFIXES)})")
    return [torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1).contiguous() for p in paths]


def central_crop(picture: torch.Tensor, size: int, multiple: int = 1) -> torch.Tensor:
    """The centre of [C, H, W], at most `size` wide and high, a multiple of `multiple` where the picture is that large."""
    height, width = (min(size, extent) // multiple * multiple or extent for extent in picture.shape[1:])
    top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
    return picture[:, top : top + height, left : left + width].contiguous()


def central_squares(photos: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
    """The centres [1, 3, size, size] in 0..1 of photographs, uint8 [3, H, W]; smaller photographs are left out."""
    return [central_crop(p, size)[None].float() / 255 for p in photos if min(p.shape[1:]) >= size]


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


class PhotoCrops:
    """Random augmented crops of photographs.

    Larger photographs are drawn more often (square root of their area). Augmentation: scale, the eight symmetries of the
    square, exposure, contrast and white balance, exchanged channels.
    """

    def __init__(self, photos: Sequence[torch.Tensor]) -> None:
        self.photos = photos
        self.weights = torch.tensor([math.sqrt(p.shape[1] * p.shape[2]) for p in photos])

    def sample(self, size: int, generator: torch.Generator, smallest: float = 0.5) -> torch.Tensor:
        """One crop [3, size, size], float in 0..1. Half of them are of photographs reduced to `smallest`..1 of their size."""
        photo = self.photos[int(torch.multinomial(self.weights, 1, generator=generator))]
        shortest = min(photo.shape[1:])
        scale = smallest ** _uniform(generator) if _uniform(generator) < 0.5 else 1.0
        side = min(shortest, math.ceil(size / scale))
        top, left = (int(_uniform(generator) * (extent - side + 1)) for extent in photo.shape[1:])
        crop = photo[:, top : top + side, left : left + side].float() / 255
        if side != size:
            crop = F.interpolate(crop[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
        crop = torch.rot90(crop, int(_uniform(generator) * 4), (1, 2))
        if _uniform(generator) < 0.5:
            crop = crop.flip(2)
        if _uniform(generator) < 0.4:
            crop = self._recolour(crop, generator)
        return crop.contiguous()

    def batch(self, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
        """Crops [count, 3, size, size]."""
        return torch.stack([self.sample(size, generator) for _ in range(count)])

    @staticmethod
    def _recolour(crop: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        gamma = math.exp(_uniform(generator, -0.25, 0.25))
        gain = torch.tensor([_uniform(generator, 0.9, 1.1) for _ in range(3)]) * _uniform(generator, 0.85, 1.1)
        crop = (crop.clamp_min(1e-4) ** gamma * gain[:, None, None]).clamp(0, 1)
        if _uniform(generator) < 0.3:
            crop = crop[torch.randperm(3, generator=generator)]
        return crop


@dataclass(frozen=True)
class Task:
    """One way to damage a crop, and how often it is drawn. Several chains: one of them is drawn.

    choice: of so many crops the one with most detail is taken; blur and JPEG hardly show on a smooth one. smallest: half
    of the crops come from photographs reduced to as little as this. Whether a picture is hazy or dark, or shows a pale or
    dark thing, can only be told when much of the scene is in the crop.
    """

    name: str
    weight: float
    chains: tuple[tuple[Degradation, ...], ...]
    choice: int = 1
    smallest: float = 0.5


def _single(name: str, weight: float, kind: str, strength: float = 1.0, choice: int = 1, smallest: float = 0.5) -> Task:
    return Task(name, weight, ((Degradation(kind, strength),),), choice, smallest)


def _mixture(*kinds: str, strength: float = 0.7) -> tuple[Degradation, ...]:
    return tuple(Degradation(kind, strength) for kind in kinds)


STARTER_TASKS = (
    # half of the noise is weak: there a blind network is hardest to tell from one that knows the level
    Task("noise", 1.15, ((Degradation("noise"),), (Degradation("noise", 0.5),))),
    _single("channel-noise", 0.02, "channel-noise"),
    _single("poisson", 0.02, "poisson"),
    _single("blur", 0.08, "blur", choice=3),
    _single("motion-blur", 0.38, "motion-blur", choice=3),
    _single("defocus", 0.02, "defocus", choice=3),
    _single("downsample", 0.02, "downsample", choice=3),
    _single("rain", 0.08, "rain"),
    _single("raindrops", 0.015, "raindrops"),
    _single("snow", 0.18, "snow"),
    _single("haze", 0.58, "haze", smallest=0.12),
    _single("low-light", 0.34, "low-light", smallest=0.12),
    _single("jpeg", 0.18, "jpeg", choice=3),
    Task("clean", 0.05, ((),), smallest=0.25),
    Task("haze and noise", 0.32, (_mixture("haze", "noise", strength=1.0),), smallest=0.12),
    Task("darkness and rain", 0.095, (_mixture("low-light", "rain"), _mixture("rain", "low-light")), smallest=0.25),
    Task(
        "mixture",
        0.195,
        (
            _mixture("haze", "noise"),
            _mixture("haze", "rain"),
            _mixture("haze", "snow"),
            _mixture("rain", "noise"),
            _mixture("low-light", "noise"),
            _mixture("low-light", "haze"),
            _mixture("haze", "low-light"),
            _mixture("snow", "low-light"),
            _mixture("blur", "noise"),
            _mixture("motion-blur", "noise"),
            _mixture("noise", "jpeg"),
            _mixture("blur", "jpeg"),
            _mixture("rain", "jpeg"),
            _mixture("snow", "noise"),
            _mixture("low-light", "jpeg"),
            _mixture("low-light", "blur"),
        ),
        smallest=0.25,
    ),
)

WEATHER_TASKS = (
    _single("haze", 0.35, "haze", smallest=0.12),
    _single("rain", 0.22, "rain"),
    _single("raindrops", 0.04, "raindrops"),
    _single("snow", 0.22, "snow"),
    Task("clean", 0.05, ((),), smallest=0.25),
    Task(
        "mixture", 0.12, (_mixture("haze", "rain"), _mixture("haze", "snow"), _mixture("rain", "haze")), smallest=0.25
    ),
)

DEBLUR_TASKS = (
    _single("blur", 0.34, "blur", choice=4),
    _single("motion-blur", 0.42, "motion-blur", choice=4),
    _single("defocus", 0.08, "defocus", choice=4),
    Task("clean", 0.04, ((),)),
    Task(  # what a camera or a web page adds after the blur: without it a network learns to enlarge it
        "blur and a little noise",
        0.12,
        tuple(
            (Degradation(blur), Degradation(after, 1.0, parameters))
            for blur in ("blur", "motion-blur")
            for after, parameters in (("noise", {"sigma": 3.0}), ("noise", {"sigma": 8.0}), ("jpeg", {"quality": 80}))
        ),
        choice=4,
    ),
)

VALIDATION: Mapping[str, tuple[Degradation, ...]] = {
    "clean": (),
    "noise 15": (Degradation("noise", 1, {"sigma": 15.0}),),
    "noise 25": (Degradation("noise", 1, {"sigma": 25.0}),),
    "noise 50": (Degradation("noise", 1, {"sigma": 50.0}),),
    "haze": (Degradation("haze"),),
    "rain": (Degradation("rain"),),
    "snow": (Degradation("snow"),),
    "low light": (Degradation("low-light"),),
    "JPEG 10": (Degradation("jpeg", 1, {"quality": 10}),),
    "blur 1.6": (Degradation("blur", 1, {"sigma": 1.6}),),
    "motion 15": (Degradation("motion-blur", 1, {"length": 15.0}),),
    "haze + noise 25": (Degradation("haze"), Degradation("noise", 1, {"sigma": 25.0})),
    "low light + rain": (Degradation("rain"), Degradation("low-light")),
}


def within_crop(step: Degradation, generator: torch.Generator) -> Degradation:
    """The step as a crop shows it: of a hazy scene's depth, a part."""
    if step.kind != "haze":
        return step
    zoom = _uniform(generator, 0.2, 1.0)
    return Degradation("haze", step.strength, {"zoom": zoom, **step.parameters})


def as_arriving(image: torch.Tensor, draw: float) -> torch.Tensor:
    """By a number drawn from 0..1: most pictures clipped to it, half of all in steps of 1 / 255, a few as they are."""
    if draw < 0.85:
        image = image.clamp(0, 1)
    return (image * 255).round() / 255 if draw < 0.5 else image


def _detail(crop: torch.Tensor) -> float:
    return float((crop[:, 1:] - crop[:, :-1]).square().mean() + (crop[:, :, 1:] - crop[:, :, :-1]).square().mean())


class PairStream:
    """Endless batches of (damaged, clean) pairs, each [B, 3, size, size]; the damaged one as a picture file holds it.

    Most damaged crops are clipped to 0..1, half of all rounded to 8 bit, as pictures arrive in practice; a few keep
    their values outside. A share of them, `saved`, went through a good JPEG first, as what cameras and sites hand out has:
    a network that knows only fresh noise leaves noise alone once JPEG has smoothed it.
    """

    def __init__(
        self, crops: PhotoCrops, tasks: Sequence[Task], generator: torch.Generator, saved: float = 0.3
    ) -> None:
        self.crops, self.tasks, self.generator, self.saved = crops, tasks, generator, saved
        self.weights = torch.tensor([t.weight for t in tasks])

    def batch(self, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """The damaged and the clean batch, and the task of every pair."""
        g, damaged, clean = self.generator, [], []
        picks = torch.multinomial(self.weights, count, replacement=True, generator=g).tolist()
        for pick in picks:
            task = self.tasks[pick]
            chain = task.chains[int(_uniform(g) * len(task.chains))]
            crop = max((self.crops.sample(size, g, task.smallest) for _ in range(task.choice)), key=_detail)
            image = crop[None]
            for step in chain:
                image, _ = within_crop(step, g)(image, g)
            if chain and _uniform(g) < self.saved:
                image, _ = Degradation("jpeg", 1, {"quality": int(_uniform(g, 70, 98))})(image.clamp(0, 1), g)
            damaged.append(as_arriving(image, _uniform(g))[0])
            clean.append(crop)
        return torch.stack(damaged), torch.stack(clean), [self.tasks[p].name for p in picks]


class SuperResolutionStream:
    """Endless batches of (small, clean) pairs: crops [B, 3, size, size] and the same ones shrunk `scale` times.

    Shrunk bicubically with anti-aliasing, as Pillow and MATLAB do, and rounded to 8 bit: the classical setting.
    """

    def __init__(self, crops: PhotoCrops, scale: int, generator: torch.Generator) -> None:
        self.crops, self.scale, self.generator = crops, scale, generator

    def batch(self, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """The small and the clean batch, and the task of every pair. `size` is the clean one."""
        clean = self.crops.batch(count, size, self.generator)
        return shrink(clean, self.scale), clean, [f"x{self.scale}"] * count


def reduce(clean: torch.Tensor, scale: int) -> torch.Tensor:
    """[B, C, H, W] (0..1) -> [B, C, H / scale, W / scale], bicubic: what super-resolution starts from."""
    if scale == 1:
        return clean
    size = [extent // scale for extent in clean.shape[-2:]]
    return F.interpolate(clean, size, mode="bicubic", antialias=True).clamp(0, 1)


def shrink(clean: torch.Tensor, scale: int) -> torch.Tensor:
    """As `reduce`, in steps of 1 / 255."""
    return (reduce(clean, scale) * 255).round() / 255
