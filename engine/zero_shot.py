"""Zero-shot restoration under the host: priors on devices, progress with previews, the published settings.

What travels on the MEND_PRIOR wire is an object with `run(size, body)`: it puts its network on the device, calls `body`
with a `Session` and returns what that returns. States (noisy or clean pictures) are [B, C, H, W] in the prior's own
space: pixels in -1..1, or latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from .. import models
from ..errors import InputError
from ..guidance import cm4ir, priors, rdmd, schedules
from ..guidance.measurement import Measurement, draw, task
from ..guidance.operators import Operator
from . import host, prior_tiles, tiling
from .loaded import LoadedRestorer
from .pictures import to_pil

KINDS = ("automatic", "consistency", "EDM", "epsilon")
AUTOMATIC, BY_HAND = "automatic", "by hand"
PRESETS = (AUTOMATIC, *cm4ir.PRESETS, BY_HAND)
OUTPUTS = ("automatic", "estimate", "denoised")
_OTHER = cm4ir.Preset(250, 0.2, 1.0)
"""Where nothing is published: moderate noise and a damped pseudo-inverse."""


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class Session:
    """A prior that is ready to run: `encode` and `decode` lead from pixels in -1..1 to its space and back.

    `as_latent` brings a clean state to the scale of ComfyUI's LATENT, from which samplers and VAEs start.
    """

    prior: priors.Prior
    device: torch.device
    encode: Callable[[torch.Tensor], torch.Tensor] = _same
    decode: Callable[[torch.Tensor], torch.Tensor] = _same
    as_latent: Callable[[torch.Tensor], torch.Tensor] = _same

    def operator(self, operator: Operator) -> Operator:
        """`operator` on states of this prior."""
        return operator if self.encode is _same else LatentOperator(operator, self.encode, self.decode)


class LatentOperator(Operator):
    """A pixel operator seen from latent space: corrections are made in pixels and encoded as differences.

    The difference of two encodings cancels most of the auto-encoder's own error.
    """

    name = "latent"

    def __init__(self, operator: Operator, encode: Callable, decode: Callable) -> None:
        self.pixels, self.encode, self.decode = operator, encode, decode

    def back_project(self, x: torch.Tensor, y: torch.Tensor, eta: float = 0.0, step: float = 1.0) -> torch.Tensor:
        picture = self.decode(x)
        return x + self.encode(self.pixels.back_project(picture, y, eta, step)) - self.encode(picture)

    def gradient(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        picture = self.decode(x)
        return self.encode(picture) - self.encode(picture - self.pixels.gradient(picture, y))


class Prior(Protocol):
    """What travels on the MEND_PRIOR wire."""

    name: str

    def run(self, size: tuple[int, ...], body: Callable[[Session], Any]) -> Any:
        """Calls body(session) with the network on the device; `size` [B, 3, H, W] is that of the pictures."""


@dataclass(frozen=True, eq=False)
class NetworkPrior:
    """A pixel-space diffusion or consistency network under the host's memory management."""

    loaded: LoadedRestorer
    kind: str
    label: int | None = None
    precision: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.loaded.restorer.architecture.title} ({self.kind})"

    def prior(self, module: torch.nn.Module, device: torch.device) -> priors.Prior:
        """The denoiser of a module that lies on `device`; works in tiles where memory is short."""
        if self.kind == "epsilon":
            made = priors.epsilon_prior(module, self.label)
        else:
            made = priors.consistency_prior(module, self.label, boundary=self.kind == "consistency")
        dtype = host.working_dtype(self.precision, device)

        def half(*arguments: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, dtype=dtype):
                return made.network(*arguments).float()

        network = made.network if dtype == torch.float32 else half
        return replace(made, network=prior_tiles.in_parts(network, self.loaded, dtype, device))

    def run(self, size: tuple[int, ...], body: Callable[[Session], Any]) -> Any:
        target = host.device()
        dtype = host.working_dtype(self.precision, target)
        side = tiling.choose_tile(self.loaded, size[-2], size[-1], dtype, target)
        pixels = min(size[-2] * size[-1], side**2)
        with self.loaded.managed.on_device(int(pixels * tiling.bytes_per_pixel(self.loaded, dtype))) as (
            module,
            device,
        ):
            return body(Session(self.prior(module, device), device))


def network_prior(loaded: LoadedRestorer, kind: str = AUTOMATIC, label: int | None = None, precision: str = "auto"):
    """A loaded file as a prior. `kind` one of KINDS; automatic: by the network's form, what its file says it is for, and
    its name."""
    restorer = loaded.restorer
    if restorer.architecture.kind != "prior":
        raise InputError(f"model: {restorer.architecture.title} is a {restorer.architecture.kind}, not a prior")
    if kind == AUTOMATIC:
        kind = _kind(restorer)
    classes = getattr(restorer.module, "num_classes", None)
    if classes is not None and label is None:
        raise InputError(f"class_index: this prior was trained with {classes} classes; choose one in 0..{classes - 1}")
    if classes is not None and not 0 <= label < classes:
        raise InputError(f"class_index: {label} is outside 0..{classes - 1}")
    return NetworkPrior(loaded, kind, label if classes is not None else None, precision)


def _kind(restorer: models.Restorer) -> str:
    wrapper = restorer.config.get("wrapper")
    if priors.predicts_noise(restorer.module, wrapper):
        return "epsilon"
    if said := [kind for kind in ("consistency", "EDM") if kind in restorer.tasks]:
        return said[0]
    name = restorer.source.lower().replace("\\", "/").rsplit("/", 1)[-1]
    return "consistency" if wrapper == "karras" and "edm" not in name else "EDM"


@dataclass(frozen=True, eq=False)
class RestorerPrior:
    """A blind restorer as a plug-and-play denoiser: it is told no noise level."""

    loaded: LoadedRestorer

    @property
    def name(self) -> str:
        return self.loaded.restorer.architecture.title

    def run(self, size: tuple[int, ...], body: Callable[[Session], Any]) -> Any:
        if self.loaded.restorer.scale != 1:
            raise InputError("restorer: one that enlarges cannot be a prior; use one for denoising or deblurring")

        def restore(picture: torch.Tensor) -> torch.Tensor:
            with host.part_of_progress(0, 1):
                return tiling.restore(self.loaded, picture)

        return body(Session(priors.restorer_prior(restore), host.intermediate_device()))


# CM4IR ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cm4ir:
    """Settings of CM4IR beside its noise levels; the names are those of `guidance.cm4ir.step`."""

    zeta: float = 0.0
    eta: float = 0.1
    mu: float = 1.0
    noise_sign: float = -1.0
    deltas: tuple[float, ...] = ()
    delta_in_scalings: bool = False
    fill: str = "medians"
    """How holes are filled before the start; of no concern to the steps."""

    @classmethod
    def of(cls, preset: cm4ir.Preset, eta: float = 0.1, mu: float = 1.0, noise_sign: float = -1.0) -> Cm4ir:
        """A published setting with what is left open by it."""
        return cls(preset.zeta, eta, mu, noise_sign, preset.deltas, preset.delta_in_scalings, preset.fill)

    def options(self, measurement: Measurement) -> dict[str, Any]:
        """Keyword arguments of `cm4ir.step` that hold for all steps."""
        return {
            "sigma_y": measurement.noise,
            "zeta": self.zeta,
            "eta": self.eta,
            "noise_sign": self.noise_sign,
            "delta_in_scalings": self.delta_in_scalings,
        }


def cm4ir_preset(name: str, measurement: Measurement, prior: Prior | None = None) -> cm4ir.Preset:
    """A setting by name; automatic: by what the operator does, the noise level, and what the prior is.

    The published settings are for consistency models; an EDM network, which blurs what it cannot know, has its own.
    """
    if name == AUTOMATIC:
        kind = task(measurement.operator)
        if getattr(prior, "kind", "") == "EDM":
            return cm4ir.preset(f"{kind} (EDM)", measurement.noise)
        if kind == "other":
            return _OTHER
        name = f"{kind} x4 (bedroom)" if kind == "super-resolution" else f"{kind} (bedroom)"
    return cm4ir.preset(name, measurement.noise)


def levels(sigmas: torch.Tensor) -> torch.Tensor:
    """The noise levels to evaluate at: SIGMAS without the zero that ends it.

    Raises InputError if there is none, or one is not a positive number.
    """
    found = sigmas.float().cpu()
    found = found[:-1] if len(found) and float(found[-1]) == 0 else found
    if not len(found) or bool((found <= 0).any()):
        raise InputError("sigmas: needs at least one noise level above 0, each one evaluation of the prior")
    if not bool(found.isfinite().all()):
        raise InputError("sigmas: holds a level that is no finite number; take sigmas from a scheduler or CM4IR Sigmas")
    return found


def cm4ir_start(
    session: Session, measurement: Measurement, sigma: float, seed: int, zeta: float, fill: str = "medians"
) -> torch.Tensor:
    """The state that CM4IR begins with: the pseudo-inverse of y, its holes filled, with noise of level `sigma`."""
    measurement = measurement.to(session.device)
    x = session.encode(cm4ir.start(measurement.operator, measurement.y, zeta, measurement.noise, fill))
    return x + sigma * draw(x.shape, seed, 0, x.device)


def run_cm4ir(
    session: Session,
    measurement: Measurement,
    sigmas: torch.Tensor,
    x: torch.Tensor,
    seed: int,
    settings: Cm4ir,
    tell: Callable[[cm4ir.Step], None] | None = None,
) -> torch.Tensor:
    """CM4IR from the state x over all noise levels; returns the last state. `tell`: in place of the host's progress."""
    measurement = measurement.to(session.device)
    count = len(sigmas)
    if tell is None:
        progress = host.progress(count)

        def tell(step: cm4ir.Step) -> None:
            progress.update(1, lambda: preview(session, step.x0))

    return cm4ir.sample(
        session.prior,
        session.operator(measurement.operator),
        measurement.y,
        x,
        sigmas,
        [draw(x.shape, seed, k, x.device) for k in range(1, count)],
        deltas=settings.deltas if len(settings.deltas) == count else (),
        mu=settings.mu,
        callback=tell,
        **settings.options(measurement),
    )


# RDMD -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rdmd:
    """Settings of RDMD. tau 0: faithful, 1: generative. renewal is the paper's zeta; output one of OUTPUTS."""

    iterations: int = 100
    tau: float = 0.5
    weight: float = 20.0
    renewal: float | None = None
    """None: as published, 0 for super-resolution and 0.3 elsewhere."""
    output: str = AUTOMATIC

    def schedule(self, measurement: Measurement, sigmas: torch.Tensor | None = None) -> schedules.RdmdSchedule:
        """`sigmas`: noise levels in place of the published ones for `iterations`."""
        factor = max(1, round(measurement.size[0] / measurement.y.shape[-2])) if upscales(measurement) else 1
        return schedules.rdmd_schedule(self.iterations, measurement.noise, self.weight, self.tau, factor, sigmas)

    def fresh(self, measurement: Measurement) -> float:
        """The share of fresh noise per step."""
        return self.renewal if self.renewal is not None else (0.0 if upscales(measurement) else 0.3)

    def chosen(self, measurement: Measurement, estimate: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """Published scripts return the estimate for super-resolution, else the last denoised picture."""
        if self.output == AUTOMATIC:
            return estimate if upscales(measurement) else denoised
        return estimate if self.output == "estimate" else denoised


def upscales(measurement: Measurement) -> bool:
    """True for super-resolution."""
    return task(measurement.operator) == "super-resolution"


def rdmd_start(
    session: Session, measurement: Measurement, sigma: float, seed: int, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, x): the first estimate and the noisy state that RDMD begins with. `noise`: in place of what `seed` draws."""
    measurement = measurement.to(session.device)
    kind, y = task(measurement.operator), measurement.y

    def drawn(u: torch.Tensor) -> torch.Tensor:
        return draw(u.shape, seed, 0, u.device) if noise is None else noise

    if kind == "super-resolution":
        u = session.encode(F.interpolate(y, size=measurement.size, mode="bicubic", align_corners=False))
    elif kind == "deblurring":
        u = session.encode(y)
        return rdmd.start_from_noisy(u, measurement.noise, sigma, drawn(u))
    else:
        u = session.encode(cm4ir.start(measurement.operator, y))
    return u, u + sigma * drawn(u)


def rdmd_draw(shape: torch.Size, seed: int, device: torch.device) -> Callable[[int, str], torch.Tensor]:
    """draw(i, name) for `rdmd.sample`; fresh noise has odd numbers, churn even ones."""
    return lambda i, name: draw(shape, seed, 2 * i + (1 if name == "zeta" else 2), device)


def run_rdmd(
    session: Session,
    measurement: Measurement,
    u: torch.Tensor,
    x: torch.Tensor,
    seed: int,
    settings: Rdmd,
    sigmas: torch.Tensor | None = None,
    tell: Callable[[rdmd.Step], None] | None = None,
) -> torch.Tensor:
    """RDMD from estimate u and state x; returns what `settings.output` names.

    sigmas: noise levels of the state in place of the published ones. tell: in place of the host's progress.
    """
    measurement = measurement.to(session.device)
    schedule = settings.schedule(measurement, sigmas)
    if tell is None:
        progress = host.progress(len(schedule.sigmas))

        def tell(step: rdmd.Step) -> None:
            progress.update(1, lambda: preview(session, step.u))

    estimate, denoised = rdmd.sample(
        session.prior,
        session.operator(measurement.operator),
        measurement.y,
        u,
        x,
        schedule,
        rdmd_draw(u.shape, seed, u.device),
        zeta=settings.fresh(measurement),
        callback=tell,
    )
    return settings.chosen(measurement, estimate, denoised)


# Whole restorations ---------------------------------------------------------------------------------------------------


def picture_size(measurement: Measurement) -> tuple[int, int, int, int]:
    """[B, 3, H, W] of the pictures to find."""
    return (len(measurement.y), 3, *measurement.size)


def as_picture(session: Session, state: torch.Tensor) -> torch.Tensor:
    """A clean state as [B, 3, H, W] in 0..1."""
    return (session.decode(state) / 2 + 0.5).clamp(0, 1)


def preview(session: Session, state: torch.Tensor) -> Any:
    """A picture of the first state of a batch."""
    shown = as_picture(session, state[:1])[0, :3]
    step = max(1, max(shown.shape[-2:]) // tiling.PREVIEW_SIDE)
    return to_pil(shown[:, ::step, ::step])


def restore_cm4ir(
    prior: Prior, measurement: Measurement, seed: int, sigmas: torch.Tensor, settings: Cm4ir
) -> torch.Tensor:
    """CM4IR from a measurement to pictures [B, 3, H, W] in 0..1."""
    sigmas = levels(sigmas)

    def body(session: Session) -> torch.Tensor:
        x = cm4ir_start(session, measurement, float(sigmas[0]), seed, settings.zeta, settings.fill)
        return as_picture(session, run_cm4ir(session, measurement, sigmas, x, seed, settings))

    return prior.run(picture_size(measurement), body)


def restore_rdmd(prior: Prior, measurement: Measurement, seed: int, settings: Rdmd) -> torch.Tensor:
    """RDMD from a measurement to pictures [B, 3, H, W] in 0..1."""

    def body(session: Session) -> torch.Tensor:
        sigma = float(settings.schedule(measurement).sigmas[0])
        u, x = rdmd_start(session, measurement, sigma, seed)
        return as_picture(session, run_rdmd(session, measurement, u, x, seed, settings))

    return prior.run(picture_size(measurement), body)
