"""CM4IR: zero-shot restoration in a few evaluations of a consistency model.

Garber and Tirer, "Zero-Shot Image Restoration Using Few-Step Guidance of Consistency Models (and Beyond)", CVPR 2025,
arXiv 2412.20596. Pictures in -1..1; noise levels sigma_y on the 0..1 scale as the paper quotes them; random draws come in
as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from .fills import median_fill, smooth_fill
from .operators import Inpainting, Operator
from .priors import Prior


def damping(zeta: float, sigma_y: float) -> float:
    """eta of the pseudo-inverse: zeta times the noise variance on the -1..1 scale."""
    return zeta * (2 * sigma_y) ** 2


FILLS = {"medians": median_fill, "smooth": smooth_fill}


def start(
    operator: Operator, y: torch.Tensor, zeta: float = 0.0, sigma_y: float = 0.0, fill: str = "medians"
) -> torch.Tensor:
    """x_start: the (damped) pseudo-inverse of y; for inpainting with its holes filled, as published by medians."""
    x = operator.A_dagger(y, damping(zeta, sigma_y))
    if not isinstance(operator, Inpainting):
        return x
    masks = operator.mask.expand(len(x), -1, -1, -1)
    if len(operator.mask) == 1:
        return FILLS[fill](x, masks[0, 0])
    return torch.cat([FILLS[fill](one[None], mask[0]) for one, mask in zip(x, masks, strict=True)])


def predict(
    prior: Prior, x: torch.Tensor, sigma: float, delta: float = 0.0, delta_in_scalings: bool = False
) -> torch.Tensor:
    """x0 of x at noise `sigma`. delta: relative increase of the level the denoiser is told, in its time input alone or
    in its input and output scalings as well."""
    told = (1 + delta) * sigma
    return prior(x, told if delta_in_scalings else sigma, told)


def back_project(
    operator: Operator, x0: torch.Tensor, y: torch.Tensor, zeta: float = 0.0, sigma_y: float = 0.0, mu: float = 1.0
) -> torch.Tensor:
    """x0 - mu A+ (A x0 - y): the estimate, moved onto the measurement (eq. 9)."""
    return operator.back_project(x0, y, damping(zeta, sigma_y), mu)


def mix_noise(
    guided: torch.Tensor,
    x: torch.Tensor,
    x0: torch.Tensor,
    sigma: float,
    sigma_next: float,
    noise: torch.Tensor,
    eta: float = 0.1,
    noise_sign: float = -1.0,
) -> torch.Tensor:
    """The next state: fresh noise and the predicted noise, whose sign CM4IR turns round (eq. 11; +1 is DDIM's)."""
    predicted = (x - x0) / sigma
    return guided + sigma_next * (eta * noise + noise_sign * math.sqrt(1 - eta**2) * predicted)


@dataclass(frozen=True)
class Step:
    """One step of the sampler: the state it began with, the network's x0, the guided x0, and the next state."""

    index: int
    x: torch.Tensor
    x0: torch.Tensor
    guided: torch.Tensor
    x_next: torch.Tensor | None


def step(
    prior: Prior,
    operator: Operator,
    y: torch.Tensor,
    x: torch.Tensor,
    sigma: float,
    sigma_next: float | None,
    noise: torch.Tensor | None,
    *,
    index: int = 0,
    sigma_y: float = 0.05,
    zeta: float = 0.0,
    eta: float = 0.1,
    mu: float = 1.0,
    delta: float = 0.0,
    delta_in_scalings: bool = False,
    noise_sign: float = -1.0,
) -> Step:
    """One evaluation of the prior, back-projection and re-noising; sigma_next None: the last step.

    The last step of a noisy measurement is not back-projected: that would bring its noise back.
    """
    x0 = predict(prior, x, sigma, delta, delta_in_scalings)
    if sigma_next is None and sigma_y != 0:
        return Step(index, x, x0, x0, None)
    guided = back_project(operator, x0, y, zeta, sigma_y, mu)
    if sigma_next is None:
        return Step(index, x, x0, guided, None)
    return Step(index, x, x0, guided, mix_noise(guided, x, x0, sigma, sigma_next, noise, eta, noise_sign))


def sample(
    prior: Prior,
    operator: Operator,
    y: torch.Tensor,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    noises: Sequence[torch.Tensor],
    *,
    deltas: Sequence[float] = (),
    mu: float = 1.0,
    mu_factor: float = 1.0,
    callback: Callable[[Step], None] | None = None,
    **options: float,
) -> torch.Tensor:
    """CM4IR (algorithm 1) from the noisy state x: one prior evaluation per entry of sigmas [N].

    noises: a draw for every step but the last. deltas: one per step or none. options as for `step`. Returns the restored
    picture in about -1..1, not clamped.
    """
    count = len(sigmas)
    if len(noises) < count - 1 or len(deltas) not in (0, count):
        raise InputError(
            f"{count} steps need {count - 1} draws and no or {count} deltas, got {len(noises)}, {len(deltas)}"
        )
    for k in range(count):
        last = k == count - 1
        done = step(
            prior,
            operator,
            y,
            x,
            float(sigmas[k]),
            None if last else float(sigmas[k + 1]),
            None if last else noises[k],
            index=k,
            delta=deltas[k] if deltas else 0.0,
            mu=mu * mu_factor**k,
            **options,
        )
        if callback is not None:
            callback(done)
        x = done.guided if last else done.x_next
    return x


@dataclass(frozen=True)
class Preset:
    """A setting: where the schedule starts, how fast it goes, how much the pseudo-inverse is damped, how holes are filled."""

    start: int
    gamma: float
    zeta: float = 0.0
    deltas: tuple[float, ...] = ()
    delta_in_scalings: bool = False
    fill: str = "medians"


# For networks that predict the mean, such as Mend's starter prior: found on photographs that it was trained on. They begin
# with much less noise than the published ones; what a mean has lost to noise does not come back.
EDM_PRESETS: dict[str, dict[float, Preset]] = {
    "super-resolution (EDM)": {0.0: Preset(40, 0.006), 0.05: Preset(60, 0.005, 1)},
    "deblurring (EDM)": {0.02: Preset(40, 0.005, 8), 0.05: Preset(34, 0.0025, 7)},
    "inpainting (EDM)": {
        0.0: Preset(5, 0.01, fill="smooth"),
        0.025: Preset(14, 0.001, fill="smooth"),
        0.05: Preset(18, 0.0005, fill="smooth"),
    },
    "other (EDM)": {0.05: Preset(150, 0.08, 1)},
}

# Section 4 of the released evaluation script, by task and noise level on the 0..1 scale.
PRESETS: dict[str, dict[float, Preset]] = {
    "super-resolution x4 (bedroom)": {
        0.025: Preset(400, 0.7, 0, (0, 0.5, 0.1, 0)),
        0.05: Preset(250, 0.2, 0, (0, 0.3, 0.05, 0.1)),
    },
    "super-resolution x4 (cat)": {
        0.025: Preset(400, 0.7, 0, (0, 0.3, 0, 0)),
        0.05: Preset(250, 0.2, 0, (0.1, 0.1, 0, 0)),
    },
    "super-resolution x2 (ImageNet 64)": {
        0.01: Preset(50, 0.01),
        0.025: Preset(75, 0.02),
        0.05: Preset(100, 0.03),
    },
    "deblurring (bedroom)": {
        0.025: Preset(75, 0.01, 3, (0.1, 0, 0, 0.05)),
        0.05: Preset(150, 0.05, 1, (0.1, 0, 0, 0.05)),
    },
    "deblurring (cat)": {0.025: Preset(125, 0.05, 4), 0.05: Preset(250, 0.2, 1)},
    "inpainting (bedroom)": {
        0.0: Preset(150, 0.2, 0, (0.2, 0.1, 1.0, 1.0), True),
        0.025: Preset(150, 0.2, 0, (0.1, 0.1, 0.8, 0.8), True),
        0.05: Preset(150, 0.2, 0, (0.2, 0.3, 0.8, 0.8), True),
    },
    "inpainting text (bedroom)": {0.025: Preset(150, 0.2, 0, (0.2, 0.3, 0.8, 0.8), True)},
    "inpainting (cat)": {
        0.025: Preset(150, 0.2, 0, (0, 0, 1.0, 1.0), True),
        0.05: Preset(150, 0.2, 0, (0, 0, 1.0, 1.0), True),
    },
    **EDM_PRESETS,
}


def preset(task: str, sigma_y: float) -> Preset:
    """The published setting of a task for the nearest noise level."""
    if task not in PRESETS:
        raise InputError(f"preset: {task!r} is unknown; one of {', '.join(PRESETS)}")
    levels = PRESETS[task]
    return levels[min(levels, key=lambda level: abs(level - sigma_y))]
