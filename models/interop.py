"""Teaches spandrel, the model loader of ComfyUI's own upscaling nodes, our networks; only where it is installed.

Then every node built on it takes their files. The other way round is `foreign.from_spandrel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import registry
from .checkpoint import load
from .foreign import PREFIX, spandrel_package
from .registry import Architecture, State
from .restorer import Restorer

# Networks that spandrel has too: (its id, which files ours is asked about before it is). Others come after its own.
_FIRST: Mapping[str, tuple[str, Callable[[State], bool]]] = {
    "uformer": ("Uformer", lambda state: "var_conv.0.weight" in state),  # TUR's head is an unexpected key to it
}


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
    spandrel = spandrel_package()
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
