"""Every shipped workflow is well formed and runs, in the built-in engine and in a real ComfyUI, to the same pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from comfyui_mend import models
from comfyui_mend.engine import folders
from comfyui_mend.engine.node_api import GraphBuilder, io
from comfyui_mend.engine.runner import Runner
from comfyui_mend.engine.validation import validate_prompt
from comfyui_mend.engine.video import VIDEO_SUFFIXES
from comfyui_mend.engine.workflow_format import DRAWN_ONLY, read, to_api, widgets

from .comfyui_process import run_script
from .engine_cases import CASES, Nodes, observe
from .make_workflow import WORKFLOWS, classes, cramped, missing_models, overlaps, plain

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
CLASSES = classes()
SAME = 2 / 255
"""Two engines run the same code; saved pictures may differ by rounding."""
KEEPS_FREED_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(1 << 30))
"""glibc asks the system anew for every large tensor otherwise, which is a tenth of the time these workflows take."""
FORBIDDEN_NULLS = ("slot_index", "floatingLinks", "definitions", "reroutes", "localized_name", "shape")


def ui_file(name: str) -> dict[str, Any]:
    return read(WORKFLOWS / f"{name}.json")


def api_file(name: str) -> dict[str, Any]:
    return read(WORKFLOWS / "api" / f"{name}.json")


def skip_unless_runnable(name: str) -> None:
    """Skips a workflow that needs files nobody ships: those its loader nodes link to."""
    if missing := missing_models(ui_file(name)):
        pytest.skip(f"needs {', '.join(missing)} in the models folder")


def skip_without_nodes(name: str) -> None:
    missing = {node["class_type"] for node in api_file(name).values()} - set(CLASSES)
    if missing:
        pytest.skip(f"needs ComfyUI for {', '.join(sorted(missing))}")


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_page_form_converts_to_its_twin(name):
    skip_without_nodes(name)
    assert plain(to_api(ui_file(name), CLASSES)) == plain(api_file(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_has_a_thumbnail_titled_groups_and_no_overlaps(name):
    ui = ui_file(name)
    with Image.open(WORKFLOWS / f"{name}.jpg") as thumbnail:
        assert min(thumbnail.size) >= 64 and max(thumbnail.size) <= 1024
    assert overlaps(ui) + cramped(ui) == []
    assert ui["groups"] and all(group["title"].strip() for group in ui["groups"])
    assert any(node["type"] in DRAWN_ONLY for node in ui["nodes"]), "a note says what to do"


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_fits_the_schema_of_the_page(name):
    ui = ui_file(name)
    assert ui["version"] == 0.4 and ui["last_node_id"] >= max(node["id"] for node in ui["nodes"])

    def nulls(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [k for k, v in value.items() if v is None and k in FORBIDDEN_NULLS] + sum(
                map(nulls, value.values()), []
            )
        return sum(map(nulls, value), []) if isinstance(value, list) else []

    assert nulls(ui) == []
    by_id = {node["id"]: node for node in ui["nodes"]}
    for link_id, source, output, target, position, _ in ui["links"]:
        assert link_id in by_id[source]["outputs"][output]["links"]
        assert by_id[target]["inputs"][position]["link"] == link_id
    for node in ui["nodes"]:
        if node["type"] in CLASSES:
            expected = widgets(CLASSES[node["type"]])
            assert len(node["widgets_values"]) in (len(expected), len(expected) + (node["type"] == "PreviewAny"))
            controls = [v for w, v in zip(expected, node["widgets_values"], strict=False) if w.type == "CONTROL"]
            assert set(controls) <= {"fixed"}, "a shipped workflow gives the same picture every time"


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_uses_only_core_nodes_ours_and_shipped_pictures(name):
    for node in api_file(name).values():
        if node["class_type"] in ("LoadImage", "LoadImageMask"):
            assert (folders.SHIPPED_INPUTS / node["inputs"]["image"]).is_file()
    for node in ui_file(name)["nodes"]:
        assert node["type"] in DRAWN_ONLY or node["properties"]["cnr_id"] in ("comfyui-mend", "comfy-core")


def test_every_workflow_has_both_forms():
    assert sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")) == NAMES


# The built-in engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    """Runs a workflow once in the built-in engine and keeps the result for the comparison."""
    place, done = tmp_path_factory.mktemp("builtin"), {}

    def run(name: str):
        folders.set_folders(inputs=[], output=place, temp=place / "temp")
        if name not in done:
            done[name] = Runner(CLASSES).run(api_file(name))
        return done[name]

    return run


def saved(result: Any) -> dict[str, list[Path]]:
    """The pictures that a built-in run wrote, by node."""
    homes = {"output": folders.output_directory(), "temp": folders.temp_directory()}
    return {
        node_id: [homes[e["type"]] / e["subfolder"] / e["filename"] for e in shown["images"]]
        for node_id, shown in result.outputs.items()
        if "images" in shown and not _are_videos(e["filename"] for e in shown["images"])
    }


def _are_videos(names: Iterable[str]) -> bool:
    """The page shows videos under the same key as pictures."""
    return any(Path(name).suffix in VIDEO_SUFFIXES for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_to_the_end_in_the_built_in_engine(name, builtin):
    skip_without_nodes(name), skip_unless_runnable(name)
    result = builtin(name)
    assert result.complete, result.describe()
    for files in saved(result).values():
        for file in files:
            with Image.open(file) as picture:
                assert np.asarray(picture).std() > 0, f"{file.name} is empty"


# A real ComfyUI ------------------------------------------------------------------------------------------------------

BAD_PROMPTS: dict[str, dict[str, Any]] = {
    "unknown node": {"1": {"class_type": "Nowhere", "inputs": {}}},
    "no class": {"1": {"inputs": {}}},
    "no outputs": {"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}},
    "missing input": {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    },
    "too small": {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 0, "height": 99999, "batch_size": "two", "color": 0}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    },
    "wrong type": {
        "1": {"class_type": "SolidMask", "inputs": {"value": "0.5", "width": 8.9, "height": 8}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    },
    "not in list": {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "ImageScaleBy", "inputs": {"image": ["1", 0], "upscale_method": "magic", "scale_by": 2}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    },
    "no such file": {
        "1": {"class_type": "LoadImage", "inputs": {"image": "nowhere.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    },
    "bad link": {"2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0, 0]}}},
    "no such node": {"2": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}}},
    "checked by the node": {
        "1": {"class_type": "MendLoadRestorer", "inputs": {"model_name": "mend-moce-ir-starter.safetensors"}},
        "2": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "3": {
            "class_type": "MendRestore",
            "inputs": {"restorer": ["1", 0], "image": ["2", 0], "tile": 0, "overlap": -1, "precision": "fp8"},
        },
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    },
    "one good": {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "3": {"class_type": "PreviewImage", "inputs": {}},
    },
}


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    """What one process of a real ComfyUI says to all workflows and bad prompts."""
    place = tmp_path_factory.mktemp("comfyui")
    runnable = [name for name in NAMES if not missing_models(ui_file(name))]
    job = {
        "workflows": {name: plain(api_file(name)) for name in runnable},
        "prompts": BAD_PROMPTS,
        "input": str(folders.SHIPPED_INPUTS),
        "output": str(place / "output"),
    }
    (place / "job.json").write_text(json.dumps(job))
    run_script("in_comfyui.py", place / "job.json", place / "result.json", place=place, **KEEPS_FREED_MEMORY)
    return {**json.loads((place / "result.json").read_text()), "output": place / "output"}


@pytest.mark.comfyui
def test_comfyui_lists_every_node_as_the_built_in_engine_does_and_warns_of_nothing(comfyui):
    ours = {name: node for name, node in CLASSES.items() if name.startswith("Mend")}
    assert sorted(comfyui["nodes"]) == sorted(ours)
    for name, node in ours.items():
        info = json.loads(json.dumps(node.GET_NODE_INFO_V1()))
        listed = comfyui["nodes"][name]
        for key in (
            "input_order",
            "output",
            "output_name",
            "output_is_list",
            "output_node",
            "category",
            "display_name",
        ):
            assert listed[key] == info[key], f"{name}: {key}"
        for group in ("required", "optional"):
            for slot, (kind, options) in info["input"].get(group, {}).items():
                theirs = listed["input"][group][slot]
                shared = {k: v for k, v in theirs[1].items() if k in options and k != "options"}
                assert theirs[0] == kind and shared == {k: v for k, v in options.items() if k != "options"}, slot
    assert [line for line in comfyui["load_log"] if "mend" in line.lower() and "IMPORT FAILED" not in line] == []


@pytest.mark.comfyui
@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_both_engines_refuse_a_bad_prompt_in_the_same_words(name, comfyui):
    valid, error, good, node_errors = validate_prompt(json.loads(json.dumps(BAD_PROMPTS[name])), CLASSES)
    theirs = comfyui["prompts"][name]

    def words(error: dict[str, Any] | None) -> Any:
        return error and (error["type"], error["message"], sorted(error["details"].splitlines()))

    assert (valid, words(error), good) == (theirs["valid"], words(theirs["error"]), theirs["good"])
    assert sorted(node_errors) == sorted(theirs["node_errors"])
    for node_id, entry in node_errors.items():
        assert entry["dependent_outputs"] == theirs["node_errors"][node_id]["dependent_outputs"]
        ours_words = sorted(str(words(e)) for e in entry["errors"])
        assert ours_words == sorted(str(words(e)) for e in theirs["node_errors"][node_id]["errors"])


@pytest.mark.comfyui
@pytest.mark.parametrize("name", CASES)
def test_both_engines_run_a_workflow_in_the_same_way(name, comfyui):
    nodes = Nodes(io, GraphBuilder)
    runner = Runner(nodes.classes)
    ours = [observe(nodes, runner.run(prompt)) for prompt in CASES[name]]
    assert json.loads(json.dumps(ours)) == comfyui["cases"][name]


@pytest.mark.comfyui
@pytest.mark.parametrize("state", ["NORMAL_VRAM", "LOW_VRAM", "NO_VRAM"])
def test_a_network_lies_whole_on_the_card_however_comfyui_saves_memory(comfyui, state):
    assert comfyui["places"][state] == comfyui["places"][f"{state}, as a MODEL"] == ["meta"]
    assert comfyui["places"][f"{state}, cloned"] == ["Whole"]


@pytest.mark.comfyui
@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_gives_the_same_pictures_and_texts_in_comfyui(name, builtin, comfyui):
    skip_unless_runnable(name)
    theirs = comfyui["workflows"][name]
    assert theirs["complete"], theirs["problem"]
    assert theirs["log"] == []
    skip_without_nodes(name)
    ours = saved(builtin(name))
    pictures = {node_id: files for node_id, files in theirs["images"].items() if files and not _are_videos(files)}
    assert sorted(ours) == sorted(pictures)
    for node_id, files in ours.items():
        assert len(files) == len(pictures[node_id])
        for mine, other in zip(files, pictures[node_id], strict=True):
            a, b = (np.asarray(Image.open(f)).astype(np.float32) / 255 for f in (mine, other))
            assert a.shape == b.shape and np.abs(a - b).max() <= SAME, (
                f"node {node_id}: {np.abs(a - b).max() * 255:.1f}"
            )


@pytest.mark.comfyui
def test_comfyui_trains_saves_and_then_runs_other_workflows(comfyui):
    theirs = list(comfyui["workflows"])
    after = theirs[theirs.index("fine_tune_own_photos") + 1 :]
    assert after and all(comfyui["workflows"][name]["complete"] for name in after)
    assert any(
        "->" in text for texts in comfyui["workflows"]["fine_tune_own_photos"]["texts"].values() for text in texts
    )
    (saved_file,) = (comfyui["output"] / "restoration").glob("own-photos*.safetensors")
    assert models.load(saved_file).architecture.id == "moce-ir"
