"""Beginning with weights that were trained before, also where the new network is deeper."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import CheckpointError


@torch.no_grad()
def begin_with(module: nn.Module, state: Mapping[str, torch.Tensor], closing: str | None = None) -> list[str]:
    """Loads the weights of a network of the same kind and widths, which may have fewer blocks, into `module`.

    New blocks are residual: with their last layers, those called `closing`, at zero they change nothing, and training
    goes on from what the shallower network had learned (Net2DeeperNet; Chen et al., ICLR 2016). closing None: `module`
    must not be deeper. Returns the names of the parameters that `state` lacks. Raises CheckpointError where the two
    differ in another way.
    """
    own = module.state_dict()
    added = [name for name in own if name not in state]
    strange = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    layers = {name.rpartition(".")[0] for name in added}
    silent = {layer for layer in layers if closing and layer.rpartition(".")[2] == closing}
    if strange or (added and not silent):
        named = ", ".join((strange or added)[:3])
        raise CheckpointError(f"these weights are of a network that this one does not continue; they differ in {named}")
    module.load_state_dict(state, strict=False)
    for layer in silent:
        for parameter in module.get_submodule(layer).parameters():
            parameter.zero_()
    return added
