"""The built-in twin of `comfy_api.latest`: `ComfyExtension`, `io` and `ui`, as the pack's nodes use them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from . import node_io as io
from . import node_ui as ui
from .graph_builder import GraphBuilder
from .node_io import ExecutionBlocker

__all__ = ["ComfyExtension", "ExecutionBlocker", "GraphBuilder", "io", "ui"]


class ComfyExtension(ABC):
    """A pack of nodes."""

    async def on_load(self) -> None:  # noqa: B027  (optional for the pack)
        """Called once when the pack is loaded."""

    @abstractmethod
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The pack's node classes."""
