"""Fuzzing by coverage of what reads files that strangers made: model files, their pickles, bitstreams.

    python tests/fuzz_files.py TARGET [CORPUS] [libFuzzer's options, such as -max_total_time=300]

needs the package atheris (pip install atheris; Linux and macOS). TARGET: file, pickle or bitstream. New inputs are kept in the
folder CORPUS, the first ones are written there; what ends in anything but a CheckpointError stops the run and is saved as
crash-*. tests/test_fuzz_files.py holds the targets to their first inputs without atheris.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

with contextlib.ExitStack() as stack:
    if __name__ == "__main__":
        import atheris

        stack.enter_context(atheris.instrument_imports(include=["comfyui_mend"]))
    from comfyui_mend import models
    from comfyui_mend.codec import coder, container
    from comfyui_mend.errors import CheckpointError
    from comfyui_mend.models import checkpoint

SMALL = {"dim": 8, "N_ch": 24, "z_ch": 32, "num_blocks": (1, 1, 1, 1), "heads": (1, 1, 2, 2)}
LARGEST_PICTURE = 64 * 64
"""Pixels that a fuzzed bitstream may decode to: each takes time."""


@cache
def _folder() -> Path:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="mend-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _codec() -> torch.nn.Module:
    torch.manual_seed(3)
    return models.create("aio-codec", SMALL).eval().requires_grad_(False)


def read_file(data: bytes) -> None:
    """Any bytes as a model file, weights included."""
    path = _folder() / "model.pth"
    path.unlink(missing_ok=True)  # a new file, not new content below an old mapping
    path.write_bytes(data)
    for weights in (opened := checkpoint.read(path)).sets:
        weights.read(opened.size)


def zipped(stream: bytes) -> bytes:
    """A file as torch.save writes it around a pickle stream, with the storages of the first inputs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/data/1", bytes(4))
    return buffer.getvalue()


def read_pickle(data: bytes) -> None:
    """Any bytes as the pickle of a model file whose checksums are right."""
    read_file(zipped(data))


def read_bitstream(data: bytes) -> None:
    """Any bytes as a .mend file whose checksum, size and codec are right, decoded if it is small."""
    header = container._HEADER
    if len(data) < header.size:
        container.Bitstream.from_bytes(data)
        return
    _, _, quality, tile, overlap, width, height, count, *_ = header.unpack_from(data)
    body = data[header.size :]
    fields = (container.MAGIC, container.VERSION, quality, tile, overlap, width, height, count, len(body))
    start = header.pack(*fields, coder.fingerprint(_codec()), 0)
    whole = start[:-4] + struct.pack("<I", container.checksum(start, body)) + body
    stream = container.Bitstream.from_bytes(whole)
    if stream.width * stream.height <= LARGEST_PICTURE:
        coder.decode(_codec(), stream)


def _model_seeds() -> dict[str, bytes]:
    from safetensors.torch import save

    weights = {"conv.weight": torch.arange(4.0), "conv.bias": torch.ones(2, 1, dtype=torch.float16)}
    made = {"safetensors": save(weights, {"mend.note": "x"})}
    for name, legacy in (("zip", False), ("legacy", True)):
        buffer = io.BytesIO()
        content = {"params_ema": weights, "epoch": 3, "args": {"lr": 1e-3, "names": ["a", None, True]}}
        torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
        made[name] = buffer.getvalue()
    return made


def _pickle_seeds() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(_model_seeds()["zip"])) as archive:
        [name] = [n for n in archive.namelist() if n.endswith("data.pkl")]
        return {"state": archive.read(name)}


def _bitstream_seeds() -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, size, tile in (("whole", (20, 33), 0), ("tiles", (48, 40), 32)):
        image = torch.rand(3, *size, generator=generator)
        made[name] = coder.encode(_codec(), image, 40, tile=tile, overlap=min(tile, 8)).to_bytes()
    return made


Target = tuple[Callable[[bytes], None], Callable[[], dict[str, bytes]]]
TARGETS: dict[str, Target] = {
    "file": (read_file, _model_seeds),
    "pickle": (read_pickle, _pickle_seeds),
    "bitstream": (read_bitstream, _bitstream_seeds),
}


def attempt(target: str, data: bytes) -> bool:
    """True if the bytes were read, False if they were refused in words; anything else is a finding."""
    try:
        TARGETS[target][0](data)
    except CheckpointError:
        return False
    return True


def main(arguments: list[str]) -> None:
    target, *options = arguments
    torch.set_num_threads(1)
    folder = Path(options.pop(0)) if options and not options[0].startswith("-") else _folder() / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in TARGETS[target][1]().items():
        (folder / name).write_bytes(data)
    options += ["-rss_limit_mb=4096", "-timeout=30", "-max_len=8192"]
    atheris.Setup([sys.argv[0], *options, str(folder)], lambda data: attempt(target, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
