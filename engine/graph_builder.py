"""The built-in twin of `comfy_execution.graph_utils`: graphs that a node puts in its own place (expansion)."""

from __future__ import annotations

from typing import Any, ClassVar


def is_link(value: Any) -> bool:
    """True for [node id, output slot]."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))
    )


class Node:
    """One node of a graph under construction."""

    def __init__(self, id: str, class_type: str, inputs: dict[str, Any]) -> None:
        self.id, self.class_type, self.inputs = id, class_type, inputs
        self.override_display_id: str | None = None

    def out(self, index: int) -> list:
        """The link that starts at an output."""
        return [self.id, index]

    def set_input(self, key: str, value: Any) -> None:
        """Sets an input; None takes it away."""
        if value is None:
            self.inputs.pop(key, None)
        else:
            self.inputs[key] = value

    def get_input(self, key: str) -> Any:
        return self.inputs.get(key)

    def set_override_display_id(self, node_id: str) -> None:
        """Shows this node's progress on another one."""
        self.override_display_id = node_id

    def serialize(self) -> dict[str, Any]:
        shown = {} if self.override_display_id is None else {"override_display_id": self.override_display_id}
        return {"class_type": self.class_type, "inputs": self.inputs, **shown}


class GraphBuilder:
    """Builds a graph in the API format. Ids start with the id of the node that expands and the number of the call, so
    that they are the same in every run and never clash."""

    _root: ClassVar[tuple[str, int]] = ("", 0)
    _graphs: ClassVar[int] = 0

    @classmethod
    def set_default_prefix(cls, prefix_root: str, call_index: int, graph_index: int = 0) -> None:
        """The engine says which call of which node builds graphs from now on."""
        cls._root, cls._graphs = (prefix_root, call_index), graph_index

    @classmethod
    def alloc_prefix(cls) -> str:
        """A prefix that no graph of this call has had."""
        prefix = f"{cls._root[0]}.{cls._root[1]}.{cls._graphs}."
        GraphBuilder._graphs += 1
        return prefix

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = self.alloc_prefix() if prefix is None else prefix
        self.nodes: dict[str, Node] = {}
        self._count = 0

    def node(self, class_type: str, id: str | None = None, **inputs: Any) -> Node:
        """Adds a node, or returns the one that already has this id."""
        if id is None:
            self._count += 1
            id = str(self._count)
        return self.nodes.setdefault(self.prefix + id, Node(self.prefix + id, class_type, inputs))

    def lookup_node(self, id: str) -> Node | None:
        return self.nodes.get(self.prefix + id)

    def remove_node(self, id: str) -> None:
        del self.nodes[self.prefix + id]

    def finalize(self) -> dict[str, dict[str, Any]]:
        """The graph, for `io.NodeOutput(expand=...)`."""
        return {node_id: node.serialize() for node_id, node in self.nodes.items()}
