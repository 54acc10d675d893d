"""What is checked before anything runs, in ComfyUI's words: a workflow that one engine refuses, the other refuses too.

Error entries are {"type", "message", "details", "extra_info"} as the server sends them to the page.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from .graph_builder import is_link
from .node_io import ComfyNode, ExecutionBlocker

logger = logging.getLogger(__name__)

Prompt = dict[str, dict[str, Any]]
NodeClasses = Mapping[str, type[ComfyNode]]

LONGEST_LIST_SHOWN = 20
_CONVERSIONS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


def input_info(types: Mapping[str, Mapping[str, tuple]], name: str) -> tuple[str | None, str, dict[str, Any]]:
    """(group, type, options) of an input in what `INPUT_TYPES` returns; group is None for an unknown name."""
    for group, entries in types.items():
        if name in entries:
            entry = entries[name]
            return group, entry[0], entry[1] if len(entry) > 1 else {}
    return None, "", {}


def types_fit(received: Any, wanted: Any) -> bool:
    """True if a wire of type `received` may go into an input of type `wanted`: unions overlap, "*" fits all."""
    if received == wanted or "*" in (received, wanted):
        return True
    if isinstance(received, list):  # a wire typed by its list of values
        return wanted == "COMBO"
    if not isinstance(received, str) or not isinstance(wanted, str):
        return False
    return bool({t.strip() for t in received.split(",")} & {t.strip() for t in wanted.split(",")})


def full_type_name(error: BaseException) -> str:
    """The exception's class with its module, without "builtins"."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def slice_inputs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists of inputs as one dict per call; shorter lists repeat their last entry."""
    longest = max((len(v) for v in values.values()), default=0)
    return [{k: v[min(i, len(v) - 1)] for k, v in values.items()} for i in range(longest)] or [{}]


def _error(kind: str, message: str, details: str, **extra_info: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def _exception_entry(kind: str, message: str, error: Exception, **extra_info: Any) -> dict[str, Any]:
    trace = traceback.format_tb(error.__traceback__)
    return _error(kind, message, str(error), **extra_info, exception_type=full_type_name(error), traceback=trace)


class DependencyCycleError(Exception):
    """A node needs, directly or not, its own output."""


class _Validation:
    """One pass over a prompt; every node is checked once, inputs first."""

    def __init__(self, prompt: Prompt, classes: NodeClasses) -> None:
        self.prompt, self.classes = prompt, classes
        self.checked: dict[str, tuple[bool, list[dict[str, Any]]]] = {}
        self.path: list[str] = []

    def node(self, node_id: str) -> tuple[bool, list[dict[str, Any]]]:
        """(valid, errors of this very node)."""
        if node_id in self.checked:
            return self.checked[node_id]
        if node_id in self.path:
            circle = " -> ".join([*self.path[self.path.index(node_id) :], node_id])
            raise DependencyCycleError(f"Dependency cycle detected: {circle}")
        self.path.append(node_id)
        try:
            self.checked[node_id] = self._check(node_id)
        finally:
            self.path.pop()
        return self.checked[node_id]

    def _check(self, node_id: str) -> tuple[bool, list[dict[str, Any]]]:
        inputs, node_class = self.prompt[node_id]["inputs"], self.classes[self.prompt[node_id]["class_type"]]
        types = node_class.INPUT_TYPES()
        own_check = node_class.overridden("validate_inputs")
        signature = inspect.getfullargspec(own_check) if own_check else None
        # What the node checks itself the engine does not check: by name, or all of it for **kwargs.
        named = set(signature.args[1:]) if signature else set()
        takes_all = signature is not None and signature.varkw is not None

        errors: list[dict[str, Any]] = []
        sources_valid, received_types = True, {}
        for name in [*types.get("required", {}), *types.get("optional", {})]:
            group, wanted, options = input_info(types, name)
            config = (wanted, options)
            if name not in inputs:
                if group == "required":
                    errors.append(_error("required_input_missing", "Required input is missing", name, input_name=name))
                continue
            value = inputs[name]
            if isinstance(value, list):
                found, received = self._check_link(name, value, config, "input_types" in named)
                received_types[name] = received
                errors += found
                sources_valid = (bool(found) or self._check_source(name, value, config)) and sources_valid
            else:
                errors += self._check_value(inputs, name, config, name in named or takes_all)
        if named or takes_all:
            errors += self._ask_node(node_class, inputs, types, named, takes_all, received_types)
        return sources_valid and not errors, errors

    def _check_link(
        self, name: str, link: list, config: tuple, node_checks_types: bool
    ) -> tuple[list[dict[str, Any]], Any]:
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            extra = {"input_name": name, "input_config": config, "received_value": link}
            return [_error("bad_linked_input", message, name, **extra)], None
        source = self.classes[self.prompt[link[0]]["class_type"]]
        received = source.RETURN_TYPES[link[1]]
        if node_checks_types or types_fit(received, config[0]):
            return [], received
        details = f"{name}, received_type({received}) mismatch input_type({config[0]})"
        message = "Return type mismatch between linked nodes"
        extra = {"input_name": name, "input_config": config, "received_type": received, "linked_node": link}
        return [_error("return_type_mismatch", message, details, **extra)], received

    def _check_source(self, name: str, link: list, config: tuple) -> bool:
        try:
            return self.node(link[0])[0]
        except DependencyCycleError:
            raise
        except Exception as error:
            extra = {"input_name": name, "input_config": config, "linked_node": link, "exception_message": str(error)}
            message = "Exception when validating inner node"
            entry = _exception_entry("exception_during_inner_validation", message, error, **extra)
            self.checked[link[0]] = (False, [entry])
            return False

    def _check_value(
        self, inputs: dict[str, Any], name: str, config: tuple, node_checks_it: bool
    ) -> list[dict[str, Any]]:
        """Checks one constant; a converted value takes the place of the given one."""
        value, (wanted, options) = inputs[name], config
        if isinstance(value, dict) and "__value__" in value:  # how a list is written, which else would be a link
            value = inputs[name] = value["__value__"]
        extra = {"input_name": name, "input_config": config, "received_value": value}
        if wanted in _CONVERSIONS:
            try:
                value = inputs[name] = extra["received_value"] = _CONVERSIONS[wanted](value)
            except Exception as error:
                message = f"Failed to convert an input value to a {wanted} value"
                details = f"{name}, {value}, {error}"
                return [_error("invalid_input_type", message, details, **extra, exception_message=str(error))]
        if node_checks_it:
            return []
        if "min" in options and value < options["min"]:
            message = f"Value {value} smaller than min of {options['min']}"
            return [_error("value_smaller_than_min", message, name, **extra)]
        if "max" in options and value > options["max"]:
            message = f"Value {value} bigger than max of {options['max']}"
            return [_error("value_bigger_than_max", message, name, **extra)]
        choices = options.get("options") if wanted == "COMBO" else None
        if choices is not None and not options.get("multiselect") and value not in choices:
            shown = str(choices)
            if len(choices) > LONGEST_LIST_SHOWN:
                shown, extra["input_config"] = f"(list of length {len(choices)})", None
            details = f"{name}: '{value}' not in {shown}"
            return [_error("value_not_in_list", "Value not in list", details, **extra)]
        return []

    @staticmethod
    def _ask_node(
        node_class: type[ComfyNode],
        inputs: Mapping[str, Any],
        types: Mapping[str, Mapping[str, tuple]],
        named: set[str],
        takes_all: bool,
        received_types: dict[str, Any],
    ) -> list[dict[str, Any]]:
        values = {
            name: None if is_link(value) else value
            for name, value in inputs.items()
            if (name in named or takes_all) and input_info(types, name)[0] is not None
        }
        if "input_types" in named:
            values["input_types"] = received_types
        answer = node_class.PREPARE_CLASS_CLONE(None).validate_inputs(**values)
        if answer is True or isinstance(answer, ExecutionBlocker):
            return []
        said = "" if answer is False else f" - {answer}"
        message = "Custom validation failed for node"
        return [_error("custom_validation_failed", message, f"{name}{said}", input_name=name) for name in values]


def output_nodes(prompt: Prompt, classes: NodeClasses) -> list[str]:
    """Ids of the nodes that are run for their own sake."""
    return [node_id for node_id, node in prompt.items() if classes[node["class_type"]].OUTPUT_NODE]


def validate_prompt(
    prompt: Prompt, classes: NodeClasses
) -> tuple[bool, dict[str, Any] | None, list[str], dict[str, dict[str, Any]]]:
    """Checks a workflow in the API format; constants in it are converted to the types of their inputs.

    Returns (something can run, the error if not, the output nodes that can run, errors by node id): with some bad
    outputs the good ones still run.
    """
    for node_id, node in prompt.items():
        missing = None
        if "class_type" not in node:
            missing = "Cannot execute because a node is missing the class_type property."
        elif node["class_type"] not in classes:
            missing = f"Cannot execute because node {node['class_type']} does not exist."
        if missing:
            return False, _error("invalid_prompt", missing, f"Node ID '#{node_id}'"), [], {}
        node.setdefault("inputs", {})
    outputs = output_nodes(prompt, classes)
    if not outputs:
        return False, _error("prompt_no_outputs", "Prompt has no outputs", ""), [], {}

    validation, good, failed = _Validation(prompt, classes), [], []
    node_errors: dict[str, dict[str, Any]] = {}
    for output in outputs:
        try:
            valid, reasons = validation.node(output)
        except Exception as error:
            valid = False
            reasons = [_exception_entry("exception_during_validation", "Exception when validating node", error)]
            validation.checked[output] = (False, reasons)
        if valid:
            good.append(output)
            continue
        failed += reasons
        for node_id, (node_valid, node_reasons) in validation.checked.items():
            # Nodes that are only below a bad one are invalid without errors of their own: not listed.
            if not node_valid and node_reasons:
                kind = prompt[node_id]["class_type"]
                entry = {"errors": node_reasons, "dependent_outputs": [], "class_type": kind}
                node_errors.setdefault(node_id, entry)["dependent_outputs"].append(output)
    if not good:
        details = "\n".join(f"{reason['message']}: {reason['details']}" for reason in failed)
        error = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
        return False, error, [], node_errors
    return True, None, good, node_errors


def describe_errors(error: Mapping[str, Any] | None, node_errors: Mapping[str, Mapping[str, Any]]) -> str:
    """The errors of `validate_prompt` as lines for a person."""
    lines = []
    for node_id, entry in node_errors.items():
        for reason in entry["errors"]:
            lines.append(f"{entry['class_type']} {node_id}: {reason['message']}: {reason['details']}")
    if not lines and error is not None:
        lines.append(f"{error['message']} {error['details']}".strip())
    return "\n".join(lines)
