"""Runs workflows without ComfyUI, as ComfyUI runs them.

The same checks before anything runs, only what leads to an output node, each node once its inputs are there, lazy
inputs on demand, lists item by item, graphs that a node puts in its own place, results kept from run to run for as
long as neither a node nor anything above it changed, everything under `torch.inference_mode()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import Cancelled
from . import host
from .graph import Graph, Schedule, Signatures
from .graph_builder import GraphBuilder, is_link
from .node_io import ComfyNode, ExecutionBlocker, Hidden, NodeOutput
from .validation import (
    NodeClasses,
    Prompt,
    describe_errors,
    full_type_name,
    input_info,
    output_nodes,
    slice_inputs,
    validate_prompt,
)

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_TIP = (
    "This error means you ran out of memory on your GPU.\n\nTIPS: If the workflow worked before you might have "
    "accidentally set the batch_size to a large number."
)


class DuplicateNodeError(Exception):
    """An expansion uses an id that the graph already has."""


@dataclass
class Result:
    """How a run went; the names are those of ComfyUI's history."""

    success: bool = False
    """No node failed and none was cancelled."""
    complete: bool = False
    """Every output node of the workflow has run or was still valid from before, and none was blocked."""
    outputs: dict[str, dict[str, list]] = field(default_factory=dict)
    """What nodes show, by node id."""
    values: dict[str, list[list]] = field(default_factory=dict)
    """What nodes returned: by node id a list per output."""
    executed: list[str] = field(default_factory=list)
    """Nodes in the order in which they ran; those of expansions included."""
    cached: list[str] = field(default_factory=list)
    """Nodes whose results were still valid."""
    error: dict[str, Any] | None = None
    """Why nothing could run, as the server answers a bad prompt."""
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was wrong with nodes, by id; the output nodes above which all was well ran all the same."""
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """execution_start, execution_cached, execution_error, execution_interrupted, execution_success."""
    exception: BaseException | None = None
    """What a node raised."""

    def describe(self) -> str:
        """What went wrong, for a person; empty if nothing did."""
        lines = [describe_errors(self.error, self.node_errors)]
        for event, data in self.messages:
            if event == "execution_error":
                lines.append(f"{data['node_type']} {data['node_id']}: {data['exception_message'].strip()}")
            elif event == "execution_interrupted":
                lines.append(f"cancelled in {data['node_type']} {data['node_id']}")
        return "\n".join(line for line in lines if line)


@dataclass
class _Kept:
    """A node's results, kept for the next run."""

    outputs: list[list]
    ui: dict[str, list]
    root: str | None
    """For a node of an expansion: the node of the original workflow that it belongs to."""


class _Pending(Exception):
    """The node has to wait: for a lazy input, or for the graph that it put in its own place."""


class Runner:
    """Runs workflows in the API format and keeps results between runs.

    `classes` maps class_type to node class. `progress(node_id, done, total, preview)` is called while nodes work;
    `interrupt()` is asked between nodes and inside their loops whether to stop.
    """

    def __init__(
        self,
        classes: NodeClasses,
        progress: Callable[[str, int, int, Any], None] | None = None,
        interrupt: Callable[[], bool] | None = None,
    ) -> None:
        self.classes, self.progress, self.interrupt = classes, progress, interrupt
        self.kept: dict[int, _Kept] = {}
        self.numbers: dict[Any, int] = {}

    def forget(self) -> None:
        """Drops every result kept."""
        self.kept.clear()
        self.numbers.clear()

    def forget_shown(self) -> None:
        """Drops the results of nodes that show or save something: they run again, everything above them is kept."""
        for signature in [s for s, entry in self.kept.items() if entry.ui]:
            del self.kept[signature]

    def run(self, prompt: Prompt, extra_pnginfo: Mapping[str, Any] | None = None) -> Result:
        """Checks the whole workflow, then runs every output node that passed.

        What nodes raise is in the result, not raised. `extra_pnginfo` goes into saved pictures: {"workflow": the UI
        format} as a rule.
        """
        prompt = copy.deepcopy(prompt)
        valid, error, outputs, node_errors = validate_prompt(prompt, self.classes)
        result = Result(error=error, node_errors=node_errors)
        if not valid:
            return result
        run = _Run(self, prompt, result, dict(extra_pnginfo or {}))
        host.set_hooks(progress=run.report_progress, interrupt=self.interrupt)
        try:
            with torch.inference_mode():
                asyncio.run(run.execute(outputs))
        finally:
            host.set_hooks(progress=None, interrupt=None)
        wanted = set(output_nodes(prompt, self.classes))
        finished = {*result.executed, *result.cached} - run.blocked
        result.complete = result.success and not node_errors and wanted <= finished
        return result


class _Run:
    """One run of a `Runner`."""

    def __init__(self, runner: Runner, prompt: Prompt, result: Result, extra_pnginfo: dict[str, Any]) -> None:
        self.runner, self.classes, self.result, self.extra_pnginfo = runner, runner.classes, result, extra_pnginfo
        self.graph = Graph(prompt)
        self.signatures = Signatures(self.graph, self.classes, runner.numbers)
        self.schedule = Schedule(self.graph, self.classes, lambda node_id: self.kept(node_id) is not None)
        self.expanded: dict[str, list[tuple[bool, tuple]]] = {}
        self.uis: dict[str, dict[str, list]] = {}
        self.blocked: set[str] = set()
        self.touched: set[int] = set()
        self.current, self.current_inputs = "", {}

    def kept(self, node_id: str) -> _Kept | None:
        """The node's results, from this run or an earlier one."""
        signature = self.signatures.of(node_id)
        self.touched.add(signature)
        return self.runner.kept.get(signature)

    def report_progress(self, done: int, total: int, preview: Any) -> None:
        if self.runner.progress is not None:
            self.runner.progress(self.graph.get_display_node_id(self.current), done, total, preview)

    def message(self, event: str, **data: Any) -> None:
        self.result.messages.append((event, {**data, "timestamp": int(time.time() * 1000)}))

    async def execute(self, outputs: Iterable[str]) -> None:
        """Runs the output nodes and what they need; drops results that no longer belong to the workflow."""
        self.message("execution_start")
        original, kept = self.graph.original, self.runner.kept
        current = {self.signatures.of(node_id) for node_id in original}
        self._drop(s for s, entry in kept.items() if s not in current and entry.root not in original)
        self.result.cached = [node_id for node_id in original if self.kept(node_id) is not None]
        self.message("execution_cached", nodes=list(self.result.cached))
        self.result.success = await self._run_all(outputs)
        for node_id in original:
            entry = self.kept(node_id)
            if entry is not None:
                self.result.values[node_id] = entry.outputs
        self.result.outputs = {n: ui for n in self.graph.all_node_ids() if (ui := self._ui(n))}
        if self.result.success:
            self.message("execution_success")
        ran = {self.graph.root(node_id) for node_id in self.result.executed}
        self._drop(s for s, e in kept.items() if s not in self.touched and e.root in ran)

    def _ui(self, node_id: str) -> dict[str, list]:
        entry = self.kept(node_id)
        return entry.ui if entry is not None else self.uis.get(node_id, {})

    def _drop(self, signatures: Iterable[int]) -> None:
        for signature in list(signatures):
            del self.runner.kept[signature]

    async def _run_all(self, outputs: Iterable[str]) -> bool:
        node_id = ""
        try:
            for node_id in outputs:
                self.schedule.add(node_id)
            while self.schedule.waiting:
                node_id = self.schedule.pick()
                with contextlib.suppress(_Pending):
                    await self._run_node(node_id)
                    self.schedule.finish(node_id)
        except Cancelled as error:
            self._fail("execution_interrupted", node_id, error)
            return False
        except Exception as error:
            logger.error(
                "%s %s: %s",
                self.graph[node_id]["class_type"],
                node_id,
                error,
                exc_info=logger.isEnabledFor(logging.DEBUG),
            )
            tip = OUT_OF_MEMORY_TIP if host.is_out_of_memory(error) else ""
            self._fail(
                "execution_error",
                node_id,
                error,
                exception_message=f"{error}\n{tip}",
                exception_type=full_type_name(error),
                traceback=traceback.format_tb(error.__traceback__),
                current_inputs={name: [str(v) for v in values] for name, values in self.current_inputs.items()},
                current_outputs=[n for n in self.graph.all_node_ids() if self.kept(n) is not None],
            )
            return False
        return True

    def _fail(self, event: str, node_id: str, error: BaseException, **data: Any) -> None:
        self.result.exception = error.with_traceback(None)  # its frames would keep the node's tensors alive
        root = self.graph.root(node_id)
        kind = self.graph.original[root]["class_type"]
        self.message(event, node_id=root, node_type=kind, executed=list(self.result.executed), **data)

    async def _run_node(self, node_id: str) -> None:
        """Runs a node whose inputs are there. Raises `_Pending` if it has to be taken up again later."""
        self.current, self.current_inputs = node_id, {}
        if self.kept(node_id) is not None:  # an equal node has run in the meantime
            if node_id not in self.result.cached:
                self.result.cached.append(node_id)
            return
        node_class = self.classes[self.graph[node_id]["class_type"]]
        if node_id in self.expanded:
            outputs = merge_outputs([self._resolve(*part) for part in self.expanded[node_id]], node_class)
        else:
            values, missing = self._inputs(node_id)
            self.current_inputs = values
            hidden = self._hidden(node_id, node_class)
            self._ask_for_lazy(node_id, node_class, hidden, values, missing)
            returned = await self._call(node_id, node_class, hidden, values)
            self.uis[node_id] = merge_ui([r.ui for r in returned if r.ui is not None])
            parts = [(r.expand is not None, self._result(r, node_class)) for r in returned]
            if any(expands for expands, _ in parts):
                self._expand(node_id, [r.expand for r in returned], parts)
                raise _Pending
            outputs = merge_outputs([part for _, part in parts if part is not None], node_class)
        root = self.graph.root(node_id) if node_id in self.graph.parents else None
        self.runner.kept[self.signatures.of(node_id)] = _Kept(outputs, self.uis.get(node_id, {}), root)
        self.result.executed.append(node_id)

    def _inputs(self, node_id: str) -> tuple[dict[str, Any], set[str]]:
        """A list of values per input, and the inputs whose source has not run."""
        node = self.graph[node_id]
        types = self.classes[node["class_type"]].INPUT_TYPES(include_hidden=False)
        values: dict[str, Any] = {}
        missing: set[str] = set()
        for name, value in node["inputs"].items():
            group, _, options = input_info(types, name)
            if is_link(value) and not options.get("rawLink"):
                source = self.kept(value[0])
                if source is None or value[1] >= len(source.outputs):
                    values[name] = (None,)
                    missing.add(name)
                else:
                    values[name] = source.outputs[int(value[1])]
            elif group is not None:
                values[name] = [value]
        return values, missing

    def _hidden(self, node_id: str, node_class: type[ComfyNode]) -> dict[Hidden, Any]:
        known = {
            Hidden.unique_id: node_id,
            Hidden.prompt: self.graph.original,
            Hidden.dynprompt: self.graph,
            Hidden.extra_pnginfo: self.extra_pnginfo,
        }
        return {name: known.get(name) for name in node_class.GET_SCHEMA().hidden or []}

    def _ask_for_lazy(
        self,
        node_id: str,
        node_class: type[ComfyNode],
        hidden: dict[Hidden, Any],
        values: dict[str, Any],
        missing: set[str],
    ) -> None:
        if node_class.overridden("check_lazy_status") is None:
            return
        needed: set[str] = set()
        for call in [values] if node_class.INPUT_IS_LIST else slice_inputs(values):
            if not any(isinstance(value, ExecutionBlocker) for value in call.values()):
                needed.update(node_class.PREPARE_CLASS_CLONE(hidden).check_lazy_status(**call) or [])
        needed = {name for name in needed if name not in values or name in missing}
        for name in sorted(needed):
            self.schedule.require_input(node_id, name)
        if needed:
            raise _Pending

    async def _call(
        self, node_id: str, node_class: type[ComfyNode], hidden: dict[Hidden, Any], values: dict[str, Any]
    ) -> list[NodeOutput]:
        """Runs the node once per item of its inputs, or once with the lists if it takes lists."""
        returned, ran = [], False
        takes_lists = node_class.INPUT_IS_LIST
        for index, call in enumerate([values] if takes_lists else slice_inputs(values)):
            host.check_interrupt()
            given = (item for value in call.values() for item in (value if takes_lists else [value]))
            blocker = next((item for item in given if isinstance(item, ExecutionBlocker)), None)
            if blocker is None:
                GraphBuilder.set_default_prefix(node_id, index)
                returned.append(await node_class.run(hidden, **call))
                ran = True
            else:
                self._report_block(node_id, blocker)
                returned.append(NodeOutput(*[ExecutionBlocker(None)] * len(node_class.RETURN_TYPES)))
        if not ran:
            self.blocked.add(node_id)
        return returned

    def _report_block(self, node_id: str, blocker: ExecutionBlocker) -> None:
        if blocker.message is not None:
            self.message(
                "execution_error",
                node_id=node_id,
                node_type=self.graph[node_id]["class_type"],
                executed=list(self.result.executed),
                exception_message=f"Execution Blocked: {blocker.message}",
                exception_type="ExecutionBlocked",
                traceback=[],
                current_inputs=[],
                current_outputs=[],
            )

    @staticmethod
    def _result(returned: NodeOutput, node_class: type[ComfyNode]) -> tuple | None:
        if returned.block_execution is not None and (returned.result is not None or returned.expand is not None):
            return (ExecutionBlocker(returned.block_execution),) * len(node_class.RETURN_TYPES)
        return returned.result

    def _expand(self, node_id: str, graphs: list[dict | None], parts: list[tuple[bool, tuple | None]]) -> None:
        """Puts the graphs that a node returned into the workflow; the node takes its results from them."""
        added = []
        for new_id, node in (item for graph in graphs for item in (graph or {}).items()):
            if new_id in self.graph:
                raise DuplicateNodeError(
                    f"Attempt to add duplicate node {new_id}. Ensure node ids are unique and deterministic or use "
                    "graph_utils.GraphBuilder."
                )
            self.graph.add(new_id, node, node_id)
            added.append(new_id)
        self.expanded[node_id] = [(expands, part or ()) for expands, part in parts]
        for new_id in added:
            if self.classes[self.graph[new_id]["class_type"]].OUTPUT_NODE:
                self.schedule.add(new_id)
        for expands, part in self.expanded[node_id]:
            for value in part if expands else ():
                if is_link(value):
                    self.schedule.require(node_id, value[0])

    def _resolve(self, expands: bool, part: tuple) -> tuple:
        """An expansion's results with the links in them replaced by what came out there."""
        if not expands:
            return part
        resolved: list[Any] = []
        for value in part:
            resolved += self.kept(value[0]).outputs[value[1]] if is_link(value) else [value]
        return tuple(resolved)


def merge_outputs(results: list[tuple], node_class: type[ComfyNode]) -> list[list]:
    """The results of a node's calls as a list per output; outputs declared as lists are joined."""
    if not results:
        return []
    merged: list[list] = []
    is_list = node_class.OUTPUT_IS_LIST or [False] * len(results[0])
    for position, (joined, _) in enumerate(zip(is_list, results[0], strict=False)):
        items: list[Any] = []
        for result in results:
            value = result[position]
            items += value if joined and not isinstance(value, ExecutionBlocker) else [value]
        merged.append(items)
    return merged


def merge_ui(uis: list[Any]) -> dict[str, list]:
    """What a node's calls show, joined by key."""
    shown = [ui if isinstance(ui, dict) else ui.as_dict() for ui in uis]
    return {key: [item for ui in shown for item in ui[key]] for key in shown[0]} if shown else {}
