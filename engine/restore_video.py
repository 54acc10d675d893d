"""Restores a video in bounded memory: frame by frame, in parts that survive an interruption, steady within a shot."""

from __future__ import annotations

import io
import itertools
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..errors import InputError
from . import host, mix, shots, tiling
from .journal import JOURNAL, Journal, fingerprint, identity
from .loaded import LoadedRestorer
from .stabiliser import TOLERANCE, Stabiliser
from .video import VideoInfo, VideoReader, VideoWriter, join, suffix_for

logger = logging.getLogger(__name__)

CHUNK_PIXELS = 8_000_000
"""Pixels of the result that are restored at a time: a few frames where they are small, one where they are large."""


@dataclass(frozen=True)
class VideoSettings:
    """What a restored video depends on, besides the network."""

    hold: bool = True
    """Decide a route or a degradation once per shot, from its first frame, instead of in every frame."""
    stabilise: float = 0.0
    """Largest weight of the past (`Stabiliser`); 0: off."""
    tolerance: float = TOLERANCE
    strength: float = 1.0
    """0 the original, 1 the restoration."""
    codec: str = "h264"
    crf: int = 16
    tile: int = 0
    precision: str = "auto"


@dataclass(frozen=True)
class VideoResult:
    """A restored video."""

    path: Path
    frames: int
    shots: int
    skipped: bool = False
    """It was there already, made from the same file with the same settings."""


def restore_video(
    loaded: LoadedRestorer,
    source: str | Path | io.BytesIO,
    folder: Path,
    name: str,
    settings: VideoSettings | None = None,
    *,
    context: Mapping[str, Any] | None = None,
    again: bool = False,
    apart: bool = False,
    origin: str | None = None,
    part: int = 60,
) -> VideoResult:
    """Restores a video file into `folder/name.mp4` (.mkv where the sound or the codec asks for it).

    Size times the network's scale; sound, time stamps, pixel aspect and colour tags stay; turned upright; subtitles are
    left out. Finished parts of `part` frames lie in `folder/name.parts` until all are there; a run that was interrupted,
    by whatever, goes on behind the last one with the same result. Nothing is done if the result is there already, made
    with the same settings from the same file, unless `again`. What was made from something else is replaced; with `apart` it
    stays, and the result is called `name_2`, `name_3`... context: as for `tiling.restore`, one for all frames.
    origin: what the source is known by where its time says nothing, as that of a file written for this run alone.
    Raises InputError for a file that cannot be read; what was restored before the damage is kept as parts.
    """
    settings, context = settings or VideoSettings(), dict(context or {})
    for what, value in context.items():
        if hasattr(value, "__len__") and len(value) != 1:
            raise InputError(f"{what}: made for {len(value)} pictures; a video takes one, held for all frames")
    if origin is None:
        origin = fingerprint(source.getvalue()) if isinstance(source, io.BytesIO) else identity(Path(source))
    made_from = fingerprint(loaded, settings, context, origin)
    with VideoReader(source) as reader:
        suffix, journal = suffix_for(reader.info, settings.codec), Journal(folder / JOURNAL)
        name = _name_apart(journal, name, suffix, made_from) if apart else name
        output = folder / f"{name}{suffix}"
        before = journal.find(output.name, made_from)
        if before is not None and output.is_file() and not again:
            return VideoResult(output, before["frames"], before["shots"], skipped=True)
        parts = _Parts(folder / f"{name}.parts", made_from, reader.info, settings, part, again)
        try:
            count = _restore_frames(loaded, reader, parts, settings, context)
        finally:  # also when cancelled or damaged: what is done is kept
            parts.close()
    written = join(parts.files, source, output)
    if written != parts.frames:
        raise InputError(f"{output.name}: {written} of {parts.frames} frames arrived in the file; is the disk full?")
    journal.add(output.name, made_from, frames=written, shots=count)
    parts.remove()
    return VideoResult(output, written, count)


def _name_apart(journal: Journal, name: str, suffix: str, made_from: str) -> str:
    """`name`, or the first of `name_2`, `name_3`... that nothing else has; a result made before keeps the name it has."""
    folder, ours = journal.path.parent, re.compile(re.escape(name) + r"(_\d+)?")
    for key in journal.entries:
        stem = key.removesuffix(suffix)
        if stem != key and ours.fullmatch(stem) and journal.find(key, made_from) and (folder / key).is_file():
            return stem
    # Results that are not finished have their names too, so that they can be gone on with.
    begun = {path.stem: _parts_made_from(path) for path in folder.glob("*.parts")}
    for stem in sorted(begun):
        if ours.fullmatch(stem) and made_from in begun[stem]:
            return stem
    names = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    return next(stem for stem in names if not begun.get(stem) and not (folder / f"{stem}{suffix}").exists())


def _parts_made_from(folder: Path) -> set[str]:
    return {str(entry.get("made_from")) for entry in Journal(folder / JOURNAL).entries.values()}


class _Parts:
    """The finished parts of a video and the one that is being written."""

    def __init__(
        self, folder: Path, made_from: str, info: VideoInfo, settings: VideoSettings, length: int, again: bool
    ) -> None:
        self.folder, self.made_from, self.info, self.settings, self.length = folder, made_from, info, settings, length
        self.stabiliser = Stabiliser(settings.stabilise, settings.tolerance)
        self.files: list[Path] = []
        self.frames = 0
        """In finished parts."""
        self._writer: VideoWriter | None = None
        self._written = 0
        if again:
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.folder / JOURNAL)
        self._resume()

    def _resume(self) -> None:
        while (entry := self._journal.find(self._next.name, self.made_from)) and self._next.is_file():
            self.files.append(self._next)
            self.frames += entry["frames"]
        if self.files and self.settings.stabilise > 0:
            state = self.files[-1].with_suffix(".safetensors")
            if state.is_file():
                self.stabiliser.restore_state(load_file(state))
            else:
                self.files, self.frames = [], 0
        if self.files:
            logger.info("%s: going on after frame %d", self.folder.name, self.frames)

    @property
    def _next(self) -> Path:
        return self.folder / f"{len(self.files):05}.nut"

    def write(self, image: torch.Tensor, pts: int) -> None:
        """Adds a frame [3, H, W]; a full part is closed."""
        if self._writer is None:
            size, unfinished = tuple(image.shape[1:]), self._next.with_suffix(".part")
            self._writer = VideoWriter(unfinished, self.info, size, self.settings.codec, self.settings.crf)
        self._writer.write(image, pts)
        self._written += 1
        if self._written >= self.length:
            self.close()

    def close(self) -> None:
        """Finishes the part that is being written, however short."""
        if self._writer is None:
            return
        writer, self._writer, file = self._writer, None, self._next
        writer.close()
        if self.stabiliser.last is not None:
            save_file(self.stabiliser.state(), file.with_suffix(".safetensors"))
        file.with_suffix(".part").replace(file)
        self._journal.add(file.name, self.made_from, frames=self._written)
        for older in self.files:
            older.with_suffix(".safetensors").unlink(missing_ok=True)
        self.files.append(file)
        self.frames, self._written = self.frames + self._written, 0

    def remove(self) -> None:
        """Deletes everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.files, self.frames = [], 0


def _restore_frames(
    loaded: LoadedRestorer, reader: VideoReader, parts: _Parts, settings: VideoSettings, context: Mapping[str, Any]
) -> int:
    """Restores every frame that no part holds yet, a group of one shot at a time; returns the number of shots."""
    detector, follows_shots = shots.ShotDetector(), settings.hold or settings.stabilise > 0
    info, scale, done, count = reader.info, loaded.restorer.scale, parts.frames, 0
    size = max(1, min(8, CHUNK_PIXELS // (info.width * info.height * scale**2)))
    held: dict[str, Any] | None = None
    opening, waiting = torch.empty(0), []

    def restore_waiting() -> None:
        nonlocal held
        if not waiting:
            return
        if held is None:
            held = shots.decide(loaded, opening, context) if settings.hold else {}
        groups = -(-max(info.frames, index + 1) // size)
        with host.part_of_progress(min(parts.frames // size, groups - 1), groups):
            _restore_group(loaded, waiting, parts, settings, {**context, **held})
        waiting.clear()

    for index, frame in enumerate(reader):
        host.check_interrupt()
        if index < done and not follows_shots:
            continue
        image = frame.image()[None]
        if detector(image) >= shots.THRESHOLD if follows_shots else index == 0:
            restore_waiting()
            opening, held, count = image, None, count + 1
            if index >= done:
                parts.stabiliser.reset()
        if index >= done:
            waiting.append((frame.pts, image))
        if len(waiting) == size:
            restore_waiting()
    restore_waiting()
    return count


def _restore_group(
    loaded: LoadedRestorer,
    frames: Sequence[tuple[int, torch.Tensor]],
    parts: _Parts,
    settings: VideoSettings,
    context: Mapping[str, Any],
) -> None:
    """Restores frames [1, 3, H, W] of one shot with their time stamps, and writes them."""
    images = torch.cat([image for _, image in frames])
    with torch.inference_mode():
        restored = tiling.restore(loaded, images, tile=settings.tile, precision=settings.precision, context=context)
        if settings.strength != 1:
            restored = mix.mix(images, restored, strength=settings.strength)
        for (pts, _), picture in zip(frames, restored, strict=True):
            parts.write(parts.stabiliser(picture[None])[0], pts)
