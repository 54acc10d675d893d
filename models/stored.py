"""Tensors as files describe them: checked against the bytes that are there before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError

MAX_DIMENSIONS = 8
MAX_TENSORS = 50_000


def size_in_words(count: int) -> str:
    """A number of bytes for people: "12.3 MB"."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def aligned(buffer: memoryview) -> torch.Tensor:
    """The buffer's bytes as a tensor that shares its memory, or a copy where the address fits no 8-byte number."""
    if len(buffer) == 0:
        return torch.empty(0, dtype=torch.uint8)
    flat = torch.frombuffer(buffer, dtype=torch.uint8)
    return flat.clone() if flat.data_ptr() % 8 else flat


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A view of a storage that is still in the file. `open` gives the storage's bytes, `verify` compares checksums."""

    open: Callable[[], torch.Tensor]
    verify: Callable[[], None]
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, sharing the file's memory. Raises CheckpointError if it is not a plain view of what is there."""
        self.check_layout()
        extent = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        storage = self.open()
        if self.elements and extent * self.dtype.itemsize > len(storage):
            raise CheckpointError(
                f"has shape {_shape(self.shape)}, that is {size_in_words(self.nbytes)}, "
                f"but the file holds {size_in_words(len(storage))} for it"
            )
        if not self.elements:
            return torch.empty(self.shape, dtype=self.dtype)
        whole = storage[: len(storage) // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return whole.as_strided(self.shape, self.stride, self.offset)

    def check_layout(self) -> None:
        """Raises CheckpointError unless shape and strides can belong to a plain, non-overlapping view."""
        if len(self.shape) > MAX_DIMENSIONS or len(self.stride) != len(self.shape):
            raise CheckpointError(f"has {len(self.shape)} dimensions and {len(self.stride)} strides")
        if not all(type(n) is int and 0 <= n < 2**48 for n in (*self.shape, *self.stride, self.offset)):
            raise CheckpointError("has sizes that are no sizes")
        if not self.elements and max(self.shape) > 1 << 16:
            raise CheckpointError(f"is empty, but of the absurd shape {_shape(self.shape)}")
        # Sorted by stride, every dimension must step over all that the smaller ones cover.
        covered = 0
        for stride, count in sorted(zip(self.stride, self.shape, strict=True)):
            if count > 1:
                if stride <= covered:
                    raise CheckpointError(
                        f"has shape {_shape(self.shape)} with overlapping strides {_shape(self.stride)}: it would "
                        "unfold to more than the file holds"
                    )
                covered += (count - 1) * stride


class UnreadableTensor:
    """A tensor of a kind that is not read (sparse, quantised); said when it is wanted."""

    nbytes = 0

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def check_layout(self) -> None:
        """Nothing to check."""

    def read(self) -> torch.Tensor:
        raise CheckpointError(f"is {self.kind}; only dense tensors are read")

    def verify(self) -> None:
        """Nothing to compare."""


def _shape(sizes: Sequence[Any]) -> str:
    return "x".join(str(n)[:20] for n in sizes) or "()"
