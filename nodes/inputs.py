"""Inputs that several nodes have, with their checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..engine import journal, model_folder
from ..errors import InputError, MendError
from .api import Node, advanced, io

PRECISIONS = ["auto", "fp32", "bf16", "fp16"]


def one_of(name: str, value: Any, options: Iterable[str]) -> bool | str:
    """What `validate_inputs` returns for a choice; None means that a wire brings the value, which is not known yet."""
    options = list(options)
    return True if value is None or value in options else _not_offered(name, value, options)


def _not_offered(name: str, value: Any, options: Iterable[str]) -> str:
    return f"{name}: {value!r} is not one of {', '.join(options)}; choose one of these"


def chosen(name: str, value: Any, options: Iterable[str]) -> Any:
    """The value, when the node runs; raises InputError for one that came over a wire and is none of the options."""
    options = list(options)
    if value not in options:
        raise InputError(_not_offered(name, value, options))
    return value


def held(name: str, value: Any) -> Any:
    """The value of a required input; raises InputError for None, which Hold Per Shot passes for what it was not given."""
    if value is None:
        raise InputError(f"{name}: Hold Per Shot was given none to hold; connect one there, or straight to this input")
    return value


def check_choices(node: type[Node], **values: Any) -> None:
    """Raises InputError, when the node runs, for a value that the menu of this name in `node` does not offer.

    ComfyUI 0.3.64 lets any text through that comes by a wire or by the API.
    """
    menus = {slot.id: slot.options for slot in node.define_schema().inputs if slot.id in values}
    for name, value in values.items():
        chosen(name, value, menus[name])


def above(limit: float, **values: float) -> None:
    """Raises InputError, when the node runs, for a number that is not above `limit`, or NaN.

    ComfyUI lets any number through that comes by a wire. Widgets end somewhere; this is for where a meaning ends.
    """
    for name, value in values.items():
        if not value > limit:
            raise InputError(f"{name}: {value}, but a number above {limit} is needed; change what is connected to it")


def within(low: float, high: float, **values: float) -> None:
    """As `above`, for a number that is not in low..high."""
    for name, value in values.items():
        if not low <= value <= high:
            raise InputError(f"{name}: {value} is not within {low} and {high}; change what is connected to it")


def accepted(check: Callable[[Any], Any], value: Any) -> bool | str:
    """What `validate_inputs` returns where `check(value)` raises if it refuses the value; None as for `one_of`."""
    try:
        if value is not None:
            check(value)
    except Exception as error:
        return str(error)
    return True


def fingerprint(of_files: Callable[[], str], *named: Any) -> str:
    """What `fingerprint_inputs` returns for files that inputs name: `of_files()`.

    "" where a wire brings a name, which is not known yet: ComfyUI runs a node again anyway when one above it did. "" also
    for files that are not there: what is wrong with them is said when the node runs.
    """
    if any(name is None for name in named):
        return ""
    try:
        return of_files()
    except (MendError, OSError):
        return ""


def first_problem(*checks: bool | str) -> bool | str:
    """What `validate_inputs` returns for several checks: the first that is not True, or True."""
    return next((check for check in checks if check is not True), True)


def seed_input(tooltip: str, most: int = 0xFFFFFFFFFFFFFFFF) -> io.Input:
    """The seed of everything that a node draws, 0..most."""
    return io.Int.Input("seed", default=0, min=0, max=most, control_after_generate=True, tooltip=tooltip)


def model_input(tooltip: str, first: str = "") -> io.Input:
    """The choice of a model file, `first` chosen if it is there; the node that has it is a `ModelFile`."""
    files = model_folder.model_files()
    default = {"default": first} if first in files else {}
    return io.Combo.Input("model_name", options=files, tooltip=tooltip, **default)


class ModelFile:
    """Mixin before Node, for nodes with a `model_input`: the file exists; the node runs again when it changed."""

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        return accepted(model_folder.model_path, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **others: Any) -> str:
        return fingerprint(lambda: journal.identity(model_folder.model_path(model_name)), model_name)


def precision_input(default: str = "auto", tooltip: str = "") -> io.Input:
    """In which number format to compute; the node that has it is a `Precision`."""
    usual = (
        "auto: half precision where the device is good at it, 32 bit elsewhere. A tile that overflows in half precision "
        "is repeated in 32 bit."
    )
    return advanced(io.Combo.Input("precision", options=PRECISIONS, default=default, tooltip=tooltip or usual))


class Precision:
    """Mixin before Node, for nodes with a `precision_input`."""

    @classmethod
    def validate_inputs(cls, precision: str | None) -> bool | str:
        return one_of("precision", precision, PRECISIONS)


def tiling_inputs(note: str = "", step: int = 8) -> list[io.Input]:
    """tile, overlap and precision, as `engine.tiling.restore` takes them. note: a sentence more about the tiles."""
    tile = (
        "Side of a tile in pixels. 0 chooses the largest that fits into free memory; if it does not fit after all, "
        f"smaller ones are used. {note}"
    )
    shared = "Pixels that neighbouring tiles share. -1 chooses by the network's receptive field."
    return [
        advanced(io.Int.Input("tile", default=0, min=0, max=8192, step=step, tooltip=tile.strip())),
        advanced(io.Int.Input("overlap", default=-1, min=-1, max=1024, tooltip=shared)),
        precision_input(),
    ]
