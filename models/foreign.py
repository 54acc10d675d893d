"""Networks that are none of ours but that spandrel, ComfyUI's model loader, knows; only where it is installed.

A file that no network here recognises, but spandrel does, becomes a restorer like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from ..errors import CheckpointError
from .registry import Architecture, State
from .restorer import Restorer

logger = logging.getLogger(__name__)

PREFIX = "mend-"
"""Of our architectures' ids in spandrel (see `interop`), so that they cannot clash with its own, present or future."""


@lru_cache(maxsize=1)
def spandrel_package() -> Any | None:
    """The package, or None where it is missing or cannot be imported (it needs torchvision)."""
    try:
        import spandrel
    except ImportError:
        return None
    except (RuntimeError, OSError, AttributeError) as error:  # a torchvision that does not fit its torch
        logger.warning("spandrel is installed but does not import (%s): its networks are not available", error)
        return None
    return spandrel


def from_spandrel(state: State, source: str = "") -> Restorer | None:
    """A restorer for a state dict that spandrel recognises; None if it does not, or is not installed.

    Its results are clamped to 0..1 and carry no gradients. Raises CheckpointError for a file that it recognises but
    cannot load, or that is no image-to-image network.
    """
    spandrel = spandrel_package()
    if spandrel is None:
        return None
    native = spandrel.ArchRegistry()
    native.add(
        *(s for s in spandrel.MAIN_REGISTRY.architectures("detection") if not s.architecture.id.startswith(PREFIX))
    )
    try:
        descriptor = native.load(dict(state))
    except spandrel.UnsupportedModelError:
        return None
    except Exception as error:  # whatever a network's constructor raises for shapes that do not fit
        raise CheckpointError(f"spandrel recognises this file but cannot load it: {error}") from None
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise CheckpointError(f"this {descriptor.architecture.name} does not take a picture alone (it needs a mask)")
    if descriptor.input_channels != descriptor.output_channels:
        raise CheckpointError(f"this {descriptor.architecture.name} changes the number of channels")
    descriptor.eval()
    descriptor.model.requires_grad_(False)
    config = {"inp_channels": descriptor.input_channels, "scale": descriptor.scale, "tags": tuple(descriptor.tags)}
    note = f"not one of Mend's networks: loaded through spandrel as {descriptor.architecture.name}"
    return Restorer(_architecture_of(descriptor), config, descriptor.model, source, [note])


def _architecture_of(descriptor: Any) -> Architecture:
    """What `Restorer` and the tiling need to know about a network of spandrel's."""
    theirs, size = descriptor.architecture, descriptor.size_requirements

    def unsupported(config: Mapping[str, Any]) -> nn.Module:
        raise CheckpointError(f"{theirs.name} is spandrel's: it is only made from a file")

    return Architecture(
        id=f"spandrel-{theirs.id}",
        system="spandrel",
        title=theirs.name,
        paper=f"see spandrel's documentation of {theirs.id}",
        licence="network: see spandrel; weights: see where the file is from",
        detect=lambda state: False,
        config_from_state_dict=lambda state: {},
        build=unsupported,
        matches_config=lambda config: False,
        tasks=("super-resolution",) if descriptor.purpose == "SR" else (),
        scale=lambda config: descriptor.scale,
        multiple_of=lambda config: size.multiple_of,
        minimum_size=lambda config: max(1, size.minimum),
        restore=lambda module, image: descriptor(image),
        global_statistics="how far this network looks is not known here: tiles overlap by the default amount",
        # What ComfyUI's own upscaling node plans with.
        bytes_per_pixel=lambda config: 4608.0 * max(1, descriptor.scale),
        half=descriptor.supports_half or descriptor.supports_bfloat16,
    )
