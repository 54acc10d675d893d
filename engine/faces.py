"""The faces of a batch of pictures: cut out upright at one size, and pasted back where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import InputError
from ..models.colour import rgb
from . import colours, host
from .face_geometry import apply, compose, corners, inverse, soft_square, stretch, warp
from .values import check_image, check_mask, clamped


@dataclass(frozen=True, eq=False)
class Face:
    """One face: its picture's number, the similarity from pixels to the unit square of its crop, what is known of it."""

    picture: int
    to_crop: torch.Tensor
    box: torch.Tensor
    """x0, y0, x1, y1 in pixels."""
    score: float | None = None
    landmarks: torch.Tensor | None = None
    """Eyes, nose, corners of the mouth [5, 2], from the picture's left to its right."""

    @property
    def extent(self) -> float:
        """Side of the crop in pixels of the picture."""
        return float(torch.linalg.det(self.to_crop[:, :2])) ** -0.5


@dataclass(frozen=True, eq=False)
class Faces:
    """What travels on the MEND_FACES wire: the faces of `count` pictures of one size (height, width)."""

    faces: Sequence[Face]
    size: tuple[int, int]
    count: int

    def __len__(self) -> int:
        return len(self.faces)

    def describe(self) -> str:
        """A line per picture, and per face what was found."""
        lines = []
        for number in range(self.count):
            own = [face for face in self.faces if face.picture == number]
            lines.append(f"picture {number + 1}: {len(own)} {'face' if len(own) == 1 else 'faces'}")
            for face in own:
                x0, y0, x1, y1 = (round(v) for v in face.box.tolist())
                sure = "" if face.score is None else f", confidence {face.score:.2f}"
                lines.append(f"  {x1 - x0} x {y1 - y0} at {x0}, {y0}{sure}")
        return "\n".join(lines)

    def zoomed(self, context: float) -> Faces:
        """The same faces with `context` times as much around them in their crops."""
        grow = stretch(1 / context, 1 / context, 0.5 - 0.5 / context, 0.5 - 0.5 / context)
        return replace(self, faces=[replace(face, to_crop=compose(grow, face.to_crop)) for face in self.faces])

    def on(self, size: tuple[int, int]) -> list[Face]:
        """The faces in the coordinates of the same pictures at another size."""
        if size == self.size:
            return list(self.faces)
        shrink = stretch(self.size[1] / size[1], self.size[0] / size[0])
        return [replace(face, to_crop=compose(face.to_crop, shrink)) for face in self.faces]


def nobody(pictures: torch.Tensor) -> Faces:
    """A stand-in for pictures without faces: the middle of the first one, which is never pasted."""
    check_image(pictures)
    height, width = pictures.shape[-2:]
    side = min(height, width)
    box = torch.tensor([0.0, 0.0, side, side], dtype=torch.float64) + torch.tensor(
        [(width - side) / 2, (height - side) / 2] * 2, dtype=torch.float64
    )
    to_crop = stretch(1 / side, 1 / side, -float(box[0]) / side, -float(box[1]) / side)
    return Faces([Face(-1, to_crop, box)], (height, width), len(pictures))


def _check(pictures: torch.Tensor, faces: Faces) -> None:
    if len(pictures) != faces.count:
        raise InputError(f"image: {len(pictures)} pictures, but the faces were found in {faces.count}")


def _colour_channels(pictures: torch.Tensor) -> int:
    return 3 if pictures.shape[1] >= 3 else 1


def align(pictures: torch.Tensor, faces: Faces, side: int = 512) -> torch.Tensor:
    """The faces of pictures [B, C, H, W], upright at [N, 3, side, side] (grey ones [N, 1, side, side]).

    The pictures may have another size than the ones that the faces were found in. Raises InputError without faces.
    """
    check_image(pictures)
    _check(pictures, faces)
    if not len(faces):
        raise InputError("faces: none were found; lower the threshold, or mark them by a mask or boxes (Mark Faces)")
    target, cut, progress = host.device(), [], host.progress(len(faces))
    pictures = pictures[:, : _colour_channels(pictures)]
    for face in faces.on(tuple(pictures.shape[-2:])):
        cut.append(_cut(pictures[max(face.picture, 0)][None].to(target), face, (side, side)).to(pictures.device))
        progress.update()
    return torch.cat(cut)


def _cut(picture: torch.Tensor, face: Face, size: tuple[int, int]) -> torch.Tensor:
    to_picture = compose(inverse(face.to_crop), stretch(1 / size[1], 1 / size[0]))
    return warp(picture, to_picture, size).clamp(0, 1)


def paste(
    pictures: torch.Tensor,
    crops: torch.Tensor,
    faces: Faces,
    *,
    feather: float = 0.1,
    colour: str | None = None,
    detail: float = 1.0,
    opacity: float = 1.0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [B, C, H, W] with crops [N, C', h, w] where their faces are, and where that was [B, H, W] in 0..1.

    feather: width of the soft border, as a part of a crop's side; colour: a method of `colours` that gives crops the
    colours of the picture, or None; detail: how much of the picture's detail finer than a crop's pixels stays, 1: a
    crop that was not changed changes nothing; mask: further limits in the crops, [N or 1, h', w']. Crops may be larger
    or smaller than they were cut. Pixels outside the crops keep every bit; transparency stays as it is.
    """
    check_image(pictures)
    if len(crops):
        check_image(crops, "crops")
    _check(pictures, faces)
    if len(crops) != len(faces):
        raise InputError(f"faces: {len(crops)} pictures of faces for {len(faces)} places")
    if mask is not None:
        check_mask(mask)
    if mask is not None and len(mask) not in (1, len(crops)):
        raise InputError(f"mask: {len(mask)} masks for {len(crops)} faces; use one, or one per face")
    target, progress = host.device(), host.progress(len(faces))
    channels = _colour_channels(pictures)
    result = pictures.float().clone()
    covered = torch.zeros(len(pictures), *pictures.shape[-2:])
    # Small faces last: where two overlap, the one that is farther away is the one that would be lost.
    for index, face in sorted(enumerate(faces.on(tuple(pictures.shape[-2:]))), key=lambda pair: -pair[1].extent):
        progress.update()
        if face.picture < 0:
            continue
        crop = crops[index][None].to(target).float()
        if channels == 3:
            crop = rgb(crop)
        elif crop.shape[1] >= 3:
            crop = crop[:, :3].mean(dim=1, keepdim=True)
        crop = crop[:, :channels]
        height, width = crop.shape[-2:]
        quad = apply(inverse(face.to_crop), corners(1, 1))
        x0, y0 = (max(0, int(v)) for v in quad.amin(0).floor().tolist())
        x1, y1 = (min(n, int(v)) for n, v in zip(pictures.shape[:1:-1], quad.amax(0).ceil().tolist(), strict=True))
        if x1 <= x0 or y1 <= y0:
            continue
        size, place = (y1 - y0, x1 - x0), (face.picture, slice(None, channels), slice(y0, y1), slice(x0, x1))
        to_unit = compose(face.to_crop, stretch(1, 1, x0, y0))
        to_crop = compose(stretch(width, height), to_unit)
        whole = pictures[face.picture][None, :channels].to(target).float()
        before = _cut(whole, face, (height, width)) if detail or colour else None
        if colour is not None:
            crop = colours.fix_colours(crop, before, colour)
        alpha = soft_square(to_unit, size, feather).to(target) * opacity
        if mask is not None:
            own = mask[index if len(mask) > 1 else 0].to(target).float()
            to_mask = compose(stretch(own.shape[-1], own.shape[-2]), to_unit)
            alpha = alpha * warp(own[None, None], to_mask, size, "bilinear")[0, 0].clamp(0, 1)
        if detail:
            # The change alone is drawn: what the crop could not hold stays below it.
            patch = whole[..., y0:y1, x0:x1] + warp(crop - before, to_crop, size)
            if detail < 1:
                patch = torch.lerp(warp(crop, to_crop, size), patch, detail)
        else:
            patch = warp(crop, to_crop, size)
        below = result[place].to(target)
        result[place] = torch.where(alpha > 0, torch.lerp(below, clamped(patch[0], whole), alpha), below).to(result)
        seen = covered[face.picture, y0:y1, x0:x1]
        covered[face.picture, y0:y1, x0:x1] = torch.maximum(seen, alpha.cpu())
    return result, covered
