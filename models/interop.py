"""Give and take with spandrel, the model loader of ComfyUI's own upscaling nodes; only where it is installed.

`register_with_spandrel` teaches it our networks, so that every node built on it takes their files. `from_spandrel` is
the other way: a file that no network here recognises, but spandrel does, becomes a restorer like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from . import registry
from .registry import Architecture, State
from .restorer import Restorer

logger = logging.getLogger(__name__)

PREFIX = "mend-"
"""Of our architectures' ids in spandrel, so that they cannot clash with its own, present or future."""

# Networks that spandrel has too: (its id, which files ours is asked about before it is). Others come after its own.
_FIRST: Mapping[str, tuple[str, Callable[[State], bool]]] = {
    "uformer": ("Uformer", lambda state: "var_conv.0.weight" in state),  # TUR's head is an unexpected key to it
}


@lru_cache(maxsize=1)
def _spandrel() -> Any | None:
    """The package, or None where it is missing or cannot be imported (it needs torchvision)."""
    try:
        import spandrel
    except ImportError:
        return None
    except (RuntimeError, OSError, AttributeError) as error:  # a torchvision that does not fit its torch
        logger.warning("spandrel is installed but does not import (%s): its networks are not available", error)
        return None
    return spandrel


class _Network(nn.Module):
    """A restorer as the plain module that spandrel's descriptors hold: [B, C, H, W] of any size -> image."""

    def __init__(self, restorer: Restorer) -> None:
        super().__init__()
        self.network = restorer.module
        self._restorer = restorer

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self._restorer(image)


def _recognises(architecture: Architecture, state: Mapping[str, Any]) -> bool:
    try:
        prepare = architecture.prepare_state_dict
        return architecture.detect(dict(state) if prepare is None else prepare(dict(state)))
    except Exception:  # asked about any file in the world; a detector's surprise must not stop other loaders
        return False


def register_with_spandrel() -> list[str]:
    """Adds every image-to-image network of ours to spandrel's registry; returns the ids added, [] without spandrel.

    Idempotent. Files load by names and shapes alone there: what only a safetensors file's metadata says (see
    `Architecture.metadata_keys`) takes its default.
    """
    spandrel = _spandrel()
    if spandrel is None:
        return []
    supports = []
    for architecture in registry.architectures():
        if architecture.kind == "restorer":
            before, _ = _FIRST.get(architecture.id, ("", None))
            supports.append(
                spandrel.ArchSupport.from_architecture(
                    _spandrel_architecture(spandrel, architecture), before=(before,) if before else ()
                )
            )
    added = spandrel.MAIN_REGISTRY.add(*supports, ignore_duplicates=True)
    return [support.architecture.id for support in added]


def _spandrel_architecture(spandrel: Any, architecture: Architecture) -> Any:
    _, wanted = _FIRST.get(architecture.id, ("", None))

    class Ours(spandrel.Architecture):
        def __init__(self) -> None:
            super().__init__(
                id=PREFIX + architecture.id,
                name=architecture.title,
                detect=lambda state: (wanted is None or wanted(state)) and _recognises(architecture, state),
            )

        def load(self, state_dict: dict[str, Any]) -> Any:
            return _descriptor(spandrel, self, state_dict, architecture.id)

    return Ours()


def _descriptor(spandrel: Any, theirs: Any, state: Mapping[str, Any], architecture_id: str) -> Any:
    from .checkpoint import load

    restorer = load({k: v for k, v in state.items() if isinstance(v, torch.Tensor)}, system=architecture_id)
    channels = restorer.config.get("inp_channels", restorer.config.get("in_chans", 3))
    local = restorer.architecture.receptive_field(restorer.config) is not None
    network = _Network(restorer)
    return spandrel.ImageModelDescriptor(
        network,
        network.state_dict(),
        architecture=theirs,
        purpose="SR" if restorer.scale > 1 else "Restoration",
        tags=[],
        # Half precision is used through autocast here; weights in half precision are not tested for every network.
        supports_half=False,
        supports_bfloat16=False,
        scale=restorer.scale,
        input_channels=channels,
        output_channels=channels,
        size_requirements=spandrel.SizeRequirements(
            minimum=restorer.minimum_size if restorer.minimum_size > 1 else 0, multiple_of=restorer.multiple_of
        ),
        tiling=spandrel.ModelTiling.SUPPORTED if local else spandrel.ModelTiling.DISCOURAGED,
    )


def from_spandrel(state: State, source: str = "") -> Restorer | None:
    """A restorer for a state dict that spandrel recognises; None if it does not, or is not installed.

    Its results are clamped to 0..1 and carry no gradients. Raises CheckpointError for a file that it recognises but
    cannot load, or that is no image-to-image network.
    """
    spandrel = _spandrel()
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
