"""The two forms of a workflow file: what the page saves (UI format 0.4) and what the engine runs (API format).

API: {id: {"class_type": ..., "inputs": {name: constant | [id, output]}, "_meta": {"title": ...}}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import WorkflowError
from .graph_builder import is_link
from .node_io import ComfyNode
from .validation import NodeClasses, Prompt

WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
SEED_NAMES = frozenset({"seed", "noise_seed"})
DRAWN_ONLY = frozenset({"Note", "MarkdownNote"})
"""Node types of the page that stand for nothing."""
MUTED, BYPASSED = 2, 4
SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS = -10, -20
"""Ids of the two nodes inside a subgraph that stand for its own inputs and outputs."""


@dataclass(frozen=True)
class Widget:
    """One entry of `widgets_values`. `name` is None for those that the page keeps for itself: what a seed does after
    each run, and an upload button."""

    name: str | None
    type: str
    options: Mapping[str, Any]


def is_widget(kind: Any, options: Mapping[str, Any]) -> bool:
    """True if an input of this type is typed on the node rather than only connected."""
    return options.get("widgetType", kind) in WIDGET_TYPES and not options.get("forceInput")


def widgets(node_class: type[ComfyNode]) -> list[Widget]:
    """What `widgets_values` of a node holds, in order. Takes ComfyUI's older kind of node class as well."""
    found: list[Widget] = []
    types = node_class.INPUT_TYPES()
    for group in ("required", "optional"):
        upload = False
        for name, (kind, *more) in types.get(group, {}).items():
            options = more[0] if more else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {"options": kind, **options}
            if not is_widget(kind, options):
                continue
            found.append(Widget(name, kind, options))
            if options.get("control_after_generate") or (kind == "INT" and name in SEED_NAMES):
                found.append(Widget(None, "CONTROL", {"default": "fixed"}))
            upload = upload or bool(options.get("image_upload"))
        if upload:  # the button is the last of the required inputs, wherever the file's name stands
            found.append(Widget(None, "UPLOAD", {"default": "image"}))
    return found


def default_value(widget: Widget) -> Any:
    """What the page puts into a widget at first."""
    if "default" in widget.options:
        return widget.options["default"]
    if widget.type == "COMBO":
        return next(iter(widget.options.get("options") or []), "")
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(widget.type, "")


def read(path: str | Path) -> dict[str, Any]:
    """The workflow in a JSON file, either format. Raises WorkflowError."""
    try:
        workflow = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise WorkflowError(f"there is no workflow file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WorkflowError(f"{path} cannot be read as a workflow: {error}") from error
    if not is_ui(workflow) and not is_api(workflow):
        raise WorkflowError(f"{path} is JSON, but neither a saved workflow nor one in the API format")
    return workflow


def is_ui(workflow: Any) -> bool:
    """True for what the page saves."""
    return isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list)


def is_api(workflow: Any) -> bool:
    """True for what the engine runs."""
    return (
        isinstance(workflow, dict)
        and bool(workflow)
        and all(isinstance(node, dict) and "class_type" in node for node in workflow.values())
    )


def to_api(workflow: Mapping[str, Any], classes: NodeClasses) -> Prompt:
    """A saved workflow in the API format, as the page would send it; one in the API format comes back as it is.

    Muted nodes and what only they feed are left out, bypassed ones pass on the first input of the output's type,
    reroutes, primitives and subgraphs are resolved, notes dropped. Raises WorkflowError for node types that do not
    exist here, and for a file that is damaged.
    """
    if is_ui(workflow):
        try:
            return _converted(workflow, classes)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise WorkflowError(f"the workflow is damaged ({what}): save it again, or take an older copy") from error
    for node_id, node in workflow.items():
        if not isinstance(node.get("class_type", ""), str) or not isinstance(node.get("inputs", {}), dict):
            raise WorkflowError(f"the workflow is damaged: node {node_id!r} has no readable class_type or inputs")
    return dict(workflow)


def _converted(workflow: Mapping[str, Any], classes: NodeClasses) -> Prompt:
    graph = _Flat.of(workflow)
    prompt: Prompt = {}
    for node_id, node in graph.nodes.items():
        kind = node["type"]
        if kind in DRAWN_ONLY or kind in ("Reroute", "PrimitiveNode") or node.get("mode") in (MUTED, BYPASSED):
            continue
        if kind not in classes:
            raise WorkflowError(
                f"the workflow has a node of type {kind!r} (#{node_id}), which the built-in engine does not have; if it is "
                "ComfyUI's, run the workflow in ComfyUI (mend run --engine comfyui)"
            )
        inputs = _constants(node, classes[kind])
        for position, slot in enumerate(node.get("inputs") or []):
            if slot.get("link") is None:
                continue
            source = graph.source(node_id, position)
            if source is None:
                if slot.get("widget") is None:
                    inputs.pop(slot["name"], None)
            else:
                inputs[slot["name"]] = source.value if isinstance(source, _Value) else source
        prompt[node_id] = {"class_type": kind, "inputs": inputs, "_meta": {"title": node.get("title") or kind}}
    for node in prompt.values():  # what comes from a node that is not there
        for name in [n for n, v in node["inputs"].items() if is_link(v) and v[0] not in prompt]:
            del node["inputs"][name]
    return prompt


def _constants(node: Mapping[str, Any], node_class: type[ComfyNode]) -> dict[str, Any]:
    stored = node.get("widgets_values") or []
    inputs: dict[str, Any] = {}
    for position, widget in enumerate(widgets(node_class)):
        if widget.name is None:
            continue
        if isinstance(stored, Mapping):
            value = stored.get(widget.name, default_value(widget))
        else:
            value = stored[position] if position < len(stored) else default_value(widget)
        inputs[widget.name] = {"__value__": value} if isinstance(value, list) else value
    return inputs


@dataclass(frozen=True)
class _Value:
    """What a PrimitiveNode of the page stands for."""

    value: Any


@dataclass
class _Flat:
    """A saved workflow with its subgraphs opened: nodes by id, and where the wire at each input starts."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    wires: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, workflow: Mapping[str, Any]) -> _Flat:
        flat = cls()
        definitions = (workflow.get("definitions") or {}).get("subgraphs") or []
        flat._add(workflow, "", {d["id"]: d for d in definitions}, ())
        return flat

    def _add(
        self, graph: Mapping[str, Any], prefix: str, subgraphs: Mapping[str, Any], inside: tuple[str, ...]
    ) -> None:
        """Adds a graph's nodes, their ids after `prefix`. A subgraph's inputs and outputs become reroutes."""
        for node in graph["nodes"]:
            node_id, definition = f"{prefix}{node['id']}", subgraphs.get(node["type"])
            self.nodes[node_id] = node
            if definition is None or node.get("mode") in (MUTED, BYPASSED):
                continue
            if node["type"] in inside:
                raise WorkflowError(f"the subgraph {definition.get('name', node['type'])!r} contains itself")
            del self.nodes[node_id]
            names = [slot["name"] for slot in definition.get("inputs") or []]
            for position, slot in enumerate(node.get("inputs") or []):
                if slot["name"] in names:  # a wire to the instance goes on inside
                    reroute = (f"{node_id}:in", names.index(slot["name"]))
                    self.wires[reroute] = (node_id, -1 - position)
            self._add(definition, f"{node_id}:", subgraphs, (*inside, node["type"]))
        for link in graph.get("links") or []:
            origin, origin_slot, target, target_slot = _ends(link)
            start = (f"{prefix}{origin}", origin_slot)
            end = (f"{prefix}{target}", target_slot)
            if origin == SUBGRAPH_INPUTS:
                start = (f"{prefix[:-1]}:in", origin_slot)
            if target == SUBGRAPH_OUTPUTS:
                end = (f"{prefix[:-1]}:out", target_slot)
            self.wires[end] = start

    def source(self, node_id: str, position: int) -> list | _Value | None:
        """Where the wire at an input starts: [id, output], a constant, or None if nothing is left of it."""
        place = (node_id, position)
        for _ in range(10_000):
            if place not in self.wires:
                return None
            origin, slot = self.wires[place]
            if slot < 0:  # from inside a subgraph out to the wire at its instance
                place = (origin, -1 - slot)
                continue
            if origin.endswith(":in"):
                place = (origin, slot)
                continue
            node = self.nodes.get(origin)
            if node is None:  # an opened subgraph
                place = (f"{origin}:out", slot)
            elif node["type"] == "Reroute":
                place = (origin, 0)
            elif node["type"] == "PrimitiveNode":
                return _Value((node.get("widgets_values") or [None])[0])
            elif node.get("mode") == MUTED:
                return None
            elif node.get("mode") == BYPASSED:
                through = _bypass(node, slot)
                if through is None:
                    return None
                place = (origin, through)
            else:
                return [origin, slot]
        raise WorkflowError(f"the wires that lead to node {node_id} run in a circle of reroutes")


def _ends(link: Any) -> tuple[int, int, int, int]:
    if isinstance(link, Mapping):
        return link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"]
    return link[1], link[2], link[3], link[4]


def _bypass(node: Mapping[str, Any], output: int) -> int | None:
    """The input whose wire goes on through a bypassed node: the one beside the output, or the first of its type."""
    inputs, kind = node.get("inputs") or [], node["outputs"][output]["type"]
    if output < len(inputs) and inputs[output]["type"] == kind:
        return output
    exact = (position for position, slot in enumerate(inputs) if slot["type"] == kind)
    wild = (position for position, slot in enumerate(inputs) if "*" in (slot["type"], kind))
    return next(exact, next(wild, None))
