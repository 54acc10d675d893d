"""Work spread over a Ray cluster: one loaded model per worker; what a dying worker had in hand goes to another."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import InputError, MissingDependency
from . import host

logger = logging.getLogger(__name__)

TRIES = 3
"""How many workers may die over one piece of work before it is given up."""


class _Worker:
    """Lives in a process of its own and keeps what `make` returned."""

    def __init__(self, make: Callable[..., Callable[[str], Any]], arguments: Mapping[str, Any]) -> None:
        self.work = make(**arguments)

    def do(self, name: str) -> Any:
        return self.work(name)

    def process(self) -> int:
        return os.getpid()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
    except ImportError:
        raise MissingDependency("--ray needs the package ray: pip install ray") from None
    return ray


def run_all(
    address: str,
    make: Callable[..., Callable[[str], Any]],
    arguments: Mapping[str, Any],
    names: Sequence[str],
    workers: int = 0,
    on_start: Callable[[list[int]], None] | None = None,
) -> Iterator[tuple[str, Any]]:
    """(name, what the work returned or the exception) for every name, in the order in which they finish.

    address: "local" starts Ray on this machine, else that of a running cluster ("auto", "ray://host:10001"); there the
    package, the model files and the folders must be under the same paths on every machine. workers: 0 takes one per GPU,
    without GPUs one per four CPU cores. `make(**arguments)`, importable on the workers, returns the work. on_start gets
    the workers' process ids. Raises InputError if the cluster cannot be reached.
    """
    ray = _ray()
    _connect(ray, address, workers)
    try:
        resources = ray.cluster_resources()
        graphics = int(resources.get("GPU", 0))
        count = workers or graphics or max(1, int(resources.get("CPU", 1)) // 4)
        count = max(1, min(count, len(names)))
        share = {"num_gpus": min(1, graphics / count)} if graphics else {}
        actor = ray.remote(num_cpus=1, **share)(_Worker)
        idle = [actor.remote(make, arguments) for _ in range(count)]
        logger.info("%d workers on %s", count, address)
        if on_start is not None:
            on_start(ray.get([worker.process.remote() for worker in idle]))
        yield from _spread(ray, lambda: actor.remote(make, arguments), idle, names)
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str, workers: int) -> None:
    local = {"include_dashboard": False, "num_cpus": workers or None} if address == "local" else {}
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **local)
    except Exception as error:  # Ray raises bare ones, too
        ray.shutdown()
        advice = "is the machine too busy?" if local else "start one, or use --ray local"
        raise InputError(f"--ray {address}: no cluster there ({_first_line(error)}); {advice}") from None


def _spread(ray: Any, start: Callable[[], Any], idle: list[Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    waiting, running, deaths = deque(names), {}, Counter()
    while waiting or running:
        while waiting and idle:
            worker, name = idle.pop(), waiting.popleft()
            running[worker.do.remote(name)] = (worker, name)
        finished, _ = ray.wait(list(running), timeout=1)
        host.check_interrupt()
        for task in finished:
            worker, name = running.pop(task)
            try:
                outcome = ray.get(task)
            except ray.exceptions.RayActorError as error:
                deaths[name] += 1
                logger.warning("a worker died over %s (%d of %d tries)", name, deaths[name], TRIES)
                idle.append(start())
                if deaths[name] < TRIES:
                    waiting.appendleft(name)
                    continue
                outcome = InputError(
                    f"{deaths[name]} workers died over it ({_first_line(error)}); too large a picture?"
                )
            except ray.exceptions.RayTaskError as error:
                outcome = error.cause if isinstance(error.cause, Exception) else error
                idle.append(worker)
            else:
                idle.append(worker)
            yield name, outcome


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
