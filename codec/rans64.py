"""A range asymmetric numeral coder with a 64-bit state and 32-bit words (Duda 2013), one interleaved table per symbol.

Plain Python and big integers would be slower still; this is the layout that other tools of the field read, for exchange and
as a reference for size. The container's own streams are made by `entropy`, which is vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .tables import PRECISION, Tables

LOWER = 1 << 31
BYPASS_BITS = 4
BYPASS_MAX = (1 << BYPASS_BITS) - 1


def _operations(planes: Sequence[tuple[np.ndarray, np.ndarray, Tables]]) -> list[tuple[int, int, int]]:
    """(start, width, bits) of everything to be coded, in decoding order; escapes add raw digits."""
    operations = []
    for symbols, indexes, tables in planes:
        for symbol, index in zip(symbols.ravel().tolist(), indexes.ravel().tolist(), strict=True):
            last = int(tables.length[index]) - 2
            value, raw = symbol - int(tables.offset[index]), -1
            if value < 0:
                raw, value = -2 * value - 1, last
            elif value >= last:
                raw, value = 2 * (value - last), last
            start = int(tables.cdf[index, value])
            operations.append((start, int(tables.cdf[index, value + 1]) - start, PRECISION))
            if raw >= 0:
                digits = max(0, -(-raw.bit_length() // BYPASS_BITS))
                count = digits
                while count >= BYPASS_MAX:
                    operations.append((BYPASS_MAX, 1, BYPASS_BITS))
                    count -= BYPASS_MAX
                operations.append((count, 1, BYPASS_BITS))
                operations += [((raw >> (BYPASS_BITS * d)) & BYPASS_MAX, 1, BYPASS_BITS) for d in range(digits)]
    return operations


def encode(planes: Sequence[tuple[np.ndarray, np.ndarray, Tables]]) -> bytes:
    """One stream of planes of (symbols, table index of each, tables), coded in raster order."""
    state, words = LOWER, []
    for start, width, bits in reversed(_operations(planes)):
        limit = ((LOWER >> bits) << 32) * width
        if state >= limit:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = ((state // width) << bits) + state % width + start
    words += [state >> 32, state & 0xFFFFFFFF]
    return np.array(words[::-1], dtype="<u4").tobytes()
