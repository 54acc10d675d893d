"""Entropy coding of integer planes with 16-bit tables, by the package constriction (a range coder in Rust).

Symbols are grouped by table, so that each of at most 256 tables makes one vectorised call; what a table does not cover is
coded as its escape symbol and written as a variable-length integer to a side list.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import CheckpointError, MissingDependency
from ..models.aio_codec_rates import LARGEST_SYMBOL
from .tables import TOTAL, Tables


class BitstreamError(CheckpointError):
    """A bitstream is damaged, or was made by another codec."""


@lru_cache(maxsize=1)
def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise MissingDependency("bitstreams need the package constriction: pip install constriction") from None
    return constriction


def available() -> bool:
    """True if bitstreams can be made and read here."""
    try:
        _constriction()
    except MissingDependency:
        return False
    return True


def _model(tables: Tables, index: int) -> Any:
    counts = tables.counts(index)
    return _constriction().stream.model.Categorical((counts / TOTAL).astype(np.float32), perfect=False)


def _groups(indexes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(table, places of its symbols in raster order), tables ascending."""
    flat = indexes.ravel()
    order = np.argsort(flat, kind="stable")
    values, starts = np.unique(flat[order], return_index=True)
    yield from zip(values.tolist(), np.split(order, starts[1:]), strict=True)


def _varint(value: int) -> bytes:
    """Zigzag and 7 bits a byte, low ones first."""
    value = 2 * value if value >= 0 else -2 * value - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Encoder:
    """Codes planes one after the other; `finish` gives (stream, escapes)."""

    def __init__(self) -> None:
        self._encoder = _constriction().stream.queue.RangeEncoder()
        self._escapes = bytearray()

    def plane(self, symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> None:
        """Adds integers of at most LARGEST_SYMBOL and the index of the table for each, arrays of one shape."""
        values = symbols.ravel().astype(np.int64)
        for index, places in _groups(indexes):
            last = int(tables.length[index]) - 2
            relative = values[places] - int(tables.offset[index])
            outside = (relative < 0) | (relative >= last)
            for value in values[places][outside].tolist():
                self._escapes += _varint(value)
            coded = np.where(outside, last, relative).astype(np.int32)
            self._encoder.encode(coded, _model(tables, index))

    def finish(self) -> tuple[bytes, bytes]:
        """The stream and the side list of escapes."""
        return self._encoder.get_compressed().astype("<u4").tobytes(), bytes(self._escapes)


class Decoder:
    """Reads planes back in the order in which they were coded."""

    def __init__(self, stream: bytes, escapes: bytes) -> None:
        if len(stream) % 4:
            raise BitstreamError("bitstream: damaged (the coded part is not made of whole words)")
        words = np.frombuffer(stream, dtype="<u4").astype(np.uint32)
        self._decoder = _constriction().stream.queue.RangeDecoder(words)
        self._escapes, self._position = escapes, 0

    def plane(self, indexes: np.ndarray, tables: Tables) -> np.ndarray:
        """Integers (int32) of the shape of `indexes`. Raises BitstreamError where they cannot be right."""
        values = np.empty(indexes.size, dtype=np.int32)
        for index, places in _groups(indexes):
            last, offset = int(tables.length[index]) - 2, int(tables.offset[index])
            try:
                coded = self._decoder.decode(_model(tables, index), len(places))
            except Exception as error:  # the coder's own, whatever its type: garbage that no encoder makes
                raise BitstreamError(f"bitstream: damaged ({error})") from None
            part = coded.astype(np.int32) + offset
            for place in np.flatnonzero(coded >= last).tolist():
                part[place] = self._escape()
            values[places] = part
        return values.reshape(indexes.shape)

    def _escape(self) -> int:
        value, shift = 0, 0
        while True:
            if self._position >= len(self._escapes) or shift > 21:
                raise BitstreamError("bitstream: damaged (an escaped value is missing)")
            byte = self._escapes[self._position]
            self._position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        value = value // 2 if value % 2 == 0 else -(value // 2) - 1
        if abs(value) > LARGEST_SYMBOL:
            raise BitstreamError("bitstream: damaged (a value is out of range)")
        return value
