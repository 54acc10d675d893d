"""Keeping freed memory for the next layer, on CPUs with the GNU C library.

It gives every large block back to the system at once, and the system must clear each page before it lends it again: a
network in pictures then spends more time there than in computing. Meanwhile freed blocks are kept; afterwards all of them go back.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

KEPT = 1.6
"""Times as much memory as without, measured: what is kept lies in pieces that do not always fit."""
WORTH_IT = 64_000_000
"""Bytes of activations below which the C library keeps them by itself."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them (malloc.h)
_EVERYTHING = 1 << 30
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}
"""What the C library itself arrives at in a process that has freed a large block."""
_SET_BY_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")

_lock = threading.Lock()
_users = 0


@cache
def _library() -> Any:
    """The C library, if its allocator can be set and no one has chosen another way for this process; else None."""
    if sys.platform != "linux" or any(name in os.environ for name in _SET_BY_USERS):
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
    except OSError:
        return None


def available() -> bool:
    """Whether freed memory can be kept here."""
    return _library() is not None


@contextmanager
def kept() -> Iterator[None]:
    """While any thread is inside, freed memory stays with the process; it goes back when the last one leaves."""
    global _users
    library = _library()
    if library is None:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            for name in _USUAL:
                library.mallopt(name, _EVERYTHING)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for name, value in _USUAL.items():
                    library.mallopt(name, value)
                library.malloc_trim(0)
