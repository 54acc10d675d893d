"""Ways to damage pictures, told in text."""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import InputError
from .data import STARTER_TASKS, Task
from .degradations import KINDS, Degradation, parse

EVERYTHING = "everything"
"""In a text of degradations: all that the starter network was trained for."""


def tasks_from_text(text: str) -> tuple[Task, ...]:
    """Tasks from text, a line each: kinds of damage joined by "+", each with its strength or exact parameters, and
    after "@" how often the line is drawn.

        everything
        rain 0.7 + noise @ 2
        jpeg: quality 10

    "everything" stands for the tasks of the starter network. Raises InputError for what cannot be read.
    """
    tasks: dict[str, Task] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        body, _, amount = line.partition("@")
        try:
            weight = float(amount) if amount else 1.0
        except ValueError:
            raise InputError(f"degradations: {amount.strip()!r} in {line!r} is not a number") from None
        if not weight > 0 or not math.isfinite(weight):
            raise InputError(f"degradations: the weight in {line!r} must be above zero")
        if body.strip().lower() == EVERYTHING:
            tasks.update({t.name: replace(t, weight=t.weight * weight) for t in STARTER_TASKS})
            continue
        chain = tuple(_step(part.strip(), line) for part in body.split("+"))
        kinds = [step.kind for step in chain if step is not None]
        name = " + ".join(kinds) or "clean"
        before = tasks.get(name, Task(name, 0.0, ()))
        steps = tuple(step for step in chain if step is not None)
        tasks[name] = Task(name, before.weight + weight, (*before.chains, steps))
    if not tasks:
        raise InputError(
            f"degradations: name at least one, such as noise; known: {EVERYTHING}, clean, {', '.join(KINDS)}"
        )
    return tuple(tasks.values())


def _step(text: str, line: str) -> Degradation | None:
    """One kind of damage; None for "clean"."""
    if ":" in text:
        return parse(text)[0]
    kind, _, strength = text.partition(" ")
    if kind == "clean":
        return None
    try:
        return Degradation(kind, float(strength) if strength.strip() else 1.0)
    except ValueError:
        raise InputError(
            f"degradations: cannot read {text!r} in {line!r}; write KIND STRENGTH, or KIND: NAME VALUE"
        ) from None
