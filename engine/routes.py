"""Routing decisions of MoCE-IR networks on real pictures."""

from __future__ import annotations

import torch

from ..errors import InputError
from ..models import moce_routing
from ..models.layers.padding import pad_to_multiple
from ..models.moce_ir import MoCEIR, Routing
from . import host, tiling
from .loaded import LoadedRestorer
from .values import check_image


def _network(loaded: LoadedRestorer) -> MoCEIR:
    if not isinstance(loaded.restorer.module, MoCEIR):
        raise InputError(
            f"restorer: {loaded.restorer.architecture.title} has no experts to route; load a MoCE-IR network"
        )
    return loaded.restorer.module


def route(loaded: LoadedRestorer, image: torch.Tensor, noise: float = 0.0, seed: int = 0) -> Routing:
    """The routing of every picture of [B, C, H, W], decided on the whole picture (reduced if it is large).

    noise: standard deviation in units of the published 1 / experts; 0 is deterministic. Draws depend on the seed and
    the block alone, not on the device.
    """
    check_image(image)
    network = _network(loaded)
    blocks, experts = len(network.decoder_blocks), loaded.restorer.config["num_experts"]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(blocks, len(image), experts, generator=generator) * noise if noise > 0 else None
    progress, parts = host.progress(len(image)), []
    for index in range(len(image)):
        picture = tiling.reduced(loaded, tiling.as_rgb(image[index : index + 1]), torch.float32, host.device())
        its_noise = None if draws is None else draws[:, index : index + 1]
        parts.append(tiling.until_it_fits(loaded, picture, lambda p, noise=its_noise: _route(loaded, p, noise)))
        progress.update()
    return moce_routing.join(parts, tuple(network.decoder_blocks))


def _route(loaded: LoadedRestorer, picture: torch.Tensor, noise: torch.Tensor | None) -> Routing:
    with loaded.managed.on_device(tiling.activation_bytes(loaded, picture, torch.float32)) as (module, device):
        padded, _ = pad_to_multiple(picture.to(device), loaded.restorer.multiple_of, loaded.restorer.minimum_size)
        return module.route(padded, None if noise is None else noise.to(device)).to(host.intermediate_device())


def sweep(loaded: LoadedRestorer, image: torch.Tensor) -> torch.Tensor:
    """One picture [1, C, H, W] restored with the network's own choice, then with each expert forced everywhere."""
    own = route(loaded, image)
    experts = own.gates.shape[-1]
    everywhere = range(own.gates.shape[0])
    routings = [own, *(moce_routing.blend(own, torch.eye(experts)[e], everywhere) for e in range(experts))]
    return torch.cat([tiling.restore(loaded, image, context={"routing": r}) for r in routings])
