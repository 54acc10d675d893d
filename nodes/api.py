"""The node API: ComfyUI's own inside it, the built-in twin (`engine/node_api.py`) elsewhere; and the base of our nodes."""

from __future__ import annotations

import functools
import math
from typing import Any

from ..engine import host
from ..errors import InputError

if host.inside_comfyui():
    from comfy_api.latest import ComfyExtension, InputImpl, io, ui
    from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder

    VideoFile = InputImpl.VideoFromFile
else:
    from ..engine.node_api import ComfyExtension, ExecutionBlocker, GraphBuilder, io, ui
    from ..engine.video import VideoFile

__all__ = ["ComfyExtension", "ExecutionBlocker", "GraphBuilder", "Node", "VideoFile", "advanced", "io", "ui"]


class Node(io.ComfyNode):
    """Base class of the pack's nodes: `execute` raises InputError for numbers that are NaN or infinite.

    ComfyUI checks what a widget holds, but not what a wire brings; such a number would end as a black picture.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        execute = cls.execute.__func__
        if execute is io.ComfyNode.execute.__func__ or hasattr(execute, "checks_numbers"):
            return  # abstract; or checked already, as in a subclass and in the clone that ComfyUI makes for each call

        @functools.wraps(execute)
        def checked(cls: type[Node], *args: Any, **values: Any) -> io.NodeOutput:
            for name, value in values.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise InputError(f"{name}: {value} is no finite number; change what is connected to it")
            return execute(cls, *args, **values)

        checked.checks_numbers = True
        cls.execute = classmethod(checked)


def advanced(slot: io.Input) -> io.Input:
    """Marks an input as one for experts: newer pages fold it away, older ones show it like any other."""
    if hasattr(slot, "advanced"):
        slot.advanced = True
    else:
        slot.extra_dict = {**(getattr(slot, "extra_dict", None) or {}), "advanced": True}
    return slot
