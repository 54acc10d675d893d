"""What saved workflows and readers rely on in every node: frozen names and order, help, translations, a workflow.

`python tests/test_node_schemas.py` adds new nodes, and new inputs at the end of old ones, to the snapshot. Anything
else that the snapshot test refuses would break workflows that people have saved.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import make_help_inputs
import pytest

from comfyui_mend.engine.workflow_format import is_widget
from comfyui_mend.nodes import node_classes

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = ROOT / "tests" / "data" / "node_schemas.json"
NODES = {node.GET_SCHEMA().node_id: node for node in node_classes()}
SCHEMAS = {name: node.GET_SCHEMA() for name, node in NODES.items()}


def ordered_inputs(node: Any) -> list[Any]:
    """Inputs in the order in which saved workflows store their values: required ones first."""
    inputs = node.GET_SCHEMA().inputs or []
    return [i for i in inputs if not i.optional] + [i for i in inputs if i.optional]


def describe(node: Any) -> dict[str, Any]:
    """What saved workflows depend on."""
    return {
        "inputs": [
            [i.id, str(i.get_io_type()), "optional" if i.optional else "required"] for i in ordered_inputs(node)
        ],
        "outputs": [[o.display_name, str(o.io_type)] for o in node.GET_SCHEMA().outputs or []],
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def frozen() -> dict[str, Any]:
    return read_json(SNAPSHOT) if SNAPSHOT.is_file() else {}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How `new` breaks what was saved with `old`."""
    found = []
    for side in ("inputs", "outputs"):
        for position, entry in enumerate(old[side]):
            now = new[side][position] if position < len(new[side]) else None
            if now != entry:
                found.append(f"{side}[{position}] was {entry}, is {now}")
        added = new[side][len(old[side]) :]
        if side == "inputs":
            found += [f"the new input {name!r} must be optional" for name, _, kind in added if kind == "required"]
    return found


@pytest.mark.parametrize("name", sorted(frozen()))
def test_ids_inputs_and_outputs_stay_as_saved_workflows_know_them(name):
    assert name in NODES, f"{name} is gone: workflows that use it no longer open"
    assert changes(frozen()[name], describe(NODES[name])) == []


def test_every_node_is_in_the_snapshot():
    missing = {n for n, node in NODES.items() if frozen().get(n) != describe(node)}
    assert not missing, "run `python tests/test_node_schemas.py` and commit the snapshot"


@pytest.mark.parametrize("name", sorted(NODES))
def test_a_node_explains_itself(name):
    schema = SCHEMAS[name]
    assert name.startswith("Mend") and schema.category.startswith("Mend/")
    assert schema.display_name and len(schema.description) > 20
    for slot in schema.inputs or []:
        assert slot.tooltip, f"input {slot.id} has no tooltip"
    for slot in schema.outputs or []:
        assert slot.tooltip and slot.display_name, f"output {slot.id} lacks a tooltip or a name"


@pytest.mark.parametrize("name", sorted(NODES))
def test_a_node_takes_every_input_that_it_declares(name):
    node, ids = NODES[name], [i.id for i in SCHEMAS[name].inputs or []]
    optional = {i.id for i in SCHEMAS[name].inputs or [] if i.optional or i.lazy}
    for method in ("execute", "fingerprint_inputs", "check_lazy_status"):
        if node.overridden(method) is None:
            continue
        parameters = inspect.signature(getattr(node, method)).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        assert set(parameters) == set(ids), f"{method} takes {sorted(parameters)}"
        undefaulted = {n for n in optional if parameters[n].default is inspect.Parameter.empty}
        assert not undefaulted or method == "fingerprint_inputs", f"{method}: {undefaulted} need defaults"
    if node.overridden("validate_inputs") is not None:
        assert set(inspect.signature(node.validate_inputs).parameters) <= {*ids, "input_types", "kwargs"}


@pytest.mark.parametrize("name", sorted(NODES))
def test_the_default_of_a_widget_is_a_valid_value(name):
    for slot in SCHEMAS[name].inputs or []:
        options = slot.as_dict()
        if not is_widget(slot.get_io_type(), options) or "default" not in options:
            continue
        value = options["default"]
        assert options.get("min", value) <= value <= options.get("max", value), slot.id
        if options.get("options"):
            assert value in options["options"], slot.id


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", sorted(NODES))
def test_a_node_has_a_help_page_whose_pictures_exist(name, language):
    page = ROOT / "web" / "docs" / name / f"{language}.md"
    assert page.is_file(), f"{page.relative_to(ROOT)} is missing"
    text = page.read_text(encoding="utf-8")
    assert len(text) > {"en": 80, "zh": 40}[language]
    for picture in [part.split(")")[0] for part in text.split("](")[1:]]:
        if not picture.startswith(("http", "#")):  # the page resolves them below docs/, not beside the text
            assert (page.parent.parent / picture).is_file(), f"{picture} is missing"


def test_help_lists_every_input_and_output_with_its_range_and_default():
    for page, before, after in make_help_inputs.pages():
        assert before == after, f"{page.relative_to(ROOT)}: run `python tests/make_help_inputs.py`"


def test_the_chinese_entries_cover_every_node_and_nothing_else():
    entries = read_json(ROOT / "locales" / "zh" / "nodeDefs.json")
    assert sorted(entries) == sorted(NODES)
    for name, schema in SCHEMAS.items():
        entry = entries[name]
        assert entry["display_name"] and entry["description"], name
        ids = [i.id.replace(".", "_") for i in schema.inputs or []]
        assert sorted(entry.get("inputs", {})) == sorted(ids), name
        assert sorted(entry.get("outputs", {})) == [str(n) for n in range(len(schema.outputs or []))], name
        for slot in [*entry.get("inputs", {}).values(), *entry.get("outputs", {}).values()]:
            assert slot["name"] and slot["tooltip"], name


def test_every_locale_file_is_sound_json():
    for path in (ROOT / "locales").rglob("*.json"):
        assert isinstance(read_json(path), dict), path


@pytest.mark.parametrize("name", sorted(NODES))
def test_a_node_has_its_place_in_a_shipped_workflow(name):
    used = {
        node["class_type"] for path in (ROOT / "workflows" / "api").glob("*.json") for node in read_json(path).values()
    }
    assert name in used


def update() -> None:
    """Adds to the snapshot what may be added."""
    snapshot = frozen()
    for name, node in NODES.items():
        broken = changes(snapshot[name], describe(node)) if name in snapshot else []
        if broken:
            raise SystemExit(f"{name}: {'; '.join(broken)}")
        snapshot[name] = describe(node)
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(snapshot.items())]
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    update()
