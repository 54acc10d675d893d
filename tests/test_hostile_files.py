"""Files made to run code, to fill memory or to crash: each is refused with a CheckpointError and leaves nothing behind.

The mutation tests state their counts. Memory is measured in a process of its own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError
from comfyui_mend.models import checkpoint as reading
from comfyui_mend.models.pickled import Record, unpickle

from .conftest import SMALL

MUTATIONS = 500  # of each kind of file; ten times as many with -m slow
SECONDS_PER_FILE = 20


# ---- files ----------------------------------------------------------------------------------------------------------


def zip_with(stream: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A file as torch.save writes it, around a pickle stream of ours."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        for key, values in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", values)
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(max(1, value.bit_length() // 8 + 1), "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values) -> bytes:
    return b"(" + b"".join(number(v) for v in values) + b"t"


def tensor(key="0", elements=4, offset=0, shape=(4,), stride=(1,), kind="FloatStorage") -> bytes:
    """The opcodes that rebuild a tensor over storage `key`."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(elements) + b"tQ"
    rest = number(offset) + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def entry(value: bytes, key: str = "weight") -> bytes:
    """A pickle of {key: value}."""
    return b"\x80\x02}" + text(key) + value + b"s."


def stacked(stream: bytes) -> bytes:
    """A file of torch.save before 1.6 around a pickle stream of ours."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(v, protocol=2) for v in head) + stream + pickle.dumps([], protocol=2)


def refused(data: bytes, tmp_path: Path, match: str | None = None, name: str = "model.pth") -> str:
    """Loads a file of `data`; returns the message with which it was refused, in time and by name."""
    (tmp_path / name).write_bytes(data)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=match) as caught:
        models.load(tmp_path / name)
    assert time.monotonic() - started < SECONDS_PER_FILE
    assert str(caught.value).startswith(f"{name}: ")
    return str(caught.value)


# ---- running code ---------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled by Python, it calls something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def harmful(canary: Path) -> dict[str, object]:
    command = f"touch {canary}"
    return {
        "os.system": Runs(os.system, command),
        "subprocess": Runs(subprocess.check_output, ["touch", str(canary)]),
        "eval": Runs(eval, f"open({str(canary)!r}, 'w')"),
        "exec": Runs(exec, f"open({str(canary)!r}, 'w')"),
        "open": Runs(open, str(canary), "w"),
        "import": Runs(__import__, "antigravity"),
        "popen": Runs(os.popen, command),
        "torch.load": Runs(torch.load, str(canary)),
        "pickle.loads": Runs(pickle.loads, b"cos\nsystem\n"),
        "os.remove": Runs(os.remove, str(canary)),
    }


@pytest.mark.parametrize("kind", harmful(Path("x")))
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_file_runs_code(kind, protocol, zipped, tmp_path):
    canary = tmp_path / "canary"
    state = {"weight": torch.ones(2), "payload": harmful(canary)[kind]}
    torch.save(state, tmp_path / "m.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    message = refused((tmp_path / "m.pth").read_bytes(), tmp_path, "asks Python to run .* Do not use this file")
    assert "Nothing was run" in message
    assert not canary.exists()


STREAMS = {
    "text opcodes": b"cos\nsystem\n(S'touch canary'\ntR.",
    "INST": b"(S'touch canary'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + text("touch canary") + b"o.",
    "STACK_GLOBAL": b"\x80\x04" + text("posix") + text("system") + b"\x93" + text("touch canary") + b"\x85R.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n" + text("touch canary") + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n" + text("touch canary") + b"\x85}\x92.",
    "extension code": b"\x80\x02\x82\x01.",
    "getattr of builtins": b"\x80\x02cbuiltins\ngetattr\n" + b"cbuiltins\n__import__\n" + text("x") + b"\x86R.",
    "dotted name": b"\x80\x04" + text("torch") + text("os.system") + b"\x93" + text("touch canary") + b"\x85R.",
    "attribute walk": b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + text("x") + b"\x85R.",
    "BUILD on a class": b"\x80\x02cresearch\nModel\n}" + text("__setstate__") + b"cos\nsystem\nsb.",
    "setstate": b"\x80\x02cresearch\nModel\n)\x81" + text("touch canary") + b"b.",
    "hub": b"\x80\x02ctorch.hub\nload\n" + text("evil/repo") + text("model") + b"\x86R.",
    "out of band": b"\x80\x05\x97.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1) + b"x.",
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("wrap", [lambda s: s, stacked, zip_with], ids=["raw", "stacked", "zip"])
def test_crafted_streams_do_nothing(kind, wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(wrap(STREAMS[kind]), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth"]


def test_unknown_calls_become_records():
    stream = b"\x80\x02cresearch.code\nmake\n" + text("argument") + b"\x85R}" + text("state") + b"K\x05sb."
    value, used = unpickle(memoryview(stream))
    assert isinstance(value, Record) and used == len(stream)
    assert (value.name, value.args, value.state) == ("research.code.make", ("argument",), {"state": 5})


def test_nothing_is_imported_by_reading(tmp_path):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        refused(zip_with(entry(b"cevil_module\nThing\n)\x81")), tmp_path, "no weights")
        assert "evil_module" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


# ---- filling memory -------------------------------------------------------------------------------------------------

FOUR = {"0": bytes(16)}
TENSOR_BOMBS = {
    "stride 0": (tensor(shape=(10**6, 10**6), stride=(0, 0)), "overlapping"),
    "one expanded axis": (tensor(shape=(10**11, 4), stride=(0, 1)), "overlapping"),
    "overlapping rows": (tensor(shape=(3, 3), stride=(1, 1)), "overlapping"),
    "10^11 elements": (tensor(shape=(10**11,), elements=10**11), "unfold to 400.0 GB"),
    "10^11 of 4": (tensor(shape=(10**11,)), "unfold to 400.0 GB"),
    "beyond the end": (tensor(offset=1), "file holds"),
    "far offset": (tensor(offset=10**12), "file holds"),
    "negative offset": (tensor(offset=-4), "no sizes"),
    "negative size": (tensor(shape=(-4,)), "no sizes"),
    "negative stride": (tensor(stride=(-1,)), "no sizes"),
    "unequal ranks": (tensor(shape=(2, 2)), "dimensions"),
    "hundred axes": (tensor(shape=(1,) * 100, stride=(1,) * 100), "dimensions"),
    "empty but huge": (tensor(shape=(0, 10**12), stride=(1, 1)), "absurd shape"),
    "huge sizes": (tensor(shape=(2**60, 2**60), stride=(2**60, 1)), "no sizes"),
    "integers of 100 bits": (tensor(shape=(2**100,)), "no sizes"),
    "absent storage": (tensor(key="9"), "no values"),
    "storage out of the folder": (tensor(key="../data.pkl"), "no values"),
    "negative storage": (tensor(elements=-4), "cannot be"),
    "not a storage": (tensor(kind="Tensor"), "not a torch storage"),
    "quantised": (tensor(kind="QInt8Storage"), "quantised"),
}


@pytest.mark.parametrize("kind", TENSOR_BOMBS)
def test_tensors_that_are_not_there_are_refused_by_name(kind, tmp_path):
    opcodes, match = TENSOR_BOMBS[kind]
    refused(zip_with(entry(opcodes), FOUR), tmp_path, match)
    refused(stacked(entry(opcodes)), tmp_path)


def test_thousands_of_views_of_one_storage_are_refused(tmp_path):
    body = b"".join(text(f"w{i}") + tensor(elements=1 << 18, shape=(1 << 18,)) for i in range(1000))
    stream = b"\x80\x02}(" + body + b"u."
    refused(zip_with(stream, {"0": bytes(1 << 20)}), tmp_path, "would unfold to 1.0 GB")


STREAM_BOMBS = {
    "a billion laughs": b"\x80\x02]q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)) + b".",
    "dictionaries of dictionaries": b"\x80\x02}q\x00X\x01\0\0\0wK\x01s"
    + b"".join(
        b"}(" + text("a") + b"h" + bytes([i]) + text("b") + b"h" + bytes([i]) + b"uq" + bytes([i + 1]) for i in range(60)
    )
    + b".",
    "itself": b"\x80\x02}q\x00" + text("a") + b"h\x00s.",
    "nested dictionaries": b"\x80\x02" + (b"}" + text("a")) * 20_000 + b"N" + b"s" * 20_000 + b".",
    "nested tuples": b"\x80\x02N" + b"\x85" * 500_000 + b".",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested records": b"\x80\x02N" + b"".join([b"cm\nC\n)\x81\x86"] * 50_000) + b".",
    "empty sets": b"\x80\x02" + b"\x8f" * 600_000 + b".",
    "marks": b"\x80\x02" + b"(" * 600_000 + b".",
    "memo": b"\x80\x04N" + b"\x94" * 600_000 + b".",
    "names": b"\x80\x02" + b"ca\nb\n0" * 200_000 + b"N.",
    "set of a list again and again": b"\x80\x02](" + b"K\x01" * 50_000 + b"eq\x00" + b"cbuiltins\nlist\nq\x01" + b"h\x01h\x00\x85R" * 50_000 + b".",
    "colliding integers": b"\x80\x02}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 20_000)) + b"u.",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"x.",
    "text of 100 MB": b"\x80\x02X" + struct.pack("<I", 100 << 20) + bytes(100) + b".",
    "integer of 2 GB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "negative length": b"\x80\x02\x8b" + struct.pack("<i", -1) + b"x.",
    "endless name": b"\x80\x02c" + b"a" * 1_000_000,
    "empty stack": b"\x80\x02.",
    "reduce of nothing": b"\x80\x02R.",
    "absent memo": b"\x80\x02h\x05.",
    "pop beyond": b"\x80\x02" + b"0" * 10 + b".",
}  # fmt: skip


@pytest.mark.parametrize("kind", STREAM_BOMBS)
def test_streams_that_unfold_are_refused(kind, tmp_path):
    refused(zip_with(STREAM_BOMBS[kind]), tmp_path)


def test_modules_within_themselves_are_refused(tmp_path):
    """A pickled module that contains itself, and one that contains everything twice, sixty levels deep."""
    twice = b"\x80\x02cresearch\nNet\n)\x81}" + text("_modules") + b"}sbq\x00"
    for i in range(60):
        child = b"h" + bytes([i])
        twice += (
            b"cresearch\nNet\n)\x81}"
            + text("_modules")
            + b"}("
            + text("a")
            + child
            + text("b")
            + child
            + b"usbq"
            + bytes([i + 1])
        )
    refused(zip_with(twice + b"."), tmp_path, "absurdly deep|far more objects")
    itself = b"\x80\x02cresearch\nNet\n)\x81q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb."
    refused(zip_with(itself), tmp_path)


def test_modules_whose_tables_are_not_tables_are_read_or_refused(tmp_path):
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        tables = {
            "_modules": b"}",
            "_parameters": b"}" + text("w") + tensor() + b"s",
            "_buffers": b"}" + text("b") + tensor() + b"s",
        }
        tables[name] = b"K\x05"
        body = b"".join(text(key) + value for key, value in tables.items())
        attempt(zip_with(b"\x80\x02cresearch\nNet\n)\x81}(" + body + b"ub."), tmp_path / "module.pth")


def test_zip_bombs_are_refused(tmp_path):
    honest = zip_with(entry(tensor()), FOUR)
    assert set(reading.read(_write(tmp_path, honest)).state) == {"weight"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", entry(tensor(elements=1 << 26, shape=(1 << 26,))))
        archive.writestr("archive/data/0", bytes(1 << 28))
    refused(buffer.getvalue(), tmp_path, "compressed")
    # Sizes in the directory that the file does not have; members laid over one another; a count of members.
    place = honest.rfind(b"PK\x01\x02")
    for at, width in ((20, 4), (24, 4), (42, 4), (28, 2), (30, 2)):
        data = bytearray(honest)
        data[place + at : place + at + width] = b"\xfe" * width
        refused(bytes(data), tmp_path)
    end = honest.rfind(b"PK\x05\x06")
    for at, width in ((10, 2), (12, 4), (16, 4)):
        for filler in (b"\xff", b"\xfe"):
            data = bytearray(honest)
            data[end + at : end + at + width] = filler * width
            refused(bytes(data), tmp_path)


def test_members_listed_twice_are_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", entry(tensor()))
        archive.writestr("archive/data.pkl", entry(tensor()))
    refused(buffer.getvalue(), tmp_path, "twice")


def _write(folder: Path, data: bytes, name: str = "model.pth") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


# ---- safetensors ----------------------------------------------------------------------------------------------------


def safetensors_with(header: object, values: bytes = b"", size: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if size is None else size) + encoded + values


def described(shape=(4,), offsets=(0, 16), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


HEADERS = {
    "beyond the end": (safetensors_with({"w": described()}, bytes(8)), "truncated"),
    "header beyond the end": (safetensors_with(b"{}", size=1 << 30), "truncated"),
    "header of 2^63": (safetensors_with(b"{}", size=1 << 63), "model file|JSON|truncated"),
    "rest belongs to nothing": (safetensors_with({"w": described()}, bytes(24)), "belong to nothing"),
    "gap": (safetensors_with({"w": described(offsets=(8, 24))}, bytes(24)), "gap"),
    "overlap": (safetensors_with({"v": described(), "w": described()}, bytes(16)), "overlaps"),
    "partial overlap": (safetensors_with({"v": described(), "w": described(offsets=(8, 24))}, bytes(24)), "overlaps"),
    "wrong size": (safetensors_with({"w": described(shape=(5,))}, bytes(16)), "takes 20 bytes"),
    "10^11 elements": (safetensors_with({"w": described(shape=(10**11,))}, bytes(16)), "takes 400.0 GB"),
    "backwards": (safetensors_with({"w": described(offsets=(16, 0))}, bytes(16)), "16"),
    "negative": (safetensors_with({"w": described(shape=(-4,))}, bytes(16)), "malformed"),
    "fraction": (safetensors_with({"w": described(shape=(4.0,))}, bytes(16)), "malformed"),
    "true": (safetensors_with({"w": described(shape=(True,), offsets=(0, 4))}, bytes(4)), "malformed"),
    "hundred axes": (safetensors_with({"w": described(shape=(1,) * 100)}, bytes(16)), "malformed"),
    "huge and empty": (safetensors_with({"w": described(shape=(0, 10**12), offsets=(0, 0))}), "absurd shape"),
    "listed twice": (b'\x6c\0\0\0\0\0\0\0' + b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(108), "twice"),
    "unknown dtype": (safetensors_with({"w": described(dtype="F4")}, bytes(16)), "F4"),
    "dtype is a list": (safetensors_with({"w": described(dtype=["F32"])}, bytes(16)), "not supported"),
    "extra field": (safetensors_with({"w": described(code="x")}, bytes(16)), "not described"),
    "not a table": (safetensors_with({"w": [1]}, bytes(16)), "not described"),
    "metadata is no text": (safetensors_with({"__metadata__": {"a": 1}}), "metadata"),
    "metadata is a list": (safetensors_with({"__metadata__": []}), "metadata"),
    "not JSON": (safetensors_with(b"{" + b"x" * 40), "not valid"),
    "not text": (safetensors_with(b"{\xff\xfe" + bytes(40)), "not valid"),
    "deep": (safetensors_with(b'{"a":' + b"[" * 9_000 + b"]" * 9_000 + b"}"), "not valid|not described"),
    "deeper": (safetensors_with(b'{"a":' + b"[" * 900_000), "far more objects"),
    "many digits": (safetensors_with(b'{"a":' + b"9" * 100_000 + b"}"), "not valid|not described"),
    "many tensors": (safetensors_with({f"{i}": described((0,), (0, 0), "U8") for i in range(60_000)}), "lists 60000"),
    "no tensors": (safetensors_with({}, b""), "no weights|too small"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_malformed_safetensors_are_refused(kind, tmp_path):
    data, match = HEADERS[kind]
    refused(data, tmp_path, match, name="model.safetensors")


# ---- shapes that are absurd for the network --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_state():
    torch.manual_seed(0)
    return models.create("moce-ir", SMALL).state_dict()


def test_a_network_far_larger_than_its_file_is_not_built(network_state):
    with pytest.raises(CheckpointError, match="far larger than the weights"):
        models.load(network_state, config={"dim": 1 << 14})  # some terabytes
    with pytest.raises(CheckpointError, match="far larger than the weights"):
        models.load(network_state, config={"num_blocks": (10**6, 1, 1, 1)})
    with pytest.raises(CheckpointError, match="no known rule"):
        models.load(network_state | {"patch_embed.proj.weight": torch.empty(65_536, 3, 0, 3)})


@pytest.mark.parametrize("value", [10**12, -(10**9), 1e300, "x" * 500, [[[[1]]]], [1] * 1_000, {"a": 10**12}])
def test_absurd_settings_in_metadata_are_refused(value, network_state, tmp_path):
    data = save_safetensors(network_state, metadata={"mend.config": json.dumps({"topk": value})})
    refused(data, tmp_path, "'topk' the absurd value", name="model.safetensors")


@pytest.mark.parametrize("key", ["enc.0.0.layers.999999.x", "enc.99999999999999999999.x", "a" * 5_000, "1" * 2_000])
def test_absurd_names_are_refused(key, network_state):
    with pytest.raises(CheckpointError, match="absurd"):
        models.load({**network_state, key: torch.ones(1)})


def test_shapes_of_any_kind_give_one_error(network_state):
    """Every fortieth tensor in turn gets five other shapes: refused, never another error."""
    keys = [k for k in sorted(network_state) if not k.endswith("complexity")]
    for key in keys[::40]:
        for shape in ((), (0,), (7,), (5, 1), (2, 3, 5, 7, 1)):
            with pytest.raises(CheckpointError):
                models.load({**network_state, key: torch.zeros(shape)}, system="moce-ir")


# ---- mutations ------------------------------------------------------------------------------------------------------


def base_files() -> dict[str, bytes]:
    state = OrderedDict((f"layers.{i}.weight", torch.arange(6.0).view(2, 3)) for i in range(4))
    state["scale"] = torch.tensor(2.0)
    wrapped = {"params_ema": state, "epoch": 3, "lr": 1e-4, "names": ["a", {"b": (1, 2)}]}
    files = {}
    for name, options in (
        ("zip", {}),
        ("zip4", {"pickle_protocol": 4}),
        ("stacked", {"_use_new_zipfile_serialization": False}),
    ):
        buffer = io.BytesIO()
        torch.save(wrapped, buffer, **options)
        files[name] = buffer.getvalue()
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    buffer = io.BytesIO()
    torch.save({"Tnet": module}, buffer)
    files["module"] = buffer.getvalue()
    files["safetensors"] = save_safetensors(dict(state), metadata={"mend.config": "{}"})
    return files


BASES = base_files()


def attempt(data: bytes, path: Path) -> bool:
    """Reads a file completely; True if it was accepted. Any error but CheckpointError fails the test."""
    path.write_bytes(data)
    try:
        found = reading.read(path)
        for weights in found.sets:
            state = weights.read(found.size)
            weights.verify()
            assert sum(t.numel() * t.element_size() for t in state.values()) <= 5 * len(data) + (1 << 16)
            for value in state.values():
                value.clone()
    except CheckpointError:
        return False
    return True


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four damages: a bit, a byte (often an opcode), a run, a cut, an insertion, a moved piece, a length."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(len(changed), 1))
        kind = rng.randrange(8)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            changed[at] = rng.choice(b"().0123BCGIJKMNQRSTUVX]abcdeghijlopqrstu}\x80\x81\x85\x8a\x8c\x8f\x93\x94\x95")
        elif kind == 3:
            changed[at : at + rng.randint(1, 64)] = rng.randbytes(rng.randint(0, 64))
        elif kind == 4:
            del changed[at:]
        elif kind == 5:
            changed[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 6:
            other = rng.randrange(max(len(changed), 1))
            changed[at : at + 32] = changed[other : other + 32]
        else:
            changed[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, len(data), 1 << 20]))
        if not changed:
            break
    return bytes(changed)


@pytest.mark.parametrize("base", BASES)
def test_intact_bases_are_accepted(base, tmp_path):
    assert attempt(BASES[base], tmp_path / "file")


@pytest.mark.parametrize("base", BASES)
def test_a_file_cut_anywhere_is_refused(base, tmp_path):
    """At every 7th byte, and at each of the last 64."""
    data = BASES[base]
    for length in sorted({*range(0, len(data), 7), *range(max(0, len(data) - 64), len(data))}):
        assert not attempt(data[:length], tmp_path / "file"), length


@pytest.mark.parametrize("base", BASES)
def test_mutated_files_are_read_or_refused(base, tmp_path):
    """500 mutations of each base; only CheckpointError, never more memory than a few times the file."""
    rng = random.Random(f"mend {base}")
    for _ in range(MUTATIONS):
        attempt(mutate(BASES[base], rng), tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_many_mutated_files_are_read_or_refused(base, tmp_path):
    """5,000 mutations of each base (slow only because of their number)."""
    rng = random.Random(f"mend slow {base}")
    for _ in range(10 * MUTATIONS):
        attempt(mutate(BASES[base], rng), tmp_path / "file")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(
    [b"(", b")", b"]", b"}", b"N", b"K\x01", b"q\x01", b"h\x01", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86", b"R",
     b"b", b"0", b"1", b"2", b"Q", b"\x8f", b"\x90", b"\x91", b"\x94", b"\x81", b"\x92", b"X\x01\0\0\0a", tensor(),
     b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n", b"ctorch._utils\n_rebuild_parameter\n", b"cm\nC\n",
     b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n"]
), max_size=40))  # fmt: skip
def test_any_sequence_of_opcodes_is_read_or_refused(tmp_path_factory, opcodes):
    """400 programs of the opcodes and names that are understood."""
    attempt(zip_with(b"\x80\x02" + b"".join(opcodes) + b".", FOUR), tmp_path_factory.getbasetemp() / "program.pth")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.binary(min_size=0, max_size=300),
    st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"PK\x03\x04", b"\x20\0\0\0\0\0\0\0{"]),
)
def test_any_bytes_are_refused(tmp_path_factory, data, start):
    """200 files of random bytes after the beginnings of the known formats."""
    assert not attempt(start + data, tmp_path_factory.getbasetemp() / "bytes.pth")


# ---- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from comfyui_mend import models
from comfyui_mend.errors import CheckpointError
models.registry.architectures()
def load(path):
    try:
        models.load(path)
    except CheckpointError:
        pass
paths = sorted(Path(sys.argv[1]).iterdir())
load(paths[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in paths:
    load(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the module resource")
def test_memory_stays_bounded_over_all_bombs(tmp_path):
    """All bombs of this file one after another in a fresh process: less than 400 MB above its start."""
    bombs = [zip_with(entry(opcodes), FOUR) for opcodes, _ in TENSOR_BOMBS.values()]
    bombs += [zip_with(stream) for stream in STREAM_BOMBS.values()]
    bombs += [data for data, _ in HEADERS.values()]
    for index, data in enumerate([BASES["zip"], *bombs]):
        _write(tmp_path, data, f"{index:03}.pth")
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    kilobytes = int(measured.stdout.split()[-1]) // (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 400_000
