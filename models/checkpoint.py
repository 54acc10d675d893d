"""Reading checkpoints: from a file or a state dict to a running network, trusting nothing.

`read` opens safetensors files and files of torch.save without running anything in them (`pickled`, `torch_file`,
`safetensor_file`); `unwrap` finds the weights in what training code wrapped around them; the registry says which network
they are and with which hyper-parameters, `empty` builds it for them. Every error is a CheckpointError that names the file.
"""

from __future__ import annotations

import json
import logging
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from . import catalogue, foreign, registry
from .empty import NONSENSE, build_empty
from .file_kinds import describe, describe_weights
from .registry import Architecture
from .resemblance import closest
from .restorer import Restorer
from .safetensor_file import looks_like_safetensors, read_safetensors
from .torch_file import ZIP_START, read_legacy, read_zip
from .unwrap import WeightSet, views, weight_sets

logger = logging.getLogger(__name__)

_KINDS = ("restorer", "codec", "prior", "embedder", "classifier", "critic", "helper")
_MARK = "mend."
_HARMLESS = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked)$")
_LISTED = 6


@dataclass
class Checkpoint:
    """What a file holds: sets of named tensors (best first) that share the file's memory until they are used."""

    sets: list[WeightSet]
    metadata: dict[str, str] = field(default_factory=dict)
    """A safetensors file's metadata; our own entries without their "mend." prefix."""
    notes: list[str] = field(default_factory=list)
    source: str = ""
    size: int | None = None
    """Bytes of the file; None for a state dict in memory."""

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The best set's tensors, with their names as in the file."""
        return self.sets[0].read(self.size)


def read(path: str | Path) -> Checkpoint:
    """Opens a .safetensors, .pth, .pt or .ckpt file. Raises CheckpointError saying what the file is instead."""
    path = Path(path)
    try:
        return _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror or error})") from None


def _read(path: Path) -> Checkpoint:
    if path.is_dir():
        raise CheckpointError("this is a folder; name the model file in it")
    if not path.exists():
        raise CheckpointError(_missing(path))
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 8:
            raise CheckpointError(
                "this file is empty: the download failed" if size == 0 else "too small for a model file"
            )
        # A private mapping: pages are read when touched, and writing to a tensor cannot reach the file.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    head, notes = bytes(data[:1024]), []
    if looks_like_safetensors(head):
        tensors, metadata = read_safetensors(data)
        sets = weight_sets(tensors)
    elif head.startswith(ZIP_START):
        sets, metadata = weight_sets(read_zip(data, notes)), {}
    elif head[0] == 0x80 and head[1] in (2, 3, 4, 5):
        sets, metadata = weight_sets(read_legacy(data, notes)), {}
    else:
        kind = describe(head)
        raise CheckpointError(f"this is {kind}" if kind else "this is not a model file of any format known here")
    if not sets:
        raise CheckpointError("the file holds no weights")
    metadata = {key.removeprefix(_MARK): value for key, value in metadata.items()}
    return Checkpoint(sets, metadata, notes, path.name, size)


def _missing(path: Path) -> str:
    return f"there is no such file in {path.resolve().parent}. {catalogue.where_to_get(path)}".strip()


def load(
    source: str | Path | Mapping[str, torch.Tensor],
    *,
    system: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Restorer:
    """The network that a checkpoint holds, in float32 and evaluation mode on the CPU.

    source: a file, or a state dict (wrapped or not). system: expect this system or architecture id, instead of
    recognising it. config: hyper-parameters that override what was found. What was found is in the result's `config`
    and `notes`. Raises CheckpointError (damaged, hostile, unknown, incomplete), ConfigError (unknown `system`).
    """
    with torch.inference_mode(False), torch.no_grad():  # parameters must be able to take part in autograd later
        if isinstance(source, Mapping):
            checkpoint = Checkpoint(weight_sets(source))
            if not checkpoint.sets:
                raise CheckpointError("the state dict holds no tensors")
            return _load(checkpoint, None, system, config or {})
        checkpoint = read(source)
        try:
            return _load(checkpoint, Path(source), system, config or {})
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.source}: {error}") from None


def _load(checkpoint: Checkpoint, path: Path | None, system: str | None, config: Mapping[str, Any]) -> Restorer:
    try:
        found = recognise(checkpoint, system, config)
    except CheckpointError:
        theirs = None if system or config else _through_spandrel(checkpoint)
        if theirs is None:
            raise
        return theirs
    architecture, state = found.architecture, found.state
    released = catalogue.find(path) if path is not None else None
    if released is not None and released[0].id != architecture.system:
        released = None
    if released is not None and not checkpoint.metadata:
        config = {**_told_by_name(architecture, released[1].variant), **config}
    settings = configuration(architecture, state, checkpoint.metadata, config)
    size = sum(t.numel() * t.element_size() for t in state.values())
    module = build_empty(architecture, settings, tensors=len(state), size=size)
    _check_fit(architecture, module, state)
    found.weights.verify()
    module.load_state_dict(state, strict=False)
    module.eval().requires_grad_(False)
    notes = [*checkpoint.notes, *found.notes]
    broken = [name for name, p in module.state_dict().items() if p.is_floating_point() and not p.isfinite().all()]
    if broken:
        notes.append(f"{_some(broken)} hold NaN or infinity: the file is damaged or its training failed")
        logger.warning("%s: %s", checkpoint.source or "state dict", notes[-1])
    metadata = dict(checkpoint.metadata)
    if released is not None:
        notes.append(
            f"named like the released file {released[1].id}" + (f" ({released[1].note})" * bool(released[1].note))
        )
        metadata.setdefault("tasks", ",".join(released[1].tasks))
    return Restorer(architecture, settings, module, checkpoint.source, notes, metadata)


def _told_by_name(architecture: Architecture, variant: str) -> dict[str, Any]:
    """What only the name of a released file tells: its variant's settings that leave no trace in shapes."""
    settings = architecture.variants.get(variant, {})
    return {key: settings[key] for key in architecture.metadata_keys if key in settings}


def _through_spandrel(checkpoint: Checkpoint) -> Restorer | None:
    """A network that is none of ours, if spandrel is installed and knows it."""
    for weights in checkpoint.sets:
        try:
            state = weights.read(checkpoint.size)
            weights.verify()
        except CheckpointError:
            continue
        restorer = foreign.from_spandrel(state, checkpoint.source)
        if restorer is not None:
            restorer.notes.extend(checkpoint.notes)
            return restorer
    return None


@dataclass
class Recognised:
    """Which architecture a set of weights belongs to, and the weights under that architecture's names."""

    architecture: Architecture
    state: dict[str, torch.Tensor]
    weights: WeightSet
    notes: list[str]


def recognise(checkpoint: Checkpoint, system: str | None = None, config: Mapping[str, Any] | None = None) -> Recognised:
    """Finds the architecture in any of the file's sets of weights, under any wrapper prefix. Raises CheckpointError."""
    candidates = _candidates(checkpoint, system, config or {})
    found: list[Recognised] = []
    first_error: CheckpointError | None = None
    for anywhere in (False, True):
        for weights in checkpoint.sets:
            try:
                state = weights.read(checkpoint.size)
            except CheckpointError as error:
                first_error = first_error or error
                continue
            match = _match(state, candidates, anywhere)
            if match is not None:
                architecture, prepared, prefix, left = match
                found.append(
                    Recognised(architecture, prepared, weights, _notes(checkpoint, weights, prepared, prefix, left))
                )
        if found:
            # A file with a restorer and its critic is a restorer's; the sets are sorted, averaged ones first.
            return min(found, key=lambda f: _KINDS.index(f.architecture.kind))
    raise first_error or CheckpointError(_unknown(checkpoint, candidates, system))


def _candidates(checkpoint: Checkpoint, system: str | None, config: Mapping[str, Any]) -> list[Architecture]:
    every = registry.architectures()
    if system is not None:
        named = [a for a in every if system in (a.id, a.system)]
        if not named:
            registry.find(system, config)  # raises, listing the systems there are
        return named
    marked = checkpoint.metadata.get("architecture")
    return [a for a in every if a.id == marked] or every


def _match(
    state: dict[str, torch.Tensor], candidates: list[Architecture], anywhere: bool
) -> tuple[Architecture, dict[str, torch.Tensor], str, int] | None:
    for view, prefix, left in views(state, anywhere):
        for architecture in candidates:
            prepared = _prepare(architecture, view)
            if prepared is not None:
                return architecture, prepared, prefix, left
    return None


def _prepare(architecture: Architecture, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The state under the architecture's present names; None if it is not this architecture's."""
    try:
        if architecture.prepare_state_dict is not None:
            state = architecture.prepare_state_dict(dict(state))
        return state if architecture.detect(state) else None
    except (*NONSENSE, CheckpointError):
        return None


def _notes(
    checkpoint: Checkpoint, weights: WeightSet, state: Mapping[str, torch.Tensor], prefix: str, left: int
) -> list[str]:
    notes = []
    if weights.name:
        notes.append(f"weights taken from {weights.name!r}")
    if weights.ema or "ema" in prefix:
        notes.append("averaged (EMA) weights chosen")
    others = [s.name or "top level" for s in checkpoint.sets if s is not weights]
    if others:
        notes.append(f"not used: {_some(others)}")
    if prefix:
        notes.append(f"prefix {prefix!r} removed from the names")
    if left:
        notes.append(f"{left} tensors outside the network ignored")
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()})
    if kinds and kinds != ["float32"]:
        notes.append(f"stored as {', '.join(kinds)}, loaded as float32")
    return notes


def configuration(
    architecture: Architecture,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Every hyper-parameter: from names and shapes, then the metadata where shapes do not tell, then `overrides`."""
    try:
        found = dict(architecture.config_from_state_dict(state))
    except KeyError as error:
        raise CheckpointError(f"looks like {architecture.title}, but this entry is missing: {error.args[0]}") from None
    except (*NONSENSE, ConfigError) as error:
        raise CheckpointError(f"looks like {architecture.title}, but its shapes make no sense ({error})") from None
    try:
        # "acl_config" and the like: what others may write beside their weights.
        stored = json.loads(metadata.get("config") or metadata.get(f"{architecture.id.replace('-', '_')}_config", "{}"))
    except (ValueError, RecursionError):
        stored = {}
    for key in architecture.metadata_keys if isinstance(stored, dict) else ():
        if key in stored:
            if not _is_setting(stored[key]):
                raise CheckpointError(f"its metadata gives {key!r} the absurd value {str(stored[key])[:60]!r}")
            known = found.get(key)
            merge = isinstance(known, Mapping) and isinstance(stored[key], Mapping)
            found[key] = {**known, **stored[key]} if merge else stored[key]
    nested = {key: {**found[key], **value} for key, value in overrides.items() if isinstance(found.get(key), dict)}
    return found | dict(overrides) | nested


def _is_setting(value: Any, depth: int = 3) -> bool:
    """Whether a value may be a hyper-parameter: a small number, a short text, or a list or mapping of some of these."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= 256 and all(_is_setting(v, depth - 1) for v in value)
    if isinstance(value, (int, float)):
        return abs(value) <= 1 << 16
    return value is None or (isinstance(value, str) and len(value) <= 256)


def _check_fit(architecture: Architecture, module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Compares names and shapes with the network's; drops entries that it computes itself. Raises CheckpointError."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    computed = [re.compile(p) for p in architecture.computed_buffers]

    def is_computed(key: str) -> bool:
        return any(p.search(key) for p in computed)

    wrong = [k for k in wanted.keys() & state.keys() if wanted[k] != tuple(state[k].shape)]
    for key in [k for k in wrong if is_computed(k)]:
        wrong.remove(key)
        del state[key]
    missing = [k for k in wanted.keys() - state.keys() if not is_computed(k) and not _HARMLESS.search(k)]
    unexpected = [k for k in state.keys() - wanted.keys() if not is_computed(k) and not _HARMLESS.search(k)]
    problems = []
    if missing:
        problems.append(f"these keys are missing: {_some(missing)}")
    if unexpected:
        problems.append(f"these are not part of it: {_some(unexpected)}")
    if wrong:
        shapes = [f"{k} is {tuple(state[k].shape)} instead of {wanted[k]}" for k in sorted(wrong)]
        problems.append(f"these have other shapes: {_some(shapes)}")
    if problems:
        raise CheckpointError(f"looks like {architecture.title}, but {'; '.join(problems)}")


def _unknown(checkpoint: Checkpoint, candidates: list[Architecture], system: str | None) -> str:
    """Why no architecture was found, as helpful as the keys allow."""
    keys = [key for weights in checkpoint.sets for key in weights.tensors]
    other = describe_weights(keys)
    if other and system is None:
        return f"this looks like {other}"
    resembled = closest(checkpoint.sets[0].tensors, candidates)
    if resembled is not None:
        architecture, missing = resembled
        return f"looks like {architecture.title}, but these keys are missing: {_some(missing)}"
    if system is not None:
        return f"this is not a {candidates[0].title} checkpoint; its first entries are {_some(keys)}"
    known = ", ".join(sorted({a.title for a in candidates}))
    return f"no network known here has such weights; its first entries are {_some(keys)}. Known: {known}"


def _some(names: Iterable[str]) -> str:
    names = sorted(str(n)[:100] for n in names)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
