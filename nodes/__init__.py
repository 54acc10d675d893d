"""The graph faces: ComfyUI V3 nodes, a file per family; each family's last lines list its nodes in `NODES`."""

from __future__ import annotations

import importlib

from ..engine import host
from ..models import interop
from .api import ComfyExtension, Node

# The order is the order of the node menu.
FAMILIES: tuple[str, ...] = (
    "restore",
    "routing",
    "inspect",
    "vlu",
    "residual",
    "weather",
    "classify",
    "degrade",
    "gendeg",
    "synthesis",
    "features",
    "local_pooling",
    "state_space",
    "uncertainty",
    "regions",
    "ensemble",
    "input_range",
    "colour",
    "video",
    "steady",
    "faces",
    "osdface",
    "face_identity",
    "codec",
    "operators",
    "measurements",
    "guidance",
    "zero_shot_samplers",
    "datasets",
    "objectives",
    "train",
)


def node_classes() -> list[type[Node]]:
    """Every node class of the pack."""
    return [node for family in FAMILIES for node in importlib.import_module(f".{family}", __package__).NODES]


class MendExtension(ComfyExtension):
    """What ComfyUI's entry point returns."""

    async def get_node_list(self) -> list[type[Node]]:
        if host.inside_comfyui():  # so that its own Load Upscale Model takes our networks' files
            interop.register_with_spandrel()
        return node_classes()
