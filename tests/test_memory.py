"""Memory is planned from measurements, and whatever happens it is afterwards as it was before."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.bench import memory as bench_memory
from comfyui_mend.engine import (
    classify,
    coarse,
    host,
    loaded,
    memory,
    model_folder,
    osdface,
    residuals,
    routes,
    state_space,
    tiling,
)
from comfyui_mend.errors import Cancelled, OutOfMemoryError
from comfyui_mend.models.mpmf_net import CoarseImage

from .support import local_restorer, wrapped
from .test_da_rcot import SMALL as RCOT
from .test_mpmf_net import SMALL as MPMF
from .test_state_space import V2 as MAMBAIRV2

SIZE, TILE = (1, 3, 260, 130), 128
CPU = torch.device("cpu")


def live_bytes() -> int:
    """Bytes of every tensor alive, counted once a storage; nothing is collected before."""
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.layout is torch.strided:
            storages[found.untyped_storage()._cdata] = found.untyped_storage().nbytes()
    return sum(storages.values())


def kept_bytes() -> int:
    """What the host's cache of networks holds."""
    return sum(n.size for n in host.networks._kept.values())


class Failing:
    """Calls `network.forward`, and raises `error` at call number `at` (from 0), once."""

    def __init__(self, network: Any, at: int, error: BaseException | None) -> None:
        self.forward, self.at, self.error, self.count = network.forward, at, error, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.error is not None and self.count == self.at + 1:
            held = [x * 2]  # as a network has some when it fails
            raise type(self.error)(*self.error.args, *held[1:])
        return self.forward(x)


def tiles() -> int:
    restorer = local_restorer()
    counter = Failing(restorer.restorer.module, 0, None)
    restorer.restorer.module.forward = counter
    tiling.restore(restorer, torch.rand(SIZE), tile=TILE)
    return counter.count


COUNT = tiles()
ENDINGS = {
    "success": None,
    "error": ZeroDivisionError("a bug"),
    "cancel": Cancelled("cancelled"),
    "cuda": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
    "python": MemoryError(),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_memory_is_as_before_whatever_happens_at_whatever_tile(ending):
    restorer, image = local_restorer(), torch.rand(SIZE)
    forward = restorer.restorer.module.forward
    gc.collect()
    gc.freeze()  # what is there now is not looked at again: quicker
    gc.disable()
    try:
        before = live_bytes(), kept_bytes()
        for index in range(COUNT):
            restorer.restorer.module.forward = Failing(SimpleNamespace(forward=forward), index, ENDINGS[ending])
            if ending in ("error", "cancel"):
                with pytest.raises(type(ENDINGS[ending])):
                    tiling.restore(restorer, image, tile=TILE)
                gc.collect()  # pytest's own record of the exception refers to itself
            else:
                restored = tiling.restore(restorer, image, tile=TILE)
                assert restored.isfinite().all()
                del restored
            assert (live_bytes(), kept_bytes()) == before, f"tile {index}"
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_picture_restored_after_running_out_of_memory_is_the_same_at_every_tile():
    image, want = torch.rand(SIZE), None
    for index in range(COUNT):
        torch.manual_seed(0)
        restorer = local_restorer()
        want = tiling.restore(restorer, image) if want is None else want
        restorer.restorer.module.forward = Failing(restorer.restorer.module, index, ENDINGS["cuda"])
        assert (tiling.restore(restorer, image, tile=TILE) - want).abs().max() < 1e-5


def test_the_chunk_of_a_batch_follows_free_memory(monkeypatch):
    restorer, batch = local_restorer(), torch.rand(6, 3, 64, 64)
    per_picture = tiling.bytes_per_pixel(restorer, torch.float32) * 64 * 64
    for pictures, want in ((1.5, [1] * 6), (2.5, [2] * 3), (100, [6])):
        monkeypatch.setattr(host, "working_memory", lambda target, n=pictures: int(n * per_picture))
        restorer.restorer.module.calls.clear()
        tiling.restore(restorer, batch)
        assert [c[0] for c in restorer.restorer.module.calls] == want


def test_between_the_pictures_of_a_batch_the_bar_moves_and_cancel_is_heard(monkeypatch):
    restorer, batch, told = local_restorer(), torch.rand(6, 3, 64, 64), []
    monkeypatch.setattr(tiling, "PICTURES_AT_ONCE", {"cpu": 2 * 64 * 64 + 1})
    host.set_hooks(progress=lambda done, total, picture: told.append((done, total)), interrupt=lambda: len(told) == 2)
    try:
        with pytest.raises(Cancelled):
            tiling.restore(restorer, batch)
    finally:
        host.set_hooks()
    assert told == [(2, 6), (4, 6)] and [c[0] for c in restorer.restorer.module.calls] == [2, 2]


def test_a_batch_that_does_not_fit_goes_on_with_fewer_pictures_at_a_time(caplog):
    restorer, batch = local_restorer(), torch.rand(6, 3, 64, 64)
    want = tiling.restore(restorer, batch)
    restorer.restorer.module.fail_above = 3 * 64 * 64
    assert torch.equal(tiling.restore(restorer, batch), want)
    assert "going on with 3 pictures at a time" in caplog.text


def test_tiles_are_planned_with_the_measured_figure_and_without_one_with_the_formula(monkeypatch, moce):
    architecture, config = moce.restorer.architecture, moce.restorer.config
    assert memory.measured(moce.restorer) is None
    assert memory.bytes_per_pixel(moce.restorer, torch.float32) == architecture.bytes_per_pixel(config)
    row = {"network": architecture.id, "config": config, "single": 1000, "half": 700}
    monkeypatch.setattr(memory, "table", lambda: {(architecture.id, memory.settings(config)): row})
    assert tiling.bytes_per_pixel(moce, torch.float32) == 1000
    assert tiling.bytes_per_pixel(moce, torch.bfloat16) == 700


def test_settings_read_from_a_file_find_the_row_of_a_released_variant():
    assert memory.settings({"b": (1, 2), "a": 1.0}) == memory.settings({"a": 1, "b": [1, 2]})
    assert memory.settings({"a": True}) != memory.settings({"a": 1})
    missing = []
    for row in memory.table().values():
        architecture = models.registry.get(row["network"])
        if row["config"] not in [json.loads(json.dumps(c)) for c in architecture.variants.values()]:
            continue  # of a shipped file
        with torch.device("meta"):
            state = architecture.build(row["config"]).state_dict()
        found = architecture.config_from_state_dict(state)
        left_to_metadata = {k: row["config"][k] for k in architecture.metadata_keys if k in row["config"]}
        config = {**found, **left_to_metadata}
        if memory.measured(SimpleNamespace(architecture=architecture, config=config)) is None:
            missing.append(row["name"])
    assert not missing


def test_the_table_has_the_shipped_starter_and_every_figure_is_near_its_formula():
    starter = loaded.load(model_folder.model_path("mend-moce-ir-starter.safetensors"))
    assert memory.measured(starter.restorer) is not None
    for (name, _), row in memory.table().items():
        formula = models.registry.get(name).bytes_per_pixel(row["config"])
        assert 0.05 * formula < row["single"] < 10 * formula and 0 < row["half"] <= row["single"], row["name"]


def test_measuring_writes_a_row_that_planning_reads(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "TABLE", tmp_path / "memory.json")
    memory.table.cache_clear()
    try:
        bench_memory.main(["--model", "wiring-nafnet.safetensors", "--size", "16", "32", "--write"])
        memory.table.cache_clear()
        restorer = loaded.load(model_folder.model_path("wiring-nafnet.safetensors")).restorer
        assert memory.measured(restorer)["single"] == memory.bytes_per_pixel(restorer, torch.float32) > 0
        assert "wiring-nafnet" in capsys.readouterr().out
    finally:
        host.set_device(None)
        memory.table.cache_clear()


def small_moce() -> loaded.LoadedRestorer:
    shape = {"num_blocks": (1, 1), "num_dec_blocks": (1,), "heads": (1, 2), "num_refinement_blocks": 1}
    return wrapped("moce-ir", {"dim": 8, "num_experts": 2, "ffn_expansion_factor": 2, **shape})


def limited(monkeypatch, module: torch.nn.Module, method: str, pixels: int) -> list[int]:
    """Lets `module.method` run out of memory above so many pixels; what it was called with is noted."""
    original, seen = getattr(module, method), []

    def call(image, *args, **kwargs):
        shown = getattr(image, "image", image)
        seen.append(shown.shape[-2] * shown.shape[-1])
        if seen[-1] > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(image, *args, **kwargs)

    monkeypatch.setattr(module, method, call)
    return seen


def test_a_route_that_does_not_fit_is_decided_on_a_smaller_picture(monkeypatch, caplog):
    restorer, image = small_moce(), torch.rand(1, 3, 96, 160)
    limited(monkeypatch, restorer.restorer.module, "forward", 64 * 64)
    seen = limited(monkeypatch, restorer.restorer.module, "route", 48 * 80)
    assert tiling.restore(restorer, image, tile=96).isfinite().all()  # with tiles of 64 in the end
    assert "looks at the whole picture reduced to 80 x 48 pixels" in caplog.text
    seen.clear()
    assert len(routes.route(restorer, image)) == 1 and seen == [96 * 160, 48 * 80]
    assert len(routes.sweep(restorer, image)) == 3
    limited(monkeypatch, restorer.restorer.module, "route", 10)
    with pytest.raises(OutOfMemoryError, match="what it decides on the whole picture does not fit"):
        routes.route(restorer, image)


def test_a_map_of_routes_that_does_not_fit_is_made_of_smaller_pictures(monkeypatch):
    restorer = wrapped("mambairv2", MAMBAIRV2)
    limited(monkeypatch, restorer.restorer.module, "routes", 40 * 48)
    image = torch.rand(2, 3, 80, 96)
    assert state_space.routes(restorer, image).shape[1:] == (2, 40, 48)


def test_a_residual_that_does_not_fit_is_encoded_tile_by_tile(monkeypatch, caplog):
    restorer = wrapped("da-rcot", RCOT)
    residual = residuals.from_pictures(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    limited(monkeypatch, restorer.restorer.module, "encode_residual", 10)
    assert residuals.encode(restorer, residual).embeddings is None
    assert "encoded tile by tile" in caplog.text


def test_a_coarse_image_that_does_not_fit_is_decided_on_a_smaller_picture(monkeypatch, caplog):
    restorer, image = wrapped("mpmf-net", MPMF), torch.rand(2, 3, 90, 71)
    whole = coarse.predict(restorer, image).image
    limited(monkeypatch, restorer.restorer.module, "coarse", 60 * 60)
    smaller = coarse.predict(restorer, image).image
    assert smaller.shape == whole.shape and not torch.equal(smaller, whole)
    assert "looks at the whole picture reduced to 36 x 46 pixels" in caplog.text
    assert tiling.restore(restorer, image, context={"coarse": CoarseImage(smaller)}).isfinite().all()


def test_a_classifier_that_runs_out_of_memory_looks_through_smaller_windows(monkeypatch, caplog):
    nafnet = {"width": 8, "enc_blk_nums": (1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1)}
    head = {"feature_dims": (8, 16), "num_res_blocks": 1, "num_classes": 3}
    pair = wrapped("dcpt-classified-network", {"backbone": "nafnet", "net_g": nafnet, "net_dc": head})
    image = torch.rand(2, 3, 128, 200)
    expected = classify.classify(pair, image, window=100).probabilities
    seen = limited(monkeypatch, pair.restorer.module.net_g, "decoder_features", 110 * 110)
    torch.testing.assert_close(classify.classify(pair, image).probabilities, expected)
    assert "windows of 100 pixels" in caplog.text and seen[0] == 128 * 200
    limited(monkeypatch, pair.restorer.module.net_g, "decoder_features", 0)
    with pytest.raises(OutOfMemoryError, match="not even 50 pixels of a picture fit"):
        classify.classify(pair, image)


def test_a_score_that_does_not_fit_says_what_to_do(monkeypatch):
    potential = wrapped("da-rcot-potential", {"patch_size": 32, "width": 8})
    limited(monkeypatch, potential.restorer.module, "score_map", 0)
    with pytest.raises(OutOfMemoryError, match="40 x 33 does not fit into memory beside the network; make it smaller"):
        residuals.score(potential, torch.rand(1, 3, 33, 40))


@pytest.mark.parametrize("fitting", [8, 2, 1, 0])
def test_faces_that_do_not_fit_together_are_restored_in_smaller_groups(fitting, monkeypatch):
    groups = []

    def encode(vae, faces, seed=None):
        if len(faces) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        groups.append(len(faces))
        return faces + seed

    monkeypatch.setattr(osdface, "check_model", lambda model: None)
    monkeypatch.setattr(osdface, "prompts", lambda _, f: (torch.zeros(len(f), 77, osdface.CONTEXT), [0] * len(f)))
    monkeypatch.setattr(osdface, "encode", encode)
    monkeypatch.setattr(osdface, "sample", lambda model, conditions, latents, timestep: latents)
    monkeypatch.setattr(osdface, "prescaled", lambda latents, timestep: latents)
    vae, faces = SimpleNamespace(decode=lambda latents: latents.movedim(1, -1)), torch.rand(5, 3, 8, 8)
    if not fitting:
        with pytest.raises(OutOfMemoryError, match="not even one face of 8 x 8 pixels fits"):
            osdface.restore(None, vae, None, faces, seed=0, square=0)
        return
    restored, _ = osdface.restore(None, vae, None, faces, seed=0, square=0)
    assert groups == {8: [5], 2: [2, 2, 1], 1: [1] * 5}[fitting]
    starts = torch.tensor([sum(groups[:i]) for i, n in enumerate(groups) for _ in range(n)])
    assert torch.equal(restored, faces + starts[:, None, None, None])
