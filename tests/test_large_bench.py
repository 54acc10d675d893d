"""`mend bench large`: a run that stops early says how far it came."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.bench import large
from comfyui_mend.engine import host, loaded, tiling
from comfyui_mend.errors import Cancelled


@pytest.fixture(autouse=True)
def _without_hooks():
    yield
    host.set_hooks()


def test_a_released_setting_is_named_by_network_and_setting() -> None:
    names = list(large._released(["uformer", "transweather"]))
    assert names == ["transweather/TUR", "uformer/TUR 7 tasks"]


def test_a_model_file_in_a_subfolder_is_a_file_not_a_released_setting(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "net.safetensors").write_bytes((host.PACK / "weights" / "wiring-nafnet.safetensors").read_bytes())
    monkeypatch.setenv("MEND_MODELS", str(tmp_path))
    assert large._network("mine/net.safetensors", released=False).restorer.architecture.id == "nafnet"
    assert large._network("uformer/B", released=True).restorer.parameters > 50_000_000


def test_the_clock_stops_after_the_first_tile_that_ends_too_late() -> None:
    module = models.create("nafnet", {"width": 4, "enc_blk_nums": [1], "middle_blk_num": 0, "dec_blk_nums": [1]})
    architecture = models.registry.get("nafnet")
    config = {"width": 4, "enc_blk_nums": (1,), "middle_blk_num": 0, "dec_blk_nums": (1,), "train_size": None}
    network = loaded.wrap(models.Restorer(architecture, config, module.eval().requires_grad_(False)))
    clock = large.Clock(1e-9)
    with pytest.raises(Cancelled), torch.inference_mode():
        tiling.restore(network, torch.rand(1, 3, 128, 192), tile=64, overlap=0)
    assert (clock.done, clock.total) == (1, 6)
    clock = large.Clock(0)
    with torch.inference_mode():
        tiling.restore(network, torch.rand(1, 3, 128, 192), tile=64, overlap=0)
    assert clock.done == clock.total == 6
