"""Restores a folder of pictures and videos, a file at a time: sub-folders kept, resumable, no bad file stops the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from . import host, mix, tiling
from .folders import IMAGE_SUFFIXES
from .journal import JOURNAL, Journal, Report, find_files, fingerprint, identity, written_whole
from .loaded import LoadedRestorer
from .photos import read_photo, write_photo
from .restore_video import VideoSettings, restore_video
from .video import VIDEO_SUFFIXES

FORMATS = ("as source", "png", "jpg", "webp", "tif")
_WRITABLE = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})


@dataclass(frozen=True)
class FolderSettings:
    """What the results in a folder depend on, besides the network."""

    format: str = "as source"
    strength: float = 1.0
    tile: int = 0
    precision: str = "auto"
    video: VideoSettings = field(default_factory=VideoSettings)


def restore_folder(
    loaded: LoadedRestorer,
    source: Path,
    target: Path,
    settings: FolderSettings | None = None,
    *,
    context: Mapping[str, Any] | None = None,
    subfolders: bool = True,
    videos: bool = True,
    again: bool = False,
) -> Report:
    """Restores every picture (and video) below `source` into the same place below `target`.

    A file whose result is there, made from the same file with the same settings, is skipped, unless `again`. What fails
    is written down in the report and the next file's turn comes; a cancel keeps what is done. The report is also saved
    as mend-report.json and .txt in `target`. Raises InputError for a folder that does not exist or holds nothing.
    """
    settings, context = settings or FolderSettings(), dict(context or {})
    check_folders(source, target)
    files = find_files(source, IMAGE_SUFFIXES | (VIDEO_SUFFIXES if videos else frozenset()), subfolders)
    if not files:
        raise InputError(f"{source}: there are no pictures {'or videos ' if videos else ''}in this folder")
    report = Report(f"Restored {source.name}")
    alike = Counter((file.parent, file.stem.lower()) for file in files)
    journal, print_of_settings = Journal(target / JOURNAL), fingerprint(loaded, settings, context)
    try:
        for number, file in enumerate(files):
            host.check_interrupt()
            name = file.relative_to(source).as_posix()
            # Two files that differ in their ending alone would give one result: their endings stay in its name.
            stem = file.stem if alike[file.parent, file.stem.lower()] == 1 else file.name
            with report.file(name), host.part_of_progress(number, len(files)):
                if file.suffix.lower() in VIDEO_SUFFIXES:
                    made = restore_video(
                        loaded,
                        file,
                        (target / name).parent,
                        stem,
                        settings.video,
                        context=context,
                        again=again,
                    )
                    status = "skipped" if made.skipped else "done"
                    report.add(name, status, result=made.path.relative_to(target).as_posix(), frames=made.frames)
                else:
                    result = Path(name).with_name(stem + _suffix(file, settings.format))
                    made_from = fingerprint(print_of_settings, identity(file))
                    skip = not again and journal.find(name, made_from) and (target / result).is_file()
                    if not skip:
                        restored = _restore_picture(loaded, read_photo(file), settings, context)
                        with written_whole(target / result) as unfinished:
                            write_photo(restored, unfinished)
                        journal.add(name, made_from)
                    report.add(name, "skipped" if skip else "done", result=result.as_posix())
    except BaseException:
        report.stopped = True
        raise
    finally:
        report.save(target)
    return report


def check_folders(source: Path, target: Path) -> None:
    """Raises InputError unless `source` is a folder and results go into another one."""
    if not source.is_dir():
        raise InputError(f"{source}: there is no such folder")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: this is a file, the results need a folder; name another")
    if target.resolve() == source.resolve() or target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target}: the results cannot go into the folder that is read; name another")


def _suffix(file: Path, wanted: str) -> str:
    if wanted != "as source":
        return f".{wanted}"
    return file.suffix if file.suffix.lower() in _WRITABLE else ".png"


def _restore_picture(
    loaded: LoadedRestorer, image: torch.Tensor, settings: FolderSettings, context: Mapping[str, Any]
) -> torch.Tensor:
    """[1, C, H, W] restored as [C, H, W]."""
    with torch.inference_mode():
        restored = tiling.restore(loaded, image, tile=settings.tile, precision=settings.precision, context=context)
        return (restored if settings.strength == 1 else mix.mix(image, restored, strength=settings.strength))[0]
