"""GenDeg outside its networks: which intensities to ask for, how intense a result is, and what it was trained on.

Rajagopalan et al., CVPR 2025, arXiv 2411.17687. Intensity: mean and standard deviation of |clean - degraded| over all
pixels and channels of pictures in 0..1.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from math import exp

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.gendeg import BINS, MU_RANGE, SIGMA_RANGE
from . import latent_diffusion as ld

Range = tuple[float, float]


@dataclass(frozen=True)
class Preset:
    """One degradation: what is appended to a caption, and the intensities that the training pairs had."""

    suffix: str
    mu: Range
    sigma: Range
    corrected: bool
    """Whether the published code runs the structure correction on it."""


PRESETS: Mapping[str, Preset] = {
    "haze": Preset("in hazy conditions", (0.005, 0.284), (0.006, 0.309), True),
    "rain": Preset("in rainy conditions", (0.0, 0.284), (0.003, 0.247), False),
    "snow": Preset("in snowy conditions", (0.0, 0.284), (0.003, 0.2), False),
    "motion blur": Preset("in blurry conditions", (0.0, 0.126), (0.003, 0.156), True),
    "low light": Preset("in low-light conditions", (0.016, 0.284), (0.006, 0.269), False),
    "raindrop": Preset("with raindrops in it", (0.0, 0.202), (0.016, 0.191), False),
}
"""Ranges of the official histograms. Above a mean of 0.284 the model extrapolates, though it can be asked for 0.7."""

MIXED: Mapping[str, Preset] = {
    "rain and haze": Preset("in rainy and hazy conditions", (0.055, 0.284), (0.047, 0.231), False),
    "snow and haze": Preset("in snowy and hazy conditions", (0.044, 0.284), (0.044, 0.2), False),
}
"""What is asked for with the intensities of ORD and of CSD, whose pictures are hazy as well."""


def caption(text: str, degradation: str) -> str:
    """A caption with the published suffix of a degradation (a key of PRESETS or MIXED)."""
    text, suffix = text.strip().rstrip(",. "), (PRESETS.get(degradation) or MIXED[degradation]).suffix
    return f"{text}, {suffix}" if text else suffix


def measure_intensity(clean: torch.Tensor, degraded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation [B] of |clean - degraded| for pictures [B, C, H, W] in 0..1, as 8 bits."""
    if clean.shape[1:] != degraded.shape[1:]:
        raise InputError(f"pictures of a pair must be equal in size: {tuple(clean.shape)}, {tuple(degraded.shape)}")
    first, second = ((x.clamp(0, 1) * 255).round() for x in (clean, degraded))
    difference = ((first - second).abs() / 255).flatten(1)
    return difference.mean(dim=1), difference.std(dim=1, correction=0)


@dataclass(frozen=True)
class JointHistogram:
    """How often a data set's pairs have which intensities: counts[mean bin][deviation bin] over equal bins."""

    counts: Sequence[Sequence[int]]
    mu_range: Range = (0.0, 0.7)
    sigma_range: Range = (0.0, 0.4)

    def draw(self, rng: random.Random) -> tuple[float, float]:
        """A mean, then a deviation among the pairs of that mean's bin; each uniform within its bin."""
        mu_bin, mu = _draw([sum(row) for row in self.counts], self.mu_range, rng)
        return mu, _draw(self.counts[mu_bin], self.sigma_range, rng)[1]

    def draw_uniform(self, rng: random.Random) -> tuple[float, float]:
        """Both uniform over the ranges that hold any pair, whatever the counts."""
        columns = [sum(column) for column in zip(*self.counts, strict=True)]
        mu = rng.uniform(*_support([sum(row) for row in self.counts], self.mu_range))
        return mu, rng.uniform(*_support(columns, self.sigma_range))


def _edges(number: int, limits: Range) -> list[float]:
    return torch.linspace(limits[0], limits[1], number + 1, dtype=torch.float64).tolist()


def _draw(counts: Sequence[int], limits: Range, rng: random.Random) -> tuple[int, float]:
    """A bin with probability proportional to its count, and a value uniform in it."""
    cumulated = list(accumulate(counts))
    if not cumulated or cumulated[-1] < 1:
        raise InputError("intensity histogram: it holds no pair to draw from")
    index = bisect_left(cumulated, rng.randint(1, cumulated[-1]))
    edges = _edges(len(counts), limits)
    return index, rng.uniform(edges[index], edges[index + 1])


def _support(counts: Sequence[int], limits: Range) -> Range:
    """From the lower edge of the first bin with any count to the upper edge of the last."""
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        raise InputError("intensity histogram: it holds no pair to draw from")
    edges = _edges(len(counts), limits)
    return edges[filled[0]], edges[filled[-1] + 1]


@dataclass(frozen=True)
class Draw:
    """One sample of the published intensity sampler."""

    dataset: str
    mu: float
    sigma: float
    uniform: bool

    def ask_for(self, degradation: str, known: Container[str] = MIXED) -> str:
        """What to ask the generator for at these intensities: the degradation they were drawn for, or its mixture with haze.

        known: what the generator knows; the published code asks for the mixture wherever the data set is hazy too.
        """
        mixture = _HAZY_TOO.get((degradation, self.dataset))
        return mixture if mixture in known else degradation


_HAZY_TOO = {("rain", "ORD"): "rain and haze", ("snow", "CSD"): "snow and haze"}


class IntensitySampler:
    """Draws intensities as the training pairs of a degradation have them; every `uniform_every`-th over their range.

    weights need not sum to one. The same generator state gives the same sequence.
    """

    def __init__(
        self, datasets: Mapping[str, JointHistogram], weights: Sequence[float], uniform_every: int | None = 20
    ) -> None:
        self.datasets, self.weights, self.uniform_every = dict(datasets), list(weights), uniform_every

    def draw(self, index: int, rng: random.Random) -> Draw:
        """The sample number `index` of a run."""
        (name,) = rng.choices(list(self.datasets), self.weights, k=1)
        uniform = bool(self.uniform_every) and index % self.uniform_every == 0
        histogram = self.datasets[name]
        return Draw(name, *(histogram.draw_uniform(rng) if uniform else histogram.draw(rng)), uniform)


@dataclass(frozen=True)
class Published:
    """What is known of one data set's pairs: ranges of filled bins, the mean intensity, and how often it is drawn."""

    mu: Range
    mean: float
    sigma: Range
    weight: float = 1.0

    def histogram(self) -> JointHistogram:
        """The least presuming joint histogram (largest entropy) with these ranges and this mean.

        The deviations of a mean are equally likely as far as differences in 0..1 allow: sigma^2 <= mu (1 - mu).
        """
        edges, columns = _edges(BINS, MU_RANGE), _edges(BINS, SIGMA_RANGE)
        centres = [(a + b) / 2 for a, b in pairwise(edges)]
        inside = [self.mu[0] - _ROUNDING <= a and b <= self.mu[1] + _ROUNDING for a, b in pairwise(edges)]
        shares = _tilted(centres, inside, self.mean)
        counts = []
        for centre, share in zip(centres, shares, strict=True):
            bound = (centre * (1 - centre)) ** 0.5
            filled = [
                self.sigma[0] - _ROUNDING <= a and b <= self.sigma[1] + _ROUNDING and a < bound
                for a, b in pairwise(columns)
            ]
            each = round(1e6 * share / max(1, sum(filled)))
            counts.append([each * one for one in filled])
        return JointHistogram(counts, MU_RANGE, SIGMA_RANGE)


_ROUNDING = 0.003
"""Half a bin: the ranges below are known to three digits."""


def _tilted(values: Sequence[float], inside: Sequence[bool], mean: float) -> list[float]:
    """Probabilities proportional to exp(k value) where `inside`, k such that their mean is `mean`."""
    low, high = -2000.0, 2000.0
    top = max(v for v, there in zip(values, inside, strict=True) if there)
    for _ in range(60):
        k = (low + high) / 2
        weights = [exp(max(-700.0, min(700.0, k * (v - top)))) * there for v, there in zip(values, inside, strict=True)]
        found = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        low, high = (k, high) if found < mean else (low, k)
    return [w / sum(weights) for w in weights]


_ORD = Published((0.055, 0.284), 0.182, (0.047, 0.231), 0.2)
_CSD = Published((0.044, 0.284), 0.162, (0.044, 0.200))

DATASETS: Mapping[str, Mapping[str, Published]] = {
    "haze": {
        "CityscapesFog": Published((0.005, 0.284), 0.147, (0.006, 0.309)),
        "DenseHaze": Published((0.159, 0.273), 0.226, (0.106, 0.225), 0.05),
        "I-HAZE": Published((0.071, 0.257), 0.148, (0.053, 0.203), 0.25),
        "NH-HAZE": Published((0.115, 0.279), 0.211, (0.100, 0.222), 0.1),
        "RESIDE": Published((0.011, 0.284), 0.115, (0.009, 0.225)),
    },
    "rain": {
        "ORD": _ORD,
        "Rain13K": Published((0.011, 0.284), 0.077, (0.013, 0.250)),
        "Rain1400": Published((0.011, 0.180), 0.066, (0.019, 0.131)),
        "RainDS": Published((0.016, 0.159), 0.054, (0.019, 0.153)),
        "RealRain1k": Published((0.0, 0.257), 0.014, (0.003, 0.188)),
        "SPAC": Published((0.005, 0.055), 0.019, (0.016, 0.091)),
    },
    "snow": {
        "CSD": _CSD,
        "CityscapesSnow": Published((0.077, 0.153), 0.108, (0.072, 0.116)),
        "Snow100k": Published((0.0, 0.279), 0.056, (0.003, 0.175)),
    },
    "motion blur": {
        "HIDE": Published((0.0, 0.115), 0.040, (0.009, 0.113)),
        "REDS": Published((0.0, 0.126), 0.029, (0.003, 0.156)),
        "RealBlur": Published((0.0, 0.126), 0.029, (0.006, 0.153)),
    },
    "low light": {
        "LOLv2": Published((0.016, 0.284), 0.180, (0.006, 0.266)),
        "SID": Published((0.033, 0.284), 0.187, (0.056, 0.269), 0.2),
    },
    "raindrop": {
        "RainDS": Published((0.005, 0.038), 0.024, (0.047, 0.128)),
        "Raindrop": Published((0.0, 0.202), 0.064, (0.016, 0.191)),
    },
    "rain and haze": {"ORD": _ORD},
    "snow and haze": {"CSD": _CSD},
}
"""Ranges, means and weights of the official histograms. These themselves come without a licence and are not here."""
FAINTEST = 0.002
"""The lowest mean that is asked for: half a grey level."""


@lru_cache(maxsize=16)
def intensity_sampler(degradation: str, uniform_every: int | None = 20) -> IntensitySampler:
    """The published sampler of a degradation (a key of DATASETS) over histograms rebuilt from DATASETS."""
    if degradation not in DATASETS:
        raise InputError(f"degradation: {degradation!r} is not one of {', '.join(DATASETS)}")
    known = DATASETS[degradation]
    weights = [published.weight / len(known) for published in known.values()]
    return IntensitySampler({name: one.histogram() for name, one in known.items()}, weights, uniform_every)


def draw_intensity(degradation: str, seed: int, index: int = 0, uniform_every: int | None = 20) -> Draw:
    """The intensity of sample number `index` of a run with this seed; the mean is at least FAINTEST."""
    found = intensity_sampler(degradation, uniform_every).draw(index, random.Random(f"{seed} {index} {degradation}"))
    return replace(found, mu=max(FAINTEST, found.mu))


ContextNetwork = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(latent with the picture's channels appended [B, 8, H, W], time [B], context [B, N, C]) -> noise [B, 4, H, W]."""


def guided_denoiser(
    network: ContextNetwork,
    context: torch.Tensor,
    null_context: torch.Tensor,
    picture: torch.Tensor,
    text_scale: float = 7.5,
    image_scale: float = 1.5,
) -> ld.Denoiser:
    """GenDeg's denoiser: the clean picture's unscaled latent as extra channels, three predictions in one batch."""
    batch = len(picture)
    contexts = torch.cat([context, *[null_context.expand(batch, -1, -1)] * 2])
    pictures = torch.cat([picture, picture, torch.zeros_like(picture)])

    def denoise(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        plain = ld.epsilon_denoiser(lambda x, t: network(torch.cat([x, pictures], dim=1), t, contexts))
        full, image, nothing = plain(z.repeat(3, 1, 1, 1), sigma).chunk(3)
        return ld.three_way_guidance(full, image, nothing, text_scale, image_scale)

    return denoise


def drop_conditions(
    context: torch.Tensor, null_context: torch.Tensor, picture: torch.Tensor, uniform: torch.Tensor, rate: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditions of a training step, some taken away: below 2 rate the text, from rate to 3 rate the picture.

    uniform [B] is one draw per picture; text and intensity leave together, the picture becomes zero.
    """
    u = uniform.reshape(-1, 1, 1)
    context = torch.where(u < 2 * rate, null_context.expand_as(context), context)
    dropped = ((u >= rate) & (u < 3 * rate))[..., None]
    return context, picture.masked_fill(dropped, 0.0)


@dataclass(frozen=True)
class TrainingStep:
    """x_noisy and predicted noise [B, 4, H, W]; loss is a scalar."""

    x_noisy: torch.Tensor
    predicted: torch.Tensor
    loss: torch.Tensor


def training_step(
    network: ContextNetwork,
    latent: torch.Tensor,
    context: torch.Tensor,
    picture: torch.Tensor,
    time: torch.Tensor,
    noise: torch.Tensor,
) -> TrainingStep:
    """Mean squared error of the noise at `time` [B] (0..999) on scaled latents of the degraded pictures."""
    alpha = ld.alphas_cumprod()[time.cpu()].to(latent).reshape(-1, 1, 1, 1)
    x_noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    predicted = network(torch.cat([x_noisy, picture], dim=1), time.to(latent), context)
    return TrainingStep(x_noisy, predicted, F.mse_loss(predicted, noise))
