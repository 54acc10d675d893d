"""The node API: ComfyUI's own inside it, the built-in twin (`engine/node_api.py`) elsewhere."""

from __future__ import annotations

from ..engine import host

if host.inside_comfyui():
    from comfy_api.latest import ComfyExtension, InputImpl, io, ui
    from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder

    VideoFile = InputImpl.VideoFromFile
else:
    from ..engine.node_api import ComfyExtension, ExecutionBlocker, GraphBuilder, io, ui
    from ..engine.video import VideoFile

__all__ = ["ComfyExtension", "ExecutionBlocker", "GraphBuilder", "VideoFile", "advanced", "io", "ui"]


def advanced(slot: io.Input) -> io.Input:
    """Marks an input as one for experts: newer pages fold it away, older ones show it like any other."""
    if hasattr(slot, "advanced"):
        slot.advanced = True
    else:
        slot.extra_dict = {**(getattr(slot, "extra_dict", None) or {}), "advanced": True}
    return slot
