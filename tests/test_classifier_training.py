"""The recipe of the starter classifier: learns, counts its confusions, and writes a file that loads."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from comfyui_mend import models
from comfyui_mend.engine.pictures import to_pil
from comfyui_mend.models.dcpt_classifier import classify
from comfyui_mend.training import classifier


@pytest.fixture
def photos(tmp_path):
    """Two smooth pictures as a training and a validation folder."""
    for index, folder in enumerate(("train", "validation")):
        (tmp_path / folder).mkdir()
        picture = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6), (100, 110), mode="bicubic").clamp(0, 1)[0]
        to_pil(picture).resize((110, 100), Image.Resampling.BICUBIC).save(tmp_path / folder / f"{index}.png")
    return tmp_path


def test_every_class_has_its_task():
    assert [task.name for task in classifier.tasks()] == list(classifier.CONFIG["labels"])
    assert all(task.chains for task in classifier.tasks())


def test_a_trained_classifier_is_a_file_that_names_its_classes(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests run in this process
    out = tmp_path / "out" / "classifier.safetensors"
    assert classifier.main(["--photos", str(photos), "--out", str(out), "--minutes", "0.02"]) == 0
    restorer = models.load(out)
    assert restorer.architecture.kind == "classifier" and out.stat().st_size < 1_000_000
    module = restorer.module
    found = classify(torch.rand(1, 3, 40, 40), module.net_g, module.net_dc, restorer.config["labels"], multiple_of=8)
    assert found.label() in classifier.KINDS
    assert out.with_suffix(".md").read_text().count("\n| ") == len(classifier.KINDS) + 1


def test_the_confusion_table_counts_every_picture_once(photos):
    module = models.create(classifier.ARCHITECTURE, classifier.CONFIG).eval()
    table = classifier.confusion(module, classifier.load_photos(photos / "validation"), draws=1)
    assert table.sum(dim=1).tolist() == [1] * len(classifier.KINDS)
