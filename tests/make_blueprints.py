"""Writes the subgraph blueprints that ComfyUI offers in its node library: `subgraphs/*.json`.

    python tests/make_blueprints.py

A blueprint is a small workflow of one node, an instance of the subgraph that its `definitions` hold. Since late 2025
ComfyUI lists the files of custom nodes' `subgraphs/` folders (`app/subgraph_manager.py`); an older one ignores them, and
takes a file copied to `user/default/subgraphs`. They are read with the system's encoding, so they are plain ASCII.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

try:
    from .make_workflow import ROOT, classes, layout
except ImportError:  # run as a script
    from make_workflow import ROOT, classes, layout

from comfyui_mend.engine.workflow_format import SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS, default_value, widgets

FOLDER = ROOT / "subgraphs"
OUTSIDE = "99"
"""Stands in a graph for the picture that comes from outside."""

BLUEPRINTS: dict[str, dict[str, Any]] = {
    "Restore Photo (Mend)": {
        "api": {
            "1": {"class_type": "MendLoadRestorer", "inputs": {"model_name": "mend-moce-ir-starter.safetensors"}},
            "2": {"class_type": "MendRestore", "inputs": {"restorer": ["1", 0], "image": [OUTSIDE, 0]}},
            "3": {"class_type": "MendRestorationMix", "inputs": {"original": [OUTSIDE, 0], "restored": ["2", 0]}},
        },
        "columns": [["1"], ["2"], ["3"]],
        "inputs": {"image": [("2", "image"), ("3", "original")]},
        "widgets": {"model_name": ("1", "model_name"), "strength": ("3", "strength")},
        "outputs": {"image": ("3", 0)},
    },
    "Compare With Reference (Mend)": {
        "api": {
            "1": {
                "class_type": "MendCompareImages",
                "inputs": {"first": [OUTSIDE, 0], "second": [OUTSIDE, 0], "third": [OUTSIDE, 0], "labels": "before, after, truth"},
            },
            "2": {"class_type": "MendImageMetrics", "inputs": {"image": [OUTSIDE, 0], "reference": [OUTSIDE, 0]}},
        },
        "columns": [["1", "2"]],
        "inputs": {
            "before": [("1", "first")],
            "after": [("1", "second"), ("2", "image")],
            "reference": [("1", "third"), ("2", "reference")],
        },
        "widgets": {"zoom": ("1", "zoom")},
        "outputs": {"comparison": ("1", 0), "metrics": ("2", 0)},
    },
}  # fmt: skip


def blueprint(
    name: str,
    api: Mapping[str, Mapping[str, Any]],
    columns: Sequence[Sequence[str]],
    inputs: Mapping[str, Sequence[tuple[str, str]]],
    widgets: Mapping[str, tuple[str, str]],
    outputs: Mapping[str, tuple[str, int]],
) -> dict[str, Any]:
    """The file of a blueprint. `inputs` and `widgets` say which inputs inside a wire or a value from outside feeds."""
    known = classes()
    complete = {OUTSIDE: {"class_type": "LoadImage", "inputs": {"image": ""}}}
    for node_id, node in api.items():
        complete[node_id] = {**node, "inputs": {**_defaults(known[node["class_type"]]), **node["inputs"]}}
    inside = layout(name, complete, [*columns, [OUTSIDE]])
    nodes = {str(node["id"]): node for node in inside["nodes"] if str(node["id"]) != OUTSIDE}
    links = [link for link in inside["links"] if str(link[1]) != OUTSIDE]
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values())

    exposed, instance_inputs, values = [], [], []
    for entry, targets in [*inputs.items(), *((key, [target]) for key, target in widgets.items())]:
        position, ids = len(exposed), []
        for node_id, input_name in targets:
            slots = nodes[node_id]["inputs"]
            slot = next(index for index, s in enumerate(slots) if s["name"] == input_name)
            kind = slots[slot]["type"] if isinstance(slots[slot]["type"], str) else "COMBO"
            ids.append(_next_link(links, SUBGRAPH_INPUTS, position, int(node_id), slot, kind))
            slots[slot]["link"] = ids[-1]
        kind = links[-1][5]
        exposed.append(
            {"id": _uuid(name, f"in {entry}"), "name": entry, "type": kind, "linkIds": ids, "pos": [-60, 20 * position]}
        )
        instance_inputs.append({"name": entry, "type": kind, "link": None})
        if entry in widgets:
            instance_inputs[-1]["widget"] = {"name": entry}
            values.append(complete[targets[0][0]]["inputs"][targets[0][1]])
    results = []
    for position, (entry, (node_id, output)) in enumerate(outputs.items()):
        source = nodes[node_id]["outputs"][output]
        link = _next_link(links, int(node_id), output, SUBGRAPH_OUTPUTS, position, source["type"])
        source["links"] = [*(source["links"] or []), link]
        results.append(
            {
                "id": _uuid(name, f"out {entry}"),
                "name": entry,
                "type": source["type"],
                "linkIds": [link],
                "pos": [right + 80, 20 * position],
            }
        )
    kept = {link[0] for link in links}
    for node in nodes.values():
        for slot in node["inputs"]:
            slot["link"] = slot["link"] if slot["link"] in kept else None

    last = max(int(node_id) for node_id in nodes)
    subgraph = {
        "id": _uuid(name, "definition"), "version": 1, "revision": 0, "name": name, "config": {}, "widgets": [],
        "state": {"lastGroupId": 0, "lastNodeId": last, "lastLinkId": max(kept), "lastRerouteId": 0},
        "inputNode": {"id": SUBGRAPH_INPUTS, "bounding": [-200, -20, 140, 40 + 20 * len(exposed)]},
        "outputNode": {"id": SUBGRAPH_OUTPUTS, "bounding": [right + 60, -20, 140, 40 + 20 * len(results)]},
        "inputs": exposed, "outputs": results, "nodes": list(nodes.values()), "groups": [], "extra": {},
        "links": [
            dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
            for link in links
        ],
    }  # fmt: skip
    instance = {
        "id": last + 1, "type": subgraph["id"], "pos": [0, 0], "size": [320, 60 + 24 * len(exposed)], "flags": {}, "order": 0,
        "mode": 0, "title": name, "inputs": instance_inputs,
        "outputs": [{"name": entry["name"], "type": entry["type"], "links": None} for entry in results],
        "properties": {"cnr_id": "comfyui-mend"}, "widgets_values": values,
    }  # fmt: skip
    return {
        "id": _uuid(name, "file"), "revision": 0, "last_node_id": last + 1, "last_link_id": 0, "nodes": [instance],
        "links": [], "groups": [], "definitions": {"subgraphs": [subgraph]}, "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def _defaults(node_class: Any) -> dict[str, Any]:
    return {widget.name: default_value(widget) for widget in widgets(node_class) if widget.name is not None}


def _next_link(links: list[list], *ends: Any) -> int:
    links.append([max((link[0] for link in links), default=0) + 1, *ends])
    return links[-1][0]


def _uuid(name: str, part: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-mend/subgraphs/{name}/{part}"))


def text(name: str) -> str:
    """What the file of a blueprint holds."""
    return json.dumps(blueprint(name, **BLUEPRINTS[name]), indent=2) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in BLUEPRINTS:
        (FOLDER / f"{each}.json").write_text(text(each), encoding="ascii")
