"""The VIDEO wire of ComfyUI: a file to read for a connected video, with what was done to it on the graph."""

from __future__ import annotations

import inspect
import io
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import host, journal
from .video import VideoInfo, VideoWriter, join, write_sound

logger = logging.getLogger(__name__)

_CRF = 6
"""Of a video that is encoded only to be read again: hardly any loss."""


@dataclass(frozen=True)
class Source:
    """What to read for a video."""

    file: str | Path | io.BytesIO
    name: str
    """For the result, without an ending."""
    origin: str | None = None
    """What stays the same when the file is written anew; None: the file itself is the source."""


@contextmanager
def readable(clip: Any, temp: Path) -> Iterator[Source]:
    """`with readable(clip, temp) as source: ...` for a VIDEO of any ComfyUI since 0.3.64, or of ours.

    The file behind it where it shows what the wire carries. Else a file below `temp`, gone afterwards: of frames from the
    graph, and of files that are trimmed or cropped, which newer versions only note until somebody saves them.
    """
    made_of_frames = any(kind.__name__ == "VideoFromComponents" for kind in type(clip).__mro__)
    stream = None if made_of_frames else _stream(clip)
    if stream is not None and not _is_edited(clip):
        unnamed = isinstance(stream, io.BytesIO)
        yield Source(stream, f"clip-{journal.fingerprint(stream.getvalue())[:8]}" if unnamed else Path(stream).stem)
        return
    temp.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mend-", dir=temp, ignore_cleanup_errors=True) as folder:
        file = None if made_of_frames else _saved(clip, Path(folder) / "clip.mp4")
        file = file or _written(clip, Path(folder))
        origin = journal.content(file)
        yield Source(file, Path(stream).stem if isinstance(stream, (str, Path)) else f"clip-{origin[:8]}", origin)


def _stream(clip: Any) -> str | Path | io.BytesIO | None:
    try:
        stream = clip.get_stream_source()
    except Exception as error:
        # By default it is saved into memory, where ComfyUI 0.3.64 does not find out the format.
        if host.is_interrupt(error):
            raise
        logger.debug("video: no stream", exc_info=True)
        return None
    return stream if isinstance(stream, (str, Path, io.BytesIO)) else None


def _is_edited(clip: Any) -> bool:
    """True if the stream is not yet what the wire carries."""
    pending, trim = getattr(clip, "has_pending_frame_edits", None), getattr(clip, "get_active_trim_window", None)
    if (pending is not None and pending()) or (trim is not None and any(trim())):
        return True
    # The first versions that could trim and crop had no way to ask.
    return any(getattr(clip, f"_VideoFromFile__{edit}", None) for edit in ("start_time", "duration", "crop"))


def _saved(clip: Any, file: Path) -> Path | None:
    """The video as it saves itself, a frame at a time in newer versions; None where it cannot."""
    try:
        known = inspect.signature(clip.save_to).parameters
        clip.save_to(str(file), **({"crf": _CRF} if "crf" in known else {}))
    except Exception as error:
        if host.is_interrupt(error):
            raise
        logger.debug("video: does not save itself", exc_info=True)
        return None
    return file


def _written(clip: Any, folder: Path) -> Path:
    """The frames without loss, of any size, and the sound."""
    components = clip.get_components()
    images, audio = components.images, components.audio
    if len(images) == 0:
        raise InputError("clip: the connected video has no frames")
    rate = Fraction(components.frame_rate).limit_denominator(10_000)  # 29.97 as a float has one that is too long
    height, width = images.shape[1:3]
    depth = getattr(clip, "get_bit_depth", lambda: 8)()
    info = VideoInfo(width, height, rate, 1 / rate, len(images), 0, Fraction(1), depth, (2, 2, 2), ())
    pictures = folder / "pictures.nut"
    writer = VideoWriter(pictures, info, (height, width), "lossless")
    try:
        for index, image in enumerate(images):
            host.check_interrupt()
            writer.write(image[..., :3].movedim(-1, 0), index)
    finally:
        writer.close()
    if not audio or audio["waveform"].shape[-1] == 0:
        return pictures
    sound, seconds = folder / "sound.mp4", len(images) / rate
    waveform = audio["waveform"][0, :, : math.ceil(seconds * int(audio["sample_rate"]))]
    write_sound(sound, waveform, int(audio["sample_rate"]))
    both = folder / "clip.nut"
    join([pictures], sound, both)
    return both
