"""Writing checkpoints: any supported file as one safetensors file that says what it is.

The result holds the network's weights under its own names (no wrappers, averaged weights chosen, no optimizer state),
and in the metadata "mend.architecture", "mend.config" (JSON), "mend.tasks" and "mend.source".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import CheckpointError, InputError
from .checkpoint import load, read
from .restorer import Restorer

_PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def metadata(architecture: str, config: Mapping[str, Any], **more: str) -> dict[str, str]:
    """The metadata of a safetensors file of ours, as `models.load` reads it."""
    described = {"architecture": architecture, "config": json.dumps(config, default=list, sort_keys=True), **more}
    return {"format": "pt"} | {f"mend.{key}": value for key, value in described.items() if value}


def save(restorer: Restorer, path: str | Path, *, force: bool = False, precision: str = "float32", **more: str) -> Path:
    """Writes a network as safetensors. precision: "float32", "float16" or "bfloat16"; integers stay as they are.

    Entries that the network computes itself are left out. Written beside the target first, so that an interruption
    leaves no half file. Raises InputError if the file is there and `force` is not given.
    """
    path = Path(path)
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; choose another name or allow overwriting (--force)")
    if precision not in _PRECISIONS:
        raise InputError(f"precision {precision!r}: one of {', '.join(_PRECISIONS)}")
    state = {key: _stored(value, _PRECISIONS[precision]) for key, value in _weights(restorer).items()}
    tasks = restorer.metadata.get("tasks", "")
    known = {"tasks": tasks, "licence": restorer.stated_licence, **more}
    described = metadata(restorer.architecture.id, restorer.config, **known)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(state, str(partial), metadata=described)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _weights(restorer: Restorer) -> dict[str, torch.Tensor]:
    """The state dict without what the network computes itself."""
    computed = [re.compile(p) for p in restorer.architecture.computed_buffers]
    state = restorer.module.state_dict()
    return {key: value for key, value in state.items() if not any(p.search(key) for p in computed)}


def _stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy of its own (safetensors refuses shared memory) in the wanted precision."""
    return value.detach().to(dtype if value.is_floating_point() else value.dtype).cpu().contiguous().clone()


def convert(
    source: str | Path,
    target: str | Path | None = None,
    *,
    force: bool = False,
    precision: str = "float32",
    system: str | None = None,
) -> tuple[Path, Restorer]:
    """Reads `source`, writes it as safetensors (beside it, unless `target` is given), and compares what was written.

    Returns the file and the network that was read. Raises CheckpointError, InputError.
    """
    source = Path(source)
    target = Path(target) if target else source.with_suffix(".safetensors")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{source}: source and target are the same file; give another one (-o)")
    restorer = load(source, system=system)
    save(restorer, target, force=force, precision=precision, source=source.name)
    verify(restorer, target, precision)
    return target, restorer


def verify(restorer: Restorer, path: Path, precision: str = "float32") -> None:
    """Reads a written file back and compares architecture, settings and every value. Raises CheckpointError."""
    again = load(path)
    wanted, found = _weights(restorer), _weights(again)
    same = again.architecture.id == restorer.architecture.id and wanted.keys() == found.keys()
    dtype = _PRECISIONS[precision]
    for key, value in wanted.items() if same else ():
        expected = value.to(dtype).to(value.dtype) if value.is_floating_point() else value
        same = same and torch.equal(expected.nan_to_num(), found[key].nan_to_num())
    if not same:
        raise CheckpointError(f"{path.name}: what was written differs from what was read; do not use it")


def describe(path: str | Path, system: str | None = None) -> dict[str, Any]:
    """What a model file is, for people and scripts: architecture, settings, size, tasks, notes. Raises CheckpointError."""
    path = Path(path)
    restorer = load(path, system=system)
    architecture = restorer.architecture
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "architecture": architecture.id,
        "title": architecture.title,
        "kind": architecture.kind,
        "paper": architecture.paper,
        "licence": restorer.licence,
        "tasks": list(restorer.tasks),
        "scale": restorer.scale,
        "multiple of": restorer.multiple_of,
        "parameters": restorer.parameters,
        "config": dict(restorer.config),
        "sets of weights": [s.name or "top level" for s in read(path).sets],
        "notes": restorer.notes,
    }
