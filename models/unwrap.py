"""Finds the weights inside what a checkpoint wraps around them.

Training code saves dictionaries of dictionaries, with and without averaged (EMA) weights, optimizer states, prefixes of
wrapper modules, or whole pickled modules. Nothing here knows any particular network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CheckpointError
from .pickled import Record
from .stored import MAX_TENSORS, StoredTensor, UnreadableTensor, size_in_words

WRAPPERS = frozenset(
    "module _orig_mod net model network generator netG net_g net_G G g ema ema_model model_ema net_ema net_g_ema "
    "generator_ema params backbone restorer".split()
)
"""First components of keys that wrapper modules add."""
_NOT_WEIGHTS = re.compile(
    r"optim|sched|scaler|^amp$|callback|loops|rng|hparams|hyper_param|history|losses|metric", re.I
)
_EMA = re.compile(r"(^|[._/])(ema|shadow|averaged)([._/]|$)|model_averag|_ema$|^ema_", re.I)
_MAX_DEPTH = 32
_MAX_NODES = 400_000
_MAX_KEY = 512
_MAX_INDEX = 999
_MAX_SETS = 64
_MAX_PARTS = 64


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Puts the tensor's name in front of what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"tensor {key[:100]!r} {error}") from None


@dataclass
class WeightSet:
    """One set of named tensors in a file: `name` is the path of the dictionary that held it ("params_ema")."""

    name: str
    tensors: dict[str, Any] = field(default_factory=dict)

    @property
    def ema(self) -> bool:
        return bool(_EMA.search(self.name))

    def read(self, file_size: int | None = None) -> dict[str, torch.Tensor]:
        """The tensors, sharing memory with the file. Raises CheckpointError if they cannot be what they say."""
        if len(self.tensors) > MAX_TENSORS:
            raise CheckpointError(f"it lists {len(self.tensors)} tensors")
        if file_size is not None:
            self._check_size(file_size)
        state = {}
        for key, tensor in self.tensors.items():
            if len(key) > _MAX_KEY or any(int(n) > _MAX_INDEX for n in re.findall(r"\d{4,18}", key)):
                raise CheckpointError(f"the tensor name {key[:80]!r} is absurd")
            with _named(key):
                state[key] = tensor if isinstance(tensor, torch.Tensor) else tensor.read()
            if state[key].layout != torch.strided or state[key].is_quantized:
                raise CheckpointError(f"tensor {key!r} is sparse or quantised; only dense tensors are read")
        return state

    def _check_size(self, file_size: int) -> None:
        unfolded = 0
        for key, tensor in self.tensors.items():
            if isinstance(tensor, torch.Tensor):
                unfolded += tensor.numel() * tensor.element_size()
            else:
                with _named(key):
                    tensor.check_layout()
                unfolded += tensor.nbytes
        # Shared weights may be listed under several names; anything beyond that is a bomb.
        if unfolded > 4 * file_size + (1 << 16):
            raise CheckpointError(
                f"its tensors would unfold to {size_in_words(unfolded)}, the file has {size_in_words(file_size)}"
            )

    def verify(self) -> None:
        """Compares checksums where the file has them. Raises CheckpointError for a damaged tensor."""
        for key, tensor in self.tensors.items():
            if not isinstance(tensor, torch.Tensor):
                with _named(key):
                    tensor.verify()


def weight_sets(root: Any) -> list[WeightSet]:
    """Every set of weights in a checkpoint, averaged ones first, then the larger ones."""
    walk = _Walk()
    walk.visit(root, (), ())
    sets = [s for s in walk.found if s.tensors]
    return sorted(sets, key=lambda s: (not s.ema, -len(s.tensors)))[:_MAX_SETS]


def views(state: dict[str, torch.Tensor], anywhere: bool = False) -> Iterator[tuple[dict[str, torch.Tensor], str, int]]:
    """The state dict as it is, then without wrapper prefixes and in parts: (state, prefix removed, entries left out).

    anywhere: parts under any first component, not only the wrappers' names.
    """
    if any("_orig_mod." in key for key in state):  # torch.compile puts it in front of any submodule
        state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    yield from _views(state, "", len(state), anywhere, depth=4)


def _views(
    state: dict[str, torch.Tensor], prefix: str, total: int, anywhere: bool, depth: int
) -> Iterator[tuple[dict[str, torch.Tensor], str, int]]:
    yield state, prefix, total - len(state)
    if depth == 0:
        return
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        head, dot, rest = key.partition(".")
        if dot:
            groups.setdefault(head, {})[rest] = value
    whole = len(groups) == 1 and len(next(iter(groups.values()))) == len(state)
    # Averaged weights first, as among the sets.
    for head in sorted(groups, key=lambda g: (not _EMA.search(g), -len(groups[g])))[:_MAX_PARTS]:
        if whole or head in WRAPPERS or (anywhere and depth > 2):
            yield from _views(groups[head], f"{prefix}{head}.", total, anywhere, depth - 1)


class _Walk:
    """Collects the sets of a nested checkpoint. Bounded in depth and in the number of objects seen."""

    def __init__(self) -> None:
        self.found: list[WeightSet] = []
        self.nodes = 0

    def visit(self, node: Any, path: tuple[str, ...], above: tuple[int, ...]) -> None:
        self._count(above)
        if id(node) in above:
            return
        above = (*above, id(node))
        if isinstance(node, Record):
            if _is_module(node):
                self.found.append(WeightSet(".".join(path), dict(self._module_tensors(node, "", above))))
                return
            for part in (node.state, node.items):
                if isinstance(part, Mapping) and part:
                    self.visit(part, path, above)
        elif isinstance(node, tuple) and len(node) == 2 and any(isinstance(n, Mapping) for n in node):
            for part in node:  # slots: (state, slots)
                self.visit(part, path, above)
        elif isinstance(node, Mapping):
            tensors = {k: v for k, v in node.items() if isinstance(k, str) and is_tensor(v)}
            self.nodes += len(node)
            if tensors:
                self.found.append(WeightSet(".".join(path), tensors))
            for key, value in node.items():
                if (
                    isinstance(key, str)
                    and isinstance(value, (Mapping, Record, tuple))
                    and not _NOT_WEIGHTS.search(key)
                ):
                    self.visit(value, (*path, key[:80]), above)

    def _module_tensors(self, module: Record, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
        """A pickled module's parameters and persistent buffers, as its state_dict() would name them."""
        self._count(above)
        if id(module) in above[:-1]:
            return
        transient = module.state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, (set, list, tuple)) else ()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _entries(module, kind):
                self.nodes += 1
                if is_tensor(tensor) and not (kind == "_buffers" and name in transient):
                    yield prefix + name, tensor
        for name, child in _entries(module, "_modules"):
            if isinstance(child, Record) and _is_module(child):
                yield from self._module_tensors(child, f"{prefix}{name}.", (*above, id(child)))

    def _count(self, above: tuple[int, ...]) -> None:
        self.nodes += 1
        if len(above) > _MAX_DEPTH:
            raise CheckpointError("it is nested absurdly deep")
        if self.nodes > _MAX_NODES:
            raise CheckpointError("it would unfold into far more objects than its size allows")


def is_tensor(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, StoredTensor, UnreadableTensor))


def _is_module(record: Record) -> bool:
    return isinstance(record.state, dict) and isinstance(record.state.get("_modules"), dict)


def _entries(module: Record, kind: str) -> Iterator[tuple[str, Any]]:
    table = module.state.get(kind)
    if isinstance(table, dict):
        yield from ((name, value) for name, value in table.items() if isinstance(name, str))
