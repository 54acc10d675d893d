"""Checks that many nodes share."""

from __future__ import annotations

import inspect
import os

import pytest
import torch

from comfyui_mend.engine import folders
from comfyui_mend.errors import InputError
from comfyui_mend.nodes import node_classes
from comfyui_mend.nodes.inputs import PRECISIONS, ModelFile, accepted, first_problem, one_of

NODES = node_classes()


def test_a_choice_is_checked_unless_a_wire_brings_it():
    assert one_of("mode", "a", ["a", "b"]) is True
    assert one_of("mode", None, ["a", "b"]) is True
    assert one_of("mode", "c", {"a": 1, "b": 2}) == "mode: 'c' is not one of a, b; choose one of these"


def test_of_several_checks_the_first_problem_is_told():
    assert first_problem(accepted(int, "1"), accepted(int, None)) is True
    assert (
        first_problem(True, accepted(int, "a"), one_of("mode", "c", ["a"]))
        == "invalid literal for int() with base 10: 'a'"
    )


@pytest.mark.parametrize("node", [n for n in NODES if issubclass(n, ModelFile)])
def test_a_loader_says_before_the_run_that_a_file_is_missing_and_notices_a_changed_one(node, tmp_path, monkeypatch):
    monkeypatch.setenv("MEND_MODELS", str(tmp_path))
    assert "there is no file 'gone.safetensors'" in node.validate_inputs("gone.safetensors")
    file = tmp_path / "here.safetensors"
    file.write_bytes(b"1")
    assert node.validate_inputs("here.safetensors") is True
    first = node.fingerprint_inputs("here.safetensors")
    assert first == node.fingerprint_inputs("here.safetensors")
    os.utime(file, ns=(0, 0))
    assert first != node.fingerprint_inputs("here.safetensors")


def test_every_node_with_a_precision_or_a_model_file_checks_it():
    for node in NODES:
        inputs = {i.id: i for i in node.GET_SCHEMA().inputs or []}
        checked = inspect.signature(node.validate_inputs).parameters
        if "model_name" in inputs:
            assert "model_name" in checked and "fingerprint_inputs" in {k for c in node.__mro__ for k in vars(c)}, node
        elif "precision" in inputs:
            assert "precision" in checked and set(inputs["precision"].options) <= set(PRECISIONS), node


LINKED = [
    n for n in NODES if "fingerprint_inputs" in {k for c in n.__mro__ for k in vars(c) if c.__name__ != "ComfyNode"}
]


@pytest.mark.parametrize("node", LINKED, ids=[n.__name__ for n in LINKED])
def test_a_linked_input_gives_a_fingerprint_that_stays(node):
    """ComfyUI passes None for it; an error, or another value each time, would run the node and all below every time."""
    inputs = {i.id: None for i in node.GET_SCHEMA().inputs or []}
    first = node.fingerprint_inputs(**inputs)
    assert isinstance(first, str) and first == node.fingerprint_inputs(**inputs)


def test_a_data_set_is_made_again_when_photographs_were_added_and_only_then(tmp_path, monkeypatch):
    node = {n.GET_SCHEMA().node_id: n for n in NODES}["MendMakeDataset"]
    monkeypatch.setattr(folders, "output_directory", lambda: tmp_path / "photos")  # results lie below the photographs
    pairs = tmp_path / "photos" / "datasets" / "mine"
    pairs.mkdir(parents=True)
    first = node.fingerprint_inputs(photos=str(tmp_path / "photos"), name="mine")
    (pairs / "a.png").write_bytes(b"1")
    assert node.fingerprint_inputs(photos=str(tmp_path / "photos"), name="mine") == first
    (tmp_path / "photos" / "b.png").write_bytes(b"1")
    assert node.fingerprint_inputs(photos=str(tmp_path / "photos"), name="mine") != first


def test_a_decision_that_hold_per_shot_was_not_given_is_named():
    nodes = {n.GET_SCHEMA().node_id: n for n in NODES}
    for name, values in (
        ("MendEditRouting", {"routing": None}),
        ("MendRoutingReport", {"routing": None}),
        ("MendPromptWeights", {"degradation": None, "restorer": None}),
        ("MendMixDegradations", {"first": None, "second": None}),
        ("MendOperatorFromDegradation", {"degradation": None, "image": None}),
        ("MendSwitchImage", {"degradation": None, "otherwise": None}),
    ):
        with pytest.raises(InputError, match=f"{next(iter(values))}: Hold Per Shot was given none"):
            nodes[name].execute(**values)


def test_a_number_without_meaning_that_comes_over_a_wire_is_named():
    nodes = {n.GET_SCHEMA().node_id: n for n in NODES}
    needed = {
        "MendAlignFaces": ["image", "faces"],
        "MendClassifyDegradation": ["classifier", "image"],
        "MendCompressRestore": ["codec", "image"],
        "MendEncodeBitstream": ["codec", "image"],
        "MendMixNoise": ["guided", "x", "x0", "sigmas"],
        "MendOfficialTiling": ["restorer", "image"],
        "MendOneStepLatent": ["latent"],
        "MendRDMDStep": ["prior", "measurement", "u", "x"],
        "MendRDMDStrip": ["prior", "measurement"],
        "MendRegionFromDegradation": ["classifier", "image"],
        "MendReportPage": ["before", "after"],
        "MendTrainRestorer": ["restorer", "dataset"],
        "MendZeroShotRestore": ["prior", "measurement"],
    }
    for name, slot, value in (
        ("MendAlignFaces", "size", 0),
        ("MendAlignFaces", "context", 0.0),
        ("MendClassifyDegradation", "window", -1),
        ("MendClassifyDegradation", "grid", 0),
        ("MendCompressRestore", "tile", -1),
        ("MendEncodeBitstream", "tile", -1),
        ("MendMixNoise", "eta", 2.0),
        ("MendOfficialTiling", "threshold", 0),
        ("MendOneStepLatent", "timestep", 1000),
        ("MendOneStepSigmas", "timestep", -1),
        ("MendOperatorDownsample", "factor", 0.0),
        ("MendOperatorDownsample", "factor", float("nan")),
        ("MendRDMDStep", "renewal", 2.0),
        ("MendRDMDStrip", "count", 1),
        ("MendRegionFromDegradation", "window", -1),
        ("MendReportPage", "largest", 0),
        ("MendTrainRestorer", "learning_rate", -1.0),
        ("MendZeroShotRestore", "eta", 1.5),
    ):
        with pytest.raises(InputError, match=f"^{slot}: {value}"):
            nodes[name].execute(**dict.fromkeys(needed.get(name, ())), **{slot: value})
    with pytest.raises(InputError, match="^crop: 0"):
        nodes["MendDatasetFromImages"].execute(torch.rand(1, 32, 32, 3), crop=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_every_node_refuses_a_number_from_a_wire_that_is_not_finite(bad):
    slots = [(n, slot) for n in NODES for slot in n.GET_SCHEMA().inputs or [] if slot.get_io_type() == "FLOAT"]
    assert len(slots) > 80
    for node, slot in slots:
        with pytest.raises(InputError, match=f"^{slot.id}: {bad} is no finite number; change what is connected to it$"):
            node.execute(**{slot.id: bad})


def test_a_choice_that_comes_over_a_wire_is_checked_when_the_node_runs():
    nodes = {n.GET_SCHEMA().node_id: n for n in NODES}
    for name, values, message in (
        (
            "MendBlendRestorations",
            {"first": None, "second": None, "by": "nonsense"},
            "by: 'nonsense' is not one of amount",
        ),
        ("MendSelfEnsemble", {"restorer": None, "image": None, "ways": "9"}, "ways: '9' is not one of 2 "),
        ("MendUncertaintyObjective", {"tasks": "data set", "accumulate": "never"}, "accumulate: 'never' is not one of"),
        ("MendMakeDataset", {"source": "magic"}, "source: 'magic' is not one of degrader, simulation"),
    ):
        with pytest.raises(InputError, match=message):
            nodes[name].execute(**values)
