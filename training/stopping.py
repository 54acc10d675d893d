"""Ending a run from outside, with everything saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Tells whether the process was asked to end (Ctrl-C or SIGTERM), so that the run can save where it stands."""
    asked = threading.Event()
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, lambda *_: asked.set()) for n in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
