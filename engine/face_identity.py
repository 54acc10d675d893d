"""How far a restoration moved a face's identity: the distance between SFace's embeddings before and after.

Zhong et al., "SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition", IEEE Transactions on Image
Processing 2021, arXiv 2205.12010; the network is OpenCV's FaceRecognizerSF on the ONNX file of its model zoo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError, MissingDependency
from ..models import catalogue, file_kinds
from . import faces as faces_module
from . import host, journal, model_folder, pictures
from .face_geometry import TEMPLATE, compose, similarity, upright
from .faces import Face, Faces

FILE = "face_recognition_sface_2021dec.onnx"
SIDE = 112
LANDMARKS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where OpenCV places eyes, nose and corners of the mouth for SFace, the centre of the first pixel at 0."""
RECOGNISED = (torch.tensor(LANDMARKS, dtype=torch.float64) + 0.5) / SIDE
ANOTHER_PERSON = 1 - 0.363
"""Cosine distance beyond which OpenCV's documentation takes two faces for different people (chosen on LFW)."""
LARGEST_FILE = 500_000_000
COLUMNS = 4


@dataclass(frozen=True, eq=False)
class Recogniser:
    """A network that maps an aligned face to a vector whose direction is the person."""

    network: Any
    size: int

    def embed(self, faces: torch.Tensor) -> torch.Tensor:
        """Aligned faces [N, 1 or 3, 112, 112] in 0..1 as vectors [N, D], float64. Raises CheckpointError."""
        import cv2

        rows = []
        for face in (faces.float().clamp(0, 1) * 255).round().byte().cpu().expand(-1, 3, -1, -1):
            blue_first = face.flip(0).movedim(0, -1).contiguous().numpy()
            try:
                found = torch.tensor(self.network.feature(blue_first), dtype=torch.float64)
            except cv2.error as error:
                raise CheckpointError(f"the recogniser takes no {SIDE} x {SIDE} pictures: {error.err}") from None
            if found.ndim != 2 or len(found) != 1 or not found.isfinite().all():
                raise CheckpointError("the recogniser gives no vector for a face; it is not SFace")
            rows.append(found)
        return torch.cat(rows)


def files() -> list[str]:
    """Names of the networks to choose from; the published one's where there is none, so that a message can say so."""
    return model_folder.model_files({".onnx"}) or [FILE]


def path(name: str) -> Path:
    """The file behind a name of `files`. Raises InputError that says where to get it."""
    try:
        return model_folder.model_path(name)
    except InputError as error:
        raise InputError(f"{error}. {catalogue.where_to_get(name)}".strip()) from None


def _opencv() -> Any:
    try:
        import cv2

        return cv2.FaceRecognizerSF
    except (ImportError, AttributeError) as error:
        raise MissingDependency(
            "the identity of faces needs OpenCV 4.5.4 or later: pip install opencv-python-headless (or opencv-python, if "
            f"that is the one you have). Python says: {error}"
        ) from None


def load(file: Path) -> Recogniser:
    """The recogniser of an ONNX file. Raises MissingDependency without OpenCV, CheckpointError for any other file."""
    recogniser = _opencv()
    key = ("face-recogniser", str(file.resolve()), journal.identity(file))
    return host.networks.get(key, lambda: _load(recogniser, file), lambda loaded: loaded.size)


def _load(recogniser: Any, file: Path) -> Recogniser:
    size = file.stat().st_size
    with file.open("rb") as stream:
        kind = file_kinds.describe(stream.read(512))
    if file.suffix != ".onnx" or size > LARGEST_FILE or (kind is not None and "ONNX" not in kind):
        what = kind or f"of {size:,} bytes, no network that recognises faces"
        raise CheckpointError(f"{file.name}: {what}. {catalogue.where_to_get(FILE)}")
    try:
        loaded = Recogniser(recogniser.create(str(file), ""), size)
        loaded.embed(torch.zeros(1, 3, SIDE, SIDE))
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: {error}") from None
    except Exception as error:  # OpenCV's own, of several kinds
        raise CheckpointError(f"{file.name}: OpenCV cannot read it ({error}); download it again") from None
    return loaded


def _placed(face: Face) -> Face:
    """The face, cut out as SFace wants it: by its landmarks, or by its box where nothing else is known."""
    if face.landmarks is not None:
        return replace(face, to_crop=similarity(face.landmarks, RECOGNISED))
    return replace(face, to_crop=compose(similarity(TEMPLATE, RECOGNISED), upright(face.box)))


def crops(images: torch.Tensor, faces: Faces) -> torch.Tensor:
    """The faces of images [B, C, H, W], as the recogniser takes them: [N, 1 or 3, 112, 112].

    Where and how they were cut out for anything else does not matter. Raises InputError if there is none.
    """
    real = [_placed(face) for face in faces.faces if face.picture >= 0]
    return faces_module.align(images, replace(faces, faces=real), SIDE)


def distances(recogniser: Recogniser, before: torch.Tensor, after: torch.Tensor) -> list[float]:
    """Cosine distance, 0 (the same) to 2, of each face in before [N, ...] to the one in after [N, ...] (see `crops`)."""
    a, b = recogniser.embed(before), recogniser.embed(after)
    return (1 - torch.cosine_similarity(a, b, dim=1)).clamp(0, 2).tolist()


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds."""

    distances: list[float]
    names: list[str]
    picture: torch.Tensor
    """[1, 3, H, W]: each face before and after, under its distance."""

    @property
    def mean(self) -> float:
        return math.fsum(self.distances) / len(self.distances)

    def describe(self) -> str:
        """A line per face, and the mean."""
        lines = [
            f"{name}: {value:.3f}" + (", another person to SFace" if value > ANOTHER_PERSON else "")
            for name, value in zip(self.names, self.distances, strict=True)
        ]
        scale = f"0: the same; beyond {ANOTHER_PERSON:.3f}: another person"
        return "\n".join([*lines, f"mean {self.mean:.3f} ({scale})"])


def compare(
    recogniser: Recogniser, before: torch.Tensor, after: torch.Tensor, faces: Faces, faces_after: Faces | None = None
) -> Comparison:
    """The distance of each face of before [B, C, H, W] to the one in after [B, C, H', W'].

    faces_after: where they lie in the second pictures, in the same order, if elsewhere. Raises InputError without faces
    or if the two do not match.
    """
    second = faces if faces_after is None else faces_after
    numbers = [[face.picture for face in each.faces if face.picture >= 0] for each in (faces, second)]
    if numbers[0] != numbers[1]:
        raise InputError(
            f"faces_after: {len(numbers[1])} faces for {len(numbers[0])}, or in other pictures; the same faces are "
            "needed in the same order (limit them in Find Faces, or mark them by boxes)"
        )
    pair = crops(before, faces), crops(after, second)
    found = distances(recogniser, *pair)
    order = [numbers[0][:i].count(n) for i, n in enumerate(numbers[0])]
    names = [f"picture {n + 1}, face {k + 1}" for n, k in zip(numbers[0], order, strict=True)]
    return Comparison(found, names, _sheet(*pair, found))


def _sheet(before: torch.Tensor, after: torch.Tensor, values: list[float]) -> torch.Tensor:
    pairs = [
        pictures.to_pil(torch.cat([a.expand(3, -1, -1), b.expand(3, -1, -1)], dim=2))
        for a, b in zip(before, after, strict=True)
    ]
    labels = [f"{value:.3f}" + (" another person" if value > ANOTHER_PERSON else "") for value in values]
    return pictures.from_pil(pictures.labelled(pairs, labels, min(COLUMNS, len(pairs))))[None]
