"""Workflows of earlier versions, as people saved them, are accepted by today's nodes: ids, inputs, order of widgets, types."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from comfyui_mend.engine.validation import validate_prompt
from comfyui_mend.engine.workflow_format import to_api
from comfyui_mend.nodes.api import io

from .make_workflow import ARCHIVE, archive, classes

FILES = sorted(ARCHIVE.glob("*/*.json"))
KNOWN = classes()
NEEDS_A_FILE = ("there is no file", "there is no model")
"""What nodes say of models that are not shipped: the workflow itself is sound."""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def stand_in(kind: str, names: list[str]) -> type[io.ComfyNode]:
    """A node of ComfyUI's that the built-in engine has no twin of: takes and gives everything."""

    class StandIn(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=kind,
                inputs=[io.AnyType.Input(name, optional=True) for name in names],
                outputs=[io.AnyType.Output(f"output {n}") for n in range(8)],
                is_output_node=True,
            )

        @classmethod
        def execute(cls, **inputs: Any) -> io.NodeOutput:
            raise AssertionError("never run")

    return StandIn


def problems(prompt: dict[str, Any]) -> list[str]:
    """What is wrong with a workflow, missing model files apart."""
    prompt = copy.deepcopy(prompt)
    ours = {node["class_type"] for node in prompt.values() if node["class_type"].startswith("Mend")}
    if ours - set(KNOWN):
        return [f"there is no node {name}" for name in sorted(ours - set(KNOWN))]
    others = {node["class_type"]: list(node["inputs"]) for node in prompt.values() if node["class_type"] not in KNOWN}
    known = {**KNOWN, **{kind: stand_in(kind, names) for kind, names in others.items()}}
    unknown = [
        f"{node['class_type']} has no input {name}"
        for node in prompt.values()
        for name in node["inputs"]
        if not any(name in group for group in known[node["class_type"]].INPUT_TYPES().values())
    ]
    _, error, _, by_node = validate_prompt(prompt, known)
    reasons = [reason for entry in by_node.values() for reason in entry["errors"]]
    if error is not None and not reasons:
        reasons = [error]
    found = [f"{reason['message']}: {reason['details']}" for reason in reasons]
    return unknown + [text for text in found if not any(words in text for words in NEEDS_A_FILE)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_old_workflow_is_accepted_by_todays_nodes(path):
    kept = read(path)
    assert problems(kept["api"]) == []
    if {node["type"] for node in kept["page"]["nodes"]} <= set(KNOWN):  # or ComfyUI itself is needed to read it
        converted = to_api(kept["page"], KNOWN)
        assert problems(converted) == []
        for node_id, node in kept["api"].items():
            assert converted[node_id]["class_type"] == node["class_type"]
            assert converted[node_id]["inputs"].items() >= node["inputs"].items(), node_id


def test_there_is_an_archive_of_every_workflow():
    versions = [folder for folder in ARCHIVE.iterdir() if folder.is_dir()]
    assert versions and all(len(list(folder.glob("*.json"))) >= 30 for folder in versions)


def test_a_node_that_is_renamed_a_lost_input_and_another_type_are_noticed():
    prompt = read(next(path for path in FILES if path.stem == "restore_photo"))["api"]
    [number] = [key for key, node in prompt.items() if node["class_type"] == "MendRestore"]
    assert problems(prompt) == []
    for change in ({"class_type": "MendRestoreAnew"}, {"inputs": {**prompt[number]["inputs"], "tiles": 3}}):
        assert problems({**prompt, number: {**prompt[number], **change}})
    lost = {name: value for name, value in prompt[number]["inputs"].items() if name != "restorer"}
    crossed = {**prompt[number]["inputs"], "restorer": prompt[number]["inputs"]["image"]}
    for inputs in (lost, crossed):
        assert problems({**prompt, number: {**prompt[number], "inputs": inputs}})


def test_an_archive_is_never_written_again():
    with pytest.raises(FileExistsError):
        archive(FILES[0].parent.name)
