"""Files of torch.save: zip archives (torch 1.6 and later) and the stacked pickles of before.

Both are read by our own interpreter (`pickled`) and a strict reader of zip directories: nothing is unpacked, nothing is
allocated for a tensor before it was compared with the bytes that are there.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ..errors import CheckpointError
from .pickled import Global, Record, unpickle
from .stored import MAX_TENSORS, StoredTensor, UnreadableTensor, aligned

ZIP_START = b"PK\x03\x04"
_ZIP_END, _ZIP64_LOCATOR, _ZIP64_END, _ZIP_ENTRY = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06", b"PK\x01\x02"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool uint16 uint32 "
        "uint64 complex64 complex128 double float half long int short"
    ).split()
    if hasattr(torch, name)
}


@dataclass(frozen=True, slots=True)
class _Storage:
    open: Callable[[], torch.Tensor]
    verify: Callable[[], None]
    dtype: torch.dtype | None
    """None: quantised."""


# ---- what the pickles may build -------------------------------------------------------------------------------------


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    return _view(storage, storage.dtype if isinstance(storage, _Storage) else None, offset, shape, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
    return _view(storage, DTYPES.get(name), offset, shape, stride)


def _view(storage: Any, dtype: torch.dtype | None, offset: Any, shape: Any, stride: Any) -> Any:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise CheckpointError("a tensor in it has no storage or no shape")
    if dtype is None:
        return UnreadableTensor("quantised, or of an unknown number format")
    return StoredTensor(storage.open, storage.verify, dtype, offset, shape, stride)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor that carries Python attributes: only the tensor."""
    rebuild = CALLS.get(function.name) if isinstance(function, Global) else None
    if rebuild is None or rebuild is _rebuild_from_type or not isinstance(arguments, tuple):
        return Record("torch._tensor._rebuild_from_type_v2")
    return rebuild(*arguments)


def _first(tensor: Any, *rest: Any) -> Any:
    return tensor


def _unreadable(kind: str) -> Callable[..., UnreadableTensor]:
    return lambda *arguments: UnreadableTensor(kind)


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_sparse_tensor": _unreadable("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _unreadable("sparse"),
    "torch._utils._rebuild_nested_tensor": _unreadable("a nested tensor"),
    "torch._utils._rebuild_qtensor": _unreadable("quantised"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("without values (a meta tensor)"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unreadable("stored as a NumPy array"),
}


def _storage_dtype(kind: Any) -> torch.dtype | None:
    match = re.fullmatch(r"torch(?:\.\w+)*?\.(\w+)Storage", kind.name) if isinstance(kind, Global) else None
    if match is None:
        raise CheckpointError("a tensor in it is kept in something that is not a torch storage")
    return _STORAGES.get(match[1])


class _Storages:
    """The storages that one file's persistent ids name; each is described once."""

    def __init__(self, find: Callable[[str, int], memoryview], verify: Callable[[str], None]) -> None:
        # Once per storage: a misaligned one is copied, and thousands of tensors may share it.
        self.find, self.verify = cache(lambda key, size: aligned(find(key, size))), cache(verify)
        self.known: dict[str, tuple[_Storage, int]] = {}

    def persistent(self, identifier: Any) -> _Storage:
        if not (isinstance(identifier, tuple) and 5 <= len(identifier) <= 6 and identifier[0] == "storage"):
            raise CheckpointError("its pickle refers to something outside it")
        _, kind, key, _, count, *view = identifier
        if not isinstance(key, str) or type(count) is not int or count < 0 or any(v is not None for v in view):
            raise CheckpointError("its pickle describes a storage that cannot be")
        dtype = _storage_dtype(kind)
        size = count * (dtype.itemsize if dtype else 1)
        known = self.known.get(key)
        if known is None:
            if len(self.known) >= 4 * MAX_TENSORS:
                raise CheckpointError(f"it lists more than {4 * MAX_TENSORS} tensors")
            known = self.known[key] = (
                _Storage(partial(self.find, key, size), partial(self.verify, key), dtype),
                size,
            )
        elif known[0].dtype != dtype or known[1] != size:
            raise CheckpointError("its pickle describes one storage in two ways")
        return known[0]


# ---- zip archives ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    start: int
    size: int
    crc: int
    plain: bool
    """False: compressed or encrypted."""


class ZipFile:
    """The directory of a zip archive checked in full when opened; only members stored as they are can be read."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        try:
            self.entries = self._read_directory()
        except struct.error:
            raise CheckpointError("its zip directory is damaged") from None

    def _read_directory(self) -> dict[str, _Entry]:
        data, total = self.data, len(self.data)
        tail = bytes(data[-65_557:])
        at = total - len(tail) + tail.rfind(_ZIP_END)
        if _ZIP_END not in tail or at + 22 + int.from_bytes(data[at + 20 : at + 22], "little") != total:
            raise CheckpointError("the file is truncated: the end of the zip archive is missing. Download it again")
        count, size, position = struct.unpack_from("<HII", data, at + 10)
        if 0xFFFF == count or 0xFFFFFFFF in (size, position):
            if at < 20 or bytes(data[at - 20 : at - 16]) != _ZIP64_LOCATOR:
                raise CheckpointError("its zip directory is damaged")
            (at,) = struct.unpack_from("<Q", data, at - 12)
            if at + 56 > total or bytes(data[at : at + 4]) != _ZIP64_END:
                raise CheckpointError("its zip directory is damaged")
            count, size, position = struct.unpack_from("<QQQ", data, at + 32)
        if position + size > total or count > 4 * MAX_TENSORS:
            raise CheckpointError(f"its zip directory is damaged, or lists {count} members")
        entries: dict[str, _Entry] = {}
        for _ in range(count):
            position = self._read_entry(position, entries)
        if sum(e.size for e in entries.values() if e.plain) > total:
            raise CheckpointError("its zip members overlap: it would unfold to more than the file holds")
        return entries

    def _read_entry(self, position: int, entries: dict[str, _Entry]) -> int:
        """Adds the member that the directory describes at `position`; returns where the next one is described."""
        data = self.data
        if bytes(data[position : position + 4]) != _ZIP_ENTRY:
            raise CheckpointError("its zip directory is damaged")
        flags, method, crc, packed, size, name_size, extra_size, comment_size = struct.unpack_from(
            "<HH4xIIIHHH", data, position + 8
        )
        (header,) = struct.unpack_from("<I", data, position + 42)
        name = str(data[position + 46 : position + 46 + name_size], "utf-8", "replace")
        extra = bytes(data[position + 46 + name_size : position + 46 + name_size + extra_size])
        size, packed, header = _zip64_fields(extra, [size, packed, header])
        if header + 30 > len(data) or bytes(data[header : header + 4]) != ZIP_START:
            raise CheckpointError(f"its zip member {name[:80]!r} is not where the directory says")
        local_name, local_extra = struct.unpack_from("<HH", data, header + 26)
        start = header + 30 + local_name + local_extra
        if start + packed > len(data):
            raise CheckpointError(f"the file is truncated: its zip member {name[:80]!r} goes beyond the end")
        if name in entries:
            raise CheckpointError(f"its zip directory lists {name[:80]!r} twice")
        entries[name] = _Entry(start, size, crc, plain=method == 0 and not flags & 1 and packed == size)
        return position + 46 + name_size + extra_size + comment_size

    def read(self, name: str) -> memoryview:
        entry = self.entries[name]
        if not entry.plain:
            raise CheckpointError(
                f"its zip member {name[:80]!r} is compressed or encrypted, which torch.save never does. "
                "If it is an archive of model files, unpack it first"
            )
        return self.data[entry.start : entry.start + entry.size]

    def intact(self, name: str) -> bool:
        """Whether the member has the checksum that the directory gives."""
        return zlib.crc32(self.read(name)) == self.entries[name].crc


def _zip64_fields(extra: bytes, fields: list[int]) -> list[int]:
    """The fields that the zip64 extra field holds where the directory's 32 bits were too few."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            for index, value in enumerate(fields):
                if value == 0xFFFFFFFF:
                    (fields[index],) = struct.unpack_from("<Q", extra, at + 4)
                    at += 8
            break
        at += 4 + length
    return fields


def read_zip(data: memoryview, notes: list[str]) -> Any:
    """What torch.save put into a zip archive: containers of `StoredTensor`. Raises CheckpointError."""
    archive = ZipFile(data)
    names = [n for n in archive.entries if n == "data.pkl" or re.fullmatch(r"[^/]*/data\.pkl", n)]
    if not names:
        inside = ", ".join(sorted(archive.entries)[:4])[:200]
        raise CheckpointError(f"it is a zip archive, not a model file (inside: {inside}). Unpack it first")
    if len(names) > 1:
        raise CheckpointError("it holds two checkpoints in one zip archive")
    root = names[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.entries or any(n.startswith(f"{root}code/") for n in archive.entries):
        raise CheckpointError("it is a TorchScript archive (program and weights); a file with the weights is needed")
    if f"{root}byteorder" in archive.entries and bytes(archive.read(f"{root}byteorder")[:8]) == b"big":
        raise CheckpointError("it was saved on a big-endian machine, which is not supported")
    checksums = archive.intact(names[0])
    if not checksums:
        notes.append("the file has no valid checksums: damage cannot be noticed")

    def find(key: str, size: int) -> memoryview:
        name = f"{root}data/{key}"
        if name not in archive.entries or archive.entries[name].size < size:
            raise CheckpointError("has no values in the file: it is truncated or made up")
        return archive.read(name)[:size]

    def verify(key: str) -> None:
        if checksums and not archive.intact(f"{root}data/{key}"):
            raise CheckpointError("has a wrong checksum: the file is damaged. Download it again")

    value, _ = unpickle(archive.read(names[0]), CALLS, _Storages(find, verify).persistent)
    return value


# ---- stacked pickles ------------------------------------------------------------------------------------------------


def read_legacy(data: memoryview, notes: list[str]) -> Any:
    """What torch.save wrote before torch 1.6: five pickles, then the storages. Raises CheckpointError."""
    magic, at = unpickle(data)
    if magic != _LEGACY_MAGIC:
        raise CheckpointError("it is a pickle, but not one of torch.save; it holds no tensors that can be read")
    _, used = unpickle(data[at:])
    at += used
    system, used = unpickle(data[at:])
    at += used
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise CheckpointError("it was saved on a big-endian machine, which is not supported")
    places: dict[str, memoryview] = {}

    def find(key: str, size: int) -> memoryview:
        if key not in places:
            raise CheckpointError("has no values in the file: it is truncated or made up")
        return places[key]

    storages = _Storages(find, lambda key: None)  # stacked pickles have no checksums
    value, used = unpickle(data[at:], CALLS, storages.persistent)
    at += used
    keys, used = unpickle(data[at:])
    at += used
    if not isinstance(keys, list) or not all(isinstance(k, str) and k in storages.known for k in keys):
        raise CheckpointError("its list of storages is malformed")
    for key in keys:
        size = storages.known[key][1]
        start, at = at + 8, at + 8 + size
        if at > len(data):
            raise CheckpointError("the file is truncated: the values of some tensors are missing. Download it again")
        count = int.from_bytes(data[start - 8 : start], "little")
        itemsize = getattr(storages.known[key][0].dtype, "itemsize", 1)
        if count * itemsize != size:
            raise CheckpointError("a storage in it has another size than its pickle says")
        places[key] = data[start:at]
    return value
