"""`.mend` files on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engine import folders
from ..errors import InputError
from .container import Bitstream
from .entropy import BitstreamError

SUFFIX = ".mend"
LARGEST_FILE = 1 << 29


def read(path: Path) -> Bitstream:
    """Reads a file. Raises BitstreamError, with its name, if it is damaged or none of ours; InputError if unreadable."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise BitstreamError("bitstream: too large to be a .mend file")
        return Bitstream.from_bytes(path.read_bytes())
    except BitstreamError as error:
        raise BitstreamError(f"{path.name}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def contents(stream: Bitstream) -> bytes:
    """The bytes of a stream's file. Raises InputError for more than `read` takes."""
    data = stream.to_bytes()
    if len(data) > LARGEST_FILE:
        raise InputError(
            f"bitstream: {len(data):,} bytes, a .mend file has at most {LARGEST_FILE:,}; choose a lower quality, or cut the "
            "picture and compress the pieces"
        )
    return data


def write(streams: Sequence[Bitstream], prefix: str, folder: Path) -> list[Path]:
    """Writes one numbered file for each, never over another.

    Raises WorkflowError for a prefix that leaves the folder, and InputError as `contents`, before anything is written.
    """
    files = [contents(stream) for stream in streams]
    target, name, number, _ = folders.save_location(prefix, folder, streams[0].width, streams[0].height)
    paths = [target / f"{name}_{number + k:05}_{SUFFIX}" for k in range(len(streams))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return paths
