"""The `.mend` file: what a compressed picture needs besides its coded parts, checked before anything is decoded.

magic "MEND", version, quality, tile side and overlap, picture size, fingerprint of the codec's weights, number of
parts, CRC-32 of everything else; then each part: size of stream, size of escapes, CRC-32 of its integers, stream, escapes;
then, optionally, "NOTE", its size, and texts by name (a workflow) as deflated JSON.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import InputError
from ..models.aio_codec import LATENT_STRIDE, QUALITIES
from .entropy import BitstreamError

MAGIC, VERSION = b"MEND", 1
LARGEST_SIDE = 65_535
LARGEST_PICTURE = 1 << 28
LARGEST_PART = 1 << 22
"""Pixels of one tile: what decoding may take in memory at a time."""
_HEADER = struct.Struct("<4sBBHHIIII16sI")
_PART = struct.Struct("<III")
_NOTE = struct.Struct("<4sI")
LARGEST_NOTE = 1 << 24
"""Bytes of texts that a file may carry along, inflated."""


@dataclass(frozen=True)
class Part:
    """One tile: its coded planes, its escapes, and the CRC-32 of its integers."""

    stream: bytes
    escapes: bytes
    checksum: int


@dataclass(frozen=True)
class Bitstream:
    """A compressed picture. tile 0: coded whole. fingerprint: of the codec that made it, 16 bytes."""

    width: int
    height: int
    quality: int
    fingerprint: bytes
    parts: tuple[Part, ...]
    tile: int = 0
    overlap: int = 0
    note: Mapping[str, str] = field(default_factory=dict)
    """Texts that travel with the picture, such as the workflow it was made by."""

    @property
    def size(self) -> int:
        """Bytes of the file, without its note."""
        return _HEADER.size + sum(_PART.size + len(p.stream) + len(p.escapes) for p in self.parts)

    @property
    def bits_per_pixel(self) -> float:
        """`size` in bits per pixel of the picture."""
        return 8 * self.size / (self.width * self.height)

    def to_bytes(self) -> bytes:
        """The file's content. Raises InputError for a note that no reader would take."""
        body = b"".join(
            _PART.pack(len(p.stream), len(p.escapes), p.checksum) + p.stream + p.escapes for p in self.parts
        )
        if self.note:
            text = json.dumps(dict(self.note)).encode()
            if len(text) > LARGEST_NOTE:
                raise InputError(
                    f"note: {len(text):,} bytes of text, a .mend file carries at most {LARGEST_NOTE:,}; save it without "
                    "the workflow"
                )
            note = zlib.compress(text, 9)
            body += _NOTE.pack(b"NOTE", len(note)) + note
        fields = (MAGIC, VERSION, self.quality, self.tile, self.overlap, self.width, self.height, len(self.parts))
        header = _HEADER.pack(*fields, len(body), self.fingerprint, 0)
        return header[:-4] + struct.pack("<I", checksum(header, body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Bitstream:
        """Reads a file. Raises BitstreamError saying what is wrong; nothing is allocated that the file does not hold."""
        if data[:4] != MAGIC:
            kind = (
                "empty" if not data else "a web page: the download failed" if data.lstrip()[:1] == b"<" else "not one"
            )
            raise BitstreamError(f"bitstream: this is no .mend file ({kind})")
        if len(data) < _HEADER.size:
            raise BitstreamError("bitstream: cut off within its header")
        _, version, quality, tile, overlap, width, height, count, size, fingerprint, stored = _HEADER.unpack_from(data)
        if version != VERSION:
            raise BitstreamError(f"bitstream: version {version}, this Mend reads version {VERSION}; update it")
        body = memoryview(data)[_HEADER.size :]
        if len(body) != size:
            raise BitstreamError(f"bitstream: {len(body)} bytes of content instead of {size}: cut off or damaged")
        if checksum(data, body) != stored:
            raise BitstreamError("bitstream: damaged (its checksum does not match)")
        sides = 1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE and width * height <= LARGEST_PICTURE
        padded = [-(-side // LATENT_STRIDE) * LATENT_STRIDE for side in (width, height)]
        part = min(tile or padded[0], padded[0]) * min(tile or padded[1], padded[1])
        if (
            not sides
            or part > LARGEST_PART
            or tile % LATENT_STRIDE
            or quality >= QUALITIES
            or overlap >= max(1, tile)
            or not 1 <= count <= size // _PART.size
        ):
            raise BitstreamError("bitstream: its header makes no sense")
        parts, position = [], 0
        for _ in range(count):
            if position + _PART.size > size:
                raise BitstreamError("bitstream: a part is missing")
            stream, escapes, part_checksum = _PART.unpack_from(body, position)
            position += _PART.size
            if position + stream + escapes > size:
                raise BitstreamError("bitstream: a part is cut off")
            middle, end = position + stream, position + stream + escapes
            parts.append(Part(bytes(body[position:middle]), bytes(body[middle:end]), part_checksum))
            position = end
        note = _read_note(bytes(body[position:]))
        return cls(width, height, quality, fingerprint, tuple(parts), tile, overlap, note)


def _read_note(data: bytes) -> dict[str, str]:
    """The texts behind the last part. Raises BitstreamError for anything else there."""
    if not data:
        return {}
    if len(data) < _NOTE.size or _NOTE.unpack_from(data) != (b"NOTE", len(data) - _NOTE.size):
        raise BitstreamError("bitstream: there is something behind its last part")
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(data[_NOTE.size :], LARGEST_NOTE)
        note = json.loads(text) if inflate.eof else None
    except (zlib.error, ValueError, RecursionError):
        note = None
    if not isinstance(note, dict) or not all(isinstance(v, str) for v in note.values()):
        raise BitstreamError("bitstream: the text that travels with it is damaged")
    return note


def checksum(header: bytes, body: bytes) -> int:
    """CRC-32 of a file but for the field that holds it."""
    return zlib.crc32(body, zlib.crc32(header[: _HEADER.size - 4]))
