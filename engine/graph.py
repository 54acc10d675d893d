"""A workflow while it runs: the nodes that were added to it, what each waits for, and which of them do equal work."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from .graph_builder import is_link
from .node_io import ComfyNode, Hidden
from .validation import DependencyCycleError, NodeClasses, Prompt, input_info

logger = logging.getLogger(__name__)


class NodeInputError(Exception):
    """A node asks for a lazy input that it does not have."""


class Graph:
    """The workflow, plus the nodes that expansions add while it runs."""

    def __init__(self, prompt: Prompt) -> None:
        self.original, self.added, self.parents, self.shown = prompt, {}, {}, {}

    def __getitem__(self, node_id: str) -> dict[str, Any]:
        return self.added[node_id] if node_id in self.added else self.original[node_id]

    def __contains__(self, node_id: str) -> bool:
        return node_id in self.added or node_id in self.original

    def add(self, node_id: str, node: dict[str, Any], parent: str) -> None:
        self.added[node_id], self.parents[node_id] = node, parent
        self.shown[node_id] = node.get("override_display_id", parent)

    def root(self, node_id: str) -> str:
        """The node of the original workflow that a node belongs to."""
        while node_id in self.parents:
            node_id = self.parents[node_id]
        return node_id

    def all_node_ids(self) -> list[str]:
        return [*self.original, *self.added]

    # The names that nodes asking for Hidden.dynprompt know.
    get_node = __getitem__
    has_node = __contains__
    get_real_node_id = root

    def get_parent_node_id(self, node_id: str) -> str | None:
        return self.parents.get(node_id)

    def get_display_node_id(self, node_id: str) -> str:
        while node_id in self.shown:
            node_id = self.shown[node_id]
        return node_id

    def get_original_prompt(self) -> Prompt:
        return self.original


class Schedule:
    """What is still to run, and what each of it waits for."""

    def __init__(self, graph: Graph, classes: NodeClasses, is_done: Callable[[str], bool]) -> None:
        self.graph, self.classes, self.is_done = graph, classes, is_done
        self.waiting: dict[str, set[str]] = {}

    def add(self, node_id: str) -> None:
        """Adds a node and, unless their results are there, everything that it needs at once."""
        todo = [node_id]
        while todo:
            current = todo.pop()
            if current in self.waiting:
                continue
            self.waiting[current] = set()
            node = self.graph[current]
            types = self.classes[node["class_type"]].INPUT_TYPES()
            for name, value in node["inputs"].items():
                if is_link(value) and not input_info(types, name)[2].get("lazy") and not self.is_done(value[0]):
                    self.waiting[current].add(value[0])
                    todo.append(value[0])

    def require(self, node_id: str, source: str) -> None:
        """`node_id` cannot go on without `source`."""
        if not self.is_done(source):
            self.add(source)
            self.waiting[node_id].add(source)

    def require_input(self, node_id: str, name: str) -> None:
        """A lazy input turned out to be needed."""
        inputs = self.graph[node_id]["inputs"]
        if name not in inputs:
            problem = "but there is no input to that node at all"
        elif not is_link(inputs[name]):
            problem = "but that value is a constant"
        else:
            self.require(node_id, inputs[name][0])
            return
        raise NodeInputError(f"Node {node_id} says it needs input {name}, {problem}")

    def finish(self, node_id: str) -> None:
        """`node_id` has run."""
        del self.waiting[node_id]
        for sources in self.waiting.values():
            sources.discard(node_id)

    def pick(self) -> str:
        """The next node: output nodes first, then what leads to one in the fewest steps, so that pictures show early."""
        ready = [node_id for node_id, sources in self.waiting.items() if not sources]
        if not ready:
            raise DependencyCycleError("Dependency cycle detected")

        def is_output(node_id: str) -> bool:
            return self.classes[self.graph[node_id]["class_type"]].OUTPUT_NODE

        nearest = {node_id for node_id in self.waiting if is_output(node_id)}
        for _ in range(3):
            found = next((node_id for node_id in ready if node_id in nearest), None)
            if found is not None:
                return found
            nearest = {source for node_id in nearest for source in self.waiting[node_id]}
        return ready[0]


class Signatures:
    """A number per node that is equal for equal work: same class, fingerprint, constants, and the same above it."""

    def __init__(self, graph: Graph, classes: NodeClasses, numbers: dict[Any, int]) -> None:
        self.graph, self.classes, self._numbers = graph, classes, numbers
        self._known: dict[str, int] = {}
        self._prints: dict[str, Any] = {}

    def of(self, node_id: str) -> int:
        """The signature of a node; one that does not exist gets a new one each time."""
        seen, stack = set(), [node_id]
        while stack:  # sources first, without recursion: graphs may be long
            current = stack.pop()
            if current in self._known:
                continue
            if current not in self.graph:
                return self._number(object())
            sources = [v[0] for v in self.graph[current]["inputs"].values() if is_link(v) and v[0] not in self._known]
            sources = [s for s in sources if s in self.graph]
            if sources and current not in seen:
                seen.add(current)
                stack += [current, *sources]
                continue
            self._known[current] = self._number(self._describe(current))
        return self._known[node_id]

    def _number(self, description: Any) -> int:
        return self._numbers.setdefault(description, len(self._numbers))

    def _describe(self, node_id: str) -> tuple:
        node = self.graph[node_id]
        node_class = self.classes[node["class_type"]]
        own = ()
        if node_class.NOT_IDEMPOTENT or Hidden.unique_id in (node_class.GET_SCHEMA().hidden or []):
            own = (node_id,)
        inputs = []
        for name, value in sorted(node["inputs"].items()):
            if is_link(value):
                inputs.append((name, "ANCESTOR", self._known.get(value[0], object()), value[1]))
            else:
                inputs.append((name, hashable(value)))
        return (node["class_type"], self._fingerprint(node_id, node, node_class), own, *inputs)

    def _fingerprint(self, node_id: str, node: dict[str, Any], node_class: type[ComfyNode]) -> Any:
        if node_class.overridden("fingerprint_inputs") is None:
            return False
        types = node_class.INPUT_TYPES()
        known = {name: value for name, value in node["inputs"].items() if input_info(types, name)[0] is not None}
        constants = {name: None if is_link(value) else value for name, value in known.items()}
        try:
            return hashable(node_class.PREPARE_CLASS_CLONE(None).fingerprint_inputs(**constants))
        except Exception as error:
            logger.warning("WARNING: %s (%s %s runs every time)", error, node["class_type"], node_id)
            return object()


def hashable(value: Any) -> Any:
    """Plain data in a form that can be compared; anything else, and NaN, is different from everything."""
    if isinstance(value, float) and math.isnan(value):
        return object()
    if value is None or isinstance(value, (str, int, float, bool)):
        return (type(value).__name__, value)
    if isinstance(value, Mapping):
        return ("dict", tuple(sorted((str(k), hashable(v)) for k, v in value.items())))
    if isinstance(value, (list, tuple)):
        return ("list", tuple(hashable(v) for v in value))
    return object()
