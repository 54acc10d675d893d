"""safetensors files: the header is checked in full before a tensor is touched.

Format: 8 bytes header length, a JSON header of name -> {dtype, shape, data_offsets}, then the values without gaps.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from ..errors import CheckpointError
from .stored import MAX_DIMENSIONS, MAX_TENSORS, aligned, size_in_words

MAX_HEADER = 16 << 20
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def looks_like_safetensors(head: bytes) -> bool:
    """True if the first bytes are a plausible header length followed by JSON."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def read_safetensors(data: memoryview) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that share the file's memory, and the metadata. Raises CheckpointError."""
    header, metadata, start = read_header(data)
    state = {}
    for name, (dtype, shape, begin, end) in header.items():
        state[name] = aligned(data[start + begin : start + end]).view(dtype).view(shape)
    return state, metadata


def read_header(
    data: memoryview,
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...], int, int]], dict[str, str], int]:
    """name -> (dtype, shape, begin, end), the metadata, and where the values start. Raises CheckpointError."""
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise CheckpointError(
            f"the file is truncated: its header alone has {size_in_words(size)}, the file "
            f"{size_in_words(len(data))}. Download it again"
        )
    if size > MAX_HEADER:
        raise CheckpointError(f"its header of {size_in_words(size)} is absurdly large")
    text = bytes(data[8 : 8 + size])
    if text.count(b"[") + text.count(b"{") > 10_000 + size // 10:
        raise CheckpointError("its header would unfold into far more objects than its size allows")
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is not valid ({str(error)[:100]})") from None
    if not isinstance(header, dict):
        raise CheckpointError("its header is not valid (a table is expected)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("its metadata is not a table of text")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"it lists {len(header)} tensors")
    entries = {name: _entry(name, described) for name, described in header.items()}
    _check_layout(entries, len(data) - 8 - size)
    return entries, metadata, 8 + size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is listed twice")
    return table


def _entry(name: str, described: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    where = f"tensor {name[:100]!r}"
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    dtype = getattr(torch, _DTYPES[kind], None) if isinstance(kind, str) and kind in _DTYPES else None
    if dtype is None:
        raise CheckpointError(f"{where} has the number format {str(kind)[:20]!r}, which is not supported")
    if not (_sizes(shape) and len(shape) <= MAX_DIMENSIONS and _sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{where} has a malformed shape or place")
    count = math.prod(shape)
    if count * dtype.itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where} of shape {tuple(shape)} takes {size_in_words(count * dtype.itemsize)}, but its place in the "
            f"file has {offsets[1] - offsets[0]} bytes"
        )
    if not count and max(shape) > 1 << 16:
        raise CheckpointError(f"{where} is empty, but of the absurd shape {tuple(shape)}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _check_layout(entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]], available: int) -> None:
    """Values must follow one another without gaps or overlaps and end with the file."""
    expected = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != expected:
            raise CheckpointError(f"tensor {name[:100]!r} overlaps another one or follows a gap")
        expected = end
    if expected > available:
        raise CheckpointError(
            f"the file is truncated: {size_in_words(available)} of {size_in_words(expected)} of weights are there. "
            "Download it again"
        )
    if expected < available:
        raise CheckpointError(f"{available - expected} bytes after the last tensor belong to nothing")
