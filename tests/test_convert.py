"""Converting checkpoints: the same network, what it is in the header, nothing overwritten, and the licence kept."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from comfyui_mend import models
from comfyui_mend.engine import host
from comfyui_mend.errors import CheckpointError, InputError
from comfyui_mend.models import convert
from comfyui_mend.training import finetune, trainer

from .conftest import SMALL


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return models.create("moce-ir", SMALL).state_dict()


def test_a_converted_file_says_what_it_is_and_gives_the_same_network(state, tmp_path):
    torch.save(
        {
            "params": {},
            "params_ema": {f"module.{key}": value for key, value in state.items()},
            "optimizer": {"a": torch.ones(999)},
        },
        tmp_path / "a.pth",
    )
    target, restorer = convert.convert(tmp_path / "a.pth")
    assert target == tmp_path / "a.safetensors"
    loaded = models.load(target).module.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    assert set(load_file(target)) <= set(state)
    with target.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"]["mend.architecture"] == "moce-ir"
    assert json.loads(header["__metadata__"]["mend.config"])["dim"] == SMALL["dim"]
    assert models.load(target).config == restorer.config
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_conversion_overwrites_only_when_told(state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        convert.convert(tmp_path / "a.pth")
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    convert.convert(tmp_path / "a.pth", force=True)
    with pytest.raises(InputError, match="same file"):
        convert.convert(tmp_path / "a.safetensors", force=True)


def test_half_precision_conversion_is_verified_and_smaller(state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    target, _ = convert.convert(tmp_path / "a.pth", precision="float16")
    assert target.stat().st_size < 0.6 * (tmp_path / "a.pth").stat().st_size


def test_verification_notices_a_difference(state, tmp_path):
    restorer = models.load(state)
    target = convert.save(restorer, tmp_path / "a.safetensors")
    next(restorer.module.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="differs"):
        convert.verify(restorer, target)


def test_a_licence_is_the_files_own_before_the_methods(tmp_path):
    shipped = models.load(host.PACK / "weights" / "mend-mair-x2-starter.safetensors")
    assert shipped.licence.startswith("Apache-2.0") and shipped.licence != shipped.architecture.licence
    for licence in (None, "CC0"):
        trainer.export(shipped.module, tmp_path / "own.safetensors", "mair", shipped.config, licence=licence)
        assert models.load(tmp_path / "own.safetensors").licence == (licence or shipped.architecture.licence)


def test_what_is_made_of_a_file_keeps_its_licence(tmp_path):
    file = host.PACK / "weights" / "mend-mair-x2-starter.safetensors"
    shipped, (converted, _) = models.load(file), convert.convert(file, tmp_path / "converted.safetensors")
    assert models.load(converted).licence == shipped.licence
    finetune.write(finetune.trainable_copy(shipped), tmp_path / "tuned.safetensors")
    assert models.load(tmp_path / "tuned.safetensors").licence == shipped.licence
