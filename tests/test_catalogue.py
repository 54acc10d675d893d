"""The catalogue agrees with the registry and the README, and `mend models` does what it says."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch

import comfyui_mend
from comfyui_mend import models
from comfyui_mend.__main__ import main as mend
from comfyui_mend.errors import InputError, MissingDependency
from comfyui_mend.models import catalogue, cli

from .conftest import SMALL

ROOT = Path(comfyui_mend.__file__).resolve().parent
TASKS = {"denoise", "derain", "dehaze", "deblur", "low-light", "desnow", "jpeg", "super-resolution", "faces", "prior"}


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "mine.pth"
    torch.save({"params_ema": models.create("moce-ir", SMALL).state_dict()}, path)
    return path


def test_every_method_and_file_is_described():
    methods = catalogue.methods()
    assert len({m.id for m in methods}) == len(methods) >= 14
    for method in methods:
        assert method.title and method.does and method.paper and method.authors and method.venue and method.place
        assert method.code.startswith("https://") and method.code_licence and method.weights_licence
        for file in method.files:
            assert file.link.startswith("https://") and set(file.tasks) <= TASKS, file.id
            assert Path(file.name).suffix in (".pth", ".pt", ".ckpt", ".safetensors", ".onnx")
    ids = [f.id for m in methods for f in m.files]
    assert len(set(ids)) == len(ids)


def test_every_network_belongs_to_a_method_of_the_catalogue():
    known = {m.id for m in catalogue.methods()} | {
        "restormer",
        "guided-diffusion-unet",
        "noise-unet",
    }  # backbones, priors
    assert {a.system for a in models.registry.architectures()} <= known


def test_every_variant_that_a_file_has_is_one_of_its_systems():
    for method in catalogue.methods():
        networks = [a for a in models.registry.architectures() if a.system == method.id]
        variants = {v for a in networks for v in a.variants}
        for file in method.files:
            assert not networks or not file.variant or file.variant in variants, (file.id, sorted(variants))


def test_every_workflow_that_is_named_is_shipped():
    for method in catalogue.methods():
        assert not method.workflow or (ROOT / "workflows" / f"{method.workflow}.json").is_file(), method.id


def test_the_readme_is_in_step():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert catalogue.with_table(readme) == readme, "run: mend models table --write README.md"


def test_a_file_is_known_by_its_name_and_folder():
    assert catalogue.find("some/where/MoCE_IR_AIO3/last.ckpt")[1].id == "moce-ir/MoCE_IR_AIO3"
    assert catalogue.find("some/where/last.ckpt") is None
    assert catalogue.find("X:/models/mair_sr_X2.pth")[0].id == "mair"
    assert "huggingface.co/GWu/TUR" in catalogue.where_to_get("AirNet_TUR_3task.pth")
    assert catalogue.where_to_get("unheard_of.pth") == ""


def test_list_prints_every_network_and_every_released_file(capsys):
    assert mend(["models", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(a.id in printed for a in models.registry.architectures())
    assert mend(["models", "list", "--released"]) == 0
    printed = capsys.readouterr().out
    assert all(f.id in printed for m in catalogue.methods() for f in m.files)
    assert "None of these files was reachable" in printed


def test_info_check_and_convert_work_together(checkpoint, capsys, tmp_path):
    assert mend(["models", "info", str(checkpoint), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["architecture"] == "moce-ir" and described["config"]["dim"] == 8
    assert any("EMA" in note for note in described["notes"])
    target = tmp_path / "out" / "mine.safetensors"
    assert mend(["models", "convert", str(checkpoint), "-o", str(target)]) == 0
    assert "verified" in capsys.readouterr().out
    assert mend(["models", "check", str(checkpoint), str(target)]) == 0
    assert capsys.readouterr().out.count("48x48 -> 48x48") == 2
    assert mend(["models", "list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("MoCE-IR") == 2


def test_a_bad_file_fails_the_check_and_says_why(checkpoint, capsys, tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>quota exceeded")
    assert mend(["models", "check", str(tmp_path / "page.pth"), str(checkpoint)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL page.pth: this is an HTML page" in printed and "ok   mine.pth" in printed
    assert mend(["models", "info", str(tmp_path / "page.pth")]) == 1
    assert "HTML page" in capsys.readouterr().err


def test_convert_does_not_overwrite_unless_forced(checkpoint, capsys):
    assert mend(["models", "convert", str(checkpoint)]) == 0
    assert mend(["models", "convert", str(checkpoint)]) == 1
    assert "--force" in capsys.readouterr().err
    assert mend(["models", "convert", str(checkpoint), "--force", "--precision", "float16"]) == 0


def test_download_says_where_files_are_that_it_cannot_fetch(capsys, tmp_path):
    assert mend(["models", "download", "mair/MaIR_SR_x2", "--folder", str(tmp_path)]) == 1
    assert "drive.google.com" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="not in the catalogue"):
        cli.main(["download", "nothing/at-all"])


def test_download_never_overwrites_and_never_leaves_half_a_file(monkeypatch, checkpoint, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    target = folder / "AirNet_TUR_3task.pth"
    arguments = ["download", "tur/AirNet_TUR_3task", "--folder", str(folder)]
    monkeypatch.setattr(cli, "_from_hugging_face", lambda repository, name: checkpoint)
    assert cli.main(arguments) == 0
    assert target.read_bytes() == checkpoint.read_bytes()
    assert [p.name for p in folder.iterdir()] == [target.name]
    with pytest.raises(InputError, match="exists already"):
        cli.main(arguments)


def test_download_without_its_library_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments, **named):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match="pip install huggingface_hub"):
        cli.main(["download", "tur/AirNet_TUR_3task", "--folder", str(tmp_path)])
