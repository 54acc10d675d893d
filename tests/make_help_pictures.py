"""Makes pictures for help pages out of the shipped workflows: what goes into a node's part of the graph, and what comes out.

    python tests/make_help_pictures.py            # every page without a picture that was made by hand
    python tests/make_help_pictures.py MendRestore MendMixNoise

Runs the smallest workflow that has the node in the built-in engine and writes web/docs/<Node>/result.jpg: the pictures
that the node takes, then its own; for a node that gives none, the next picture that depends on it. A page that does not
show its picture yet gets a line for it after its first paragraph. Nodes whose workflows need files that do not come with
Mend, and those that only give text, are left out and named.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_workflow import ROOT, WORKFLOWS, classes, missing_models
from PIL import Image

from comfyui_mend.engine import folders
from comfyui_mend.engine.runner import Runner
from comfyui_mend.engine.workflow_format import read
from comfyui_mend.nodes import node_classes

logger = logging.getLogger(__name__)

PAGES = ROOT / "web" / "docs"
NAME = "result.jpg"
HEIGHT, LARGEST_WIDTH, GAP, PANELS = 200, 720, 6, 3
CAPTIONS = {"en": "What goes in and what comes out, in the workflow {}", "zh": "工作流 {} 中的输入与结果"}
Graph = Mapping[str, Mapping[str, Any]]


def links(graph: Graph, node_id: str) -> Iterator[tuple[str, str, int]]:
    """Input name, node and output of every wire into a node."""
    for name, value in graph[node_id]["inputs"].items():
        if isinstance(value, list) and len(value) == 2 and str(value[0]) in graph:
            yield name, str(value[0]), int(value[1])


def picture(values: Mapping[str, list], graph: Graph, known: Mapping[str, Any], source: str, output: int) -> Any:
    """The first IMAGE or MASK of an output as [H, W, 3] in 0..1, or None."""
    kinds = known[graph[source]["class_type"]].RETURN_TYPES
    if source not in values or output >= len(kinds) or kinds[output] not in ("IMAGE", "MASK"):
        return None
    tensor = next((v for v in values[source][output] if isinstance(v, torch.Tensor) and v.numel()), None)
    if tensor is None:
        return None
    first = tensor[0].float().cpu().clamp(0, 1)
    return (first[..., None] if kinds[output] == "MASK" else first[..., :3]).expand(*first.shape[:2], 3).numpy()


def own(values: Mapping[str, list], graph: Graph, known: Mapping[str, Any], node_id: str) -> Any:
    """The first picture that a node gives."""
    outputs = range(len(known[graph[node_id]["class_type"]].RETURN_TYPES))
    return next((p for o in outputs if (p := picture(values, graph, known, node_id, o)) is not None), None)


def downstream(graph: Graph, node_id: str) -> Iterator[str]:
    """The node and all that depend on it, the nearest first."""
    seen, row = {node_id}, [node_id]
    while row:
        yield from row
        row = [n for n in graph if n not in seen and any(source in row for _, source, _ in links(graph, n))]
        seen.update(row)


def upstream(graph: Graph, node_id: str) -> Iterator[tuple[str, int]]:
    """Outputs that a node depends on, the nearest first."""
    seen, row = set(), [node_id]
    while row:
        wires = [(s, o) for n in row for _, s, o in links(graph, n) if (s, o) not in seen]
        seen.update(wires)
        yield from wires
        row = list(dict.fromkeys(s for s, _ in wires))


def panels(values: Mapping[str, list], graph: Graph, known: Mapping[str, Any], node_id: str) -> list[np.ndarray]:
    """What is taken, at most two pictures, and what is given."""
    shown = next((n for n in downstream(graph, node_id) if own(values, graph, known, n) is not None), None)
    last = shown or node_id
    direct = [picture(values, graph, known, s, o) for _, s, o in links(graph, last)]
    taken = [p for p in direct if p is not None][: PANELS - 1]
    if not taken:
        found = (picture(values, graph, known, s, o) for s, o in upstream(graph, last))
        taken = [p for p in found if p is not None][:1]
    given = [] if shown is None else [own(values, graph, known, shown)]
    return [*taken, *given]


def compose(parts: Sequence[np.ndarray]) -> Image.Image:
    """The pictures side by side at one height, small ones enlarged pixel by pixel."""
    scaled = []
    for part in parts:
        image = Image.fromarray((part * 255).round().astype(np.uint8))
        how = Image.Resampling.NEAREST if image.height < HEIGHT // 3 else Image.Resampling.LANCZOS
        scaled.append(image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT), how))
    width = sum(s.width for s in scaled) + GAP * (len(scaled) - 1)
    sheet, left = Image.new("RGB", (width, HEIGHT), "white"), 0
    for image in scaled:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    sheet.thumbnail((LARGEST_WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return sheet


def by_hand(node: str) -> bool:
    """Whether a node's page has a picture that was made for it."""
    return any(p.suffix in (".jpg", ".png") and p.name != NAME for p in (PAGES / node).iterdir())


def show(node: str, workflow: str) -> None:
    """Puts the picture into a node's pages, after the first paragraph, where it is not there yet."""
    for language, caption in CAPTIONS.items():
        page = PAGES / node / f"{language}.md"
        blocks = page.read_text(encoding="utf-8").split("\n\n")
        line = f"![{caption.format(workflow)}]({node}/{NAME})"
        rest = [b for b in blocks if f"]({node}/{NAME})" not in b]
        page.write_text("\n\n".join([*rest[:2], line, *rest[2:]]).rstrip("\n") + "\n", encoding="utf-8")


def make(wanted: Iterable[str]) -> list[str]:
    """Makes the pictures of these nodes; returns the nodes that have none."""
    known, left = classes(), dict.fromkeys(wanted)
    graphs = {p.stem: read(p) for p in sorted((WORKFLOWS / "api").glob("*.json"))}
    for name, graph in sorted(graphs.items(), key=lambda item: len(item[1])):
        here = {n: graph[n]["class_type"] for n in graph if graph[n]["class_type"] in left}
        foreign = {g["class_type"] for g in graph.values()} - set(known)
        if not here or foreign or missing_models(read(WORKFLOWS / f"{name}.json")):
            continue
        logger.info("%s: %s", name, ", ".join(sorted(set(here.values()))))
        values = Runner(known).run(graph).values
        for node_id, node in here.items():
            parts = panels(values, graph, known, node_id) if node in left else []
            if parts:
                compose(parts).save(PAGES / node / NAME, quality=78)
                show(node, name)
                del left[node]
    return list(left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nodes", nargs="*", help="ids of nodes; none: all whose pages have no picture made by hand")
    chosen = parser.parse_args().nodes or [n for n in sorted(p.name for p in PAGES.iterdir()) if not by_hand(n)]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)
    assert set(chosen) <= {node.GET_SCHEMA().node_id for node in node_classes()}
    with tempfile.TemporaryDirectory() as place:
        folders.set_folders(inputs=[], output=Path(place), temp=Path(place) / "temp")
        missing = make(chosen)
    logger.info("without a picture: %s", ", ".join(missing) or "none")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
