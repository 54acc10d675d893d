"""Image priors for zero-shot restoration: a denoiser that maps a noisy picture and its noise level to a clean one.

All work in the variance-exploding view, x = x0 + sigma n, on pictures in -1..1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..models.layers.padding import crop, pad_to_multiple
from . import parametrisation, schedules


@dataclass(frozen=True, eq=False)
class Prior:
    """A denoiser D(x, sigma) -> x0 on [B, C, H, W] in -1..1, any size.

    `network(x, sigma, told)` computes it; `told` [B] is the noise level its time input hears, if another than the true
    one. `clamp` limits x0 to -1..1 as the published samplers do (pixel models only).
    """

    network: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    multiple_of: int = 1
    clamp: bool = True
    name: str = "prior"

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor | float, told: torch.Tensor | float | None = None
    ) -> torch.Tensor:
        """The clean picture behind x; sigma a number or one per picture."""
        level = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        heard = level if told is None else torch.as_tensor(told, dtype=torch.float32, device=x.device).expand(len(x))
        padded, size = pad_to_multiple(x, self.multiple_of)
        x0 = crop(self.network(padded, level, heard), size)
        return x0.clamp(-1, 1) if self.clamp else x0

    def unclamped(self) -> Prior:
        """The same prior without limits on x0."""
        return replace(self, clamp=False)


def _multiple(module: nn.Module) -> int:
    return 2 ** (getattr(module, "levels", 1) - 1)


def _classes(
    module: nn.Module, label: torch.Tensor | int | None, batch: int, device: torch.device
) -> torch.Tensor | None:
    """Class indices [B] for a network that knows classes, else None."""
    count = getattr(module, "num_classes", None)
    if count is None:
        return None
    if label is None:
        raise InputError(f"class: this prior was trained with {count} classes; choose one in 0..{count - 1}")
    indices = torch.as_tensor(label, device=device).long().reshape(-1).expand(batch)
    if int(indices.min()) < 0 or int(indices.max()) >= count:
        raise InputError(f"class: {indices.tolist()} is outside 0..{count - 1}")
    return indices


def predicts_noise(module: nn.Module, wrapper: str | None) -> bool:
    """Whether a prior's network predicts noise at one of 1000 timesteps, as ADM's do; the others have EDM's scalings.

    wrapper: what the file's configuration says of it; "karras" for OpenAI's EDM and consistency networks.
    """
    return wrapper != "karras" and getattr(module, "form", "epsilon") == "epsilon"


def consistency_prior(module: nn.Module, label: torch.Tensor | int | None = None, *, boundary: bool = True) -> Prior:
    """A network of OpenAI's consistency-model release; boundary False for its EDM teachers."""
    scale = parametrisation.consistency_denoised if boundary else parametrisation.edm_denoised

    def network(x: torch.Tensor, sigma: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        time = parametrisation.edm_time(told)
        output = module(x * parametrisation.edm_c_in(sigma), time, _classes(module, label, len(x), x.device))
        return scale(x, sigma, output)

    return Prior(network, _multiple(module), name="consistency model" if boundary else "EDM")


def epsilon_prior(module: nn.Module, label: torch.Tensor | int | None = None) -> Prior:
    """An ADM network: predicts the noise at one of 1000 timesteps; the learned variance is not used."""

    def network(x: torch.Tensor, sigma: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        time = schedules.nearest_timestep(told).float()
        level = sigma.reshape(-1, 1, 1, 1)
        noise = module(x * torch.rsqrt(1 + level**2), time, _classes(module, label, len(x), x.device))
        return x - level * noise[:, : x.shape[1]]

    return Prior(network, _multiple(module), name="diffusion model")


def restorer_prior(restore: Callable[[torch.Tensor], torch.Tensor]) -> Prior:
    """Any blind restorer of 0..1 pictures as a denoiser: a plug-and-play prior that is told no noise level."""

    def network(x: torch.Tensor, sigma: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return restore((x / 2 + 0.5).clamp(0, 1)) * 2 - 1

    return Prior(network, name="restorer")


def estimate_noise(image: torch.Tensor) -> torch.Tensor:
    """Standard deviation of Gaussian noise in pictures [B, C, H, W], per picture [B], on the pictures' own scale.

    Median absolute deviation of the finest diagonal Haar band (Donoho and Johnstone 1994).
    """
    if min(image.shape[-2:]) < 2:
        raise InputError("image: a noise estimate needs at least 2 x 2 pixels")
    filters = torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=image.dtype, device=image.device)
    diagonal = F.conv2d(image.flatten(0, 1)[:, None], filters[None, None], stride=2)
    return diagonal.unflatten(0, image.shape[:2]).abs().flatten(1).median(dim=1).values / 0.6745
