"""Photographs to train on, taken out of unpacked Debian packages and made ready: one PNG each, and a fixed split.

The packages hold about 150 openly licensed photographs among many drawings (weights/README.md lists sources and
licences). Photographs of unnaturally soft pixels are shrunk, because a network learns the softness it is shown.
"""

from __future__ import annotations

import io
import json
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

from PIL import Image

from ..errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Files of one package that are photographs: those matching `pattern` (below the unpack folder), by how much to
    shrink them, and names in it that are no photographs or are kept out of training."""

    package: str
    pattern: str
    shrink: float
    skip: tuple[str, ...] = ()


# Kept out of training: they are the shipped workflows' inputs.
_SHIPPED = ("red_panda", "schwerinPalace", "gatewayofIndia", "machuPicchu")
_RCC = "usr/share/gcompris-qt/rcc"
SOURCES = (
    Source(
        "plasma-workspace-wallpapers",
        "usr/share/wallpapers/*/contents/images/2560x1600.jpg",
        2.0,
        ("Autumn", "DarkestHour", "summer_1am", "Grey"),  # drawn; nearly empty; one channel
    ),
    Source("mate-backgrounds", "usr/share/backgrounds/mate/nature/*.jpg", 2.0),
    Source("palapeli-data", "usr/share/palapeli/collection/*.jpg", 1.4),
    Source("gcompris-qt-data", f"{_RCC}/erase.rcc", 2.0, _SHIPPED),
    Source("gcompris-qt-data", f"{_RCC}/explore_monuments.rcc", 1.4, _SHIPPED),
    Source("gcompris-qt-data", f"{_RCC}/explore_world_animals.rcc", 1.4),
    Source("gcompris-qt-data", f"{_RCC}/explore_farm_animals.rcc", 1.4),
    Source("gcompris-qt-data", f"{_RCC}/explore_world_music.rcc", 1.4),
    Source(
        "gcompris-qt-data", f"{_RCC}/clickgame.rcc", 1.4, ("_[!s]*", "six_barred", "shark")
    ),  # the sea, not the fish
)
_SHORTEST = 192  # a photograph is not shrunk below this many pixels on its shorter side


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name inside the bundle, content) of every file of a Qt resource bundle. Raises InputError if it is none."""
    data = path.read_bytes()
    if data[:4] != b"qres":
        raise InputError(f"{path}: not a Qt resource bundle")
    version, tree, contents, names = struct.unpack_from(">4I", data, 4)
    node_size = 22 if version >= 2 else 14

    def walk(index: int, parent: str) -> Iterator[tuple[str, bytes]]:
        offset = tree + index * node_size
        name_at, flags = struct.unpack_from(">IH", data, offset)
        length = struct.unpack_from(">H", data, names + name_at)[0] if index else 0
        start = names + name_at + 6  # after the length and a hash
        name = parent + "/" + data[start : start + 2 * length].decode("utf-16-be") if index else ""
        if flags & 2:
            count, first = struct.unpack_from(">II", data, offset + 6)
            for child in range(first, first + count):
                yield from walk(child, name)
            return
        at = contents + struct.unpack_from(">I", data, offset + 10)[0]
        size = struct.unpack_from(">I", data, at)[0]
        blob = data[at + 4 : at + 4 + size]
        yield name, zlib.decompress(blob[4:]) if flags & 1 else blob

    yield from walk(0, "")


def find_photographs(unpacked: Path) -> Iterator[tuple[str, Image.Image, float]]:
    """(unique name, picture, factor to shrink by) of every photograph below `unpacked`.

    `unpacked` holds one folder for each package, named as the package.
    """
    for source in SOURCES:
        for path in sorted((unpacked / source.package).glob(source.pattern)):
            if path.suffix == ".rcc":
                entries = [(f"{path.stem}_{Path(n).stem}", b) for n, b in read_rcc(path) if b[8:12] == b"WEBP"]
            else:
                stem = path.parts[-4] if path.stem == "2560x1600" else path.stem
                entries = [(stem, path.read_bytes())]
            for name, blob in entries:
                if not any(fnmatch(name, f"*{skip}*") for skip in source.skip):
                    yield name, Image.open(io.BytesIO(blob)), source.shrink


def is_validation(name: str, share: float = 0.1) -> bool:
    """Whether a photograph belongs to the validation set: decided by its name alone, so the split never moves."""
    return int.from_bytes(sha256(name.encode()).digest()[:4], "big") < share * 2**32


def prepare(unpacked: Path, out: Path) -> dict[str, list[str]]:
    """Writes every photograph as OUT/train/NAME.png or OUT/validation/NAME.png and OUT/photos.json; returns the split.

    Raises InputError if `unpacked` holds none of the packages.
    """
    split: dict[str, list[str]] = {"train": [], "validation": []}
    for folder in split:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, picture, shrink in find_photographs(unpacked):
        picture = picture.convert("RGB")
        shrink = min(shrink, max(1.0, min(picture.size) / _SHORTEST))
        size = tuple(max(1, round(side / shrink)) for side in picture.size)
        part = "validation" if is_validation(name) else "train"
        picture.resize(size, Image.Resampling.LANCZOS).save(out / part / f"{name}.png", compress_level=1)
        split[part].append(name)
    if not split["train"]:
        raise InputError(f"{unpacked}: holds none of {', '.join(sorted({s.package for s in SOURCES}))}")
    (out / "photos.json").write_text(json.dumps(split, indent=1))
    logger.info("%d photographs to train on, %d to validate with", len(split["train"]), len(split["validation"]))
    return split
