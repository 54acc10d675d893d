"""Reading and writing picture files for the command line: orientation, grey, transparency and 16 bits kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

STARTER = "mend-moce-ir-starter.safetensors"
"""The network that the command line uses unless told otherwise."""


def read_photo(path: str | Path) -> torch.Tensor:
    """A picture file as [1, C, H, W] in 0..1 with C 1, 3 or 4, upright. Raises InputError."""
    path = Path(path)
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16-bit grey
                values = np.asarray(picture).astype(np.float32) / 65535
            else:
                if picture.mode not in ("L", "RGB", "RGBA"):
                    transparent = picture.mode in ("LA", "PA") or "transparency" in picture.info
                    picture = picture.convert("RGBA" if transparent else "RGB")
                values = np.asarray(picture, dtype=np.float32) / 255
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder; name the pictures in it, or use `mend batch`") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a picture that can be read ({error})") from None
    values = values[..., None] if values.ndim == 2 else values
    return torch.from_numpy(np.moveaxis(values, -1, 0).copy())[None]


def write_photo(image: torch.Tensor, path: str | Path) -> None:
    """[C, H, W] in 0..1 as an 8-bit file, its format by the file name; JPEG loses transparency. Raises InputError."""
    from .pictures import to_pil

    path = Path(path)
    picture = to_pil(image)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        picture = picture.convert("RGB")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=95)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
