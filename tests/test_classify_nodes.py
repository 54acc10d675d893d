"""Nodes that judge pictures, choose by the judgement, and open networks up."""

from __future__ import annotations

import pytest
import torch
from support import wrapped

from comfyui_mend import nodes
from comfyui_mend.engine import classify, feature_maps, loaded
from comfyui_mend.engine.node_api import io
from comfyui_mend.engine.runner import Runner
from comfyui_mend.errors import InputError
from comfyui_mend.models.degradation import Degradation

NAFNET = {"width": 8, "enc_blk_nums": (1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1)}
CLASSIFIER = {"feature_dims": (8, 16), "num_res_blocks": 1, "num_classes": 3}
NODES = {node.GET_SCHEMA().node_id: node for node in nodes.node_classes()}
RAIN = Degradation(("rain", "haze", "low light"), torch.tensor([[0.6, 0.3, 0.1]]), source="dcpt")


def _loaded(architecture: str, config: dict) -> loaded.LoadedRestorer:
    made = wrapped(architecture, config)
    for name, parameter in made.restorer.module.named_parameters():
        if name.endswith(("beta", "gamma")):
            parameter.normal_(std=0.3)
    return made


@pytest.fixture
def pair() -> loaded.LoadedRestorer:
    return _loaded(
        "dcpt-classified-network",
        {"backbone": "nafnet", "net_g": NAFNET, "net_dc": CLASSIFIER, "labels": ("rain", "haze", "low light")},
    )


def test_every_picture_of_a_batch_is_judged_by_itself(pair):
    image = torch.rand(3, 20, 31, 3)
    found, label, chart, text = NODES["MendClassifyDegradation"].execute(pair, image).args
    assert found.labels == ("rain", "haze", "low light") and len(found) == 3
    assert label in found.labels and len(text.splitlines()) == 3
    assert chart.shape[0] == 3 and chart.shape[-1] == 3
    alone = classify.classify(pair, image[1:2].movedim(-1, 1))
    torch.testing.assert_close(found.probabilities[1:2], alone.probabilities)


def test_pictures_with_alpha_or_without_colour_are_judged_too(pair):
    for channels in (1, 4):
        assert len(classify.classify(pair, torch.rand(1, channels, 16, 16))) == 1


def test_a_bare_classifier_reads_the_network_it_is_given(pair):
    body, head = _loaded("nafnet", NAFNET), _loaded("dcpt-classifier", CLASSIFIER)
    body.restorer.module.load_state_dict(pair.restorer.module.net_g.state_dict())
    head.restorer.module.load_state_dict(pair.restorer.module.net_dc.state_dict())
    image = torch.rand(2, 3, 24, 24)
    found = classify.classify(head, image, body, labels=["a", "b", "c"])
    torch.testing.assert_close(found.probabilities, classify.classify(pair, image).probabilities)
    assert found.labels == ("a", "b", "c")
    with pytest.raises(InputError, match="network: this classifier reads"):
        classify.classify(head, image)
    with pytest.raises(InputError, match="no degradation classifier"):
        classify.classify(body, image)
    with pytest.raises(InputError, match="2 names for 3 classes"):
        classify.classify(pair, image, labels=["a", "b"])


def test_a_case_is_chosen_by_the_label_of_the_whole_batch():
    assert classify.choose(RAIN, ["haze", "Rain, low light"]) == 1
    assert classify.choose(RAIN, ["haze", ""]) is None
    assert classify.choose(RAIN, ["rain"], confidence=0.7) is None
    batch = Degradation(RAIN.labels, torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.9, 0.1]]), source="dcpt")
    assert classify.overall(batch)[0] == "haze"
    with pytest.raises(InputError, match="hale unknown; the classifier knows: rain"):
        classify.choose(RAIN, ["hale"])


@pytest.mark.parametrize(
    ("labels", "confidence", "connected", "runs"),
    [
        ("rain", 0.0, True, "Second"),
        ("haze", 0.0, True, "First"),
        ("rain", 0.9, True, "First"),
        ("rain", 0.0, False, "First"),
    ],
)
def test_only_the_branch_that_is_chosen_runs(labels, confidence, connected, runs):
    calls = []

    def node(name, output, value):
        def define_schema(cls):
            return io.Schema(node_id=name, outputs=[output("out", display_name="out")])

        def execute(cls):
            calls.append(name)
            return io.NodeOutput(value)

        return type(
            name, (io.ComfyNode,), {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
        )

    def define_show(cls):
        return io.Schema(node_id="Show", is_output_node=True, inputs=[io.Image.Input("image")])

    def show(cls, image):
        return io.NodeOutput(ui={"mean": [float(image.mean())]})

    known = {
        "MendSwitchImage": NODES["MendSwitchImage"],
        "Judge": node("Judge", io.Custom("MEND_DEGRADATION").Output, RAIN),
        "First": node("First", io.Image.Output, torch.zeros(1, 4, 4, 3)),
        "Second": node("Second", io.Image.Output, torch.ones(1, 4, 4, 3)),
        "Show": type(
            "Show", (io.ComfyNode,), {"define_schema": classmethod(define_show), "execute": classmethod(show)}
        ),
    }
    inputs = {"degradation": ["1", 0], "otherwise": ["2", 0], "confidence": confidence, "labels_1": labels}
    inputs |= {f"labels_{i}": "" for i in (2, 3, 4)}
    if connected:
        inputs["image_1"] = ["3", 0]
    graph = {
        "1": {"class_type": "Judge", "inputs": {}},
        "2": {"class_type": "First", "inputs": {}},
        "3": {"class_type": "Second", "inputs": {}},
        "4": {"class_type": "MendSwitchImage", "inputs": inputs},
        "5": {"class_type": "Show", "inputs": {"image": ["4", 0]}},
    }
    result = Runner(known).run(graph)
    assert result.complete, result.describe()
    assert calls == ["Judge", runs]
    assert result.outputs["5"] == {"mean": [1.0 if runs == "Second" else 0.0]}


def test_features_go_through_the_graph_and_come_back_as_the_restoration():
    restorer, image = _loaded("nafnet", NAFNET), torch.rand(2, 18, 27, 3)
    maps, text = NODES["MendEncodeFeatures"].execute(restorer, image).args
    assert len(text.splitlines()) == 4
    (restored,) = NODES["MendDecodeFeatures"].execute(restorer, maps).args
    (expected,) = NODES["MendRestore"].execute(restorer, image).args
    torch.testing.assert_close(restored, expected)
    (changed,) = NODES["MendDecodeFeatures"].execute(restorer, maps, "1, 1, 0").args
    assert (changed - expected).abs().max() > 1e-6
    (other,) = NODES["MendBlendFeatures"].execute(maps, maps, "1").args
    assert all(torch.equal(a, b) for a, b in zip(other.maps, maps.maps, strict=True))
    (picture,) = NODES["MendShowFeatures"].execute(maps, 2).args
    assert picture.shape == (2, 5, 7, 3)
    assert NODES["MendShowFeatures"].execute(maps).args[0].shape[0] == 2
    with pytest.raises(InputError, match="level: 3 of 3"):
        NODES["MendShowFeatures"].execute(maps, 3)
    with pytest.raises(InputError, match="gains: 2 numbers for 3 levels"):
        NODES["MendDecodeFeatures"].execute(restorer, maps, "1, 1")


def test_level_numbers_say_what_is_wrong_with_them():
    assert feature_maps.numbers("0.5", 3, "gains") == [0.5] * 3
    with pytest.raises(InputError, match="gains: 'much' is no list"):
        feature_maps.numbers("much", 3, "gains")


def test_local_pooling_is_set_on_the_wire_and_not_on_the_network():
    restorer, image = _loaded("nafnet", NAFNET), torch.rand(1, 40, 24, 3)
    (local,) = NODES["MendLocalPooling"].execute(restorer, 8).args
    assert local.restorer is restorer.restorer
    before = NODES["MendRestore"].execute(restorer, image).args[0]
    assert (NODES["MendRestore"].execute(local, image).args[0] - before).abs().max() > 1e-5
    assert torch.equal(NODES["MendRestore"].execute(restorer, image).args[0], before)
    with pytest.raises(InputError, match="no NAFNet"):
        NODES["MendLocalPooling"].execute(_loaded("dcpt-classifier", CLASSIFIER))
