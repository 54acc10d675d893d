"""Muon for the matrices of a network, AdamW for the rest of it.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); PyTorch's implementation, which takes matrices
only: dense convolutions are handed to it as matrices [out, kernel height x kernel width x in] that share their memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def _is_hidden_matrix(name: str, module: nn.Module, first_and_last: tuple[str, ...]) -> bool:
    dense = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    return dense and not name.startswith(first_and_last) and min(module.weight.shape[:2]) > 1


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a matrix in the same memory; a convolution's must be channels-last or 1x1."""
    matrix = weight.flatten(1) if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)
    if matrix.data_ptr() != weight.data_ptr():
        raise ValueError("Muon needs convolution weights in channels-last memory")
    return matrix


class MuonWithAdamW:
    """An optimiser with the interface the trainer uses: `param_groups`, `step`, `state_dict`, `load_state_dict`.

    `first_and_last`: name prefixes of layers from and to pictures, which stay with AdamW as Muon's authors advise. Muon's
    steps are scaled to AdamW's size ("match_rms_adamw"), so that one learning rate serves both.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        first_and_last: tuple[str, ...],
    ) -> None:
        hidden = {
            id(layer.weight): layer.weight
            for name, layer in module.named_modules()
            if hasattr(layer, "weight") and _is_hidden_matrix(name, layer, first_and_last)
        }
        self.weights = list(hidden.values())
        self.matrices = [nn.Parameter(_as_matrix(weight.data)) for weight in self.weights]
        self.muon = torch.optim.Muon(
            self.matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        others = [p for p in module.parameters() if id(p) not in hidden]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        """One step of both."""
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            if weight.grad is None:
                matrix.grad = None
                continue
            gradient = weight.grad
            if gradient.ndim == 4:
                gradient = gradient.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            matrix.grad = gradient.flatten(1)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
