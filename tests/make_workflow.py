"""Writes shipped workflows: from an API-format graph and an arrangement to the three files that a workflow is.

    from make_workflow import write
    write("restore_photo", api={...}, columns=[["1", "2"], ["3"], ["4", "how"]], groups={"Restore": ["2", "3"]},
          notes={"how": "Drop a picture on **Load Image**, then queue."}, thumbnail="output/restored_00001_.png")

writes workflows/restore_photo.json (what the page opens), workflows/api/restore_photo.json (the same for the engine)
and workflows/restore_photo.jpg (its thumbnail), after checking that the graph is valid and no boxes overlap.
`python tests/make_workflow.py NAME...` prints how the boxes of workflows lie and whether their two forms agree; with
`--respace` it lays them out again first, for nodes that have grown since. At a release,
`python tests/make_workflow.py --archive VERSION` keeps all workflows as they are in tests/data/archive/VERSION, which
later versions must still open (tests/test_archive.py).
"""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from comfyui_mend.engine import core_nodes, model_folder
from comfyui_mend.engine.validation import describe_errors, input_info, validate_prompt
from comfyui_mend.engine.workflow_format import DRAWN_ONLY, default_value, is_widget, read, to_api, widgets
from comfyui_mend.nodes import node_classes

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows"
ARCHIVE = ROOT / "tests" / "data" / "archive"

TITLE = 30
"""Height of a node's title bar, which lies above its position."""
ROW, WIDGET, TEXT_AREA, PICTURE = 20, 24, 110, 270
"""Heights of a socket, a widget, a text box and a picture shown on a node."""
GROUP_TITLE, MARGIN = 40, 20
SHOWS_PICTURE = frozenset({"LoadImage", "LoadImageMask", "LoadVideo", "SaveImage", "PreviewImage", "MaskPreview"})
WORKS_LONG = frozenset(
    {"MEND_RESTORER", "MEND_DEGRADER", "MEND_CODEC", "MEND_PRIOR", "MEND_OPERATOR", "MODEL", "SAMPLER"}
)
"""What a node that shows a preview while it works takes in."""


def missing_models(workflow: Mapping[str, Any]) -> list[str]:
    """Files that loader nodes of a page-form workflow link to and that are in no models folder, as "folder/name"."""
    present = {Path(file).name for file in model_folder.model_files()}
    linked = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    return [f"{model['directory']}/{model['name']}" for model in linked if model["name"] not in present]


def classes() -> dict[str, Any]:
    """Every node class that a shipped workflow may use, by id."""
    return {node.GET_SCHEMA().node_id: node for node in [*core_nodes.NODES, *node_classes()]}


def shows_picture(node_class: Any) -> bool:
    """True if the page may draw a picture on the node: a result, or the preview that stays after a run."""
    types = {entry[0] for group in node_class.INPUT_TYPES(include_hidden=False).values() for entry in group.values()}
    works = "IMAGE" in node_class.RETURN_TYPES and bool(types & WORKS_LONG)
    shows = node_class.OUTPUT_NODE and bool(types & {"IMAGE", "MASK"})
    return node_class.GET_SCHEMA().node_id in SHOWS_PICTURE or works or shows


def node_size(node_class: Any) -> list[int]:
    """Width and height with which the page shows a node comfortably."""
    types = node_class.INPUT_TYPES(include_hidden=False)
    entries = [entry for group in types.values() for entry in group.values()]
    typed = [entry for entry in entries if is_widget(entry[0], entry[1])]
    areas = sum(bool(options.get("multiline")) for _, options in typed)
    rows = max(len(entries) - len(typed), len(node_class.RETURN_TYPES), 1)
    height = rows * ROW + len(widgets(node_class)) * WIDGET + areas * TEXT_AREA + 16
    kind = node_class.GET_SCHEMA().node_id
    if shows_picture(node_class):
        height += PICTURE
    if kind == "PreviewAny":
        height += 2 * TEXT_AREA
    return [380 if areas or kind == "PreviewAny" else 320, height]


def note_size(text: str) -> list[int]:
    """Width and height of a note that shows its text whole."""
    lines = sum(max(1, math.ceil(len(line) / 46)) for line in text.splitlines())
    return [380, 60 + 24 * lines]


def layout(
    name: str,
    api: Mapping[str, Mapping[str, Any]],
    columns: Sequence[Sequence[str]],
    groups: Mapping[str, Sequence[str]] | None = None,
    notes: Mapping[str, str] | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
    models: Mapping[str, list[dict[str, str]]] | None = None,
) -> dict[str, Any]:
    """The UI format of a graph in the API format.

    Ids must be whole numbers as strings. `columns` lists ids of nodes and keys of `notes` from left to right, each
    column from top to bottom; every node stands in exactly one. The members of a group should stand together, in
    neighbouring columns or under each other. `sizes` overrides [width, height]; `models` gives loader nodes their
    download entries [{"name", "url", "directory"}].
    """
    known, notes, groups = classes(), dict(notes or {}), dict(groups or {})
    placed = [entry for column in columns for entry in column]
    wanted = [*api, *notes]
    if sorted(placed) != sorted(wanted):
        raise ValueError(f"columns must hold every node and note once: {sorted(set(placed) ^ set(wanted))}")
    group_of = {member: title for title, members in groups.items() for member in members}

    boxes: dict[str, tuple[list[int], list[int]]] = {}
    x = 0
    for column in columns:
        y, before = 0, None
        for position, entry in enumerate(column):
            size = note_size(notes[entry]) if entry in notes else node_size(known[api[entry]["class_type"]])
            size = list((sizes or {}).get(entry, size))
            if position:
                y += TITLE + 2 * MARGIN
                if group_of.get(entry) != before:
                    y += GROUP_TITLE + 2 * MARGIN
            boxes[entry] = ([x, y], size)
            y, before = y + size[1], group_of.get(entry)
        x += max(boxes[entry][1][0] for entry in column) + 80

    links: list[list] = []
    nodes: dict[str, dict[str, Any]] = {}
    for order, node_id in enumerate(_topological(api)):
        node, node_class = api[node_id], known[api[node_id]["class_type"]]
        schema = node_class.GET_SCHEMA()
        ours = schema.node_id.startswith("Mend")
        types = node_class.INPUT_TYPES(include_hidden=False)
        inputs = {n: input_info(types, n) for group in ("required", "optional") for n in types.get(group, {})}
        slots = []
        for input_name, (group, kind, options) in sorted(inputs.items(), key=lambda item: is_widget(*item[1][1:])):
            slot: dict[str, Any] = {"name": input_name, "type": kind, "link": None}
            if group == "optional" and not is_widget(kind, options):
                slot["shape"] = 7
            if is_widget(kind, options):
                slot["widget"] = {"name": input_name}
            elif input_name not in node["inputs"] and group == "required":
                raise ValueError(f"node {node_id} ({schema.node_id}) lacks its input {input_name!r}")
            value = node["inputs"].get(input_name)
            if isinstance(value, list):
                source, output = value
                link_type = known[api[source]["class_type"]].RETURN_TYPES[output]
                links.append([len(links) + 1, int(source), output, int(node_id), len(slots), _type(link_type)])
                slot["link"] = len(links)
            slots.append(slot)
        values = [
            default_value(w) if w.name is None or isinstance(node["inputs"].get(w.name), list)
            else node["inputs"].get(w.name, default_value(w))
            for w in widgets(node_class)
        ]  # fmt: skip
        outputs = [
            {"name": out_name, "type": _type(out_type), "links": None}
            for out_name, out_type in zip(node_class.RETURN_NAMES, node_class.RETURN_TYPES, strict=True)
        ]
        properties: dict[str, Any] = {
            "Node name for S&R": schema.node_id,
            "cnr_id": "comfyui-mend" if ours else "comfy-core",
        }
        if models and node_id in models:
            properties["models"] = models[node_id]
        nodes[node_id] = {
            "id": int(node_id),
            "type": schema.node_id,
            "pos": boxes[node_id][0],
            "size": boxes[node_id][1],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": slots,
            "outputs": outputs,
            "properties": properties,
            "widgets_values": values,
        }
        title = (node.get("_meta") or {}).get("title")
        if title and title != schema.display_name:
            nodes[node_id]["title"] = title
    for link_id, source, output, *_ in links:
        slot = nodes[str(source)]["outputs"][output]
        slot["links"] = [*(slot["links"] or []), link_id]

    last = max(int(node_id) for node_id in api)
    for note, text in notes.items():
        last += 1
        nodes[note] = {
            "id": last, "type": "MarkdownNote", "pos": boxes[note][0], "size": boxes[note][1], "flags": {},
            "order": len(nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text],
            "color": "#432", "bgcolor": "#653",
        }  # fmt: skip
    framed = []
    for number, (title, members) in enumerate(groups.items(), start=1):
        left, top, right, bottom = _around([_box(nodes[member]) for member in members])
        bounding = [left - MARGIN, top - MARGIN - GROUP_TITLE, right - left + 2 * MARGIN]
        bounding.append(bottom - top + 2 * MARGIN + GROUP_TITLE)
        framed.append(
            {"id": number, "title": title, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}}
        )
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-mend/workflows/{name}")),
        "revision": 0,
        "last_node_id": last,
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": framed,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _type(kind: Any) -> str:
    return "COMBO" if isinstance(kind, list) else kind


def _topological(api: Mapping[str, Mapping[str, Any]]) -> list[str]:
    done: list[str] = []

    def visit(node_id: str) -> None:
        if node_id not in done:
            for value in api[node_id]["inputs"].values():
                if isinstance(value, list):
                    visit(value[0])
            done.append(node_id)

    for node_id in api:
        visit(node_id)
    return done


Box = tuple[float, float, float, float]


def _box(node: Mapping[str, Any]) -> Box:
    """Left, top, right, bottom of a node with its title bar."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def _around(boxes: Sequence[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _apart(a: Box, b: Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def overlaps(workflow: Mapping[str, Any]) -> list[str]:
    """What lies on top of something else: nodes on nodes, groups on groups, and nodes cut by a group's frame."""
    nodes = {f"{node['type']} {node['id']}": _box(node) for node in workflow["nodes"]}
    frames = {}
    for group in workflow.get("groups") or []:
        x, y, width, height = group["bounding"]
        frames[f"group {group['title']!r}"] = (x, y, x + width, y + height)
    found = []
    for boxes in (nodes, frames):
        names = list(boxes)
        pairs = ((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
        found += [f"{a} and {b} overlap" for a, b in pairs if not _apart(boxes[a], boxes[b])]
    for name, box in nodes.items():
        for title, frame in frames.items():
            inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if not inside and not _apart(box, frame):
                found.append(f"the frame of {title} cuts {name}")
    return found


def cramped(workflow: Mapping[str, Any]) -> list[str]:
    """Nodes that the page will draw larger than the file says, over what lies below them."""
    known, found = classes(), []
    for node in workflow["nodes"]:
        if node["type"] in known and node["size"][1] < node_size(known[node["type"]])[1] - 4:
            found.append(f"{node['type']} {node['id']} is too small: run make_workflow.py --respace")
    return found


def plain(api: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Class and inputs of every node, by id: what must agree between the two forms."""
    return {node_id: {"class_type": n["class_type"], "inputs": dict(n["inputs"])} for node_id, n in api.items()}


def write(
    name: str,
    api: Mapping[str, Mapping[str, Any]],
    columns: Sequence[Sequence[str]],
    groups: Mapping[str, Sequence[str]] | None = None,
    notes: Mapping[str, str] | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
    models: Mapping[str, list[dict[str, str]]] | None = None,
    thumbnail: str | Path | None = None,
) -> None:
    """Writes the files of a workflow; see `layout`. Raises ValueError for an invalid graph or overlapping boxes."""
    known = classes()
    complete = {}
    for node_id, node in api.items():  # the API format fills nothing in: name every widget
        values = {w.name: default_value(w) for w in widgets(known[node["class_type"]]) if w.name is not None}
        title = (node.get("_meta") or {}).get("title") or known[node["class_type"]].GET_SCHEMA().display_name
        inputs = {**values, **node["inputs"]}
        complete[node_id] = {"class_type": node["class_type"], "inputs": inputs, "_meta": {"title": title}}
    _, error, _, node_errors = validate_prompt(json.loads(json.dumps(complete)), known)
    if error or node_errors:
        raise ValueError(describe_errors(error, node_errors))
    ui = layout(name, complete, columns, groups, notes, sizes, models)
    if overlaps(ui):
        raise ValueError("\n".join(overlaps(ui)))
    if plain(to_api(ui, known)) != plain(complete):
        raise ValueError("the two forms differ after conversion")
    for path, content in ((WORKFLOWS / f"{name}.json", ui), (WORKFLOWS / "api" / f"{name}.json", complete)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if thumbnail is not None:
        save_thumbnail(Image.open(thumbnail).convert("RGB"), name)


def as_thumbnail(picture: Image.Image) -> Image.Image:
    """A copy as large as thumbnails of workflows are."""
    small = picture.copy()
    small.thumbnail((640, 640), Image.Resampling.LANCZOS, reducing_gap=None)
    return small


def save_thumbnail(picture: Image.Image, name: str) -> None:
    """Writes the thumbnail of a workflow."""
    as_thumbnail(picture).save(WORKFLOWS / f"{name}.jpg", quality=85, optimize=True)


def archive(version: str) -> None:
    """Keeps what engine and page need of every shipped workflow, for good: an archive is never written again."""
    folder = ARCHIVE / version
    folder.mkdir(parents=True)
    for path in sorted(WORKFLOWS.glob("*.json")):
        ui = read(path)
        nodes = [
            {
                "id": node["id"],
                "type": node["type"],
                "inputs": [
                    {key: slot[key] for key in ("name", "link", "widget") if key in slot} for slot in node["inputs"]
                ],
                "widgets_values": node["widgets_values"],
            }
            for node in ui["nodes"]
            if node["type"] not in DRAWN_ONLY
        ]
        kept = {"api": plain(read(WORKFLOWS / "api" / path.name)), "page": {"nodes": nodes, "links": ui["links"]}}
        (folder / path.name).write_text(
            json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
        )


def respace(name: str) -> None:
    """Lays a shipped workflow out again, in the same columns and groups, with the sizes that nodes have today."""
    ui, api = read(WORKFLOWS / f"{name}.json"), read(WORKFLOWS / "api" / f"{name}.json")
    entries = {n["id"]: f"note {n['id']}" if n["type"] == "MarkdownNote" else str(n["id"]) for n in ui["nodes"]}
    columns: dict[float, list[tuple[float, str]]] = {}
    for node in ui["nodes"]:
        columns.setdefault(node["pos"][0], []).append((node["pos"][1], entries[node["id"]]))
    groups = {}
    for group in ui["groups"]:
        x, y, width, height = group["bounding"]
        inside = [n for n in ui["nodes"] if not _apart(_box(n), (x, y, x + width, y + height))]
        groups[group["title"]] = [entries[n["id"]] for n in inside]
    sizes, known = {}, classes()
    for node in ui["nodes"]:
        kind = node["type"]
        least = note_size(node["widgets_values"][0]) if kind == "MarkdownNote" else node_size(known[kind])
        sizes[entries[node["id"]]] = [max(pair) for pair in zip(node["size"], least, strict=True)]
    write(
        name,
        api,
        [[entry for _, entry in sorted(columns[x])] for x in sorted(columns)],
        groups,
        {entries[n["id"]]: n["widgets_values"][0] for n in ui["nodes"] if n["type"] == "MarkdownNote"},
        sizes,
        {str(n["id"]): n["properties"]["models"] for n in ui["nodes"] if "models" in n["properties"]},
    )


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--archive"]:
        archive(arguments[1])
        return 0
    names = [name for name in arguments if name != "--respace"]
    if "--respace" in arguments:
        for name in names:
            respace(name)
    known, wrong = classes(), 0
    for name in names:
        ui = read(WORKFLOWS / f"{name}.json")
        problems = overlaps(ui) + cramped(ui)
        if plain(to_api(ui, known)) != plain(read(WORKFLOWS / "api" / f"{name}.json")):
            problems.append("the UI file and the API file differ")
        for node in ui["nodes"]:
            print(f"{name}: {node['type']} {node['id']} at {node['pos']} size {node['size']}")
        print(f"{name}: {'; '.join(problems) or 'ok'}")
        wrong += bool(problems)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
