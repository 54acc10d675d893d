"""The built-in runner behaves like ComfyUI's server: one test a promise, with small nodes of its own."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_mend.__main__ import main
from comfyui_mend.engine import core_nodes, folders, host
from comfyui_mend.engine.node_api import GraphBuilder, io, ui
from comfyui_mend.engine.runner import Runner
from comfyui_mend.engine.validation import validate_prompt
from comfyui_mend.engine.workflow_format import read, to_api
from comfyui_mend.errors import Cancelled, WorkflowError
from comfyui_mend.nodes.api import advanced

from .engine_cases import CASES, Nodes, graph, show

NODES = Nodes(io, GraphBuilder)
CLASSES, CALLS = NODES.classes, NODES.calls
CORE = {n.GET_SCHEMA().node_id: n for n in core_nodes.NODES}


async def work_in_ten_steps(cls):
    bar = host.progress(10)
    for _ in range(10):
        bar.update()
    return io.NodeOutput(ui={"done": [True]})


NODES.add("Slow", execute=None, methods={"execute": work_in_ten_steps}, is_output_node=True)


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()
    NODES.fingerprint[:] = [0]


@pytest.fixture
def run():
    runner = Runner(CLASSES)
    return runner.run


def errors_of(result, node_id="1"):
    return [(e["type"], e["message"], e["details"]) for e in result.node_errors[node_id]["errors"]]


# Validation -----------------------------------------------------------------------------------------------------------


def test_a_node_type_that_does_not_exist_stops_everything(run):
    result = run({**show("Number", {"number": 1}), "3": {"class_type": "Nowhere", "inputs": {}}})
    assert result.error["message"] == "Cannot execute because node Nowhere does not exist."
    assert result.error["details"] == "Node ID '#3'" and not CALLS and not result.complete


def test_a_workflow_without_output_nodes_is_refused(run):
    assert run(graph(n1=("Number", {"number": 1}))).error["type"] == "prompt_no_outputs"


def test_every_required_input_must_be_named_since_defaults_are_not_filled_in(run):
    assert errors_of(run(show("Number", {}))) == [("required_input_missing", "Required input is missing", "number")]


def test_links_must_fit_the_type_of_the_input(run):
    result = run(graph(n1=("Picture", {}), n2=("Add", {"a": ["1", 0], "b": 1}), n3=("Show", {"value": ["2", 0]})))
    details = "a, received_type(IMAGE) mismatch input_type(INT)"
    assert errors_of(result, "2") == [("return_type_mismatch", "Return type mismatch between linked nodes", details)]
    assert result.node_errors["2"]["dependent_outputs"] == ["3"] and "3" not in result.node_errors


def test_numbers_are_converted_to_the_type_of_the_input(run):
    assert run(show("Number", {"number": 3.7})).outputs["2"] == {"value": [3]}
    assert run(show("Number", {"number": "4"})).outputs["2"] == {"value": [4]}
    kind, message, details = errors_of(run(show("Number", {"number": "many"})))[0]
    assert kind == "invalid_input_type" and message == "Failed to convert an input value to a INT value"
    assert details.startswith("number, many, invalid literal")


def test_numbers_out_of_range_are_refused(run):
    low, high = (errors_of(run(show("Number", {"number": n})))[0][:2] for n in (-1, 11))
    assert low == ("value_smaller_than_min", "Value -1 smaller than min of 0")
    assert high == ("value_bigger_than_max", "Value 11 bigger than max of 10")


def test_a_choice_that_is_not_in_the_list_is_refused(run):
    expected = ("value_not_in_list", "Value not in list", "mode: 'c' not in ['a', 'b']")
    assert errors_of(run(show("Choice", {"mode": "c"}))) == [expected]


def test_a_node_that_checks_an_input_itself_replaces_the_range_check(run):
    assert run(graph(n1=("Careful", {"number": 99}))).complete
    details = "number - thirteen is bad luck"
    expected = ("custom_validation_failed", "Custom validation failed for node", details)
    assert errors_of(run(graph(n1=("Careful", {"number": 13})))) == [expected]


def test_bad_outputs_do_not_keep_the_good_ones_from_running(run):
    good, bad = show("Number", {"number": 1}), graph(n3=("Number", {}), n4=("Show", {"value": ["3", 0]}))
    result = run({**good, **bad})
    assert result.success and result.outputs == {"2": {"value": [1]}} and list(result.node_errors) == ["3"]
    assert not result.complete, "an output node did not run"


def test_unknown_input_names_are_ignored(run):
    assert run(show("Number", {"number": 1, "colour": "red"})).complete


def test_a_wrapped_list_is_a_constant_and_not_a_link(run):
    assert run(graph(n1=("Show", {"value": {"__value__": [3, 4]}}))).outputs["1"] == {"value": [[3, 4]]}


def test_a_circle_of_links_is_refused_and_shown(run):
    result = run(
        graph(
            n1=("Add", {"a": ["2", 0], "b": 1}), n2=("Add", {"a": ["1", 0], "b": 1}), n3=("Show", {"value": ["2", 0]})
        )
    )
    assert "Dependency cycle detected: 2 -> 1 -> 2" in result.describe() and not CALLS


def test_the_prompt_that_was_given_stays_as_it_is(run):
    prompt = show("Number", {"number": "3"})
    before = json.dumps(prompt)
    run(prompt)
    assert json.dumps(prompt) == before


# Order and results kept -----------------------------------------------------------------------------------------------


def test_only_what_leads_to_an_output_node_runs(run):
    run({**show("Number", {"number": 1}), "3": {"class_type": "Number", "inputs": {"number": 2}}})
    assert CALLS == ["Number", "Show"]


def test_a_second_run_repeats_nothing_and_shows_the_same(run):
    prompt = show("Number", {"number": 1})
    first = run(prompt)
    second = run(prompt)
    assert CALLS == ["Number", "Show"] and second.outputs == first.outputs == {"2": {"value": [1]}}
    assert second.executed == [] and sorted(second.cached) == ["1", "2"] and second.complete


def test_a_changed_value_runs_again_what_lies_below_it_and_nothing_else(run):
    before, after, _ = CASES["a changed value"]
    run(before)
    result = run(after)
    assert sorted(result.executed) == ["2", "3", "4"] and result.outputs["4"] == {"value": [4]}


def test_the_node_id_does_not_matter_unless_the_node_asked_for_it(run):
    assert run(show("Number", {"number": 1})).complete
    renamed = graph(n7=("Number", {"number": 1}), n8=("Show", {"value": ["7", 0]}))
    assert run(renamed).executed == []
    assert run(show("Whoami", {})).outputs["2"] == {"value": ["1"]}
    assert run(graph(n7=("Whoami", {}), n8=("Show", {"value": ["7", 0]}))).outputs["8"] == {"value": ["7"]}


def test_results_are_dropped_when_their_node_has_left_the_workflow():
    runner = Runner(CLASSES)
    runner.run(show("Number", {"number": 1}))
    runner.run(show("Number", {"number": 2}))
    assert len(runner.kept) == 2


@pytest.mark.parametrize(("states", "runs"), [((0, 0), 1), ((0, 1), 2), ((math.nan, math.nan), 2)])
def test_a_fingerprint_decides_whether_a_node_runs_again(run, states, runs):
    for state in states:
        NODES.fingerprint[0] = state
        run(show("Watched", {"number": 1}))
    assert CALLS.count("Watched") == runs


def test_a_fingerprint_that_fails_makes_the_node_run_every_time(run, caplog):
    prompt = show("Watched", {"number": 1, "extra": 2})
    assert run(prompt).complete and CALLS.count("Watched") == 1
    NODES.fingerprint.clear()
    run(prompt), run(prompt)
    assert CALLS.count("Watched") == 3 and "runs every time" in caplog.text


# Lists, lazy inputs, expansion, blocking -----------------------------------------------------------------------------


def test_a_list_output_runs_the_following_node_once_per_item(run):
    result = run(graph(n1=("Several", {}), n2=("Add", {"a": ["1", 0], "b": 10}), n3=("Show", {"value": ["2", 0]})))
    assert CALLS.count("Add") == 3 and result.outputs["3"] == {"value": [11, 12, 13]}


def test_a_node_that_takes_lists_gets_them_whole(run):
    assert run(graph(n1=("Several", {}), n2=("Sum", {"value": ["1", 0]}), n3=("Show", {"value": ["2", 0]}))).outputs[
        "3"
    ] == {"value": [6]}


def test_a_lazy_input_runs_only_when_it_is_asked_for(run):
    prompt = graph(
        n1=("Number", {"number": 1}),
        n2=("Fail", {"value": 0}),
        n3=("Switch", {"use_first": True, "first": ["1", 0], "second": ["2", 0]}),
        n4=("Show", {"value": ["3", 0]}),
    )
    assert run(prompt).outputs["4"] == {"value": [1]} and "Fail" not in CALLS


def test_an_expansion_takes_the_place_of_its_node_and_its_outputs_show(run):
    prompt = graph(n1=("Number", {"number": 4}), n2=("Double", {"value": ["1", 0]}), n3=("Show", {"value": ["2", 0]}))
    result = run(prompt)
    assert result.outputs["3"] == {"value": [8]} and result.outputs["2.0.0.2"] == {"value": [8]}
    assert sorted(result.executed) == ["1", "2", "2.0.0.1", "2.0.0.2", "3"] and result.complete
    CALLS.clear()
    assert run(prompt).complete and CALLS == [], "expanded nodes are kept too"


def test_expanding_without_having_said_so_is_an_error(run):
    assert "is not expandable" in run(show("Rogue", {})).describe()


def test_a_blocked_branch_does_not_run_and_says_why_while_others_do(run):
    prompt = graph(
        n1=("Number", {"number": 1}),
        n2=("Block", {"value": ["1", 0]}),
        n3=("Show", {"value": ["2", 0]}),
        n4=("Show", {"value": ["1", 0]}),
    )
    result = run(prompt)
    assert result.success and result.outputs == {"4": {"value": [1]}} and not result.complete
    assert "Execution Blocked: not today" in result.describe()


# Execution -----------------------------------------------------------------------------------------------------------


def test_nodes_run_in_inference_mode(run):
    assert run(show("Modes", {"value": 1})).outputs["2"] == {"value": ["True"]}
    assert not torch.is_inference_mode_enabled()


def test_an_error_in_a_node_stops_the_run_and_names_the_node(run):
    result = run(show("Fail", {"value": 7}))
    event, data = result.messages[-1]
    assert event == "execution_error" and (data["node_id"], data["node_type"]) == ("1", "Fail")
    assert data["exception_type"] == "ZeroDivisionError" and data["current_inputs"] == {"value": ["7"]}
    assert isinstance(result.exception, ZeroDivisionError) and not result.success and not result.complete
    assert result.describe().startswith("Fail 1: ")


def test_state_on_the_class_is_refused_because_it_would_be_lost(run):
    text = "Cannot modify class attribute 'state' on locked class 'Stateful'"
    assert text in run(graph(n1=("Stateful", {}))).describe()


def test_returning_a_dict_is_an_error_as_in_comfyui(run):
    assert isinstance(run(show("Wrong", {})).exception, TypeError)


def test_progress_reaches_the_caller_with_the_node_that_works():
    seen = []
    Runner(CLASSES, progress=lambda *step: seen.append(step)).run(graph(n5=("Slow", {})))
    assert seen[0] == ("5", 1, 10, None) and seen[-1] == ("5", 10, 10, None)


def test_an_interrupt_stops_inside_a_node_and_the_next_run_works():
    steps = []
    stop = Runner(CLASSES, progress=lambda *step: steps.append(step), interrupt=lambda: len(steps) >= 3)
    result = stop.run(graph(n1=("Slow", {})))
    assert result.messages[-1][0] == "execution_interrupted" and isinstance(result.exception, Cancelled)
    assert len(steps) == 3 and not result.complete
    stop.interrupt = None
    assert stop.run(graph(n1=("Slow", {}))).complete


def test_hidden_values_are_given_to_nodes_that_asked(run):
    seen = {}
    ask = Nodes(io, GraphBuilder).add(
        "Ask",
        execute=lambda cls: seen.update(
            prompt=cls.hidden.prompt, extra=cls.hidden.extra_pnginfo, id=cls.hidden.unique_id
        ),
        is_output_node=True,
    )
    Runner({"Ask": ask}).run(graph(n1=("Ask", {})), {"workflow": {"nodes": []}})
    assert seen == {"prompt": graph(n1=("Ask", {})), "extra": {"workflow": {"nodes": []}}, "id": None}


# Declaring nodes -----------------------------------------------------------------------------------------------------


def test_ids_of_inputs_and_outputs_must_differ():
    clash = io.Schema(node_id="X", inputs=[io.Image.Input("image")], outputs=[io.Image.Output("image")])
    with pytest.raises(ValueError, match="unique between inputs and outputs"):
        clash.validate()
    with pytest.raises(ValueError, match="Input ids must be unique"):
        io.Schema(node_id="X", inputs=[io.Image.Input("a"), io.Mask.Input("a")]).validate()


def test_keywords_that_comfyui_does_not_know_are_refused():
    with pytest.raises(TypeError, match="advanced"):
        io.Int.Input("tile", advanced=True)
    assert advanced(io.Int.Input("tile", default=1)).as_dict() == {"default": 1, "advanced": True, "optional": False}


def test_a_multi_type_input_keeps_the_widget_it_was_given():
    slot = io.MultiType.Input(io.Float.Input("x", default=2.0), types=[io.Int, io.Image])
    assert slot.get_io_type() == "FLOAT,INT,IMAGE" and slot.as_dict()["default"] == 2.0
    picture = Nodes(io, GraphBuilder).add(
        "Pic", lambda: [io.MultiType.Input("value", types=[io.Image, io.Mask])], is_output_node=True
    )
    prompt = graph(n1=("Number", {"number": 1}), n2=("Pic", {"value": ["1", 0]}))
    assert not validate_prompt(prompt, {**CLASSES, "Pic": picture})[0]
    prompt["1"] = {"class_type": "Picture", "inputs": {}}
    assert validate_prompt(prompt, {**CLASSES, "Pic": picture})[0]


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path):
    inputs, output = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    folders.set_folders(inputs=[inputs], output=output, temp=tmp_path / "temp")
    return inputs, output


def pixels(height, width, channels=3):
    return np.arange(height * width * channels, dtype=np.uint8).reshape(height, width, channels)


def test_load_image_gives_an_empty_mask_of_64_for_a_picture_without_alpha(places):
    Image.fromarray(pixels(5, 7)).save(places[0] / "a.png")
    image, mask = core_nodes.read_picture(places[0] / "a.png")
    assert torch.equal(image, torch.from_numpy(pixels(5, 7) / np.float32(255))[None])
    assert mask.shape == (1, 64, 64) and not mask.any()


def test_load_image_turns_alpha_into_its_complement_and_follows_exif(places):
    Image.fromarray(pixels(5, 7, 4)).save(places[0] / "a.png")
    _, mask = core_nodes.read_picture(places[0] / "a.png")
    assert torch.allclose(mask, 1 - torch.from_numpy(pixels(5, 7, 4)[None, ..., 3] / 255).float())
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels(5, 7)).save(places[0] / "b.jpg", exif=turned)
    assert core_nodes.read_picture(places[0] / "b.jpg")[0].shape == (1, 7, 5, 3)


def test_frames_of_an_animation_form_the_batch(places):
    frames = [Image.fromarray(np.full((4, 6, 3), v, np.uint8)) for v in (0, 100, 200)]
    frames[0].save(places[0] / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert core_nodes.read_picture(places[0] / "a.webp")[0].shape == (3, 4, 6, 3)


def test_saved_pictures_are_numbered_on_and_carry_the_workflow(places):
    prompt = graph(
        n1=("EmptyImage", {"width": 4, "height": 3, "batch_size": 2, "color": 0xFF8000}),
        n2=("SaveImage", {"images": ["1", 0], "filename_prefix": "sub/%width%x"}),
    )
    Runner(CORE).run(prompt, {"workflow": {"nodes": []}})
    result = Runner(CORE).run(prompt)
    names = [entry["filename"] for entry in result.outputs["2"]["images"]]
    assert names == ["4x_00003_.png", "4x_00004_.png"]
    with Image.open(places[1] / "sub" / "4x_00001_.png") as saved:
        assert json.loads(saved.text["prompt"]) == prompt and json.loads(saved.text["workflow"]) == {"nodes": []}
        assert saved.getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", ""])
def test_names_that_lead_out_of_the_input_folder_are_not_found(places, name):
    Image.new("RGB", (2, 2)).save(places[0].parent / "secret.png")
    assert folders.input_path(name) is None
    result = Runner(CORE).run(graph(n1=("LoadImage", {"image": name}), n2=("PreviewImage", {"images": ["1", 0]})))
    assert f"Invalid image file: {name}" in result.describe()


def test_a_prefix_that_leads_out_of_the_output_folder_is_refused(places):
    with pytest.raises(WorkflowError, match="leads out"):
        ui.ImageSaveHelper.get_save_images_ui(torch.zeros(1, 2, 2, 3), "../../x", cls=None)


def test_growing_a_mask_by_a_cross_and_by_a_square():
    mask = torch.zeros(1, 5, 5)
    mask[0, 2, 2] = 1
    assert core_nodes.grow_mask.execute(mask=mask, expand=1, tapered_corners=True)[0].sum() == 5
    grown = core_nodes.grow_mask.execute(mask=mask, expand=1, tapered_corners=False)[0]
    assert grown.sum() == 9
    assert torch.equal(core_nodes.grow_mask.execute(mask=grown, expand=-1, tapered_corners=False)[0], mask)


# The page's format ---------------------------------------------------------------------------------------------------


def page(nodes, links, **more):
    """A saved workflow from (id, type, widgets, mode or other fields) and links."""
    made = []
    for node_id, kind, values, extra in nodes:
        known = CLASSES.get(kind) or CORE.get(kind)
        names = list(known.INPUT_TYPES().get("required", {})) if known else ["a", "b"]
        outs = known.RETURN_TYPES if known else ["*"]
        slots = [{"name": n, "type": "INT", "link": None} for n in names]
        outputs = [{"name": str(o), "type": o} for o in outs]
        made.append(
            {"id": node_id, "type": kind, "widgets_values": values, "inputs": slots, "outputs": outputs, **extra}
        )
    by_id = {n["id"]: n for n in made}
    for link in links:
        by_id[link[3]]["inputs"][link[4]]["link"] = link[0]
    return {"nodes": made, "links": links, "version": 0.4, **more}


def inputs_of(workflow, classes=None):
    return {i: n["inputs"] for i, n in to_api(workflow, classes or {**CLASSES, **CORE}).items()}


def test_widget_values_are_read_in_order_and_seeds_and_uploads_have_one_more(places):
    seeded = Nodes(io, GraphBuilder).add("Seeded", lambda: [io.Int.Input("seed"), io.String.Input("text")])
    workflow = page([], [])
    workflow["nodes"] = [
        {"id": 1, "type": "Seeded", "widgets_values": [5, "randomize", "hello"]},
        {"id": 2, "type": "LoadImageMask", "widgets_values": ["a.png", "red", "image"]},
        {"id": 3, "type": "MarkdownNote", "widgets_values": ["# note"]},
    ]
    assert inputs_of(workflow, {"Seeded": seeded, **CORE}) == {
        "1": {"seed": 5, "text": "hello"},
        "2": {"image": "a.png", "channel": "red"},
    }


def test_reroutes_and_primitives_are_resolved():
    nodes = [
        (1, "Number", [3], {}),
        (2, "Reroute", [], {}),
        (3, "PrimitiveNode", [9, "fixed"], {}),
        (4, "Add", [0, 0], {}),
    ]
    links = [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 4, 0, "INT"], [3, 3, 0, 4, 1, "INT"]]
    assert inputs_of(page(nodes, links)) == {"1": {"number": 3}, "4": {"a": ["1", 0], "b": 9}}


def test_muted_nodes_are_left_out_and_bypassed_ones_pass_their_input_on():
    links = [[1, 1, 0, 2, 0, "INT"], [2, 2, 0, 3, 0, "INT"]]
    muted = [(1, "Number", [3], {}), (2, "Add", [0, 7], {"mode": 2}), (3, "Show", [], {})]
    assert inputs_of(page(muted, links)) == {"1": {"number": 3}, "3": {}}
    bypassed = [(1, "Number", [3], {}), (2, "Add", [0, 7], {"mode": 4}), (3, "Show", [], {})]
    assert inputs_of(page(bypassed, links)) == {"1": {"number": 3}, "3": {"value": ["1", 0]}}


def test_subgraphs_are_opened():
    inner = {
        "id": "abc-1",
        "name": "Plus two",
        "inputs": [{"name": "a", "type": "INT"}],
        "outputs": [{"name": "o", "type": "INT"}],
        "nodes": page([(5, "Add", [0, 2], {})], [])["nodes"],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 0, "type": "INT"},
            {"id": 2, "origin_id": 5, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "INT"},
        ],
    }
    inner["nodes"][0]["inputs"][0]["link"] = 1
    nodes = [(1, "Number", [3], {}), (2, "abc-1", [], {}), (3, "Show", [], {})]
    links = [[1, 1, 0, 2, 0, "INT"], [2, 2, 0, 3, 0, "INT"]]
    found = inputs_of(page(nodes, links, definitions={"subgraphs": [inner]}))
    assert found == {"1": {"number": 3}, "2:5": {"a": ["1", 0], "b": 2}, "3": {"value": ["2:5", 0]}}


def test_a_node_type_that_is_missing_is_named_with_its_id():
    with pytest.raises(WorkflowError, match=r"'Elsewhere' \(#8\)"):
        to_api(page([(8, "Elsewhere", [], {})], []), CLASSES)


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"a": 1}', "\0\x93"])
def test_files_that_are_no_workflow_are_refused_by_name(tmp_path, content):
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(WorkflowError, match="w.json"):
        read(path)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def workflow_file(tmp_path):
    prompt = graph(
        n1=("EmptyImage", {"width": 8, "height": 8, "batch_size": 1, "color": 0}),
        n2=("SaveImage", {"images": ["1", 0], "filename_prefix": "x"}),
    )
    prompt["2"]["_meta"] = {"title": "Result"}
    path = tmp_path / "w.json"
    path.write_text(json.dumps(prompt))
    return path


def test_mend_run_writes_the_picture_and_ends_with_0(workflow_file, tmp_path, capsys):
    assert main(["run", str(workflow_file), "--output", str(tmp_path / "o"), "--set", "EmptyImage.width=5"]) == 0
    saved = tmp_path / "o" / "x_00001_.png"
    assert capsys.readouterr().out.strip() == str(saved) and Image.open(saved).size == (5, 8)


def test_mend_run_ends_with_1_and_says_why(workflow_file, tmp_path, capsys):
    assert main(["run", str(workflow_file), "--output", str(tmp_path), "--set", "1.width=0"]) == 1
    assert "EmptyImage 1: Value 0 smaller than min of 1: width" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.json")]) == 1
    assert "there is no workflow file" in capsys.readouterr().err
    for wrong in ("Result.width=3", "9.width=3", "width=3", "1.width"):
        assert main(["run", str(workflow_file), "--output", str(tmp_path), "--set", wrong]) == 1
        assert capsys.readouterr().err.startswith("mend run: --set")


def test_set_finds_nodes_by_title_and_reads_values_as_json_or_text(workflow_file, tmp_path):
    assert main(["run", str(workflow_file), "--output", str(tmp_path), "--set", "Result.filename_prefix=deep/7"]) == 0
    assert (tmp_path / "deep" / "7_00001_.png").is_file()


def test_an_unknown_command_is_refused_and_help_lists_the_others(capsys):
    assert main(["fly"]) == 2 and "one of" in capsys.readouterr().err
    assert main([]) == 0 and "run" in capsys.readouterr().out
