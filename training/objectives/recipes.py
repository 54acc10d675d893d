"""The objectives that can be chosen and combined, by name, and what a network is trained with if none is chosen."""

from __future__ import annotations

from torch import nn

from .base import Objective, Weighted
from .dcpt import ClassificationObjective, ClassifierGuidanceObjective
from .denoising import DenoisingObjective
from .pixel import PixelObjective
from .rate_distortion import RateDistortionObjective
from .rcot import TransportObjective
from .routing import RoutingObjective
from .tur import UncertaintyObjective

OBJECTIVES: dict[str, type[Objective]] = {
    made.kind: made
    for made in (
        PixelObjective,
        RoutingObjective,
        UncertaintyObjective,
        ClassificationObjective,
        ClassifierGuidanceObjective,
        TransportObjective,
        RateDistortionObjective,
        DenoisingObjective,
    )
}
"""Every objective by the name that the command line and a file's provenance know it by."""

__all__ = ["OBJECTIVES", "Weighted", *(made.__name__ for made in OBJECTIVES.values())]


def default_objective(network_module: nn.Module, kind: str = "restorer") -> Objective:
    """What a network is fine-tuned with if nothing else is said: its paper's loss as far as that is a plain one."""
    if kind == "codec":
        return RateDistortionObjective()
    if kind == "prior":
        return DenoisingObjective()
    if hasattr(network_module, "balance_loss"):
        return Weighted(((PixelObjective(), 1.0), (RoutingObjective(complexity=False), 0.01)))
    return PixelObjective()
