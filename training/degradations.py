"""Damage made on purpose, by name: which kinds there are, how their parameters are drawn at a strength, and chains of them.

`Degradation` names one of the functions of `damage` with a strength and leaves the parameters it does not fix to chance;
`degrade` applies a chain of them from one seed and says what was done. Parameters are drawn once a call, on the CPU, what
is random in a picture for every image of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError
from .damage import (
    Generator,
    between,
    defocus_blur,
    downsample,
    gaussian_blur,
    gaussian_noise,
    haze,
    jpeg,
    low_light,
    motion_blur,
    poisson_noise,
    rain_streaks,
    raindrops,
    snow,
    synthetic_depth,
)

Parameters = dict[str, Any]
Draw = Callable[[float, Generator | None], Parameters]
Apply = Callable[[torch.Tensor, Parameters, Generator | None], torch.Tensor]
Tell = Callable[[int], None]


@dataclass(frozen=True)
class Kind:
    """One kind of damage: how its parameters are drawn at a strength, and how it is applied.

    drawn: whether applying draws too. Such a kind takes the batch at once, so that a seed means the same forever; the
    others may take one picture after another.
    """

    title: str
    draw: Draw
    apply: Apply
    drawn: bool = True

    def parts(self, image: torch.Tensor, parameters: Parameters, generator: Generator | None) -> Iterator[torch.Tensor]:
        """The damaged batch in parts, each made when it is asked for."""
        for part in (image,) if self.drawn else image.split(1):
            yield self.apply(part, parameters, generator)


def _draw_noise(strength: float, g: Generator | None) -> Parameters:
    return {"sigma": strength * between(5, 55, g)}


def _draw_channel_noise(strength: float, g: Generator | None) -> Parameters:
    return {"sigma": [strength * between(3, 55, g) for _ in range(3)]}


def _draw_poisson(strength: float, g: Generator | None) -> Parameters:
    return {"photons": math.exp(between(math.log(20), math.log(300), g)) / max(strength, 1e-3) ** 2}


def _draw_blur(strength: float, g: Generator | None) -> Parameters:
    return {"sigma": strength * between(0.6, 2.6, g)}


def _draw_motion(strength: float, g: Generator | None) -> Parameters:
    return {"length": strength * between(5, 22, g), "angle": between(0, 180, g)}


def _draw_defocus(strength: float, g: Generator | None) -> Parameters:
    return {"radius": strength * between(1, 4, g)}


def _draw_downsample(strength: float, g: Generator | None) -> Parameters:
    return {"factor": 1 + strength * between(0.5, 3, g)}


def _draw_rain(strength: float, g: Generator | None) -> Parameters:
    return {
        "density": strength * math.exp(between(math.log(0.0006), math.log(0.012), g)),
        "length": between(6, 45, g),
        "angle": between(-45, 45, g),
        "opacity": min(1.0, strength * between(0.25, 1.0, g)),
        "width": between(0.6, 3.0, g),
        "brightness": between(0.6, 1.0, g),
        "screen": between(0, 1, g),
        "layers": 1 + int(between(0, 2.999, g)),
        "veil": max(0.0, strength * between(-0.15, 0.15, g)),
    }


def _apply_rain(image: torch.Tensor, p: Parameters, g: Generator | None) -> torch.Tensor:
    for layer in range(int(p["layers"])):
        scale = 0.6**layer  # farther rain: shorter, thinner, denser, fainter
        image = rain_streaks(
            image,
            p["density"] / scale,
            p["length"] * scale,
            p["angle"] + between(-4, 4, g),
            p["opacity"] * scale,
            g,
            p["width"] * scale,
            p["brightness"],
            p["screen"],
        )
    return image + p["veil"] * (0.8 - image)


def _draw_raindrops(strength: float, g: Generator | None) -> Parameters:
    return {"count": strength * between(4, 25, g), "radius": between(4, 16, g), "blur": between(2, 6, g)}


def _draw_snow(strength: float, g: Generator | None) -> Parameters:
    return {
        "density": strength * math.exp(between(math.log(0.0006), math.log(0.008), g)),
        "size": between(0.6, 3.0, g),
        "opacity": min(1.0, strength * between(0.5, 1.0, g)),
        "drift": max(0.0, between(-6, 14, g)),
        "angle": between(-60, 60, g),
        "veil": max(0.0, strength * between(-0.25, 0.3, g)),
    }


def _draw_haze(strength: float, g: Generator | None) -> Parameters:
    light = between(0.7, 1.0, g)
    return {
        "density": strength * between(0.5, 3.0, g),
        "airlight": [min(1.0, light + between(-0.04, 0.04, g)) for _ in range(3)],
        "zoom": 1.0,
    }


def _apply_haze(image: torch.Tensor, p: Parameters, g: Generator | None) -> torch.Tensor:
    light = p["airlight"] if image.shape[1] == 3 else sum(p["airlight"]) / 3
    depth = synthetic_depth(tuple(image.shape[-2:]), image.shape[0], image, g, p["zoom"])
    return haze(image, p["density"], light, depth)


def _draw_low_light(strength: float, g: Generator | None) -> Parameters:
    return {
        "gamma": 1 + strength * between(0.0, 1.8, g),
        "gain": min(1.0, between(0.12, 0.6, g) ** strength),
        "sigma": strength * max(0.0, between(-2, 12, g)),
    }


def _draw_jpeg(strength: float, g: Generator | None) -> Parameters:
    quality = math.exp(between(math.log(6), math.log(50), g)) / max(strength, 1e-2)
    return {"quality": int(min(95, max(1, round(quality))))}


def _channels(sigma: float | Sequence[float], channels: int) -> float | Sequence[float]:
    return sigma if isinstance(sigma, float | int) or len(sigma) == channels else sum(sigma) / len(sigma)


KINDS: dict[str, Kind] = {
    "noise": Kind("Gaussian noise", _draw_noise, lambda x, p, g: gaussian_noise(x, p["sigma"], g)),
    "channel-noise": Kind(
        "noise that differs per channel",
        _draw_channel_noise,
        lambda x, p, g: gaussian_noise(x, _channels(p["sigma"], x.shape[1]), g),
    ),
    "poisson": Kind("shot noise", _draw_poisson, lambda x, p, g: poisson_noise(x, p["photons"], g)),
    "blur": Kind("Gaussian blur", _draw_blur, lambda x, p, g: gaussian_blur(x, p["sigma"]), drawn=False),
    "motion-blur": Kind(
        "motion blur", _draw_motion, lambda x, p, g: motion_blur(x, p["length"], p["angle"]), drawn=False
    ),
    "defocus": Kind("out of focus", _draw_defocus, lambda x, p, g: defocus_blur(x, p["radius"]), drawn=False),
    "downsample": Kind("low resolution", _draw_downsample, lambda x, p, g: downsample(x, p["factor"]), drawn=False),
    "rain": Kind("rain streaks", _draw_rain, _apply_rain),
    "raindrops": Kind(
        "drops on the window", _draw_raindrops, lambda x, p, g: raindrops(x, p["count"], p["radius"], p["blur"], g)
    ),
    "snow": Kind(
        "snow",
        _draw_snow,
        lambda x, p, g: snow(x, p["density"], p["size"], p["opacity"], g, p["drift"], p["angle"], p["veil"]),
    ),
    "haze": Kind("haze", _draw_haze, _apply_haze),
    "low-light": Kind("too dark", _draw_low_light, lambda x, p, g: low_light(x, p["gamma"], p["gain"], p["sigma"], g)),
    "jpeg": Kind("JPEG artefacts", _draw_jpeg, lambda x, p, g: jpeg(x, p["quality"]), drawn=False),
}


@dataclass(frozen=True)
class Degradation:
    """One kind of damage (a key of `KINDS`), how strong, and the parameters that are not left to chance.

    strength: 1 covers what photographs usually suffer, 0 is nearly nothing. Raises InputError for unknown names.
    """

    kind: str
    strength: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"degradation: {self.kind!r} is unknown; one of {', '.join(KINDS)}")
        unknown = set(self.parameters) - set(KINDS[self.kind].draw(1.0, torch.Generator().manual_seed(0)))
        if unknown:
            raise InputError(f"degradation {self.kind}: no parameter called {', '.join(sorted(unknown))}")

    def __call__(
        self, image: torch.Tensor, generator: Generator | None = None, tell: Tell | None = None
    ) -> tuple[torch.Tensor, Parameters]:
        """The damaged image (not clamped), and the parameters it was damaged with. tell: called with pictures done."""
        if self.strength == 0 and not self.parameters:
            return image, {}
        kind = KINDS[self.kind]
        parameters = {**kind.draw(self.strength, generator), **self.parameters}
        parts = []
        for part in kind.parts(image, parameters, generator):
            parts.append(part)
            if tell is not None:
                tell(len(part))
        return torch.cat(parts) if len(parts) > 1 else parts[0], parameters


def degrade(
    image: torch.Tensor, chain: Sequence[Degradation], seed: int, clamp: bool = True, tell: Tell | None = None
) -> tuple[torch.Tensor, list[tuple[str, Parameters]]]:
    """Applies `chain` in order to `image` [B, C, H, W]; returns the result (in 0..1 if `clamp`) and what was done.

    Equal seeds give equal pictures on every device. tell: called with how many pictures another degradation has done.
    """
    generator = torch.Generator().manual_seed(seed)
    done = []
    for degradation in chain:
        image, parameters = degradation(image, generator, tell)
        done.append((degradation.kind, parameters))
    return image.clamp(0, 1) if clamp else image, done


def describe(done: Sequence[tuple[str, Parameters]]) -> str:
    """What was done as text, a line for every step: "rain: density 0.003, length 21.4, ..."."""

    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return " ".join(show(v) for v in value) if isinstance(value, list | tuple) else str(value)

    lines = [f"{kind}: " + ", ".join(f"{k} {show(v)}" for k, v in parameters.items()) for kind, parameters in done]
    return "\n".join(lines) or "nothing"


def parse(text: str) -> list[Degradation]:
    """The inverse of `describe`: a chain from lines like "noise: sigma 25" or just "rain"; what a line does not say is
    drawn. Raises InputError for what cannot be read.
    """
    chain = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        kind, _, rest = line.partition(":")
        parameters: Parameters = {}
        for item in filter(None, (item.strip() for item in rest.split(","))):
            name, *values = item.replace("=", " ").split()
            try:
                numbers = [int(v) if v.lstrip("-").isdigit() else float(v) for v in values]
            except ValueError:
                raise InputError(f"degradation: cannot read {item!r} in {line!r}; write NAME NUMBER") from None
            if not numbers:
                raise InputError(f"degradation: {name!r} in {line!r} has no value")
            parameters[name] = numbers[0] if len(numbers) == 1 else numbers
        chain.append(Degradation(kind.strip(), 1.0, parameters))
    return chain
