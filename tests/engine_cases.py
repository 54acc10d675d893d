"""Small nodes and workflows that ask an engine what it does: run by the built-in one and by a real ComfyUI alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Nodes:
    """Node classes made for one engine's node API; `calls` notes every execution."""

    io: Any
    graph_builder: Any
    calls: list[str] = field(default_factory=list)
    fingerprint: list[Any] = field(default_factory=lambda: [0])
    """What the node Watched says about itself; empty makes it fail."""
    classes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _define(self)

    def add(
        self,
        node_id: str,
        inputs: Callable[[], list] = list,
        outputs: Callable[[], list] = list,
        execute: Callable[..., Any] | None = None,
        methods: dict[str, Callable] | None = None,
        **schema: Any,
    ) -> Any:
        """Makes a node class of a function and keeps it under its id."""

        def define_schema(cls: Any) -> Any:
            return self.io.Schema(node_id=node_id, inputs=inputs(), outputs=outputs(), **schema)

        def run(cls: Any, **values: Any) -> Any:
            self.calls.append(node_id)
            return execute(cls, **values)

        members = {"define_schema": define_schema, "execute": run, **(methods or {})}
        made = type(node_id, (self.io.ComfyNode,), {k: classmethod(v) for k, v in members.items()})
        self.classes[node_id] = made
        return made


def _define(nodes: Nodes) -> None:
    io, add = nodes.io, nodes.add

    def integer(*names: str) -> Callable[[], list]:
        return lambda: [io.Int.Input(name) for name in names]

    def number() -> list:
        return [io.Int.Input("number", default=1, min=0, max=10)]

    def anything() -> list:
        return [io.AnyType.Input("value")]

    def one(kind: Any = io.Int, **more: Any) -> Callable[[], list]:
        return lambda: [kind.Output("out0", **more)]

    def expand(cls: Any, value: Any) -> Any:
        graph = nodes.graph_builder()
        once = graph.node("Add", a=value, b=value)
        graph.node("Show", value=once.out(0))
        return io.NodeOutput(once.out(0), expand=graph.finalize())

    def keep_state(cls: Any) -> None:
        cls.state = 1

    async def later(cls: Any, value: Any) -> Any:
        nodes.calls.append("Later")
        return io.NodeOutput(value)

    def switch_inputs() -> list:
        return [io.Boolean.Input("use_first"), *(io.AnyType.Input(n, lazy=True) for n in ("first", "second"))]

    def switch_asks(cls: Any, use_first: bool, first: Any = None, second: Any = None) -> list[str]:
        wanted, value = ("first", first) if use_first else ("second", second)
        return [wanted] if value is None else []

    add("Number", number, one(), lambda cls, number: io.NodeOutput(number))
    add("Add", integer("a", "b"), one(), lambda cls, a, b: io.NodeOutput(a + b))
    add("Show", anything, list, lambda cls, value: io.NodeOutput(ui={"value": [value]}), is_output_node=True)
    add("Pass", anything, one(io.AnyType), lambda cls, value: io.NodeOutput(value))
    add("Fail", anything, one(), lambda cls, value: 1 // 0)
    add("Picture", list, one(io.Image), lambda cls: io.NodeOutput(torch.zeros(1, 4, 4, 3)))
    add("Several", list, one(is_output_list=True), lambda cls: io.NodeOutput([1, 2, 3]))
    add("Two", list, one(is_output_list=True), lambda cls: io.NodeOutput([10, 20]))
    add(
        "Choice",
        lambda: [io.Combo.Input("mode", options=["a", "b"])],
        one(io.String),
        lambda cls, mode: io.NodeOutput(mode),
    )
    add("Double", anything, one(), expand, enable_expand=True)
    add("Rogue", list, one(), lambda cls: io.NodeOutput(1, expand={}))
    add("Block", anything, one(), lambda cls, value: io.NodeOutput(None, block_execution="not today"))
    add("Hush", anything, one(), lambda cls, value: io.NodeOutput(nodes_blocker(io, value)))
    add("Modes", anything, one(io.String), lambda cls, value: io.NodeOutput(str(torch.is_inference_mode_enabled())))
    add("Sum", anything, one(), lambda cls, value: io.NodeOutput(sum(value)), is_input_list=True)
    add(
        "Whoami",
        list,
        one(io.String),
        lambda cls: io.NodeOutput(cls.hidden.unique_id),
        hidden=[io.Hidden.unique_id],
    )
    add("Stateful", list, list, keep_state, is_output_node=True)
    add("Wrong", list, one(), lambda cls: {"result": (1,)})
    add("Nothing", list, one(), lambda cls: None)
    add("Tuple", list, one(), lambda cls: (5,))
    add("Later", anything, one(io.AnyType), None, {"execute": later})
    add(
        "Switch",
        switch_inputs,
        one(io.AnyType),
        lambda cls, use_first, first=None, second=None: io.NodeOutput(first if use_first else second),
        {"check_lazy_status": switch_asks},
    )
    add(
        "Greedy",
        lambda: [io.AnyType.Input("value", lazy=True)],
        one(io.AnyType),
        lambda cls, value=None: io.NodeOutput(value),
        {"check_lazy_status": lambda cls, value=None: ["nowhere"]},
    )
    add(
        "Watched",
        integer("number"),
        one(),
        lambda cls, number: io.NodeOutput(number),
        {"fingerprint_inputs": lambda cls, number: nodes.fingerprint[0]},
    )
    add(
        "Careful",
        number,
        list,
        lambda cls, number: io.NodeOutput(ui={"number": [number]}),
        {"validate_inputs": lambda cls, number: True if number != 13 else "thirteen is bad luck"},
        is_output_node=True,
    )
    add(
        "Optional",
        lambda: [io.Int.Input("a"), io.Int.Input("b", optional=True)],
        one(),
        lambda cls, a, b=100: io.NodeOutput(a + b),
    )


def nodes_blocker(io: Any, value: Any) -> Any:
    """A silent block for odd numbers, as a value."""
    if value % 2 == 0:
        return value
    blocker = getattr(io, "ExecutionBlocker", None)
    if blocker is None:
        from comfy_execution.graph_utils import ExecutionBlocker as blocker
    return blocker(None)


Prompt = dict[str, dict[str, Any]]


def graph(**nodes: tuple[str, dict[str, Any]]) -> Prompt:
    """graph(n1=("Number", {"number": 3}), ...) as a prompt; ids lose their leading "n"."""
    return {key[1:]: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def show(kind: str, inputs: dict[str, Any]) -> Prompt:
    """One node, shown."""
    return graph(n1=(kind, inputs), n2=("Show", {"value": ["1", 0]}))


def chain(*kinds: str, **first: Any) -> Prompt:
    """Nodes with one input `value` below each other, then shown; `first` are the inputs of the first."""
    prompt, inputs = {}, first
    for number, kind in enumerate([*kinds, "Show"], start=1):
        prompt[str(number)] = {"class_type": kind, "inputs": inputs}
        inputs = {"value": [str(number), 0]}
    return prompt


def _sum(n: int) -> Prompt:
    return graph(
        n1=("Number", {"number": 1}),
        n2=("Number", {"number": n}),
        n3=("Add", {"a": ["1", 0], "b": ["2", 0]}),
        n4=("Show", {"value": ["3", 0]}),
        n5=("Show", {"value": ["1", 0]}),
    )


def _switch(use_first: bool) -> Prompt:
    return graph(
        n1=("Number", {"number": 1}),
        n2=("Number", {"number": 2}),
        n3=("Switch", {"use_first": use_first, "first": ["1", 0], "second": ["2", 0]}),
        n4=("Show", {"value": ["3", 0]}),
    )


CASES: dict[str, list[Prompt]] = {
    "a plain run and its repetition": [show("Number", {"number": 1})] * 2,
    "a changed value": [_sum(2), _sum(3), _sum(2)],
    "renamed nodes": [
        show("Number", {"number": 1}),
        graph(n7=("Number", {"number": 1}), n8=("Show", {"value": ["7", 0]})),
        graph(n7=("Whoami", {}), n8=("Show", {"value": ["7", 0]})),
    ],
    "two equal nodes": [
        graph(n1=("Number", {"number": 1}), n2=("Number", {"number": 1}), n3=("Add", {"a": ["1", 0], "b": ["2", 0]}),
              n4=("Show", {"value": ["3", 0]}))
    ],
    "conversions": [show("Number", {"number": 3.7}), show("Number", {"number": "4"})],
    "unknown input": [show("Number", {"number": 1, "colour": "red"})],
    "unneeded node": [{**show("Number", {"number": 1}), "3": {"class_type": "Number", "inputs": {"number": 2}}}],
    "wrapped list": [graph(n1=("Show", {"value": {"__value__": [3, 4]}}))],
    "optional input": [show("Optional", {"a": 1}), show("Optional", {"a": 1, "b": 2})],
    "lists": [
        graph(n1=("Several", {}), n2=("Add", {"a": ["1", 0], "b": 10}), n3=("Show", {"value": ["2", 0]})),
        graph(n1=("Several", {}), n2=("Two", {}), n3=("Add", {"a": ["1", 0], "b": ["2", 0]}),
              n4=("Show", {"value": ["3", 0]})),
        chain("Several", "Sum"),
    ],
    "lazy inputs": [_switch(True), _switch(True), _switch(False)],
    "a lazy input that is not there": [graph(n1=("Number", {"number": 1}), n2=("Greedy", {"value": ["1", 0]}),
                                             n3=("Show", {"value": ["2", 0]}))],
    "expansion and its repetition": [chain("Number", "Double", number=4)] * 2,
    "expansion per item": [chain("Several", "Double")],
    "expansion unannounced": [chain("Rogue")],
    "a blocked branch": [
        {**chain("Number", "Block", number=1), "9": {"class_type": "Show", "inputs": {"value": ["1", 0]}}}
    ],
    "silent blocks in a list": [chain("Several", "Hush", "Pass")],
    "inference mode": [chain("Number", "Modes", number=1)],
    "a failing node": [chain("Number", "Fail", number=7)],
    "state on the class": [graph(n1=("Stateful", {}))],
    "a dict returned": [chain("Wrong")],
    "nothing returned": [chain("Nothing")],
    "a tuple returned": [chain("Tuple")],
    "an asynchronous node": [chain("Number", "Later", number=3)],
    "a check of its own": [graph(n1=("Careful", {"number": 99})), graph(n1=("Careful", {"number": 13}))],
    "a bad and a good output": [
        {**show("Number", {"number": 1}), **graph(n3=("Number", {}), n4=("Show", {"value": ["3", 0]}))}
    ],
    "wrong types": [graph(n1=("Picture", {}), n2=("Add", {"a": ["1", 0], "b": 1}), n3=("Show", {"value": ["2", 0]}))],
    "out of range": [show("Number", {"number": -1}), show("Number", {"number": 11})],
    "no number": [show("Number", {"number": None}), show("Number", {"number": "many"})],
}  # fmt: skip


def observe(nodes: Nodes, result: Any) -> dict[str, Any]:
    """What of a run must be the same in every engine."""
    events = []
    for event, data in result.messages:
        if event in ("execution_error", "execution_interrupted"):
            kind = data.get("exception_type", "")
            events.append([event, data["node_id"], data["node_type"], kind.rpartition(".")[2]])
        elif event == "execution_success":
            events.append([event])
    problems = {
        node_id: [[e["type"], e["message"], e["details"]] for e in entry["errors"]]
        for node_id, entry in result.node_errors.items()
    }
    seen = {
        "calls": sorted(nodes.calls),
        "outputs": {k: dict(v) for k, v in sorted(result.outputs.items())},
        "events": events,
        "node_errors": problems,
        "error": result.error and [result.error["type"], result.error["message"]],
        "success": result.success,
        "complete": result.complete,
    }
    nodes.calls.clear()
    return seen
