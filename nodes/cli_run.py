"""`mend run`: runs a workflow file of either format."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..engine import folders, host
from ..engine.runner import Result, Runner
from ..engine.validation import Prompt
from ..engine.workflow_format import is_ui, read, to_api
from ..errors import InputError, WorkflowError

SHIPPED = host.PACK / "workflows"


def main(arguments: Sequence[str]) -> int:
    """Returns 0 only if every output node ran."""
    args = _parser().parse_args(arguments)
    _set_folders(args.input, args.output)
    workflow = read(find_workflow(args.workflow))
    extra = {"workflow": workflow} if is_ui(workflow) else None
    if args.engine == "comfyui":
        from ..engine.comfyui import ComfyUI

        with ComfyUI.start(device=args.device) as comfyui:
            prompt = to_api(workflow, comfyui.classes)
            assign(prompt, args.set)
            result, output = comfyui.run(prompt, extra), comfyui.output
    else:
        host.set_device(args.device)
        classes = builtin_classes()
        prompt = to_api(workflow, classes)
        assign(prompt, args.set)
        with _Bar(prompt, args.quiet) as bar:
            result, output = Runner(classes, progress=bar.update).run(prompt, extra), folders.output_directory()
    _report(prompt, result, output)
    return 0 if result.complete else 1


def _set_folders(source: str | None, output: str | None) -> None:
    """Where pictures come from and go to. Raises InputError for folders that cannot be that."""
    if source is not None and not Path(source).is_dir():
        raise InputError(f"--input: there is no folder {source}")
    if output is not None and Path(output).is_file():
        raise InputError(f"--output: {output} is a file; name a folder")
    folders.set_folders(inputs=None if source is None else [source], output=output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mend run", description="Runs a workflow, as saved by the page or exported.")
    parser.add_argument("workflow", help="a workflow file, or the name of one that comes with Mend")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change an input first; NODE is an id, or a title or node type that occurs once",
    )
    parser.add_argument("--input", metavar="DIR", help="look for pictures here first")
    parser.add_argument("--output", metavar="DIR", help='where results go (default: "output" here)')
    parser.add_argument("--engine", choices=["builtin", "comfyui"], default="builtin", help="who runs it")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def builtin_classes() -> dict[str, Any]:
    """Every node class of the built-in engine by its id: twins of core nodes, and the pack's own."""
    from ..engine import core_nodes
    from . import node_classes

    return {node.GET_SCHEMA().node_id: node for node in [*core_nodes.NODES, *node_classes()]}


def find_workflow(name: str) -> Path:
    """A path, or one of the shipped workflows by name. Raises WorkflowError."""
    path, shipped = Path(name), SHIPPED / f"{Path(name).stem}.json"
    if path.is_file():
        return path
    if path.name in (shipped.stem, shipped.name) and path.parent == Path() and shipped.is_file():
        return shipped
    known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
    raise WorkflowError(f"there is no workflow file {name}; those that come with Mend: {known or 'none'}")


def assign(prompt: Prompt, assignments: Sequence[str]) -> None:
    """Applies NODE.INPUT=VALUE to a prompt. VALUE is read as JSON where it is any, else as text."""
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        node_name, dot, input_name = target.rpartition(".")
        if not equals or not dot:
            raise WorkflowError(f"--set {assignment!r}: write it as NODE.INPUT=VALUE")
        node = prompt[find_node(prompt, node_name)]
        if input_name not in node["inputs"]:
            known = ", ".join(node["inputs"])
            raise WorkflowError(f"--set {assignment!r}: {node['class_type']} has the inputs {known}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        node["inputs"][input_name] = {"__value__": value} if isinstance(value, list) else value


def find_node(prompt: Prompt, name: str, option: str = "--set") -> str:
    """The id of a node named by its id, or by a title or type that occurs once. Raises WorkflowError."""
    if name in prompt:
        return name
    for found in (
        [i for i, node in prompt.items() if (node.get("_meta") or {}).get("title") == name],
        [i for i, node in prompt.items() if node["class_type"] == name],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise WorkflowError(f"{option}: {len(found)} nodes are called {name!r}; use an id: {', '.join(found)}")
    known = ", ".join(f"{i} {node['class_type']}" for i, node in prompt.items())
    raise WorkflowError(f"{option}: there is no node {name!r}; the workflow has {known}")


class _Bar:
    """A progress bar for the node that is working."""

    def __init__(self, prompt: Prompt, quiet: bool) -> None:
        self.prompt, self.quiet = prompt, quiet or not sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.node = ""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, node_id: str, done: int, total: int, preview: Any) -> None:
        if self.quiet:
            return
        if self.bar is None or self.node != node_id or done < self.bar.n:
            self.__exit__()
            self.node = node_id
            self.bar = tqdm(total=total, desc=self.prompt[node_id]["class_type"], leave=False)
        self.bar.total, self.bar.n = total, done
        self.bar.refresh()


def _report(prompt: Prompt, result: Result, output: Path) -> None:
    """Saved files and shown texts to standard output, what went wrong to standard error."""
    for node_id, shown in result.outputs.items():
        for entries in shown.values():
            for entry in entries:
                if isinstance(entry, dict) and entry.get("type") == "output":
                    sys.stdout.write(f"{output / entry.get('subfolder', '') / entry['filename']}\n")
        for text in shown.get("text", []):
            title = (prompt.get(node_id, {}).get("_meta") or {}).get("title") or node_id
            sys.stdout.write(f"{title}: {text}\n")
    if not result.complete:
        sys.stderr.write(f"{result.describe() or 'not every output node ran'}\n")
