"""Reading checkpoints: placeholder body, replaced below."""

from __future__ import annotations


def load(source, *, system=None, config=None):
    raise NotImplementedError
