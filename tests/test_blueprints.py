"""The subgraph blueprints are up to date and do what the nodes inside them do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from make_blueprints import BLUEPRINTS, FOLDER, OUTSIDE, text
from make_workflow import classes

from comfyui_mend.engine.validation import describe_errors, validate_prompt
from comfyui_mend.engine.workflow_format import to_api

NAMES = sorted(BLUEPRINTS)


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_bytes().decode("ascii"))


def used(name: str) -> dict[str, Any]:
    """A workflow that gives the blueprint a picture for every input and saves every picture that it makes."""
    ui = load(name)
    (instance,) = ui["nodes"]
    slot = {"name": "image", "type": "COMBO", "widget": {"name": "image"}, "link": None}
    picture = {"id": 100, "type": "LoadImage", "inputs": [slot], "outputs": [{"type": "IMAGE"}], "widgets_values": ["palace.jpg"]}  # fmt: skip
    ui["nodes"].append(picture)
    for position, entry in enumerate(instance["inputs"]):
        if "widget" not in entry:
            ui["links"].append([100 + position, 100, 0, instance["id"], position, "IMAGE"])
            entry["link"] = 100 + position
    for position, entry in enumerate(instance["outputs"]):
        kind, wanted = ("SaveImage", "images") if entry["type"] == "IMAGE" else ("PreviewAny", "source")
        end = {"id": 200 + position, "type": kind, "inputs": [{"name": wanted, "type": "*", "link": 200 + position}]}
        ui["nodes"].append({**end, "outputs": [], "widgets_values": ["mend/blueprint"]})
        ui["links"].append([200 + position, instance["id"], position, 200 + position, 0, entry["type"]])
    return ui


def test_the_files_are_what_the_generator_writes():
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)
    for name in NAMES:
        assert (FOLDER / f"{name}.json").read_text(encoding="ascii") == text(name), "run tests/make_blueprints.py"


@pytest.mark.parametrize("name", NAMES)
def test_every_end_of_every_link_is_there(name):
    ui = load(name)
    (instance,), (graph,) = ui["nodes"], ui["definitions"]["subgraphs"]
    assert instance["type"] == graph["id"] and instance["title"] == graph["name"] == name
    links = {link["id"]: link for link in graph["links"]}
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link in links.values():
        if link["origin_id"] in nodes:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        else:
            assert link["id"] in graph["inputs"][link["origin_slot"]]["linkIds"]
        if link["target_id"] in nodes:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
        else:
            assert graph["outputs"][link["target_slot"]]["linkIds"] == [link["id"]]
    assert [i["name"] for i in instance["inputs"]] == [i["name"] for i in graph["inputs"]]
    assert [o["name"] for o in instance["outputs"]] == [o["name"] for o in graph["outputs"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_on_the_graph_is_the_nodes_inside_it(name):
    prompt = to_api(used(name), classes())
    inside = {node_id.split(":")[-1]: node for node_id, node in prompt.items() if ":" in node_id}
    api = BLUEPRINTS[name]["api"]
    assert {node_id: node["class_type"] for node_id, node in inside.items()} == {
        node_id: node["class_type"] for node_id, node in api.items()
    }
    for node_id, node in api.items():
        for key, value in node["inputs"].items():
            got = inside[node_id]["inputs"][key]
            if not isinstance(value, list):
                assert got == value
            else:
                assert got == ["100", 0] if value[0] == OUTSIDE else [got[0].split(":")[-1], got[1]] == value
    _, error, _, node_errors = validate_prompt(prompt, classes())
    assert not error and not node_errors, describe_errors(error, node_errors)
