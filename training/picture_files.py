"""Pictures of data sets: found in folders, decoded when they are needed, kept within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from .data import SUFFIXES


class PictureCache:
    """Decoded pictures, uint8 [3, H, W], the least recently used ones dropped when they exceed `budget` bytes."""

    def __init__(self, budget: int = 1_000_000_000) -> None:
        self.budget, self.used = budget, 0
        self._kept: OrderedDict[Path, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, source: Path | torch.Tensor) -> torch.Tensor:
        """The picture of a file, turned upright; a tensor is returned as it is. Raises InputError for other files."""
        if isinstance(source, torch.Tensor):
            return source
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
        picture = _decode(source)
        with self._lock:
            if source not in self._kept:
                self._kept[source] = picture
                self.used += picture.numel()
            while self.used > self.budget and len(self._kept) > 1:
                self.used -= self._kept.popitem(last=False)[1].numel()
        return picture

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._kept.clear()
            self.used = 0


pictures = PictureCache()
"""What all data sets share; cleared after a training."""


def _decode(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as picture:
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise InputError(f"data set: {path} cannot be read as a picture ({error})") from None
    with torch.inference_mode(False):  # kept, and trained on later
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def files_of(folder: Path) -> dict[str, Path]:
    """Pictures of a folder and the folders in it by their name without suffix, in order. Raises InputError if none."""
    if not folder.is_dir():
        raise InputError(f"data set: there is no folder {folder}")
    found = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    }
    if not found:
        raise InputError(f"data set: no pictures in {folder} ({', '.join(SUFFIXES)})")
    return found
