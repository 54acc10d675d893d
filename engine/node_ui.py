"""The built-in twin of `comfy_api.latest.ui`: what a node shows on the page, saved as files where it must be."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from . import folders
from .node_io import ComfyNode, FolderType


class SavedResult(dict):
    """One file that the page can ask for."""

    def __init__(self, filename: str, subfolder: str, type: FolderType) -> None:
        super().__init__(filename=filename, subfolder=subfolder, type=type.value)

    @property
    def filename(self) -> str:
        return self["filename"]

    @property
    def subfolder(self) -> str:
        return self["subfolder"]

    @property
    def type(self) -> FolderType:
        return FolderType(self["type"])


class SavedImages:
    """Pictures that were saved."""

    def __init__(self, results: list[SavedResult], is_animated: bool = False) -> None:
        self.results, self.is_animated = results, is_animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.results, **({"animated": (True,)} if self.is_animated else {})}


def _folder(type: FolderType) -> Path:
    if type is FolderType.input:
        return folders.input_directories()[0]
    return folders.output_directory() if type is FolderType.output else folders.temp_directory()


def _metadata(cls: type[ComfyNode] | None) -> PngInfo | None:
    """The workflow, as ComfyUI writes it into a PNG."""
    if cls is None or cls.hidden is None:
        return None
    info = PngInfo()
    entries = {"prompt": cls.hidden.prompt or None, **(cls.hidden.extra_pnginfo or {})}
    for key, value in entries.items():
        if value is not None:
            info.add_text(key, json.dumps(value))
    return info


class ImageSaveHelper:
    """Saves batches of pictures."""

    @staticmethod
    def _convert_tensor_to_pil(image: torch.Tensor) -> PILImage.Image:
        """[H, W, C] in 0..1, cut off below like ComfyUI's (255 x, not rounded)."""
        pixels = np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)
        return PILImage.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    @staticmethod
    def save_images(
        images: torch.Tensor,
        filename_prefix: str,
        folder_type: FolderType,
        cls: type[ComfyNode] | None,
        compress_level: int = 4,
    ) -> list[SavedResult]:
        """Saves [B, H, W, C] as one PNG each, with the workflow inside when `cls` is given."""
        height, width = images[0].shape[:2]
        target, name, number, subfolder = folders.save_location(filename_prefix, _folder(folder_type), width, height)
        metadata, results = _metadata(cls), []
        for index, image in enumerate(images):
            file = f"{name.replace('%batch_num%', str(index))}_{number + index:05}_.png"
            picture = ImageSaveHelper._convert_tensor_to_pil(image)
            picture.save(target / file, pnginfo=metadata, compress_level=compress_level)
            results.append(SavedResult(file, subfolder, folder_type))
        return results

    @staticmethod
    def get_save_images_ui(
        images: torch.Tensor, filename_prefix: str, cls: type[ComfyNode] | None, compress_level: int = 4
    ) -> SavedImages:
        """Saves [B, H, W, C] into the output folder."""
        saved = ImageSaveHelper.save_images(images, filename_prefix, FolderType.output, cls, compress_level)
        return SavedImages(saved)


class PreviewImage:
    """[B, H, W, C] shown on the node; the files go into the temporary folder."""

    def __init__(
        self, image: torch.Tensor, animated: bool = False, cls: type[ComfyNode] | None = None, **kwargs: Any
    ) -> None:
        prefix = f"ComfyUI_temp_{secrets.token_hex(3)}"
        self.values = ImageSaveHelper.save_images(image, prefix, FolderType.temp, cls, compress_level=1)
        self.animated = animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.values, "animated": (self.animated,)}


class PreviewMask(PreviewImage):
    """[B, H, W] shown as greys."""

    def __init__(
        self, mask: torch.Tensor, animated: bool = False, cls: type[ComfyNode] | None = None, **kwargs: Any
    ) -> None:
        grey = mask.reshape(-1, *mask.shape[-2:], 1).expand(-1, -1, -1, 3)
        super().__init__(grey, animated, cls)


class PreviewText:
    """A text for the history and the socket; the page itself draws it only on the core PreviewAny node."""

    def __init__(self, value: str, **kwargs: Any) -> None:
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        return {"text": (self.value,)}
