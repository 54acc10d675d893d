"""Give and take with spandrel: its loaders take our files, ours takes its; without it nothing is missed."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError
from comfyui_mend.models import foreign, interop

from .comfyui_process import comfyui_python, run_script


@pytest.fixture(scope="module")
def answer(tmp_path_factory) -> dict:
    """What with_spandrel.py found, in the Python that has ComfyUI's packages."""
    root, _ = comfyui_python("spandrel")
    place = tmp_path_factory.mktemp("spandrel")
    done = run_script("with_spandrel.py", root, place, place=place, packages="spandrel", timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, f"it failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(lines[0].removeprefix("ANSWER"))


@pytest.mark.comfyui
def test_every_image_to_image_network_is_registered_once(answer) -> None:
    assert answer["first"] == [foreign.PREFIX + name for name in answer["restorers"]]
    assert answer["second"] == []
    assert answer["all"] == len(answer["first"])


@pytest.mark.comfyui
def test_comfyuis_own_upscaling_nodes_run_our_files(answer) -> None:
    for name, (architecture, scale, difference) in answer["ours"].items():
        assert architecture == foreign.PREFIX + name
        assert scale == (2 if name == "mair" else 1)
        assert difference < 1e-4, name


@pytest.mark.comfyui
def test_our_loader_takes_what_only_spandrel_knows(answer) -> None:
    theirs, ours, scale, difference, notes = answer["theirs"]["Compact"]
    assert (theirs, ours, scale) == ("Compact", "spandrel-Compact", 2)
    assert difference < 1e-5
    assert "through spandrel" in notes[0]


@pytest.mark.comfyui
def test_a_plain_uformer_stays_spandrels_there_and_ours_here_with_the_same_numbers(answer) -> None:
    theirs, ours, _, difference, _ = answer["theirs"]["Uformer"]
    assert (theirs, ours) == ("Uformer", "uformer")
    assert difference < 1e-4


@pytest.mark.comfyui
def test_a_file_that_nobody_knows_is_still_refused_in_our_words(answer) -> None:
    assert "no network known here" in answer["unknown"]


def test_without_spandrel_nothing_is_registered_and_files_load_as_before(monkeypatch) -> None:
    monkeypatch.setattr(interop, "spandrel_package", lambda: None)
    monkeypatch.setattr(foreign, "spandrel_package", lambda: None)
    assert interop.register_with_spandrel() == []
    assert foreign.from_spandrel({"body.0.weight": torch.zeros(8, 3, 3, 3)}) is None
    with pytest.raises(CheckpointError, match="no network known here"):
        models.load({"body.0.weight": torch.zeros(8, 3, 3, 3), "body.1.weight": torch.zeros(8)})


def test_a_spandrel_that_does_not_import_is_announced_once_and_left_alone(monkeypatch, caplog) -> None:
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "spandrel":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "spandrel", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    foreign.spandrel_package.cache_clear()
    try:
        assert interop.register_with_spandrel() == interop.register_with_spandrel() == []
        assert sum("does not import" in record.message for record in caplog.records) == 1
    finally:
        foreign.spandrel_package.cache_clear()


class _Unsupported(Exception):
    pass


@pytest.fixture
def stub(monkeypatch) -> types.SimpleNamespace:
    """The part of spandrel's interface that is used, with a registry that answers as told."""

    class ArchRegistry:
        found: object = None

        def add(self, *supports, ignore_duplicates: bool = False) -> list:
            return list(supports)

        def architectures(self, order: str) -> list:
            return []

        def load(self, state):
            if isinstance(ArchRegistry.found, Exception):
                raise ArchRegistry.found
            return ArchRegistry.found

    class ImageModelDescriptor:
        def __init__(self, **values) -> None:
            self.__dict__.update(values)

        def eval(self) -> None:
            self.model.eval()

        def __call__(self, image: torch.Tensor) -> torch.Tensor:
            return self.model(image).clamp(0, 1)

    package = types.SimpleNamespace(
        ArchRegistry=ArchRegistry,
        MAIN_REGISTRY=ArchRegistry(),
        ImageModelDescriptor=ImageModelDescriptor,
        UnsupportedModelError=_Unsupported,
    )
    monkeypatch.setattr(interop, "spandrel_package", lambda: package)
    monkeypatch.setattr(foreign, "spandrel_package", lambda: package)
    return package


def _descriptor(stub, **changes):
    values = {
        "model": torch.nn.Conv2d(3, 3, 3, padding=1),
        "architecture": types.SimpleNamespace(id="Theirs", name="Their Network"),
        "input_channels": 3,
        "output_channels": 3,
        "scale": 1,
        "tags": [],
        "purpose": "Restoration",
        "size_requirements": types.SimpleNamespace(minimum=16, multiple_of=8),
        "supports_half": True,
        "supports_bfloat16": False,
    }
    return stub.ImageModelDescriptor(**{**values, **changes})


def test_a_foreign_network_is_a_restorer_like_any_other(stub) -> None:
    stub.ArchRegistry.found = _descriptor(stub)
    restorer = models.load({"foreign.weight": torch.zeros(3)})
    assert (restorer.architecture.id, restorer.multiple_of, restorer.minimum_size) == ("spandrel-Theirs", 8, 16)
    assert restorer(torch.rand(1, 3, 5, 21)).shape == (1, 3, 5, 21)
    assert not any(p.requires_grad for p in restorer.module.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output_channels": 1}, "number of channels"),
        (None, "needs a mask"),
        (ValueError("bad"), "cannot load it: bad"),
    ],
)
def test_foreign_networks_that_cannot_restore_are_refused_in_words(stub, changes, words) -> None:
    if isinstance(changes, Exception):
        stub.ArchRegistry.found = changes
    elif changes is None:
        stub.ArchRegistry.found = types.SimpleNamespace(architecture=types.SimpleNamespace(name="Inpainter"))
    else:
        stub.ArchRegistry.found = _descriptor(stub, **changes)
    with pytest.raises(CheckpointError, match=words):
        models.load({"foreign.weight": torch.zeros(3)})


def test_an_explicit_system_never_goes_elsewhere(stub) -> None:
    stub.ArchRegistry.found = _descriptor(stub)
    with pytest.raises(CheckpointError):
        models.load({"foreign.weight": torch.zeros(3)}, system="acl")
