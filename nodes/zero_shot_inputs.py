"""What the nodes of zero-shot restoration share: inputs and outputs that several have, and how states travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..engine import host, zero_shot
from ..engine.values import check_values
from ..errors import InputError
from ..guidance.measurement import Measurement
from . import sockets
from .api import advanced, io
from .images import as_image

CATEGORY = "Mend/zero-shot"
STEPS = "Mend/zero-shot/steps"


def as_latent(samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state as ComfyUI's LATENT."""
    return {"samples": samples.to(host.intermediate_device(), torch.float32)}


def _shape(sizes: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in sizes)}]"


def state_of(
    name: str,
    latent: dict[str, Any],
    prior: zero_shot.Prior,
    maker: str,
    measurement: Measurement | None = None,
) -> torch.Tensor:
    """The state [B, C, h, w], float32, in the LATENT of the input `name`, of the pictures of `measurement` if there is one.

    A prior in pixels needs [B, 3, H, W]; of one on latents (a MODEL with its VAE) only the batch is known here. One
    measurement serves any number of states. Raises InputError, which says to take the LATENT from `maker`, and for values
    that are NaN, infinite or absurd.
    """
    samples = latent["samples"]
    count, *size = (None, None, None) if measurement is None else (len(measurement.y), *measurement.size)
    in_pixels = getattr(prior, "vae", None) is None
    needed = [None if count == 1 else count, *((3, *size) if in_pixels else (None, None, None))]
    fits = samples.ndim == 4 and samples.numel() > 0
    if not fits or any(n not in (None, found) for n, found in zip(needed, samples.shape, strict=True)):
        space = "in pixels, three colours" if in_pixels else "in the latents of the prior's model"
        raise InputError(
            f"{name}: a LATENT of {_shape(samples.shape)} (pictures, channels, height, width), but needed is "
            f"{_shape(needed)}, {space}; take it from {maker}"
        )
    check_values(samples, name)
    return samples.float()


def check_same_shape(maker: str, **states: torch.Tensor) -> None:
    """Raises InputError unless all states are [B, C, h, w] of one shape; the text says to take them from `maker`."""
    shapes = {tuple(state.shape) for state in states.values()}
    if len(shapes) > 1 or len(shapes.pop()) != 4:
        found = ", ".join(f"{name} {_shape(state.shape)}" for name, state in states.items())
        raise InputError(
            f"{' and '.join(states)}: LATENTs of one shape (pictures, channels, height, width) are needed, not {found}; "
            f"take them from {maker}"
        )


def states_and_picture(
    prior: zero_shot.Prior,
    size: tuple[int, ...],
    body: Callable[[zero_shot.Session], tuple[Sequence[torch.Tensor], torch.Tensor]],
) -> io.NodeOutput:
    """States as LATENTs and a picture as IMAGE: body(session) gives the states, and the clean one that is shown."""

    def with_picture(session: zero_shot.Session) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        states, shown = body(session)
        return states, zero_shot.as_picture(session, shown)

    states, picture = prior.run(size, with_picture)
    return io.NodeOutput(*map(as_latent, states), as_image(picture))


def state_output(name: str, tooltip: str) -> io.Output:
    return io.Latent.Output(name, display_name=name.replace("_", " "), tooltip=tooltip)


def picture_output(tooltip: str = "The same as a picture.") -> io.Output:
    return io.Image.Output("picture", display_name="image", tooltip=tooltip)


def prior_input() -> io.Input:
    return sockets.Prior.Input("prior", tooltip="From Load Prior, Prior From Model or Prior From Restorer.")


def measurement_input() -> io.Input:
    return sockets.Measurement.Input("measurement", tooltip="From Measure or Measurement From Image.")


def sigmas_input() -> io.Input:
    return io.Sigmas.Input("sigmas", tooltip="Noise levels, from CM4IR Sigmas or any scheduler; a final 0 is left out.")


def flow_input() -> io.Input:
    return advanced(
        io.Boolean.Input(
            "flow",
            default=False,
            optional=True,
            tooltip="For a SAMPLER on a flow model (SD3, Flux): its noise levels run from 0 to 1.",
        )
    )


def as_sigmas(levels: torch.Tensor, flow: bool) -> torch.Tensor:
    """Noise levels of x0 + sigma n as ComfyUI's SIGMAS, ended by 0. flow: of (1 - s) x0 + s n."""
    levels = levels.float()
    levels = levels / (1 + levels) if flow else levels
    return torch.cat([levels, levels.new_zeros(1)])


def index_input() -> io.Input:
    return io.Int.Input(
        "index", default=0, min=0, max=9999, tooltip="Which noise level this step works at; the first is 0."
    )


def state_input(name: str, tooltip: str) -> io.Input:
    return io.Latent.Input(name, tooltip=tooltip)


def gamma_input(tooltip: str) -> io.Input:
    return io.Float.Input("gamma", default=0.2, min=0.0, max=10.0, step=0.01, round=0.0001, tooltip=tooltip)


def zeta_input() -> io.Input:
    return io.Float.Input(
        "zeta",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="Damping of the pseudo-inverse in units of the noise variance: more for blur (1 to 4), 0 for "
        "super-resolution and inpainting.",
    )


def eta_input() -> io.Input:
    return io.Float.Input(
        "eta", default=0.1, min=0.0, max=1.0, step=0.01, tooltip="Share of fresh noise in each step; 0.1 as published."
    )


def mu_input() -> io.Input:
    return io.Float.Input(
        "mu", default=1.0, min=0.0, max=2.0, step=0.05, tooltip="How far to move onto the measurement; 1: all the way."
    )


def noise_sign_input() -> io.Input:
    return io.Combo.Input(
        "noise_sign",
        options=["turned round", "kept"],
        default="turned round",
        tooltip="Sign of the predicted noise in the next state. turned round: CM4IR. kept: DDIM, for diffusion models.",
    )


def sign_of(noise_sign: str) -> float:
    return 1.0 if noise_sign == "kept" else -1.0


def delta_inputs() -> list[io.Input]:
    return [
        advanced(
            io.Float.Input(
                "delta",
                default=0.0,
                min=-0.5,
                max=4.0,
                step=0.05,
                tooltip="Tells the prior a noise level larger by this share than there is.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "delta_in_scalings",
                default=False,
                tooltip="Use that level for the prior's input and output scalings too, as for inpainting.",
            )
        ),
    ]


def levels_at(sigmas: torch.Tensor, index: int) -> tuple[float, float | None]:
    """(sigma, next sigma or None at the end)."""
    levels = zero_shot.levels(sigmas)
    if index >= len(levels):
        raise InputError(f"index: {index}, but there are {len(levels)} noise levels (0..{len(levels) - 1})")
    return float(levels[index]), float(levels[index + 1]) if index + 1 < len(levels) else None
