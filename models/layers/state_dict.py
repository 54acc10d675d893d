"""Reading hyper-parameters from the keys of a state dict."""

from __future__ import annotations

from collections.abc import Iterable


def indices(keys: Iterable[str], prefix: str) -> list[int]:
    """The numbers that follow `prefix` in `keys`, sorted: for "enc.", keys "enc.0.x" and "enc.2.y" give [0, 2]."""
    found = set()
    for key in keys:
        if key.startswith(prefix):
            head = key[len(prefix) :].split(".", 1)[0]
            if head.isdigit():
                found.add(int(head))
    return sorted(found)


def count_indices(keys: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix` in `keys`."""
    return len(indices(keys, prefix))
