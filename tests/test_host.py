"""Devices, caches and folders."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace

import pytest
import torch

from comfyui_mend.engine import comfyui, host, model_folder
from comfyui_mend.errors import Cancelled, InputError


class Thing:
    def __init__(self, size: int) -> None:
        self.size = size


def test_the_same_key_gives_the_same_network_while_it_is_in_use() -> None:
    cache, loads = host.NetworkCache(budget=100), []

    def load() -> Thing:
        loads.append(1)
        return Thing(60)

    first = cache.get("a", load, lambda t: t.size)
    cache.get("b", load, lambda t: t.size)  # over budget: "a" is no longer kept, but still in use
    assert cache.get("a", load, lambda t: t.size) is first and len(loads) == 2
    del first
    cache.clear()
    gc.collect()
    cache.get("a", load, lambda t: t.size)
    assert len(loads) == 3


def test_the_budget_keeps_the_most_recently_used() -> None:
    cache, loads = host.NetworkCache(budget=100), []
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key, lambda key=key: loads.append(key) or Thing(40), lambda t: t.size)
        gc.collect()
    assert loads == ["a", "b", "c", "b"]


def test_precision_is_single_on_a_cpu_unless_asked_for() -> None:
    cpu = torch.device("cpu")
    assert host.working_dtype("auto", cpu) is torch.float32
    assert host.working_dtype("bf16", cpu) is torch.bfloat16
    with pytest.raises(InputError, match="precision: 'int8'"):
        host.working_dtype("int8", cpu)


def test_an_interrupt_raises_at_the_next_step_and_progress_never_runs_over() -> None:
    bar = host.progress(2)
    for _ in range(5):
        bar.update()
    assert bar.done == 2
    host.set_hooks(interrupt=lambda: True)
    try:
        with pytest.raises(Cancelled):
            bar.update()
    finally:
        host.set_hooks()


def test_previews_are_made_a_few_times_a_second_at_most() -> None:
    made = []
    bar = host.progress(100)
    for _ in range(100):
        bar.update(1, lambda: made.append(1))
    assert len(made) == 1


def test_model_files_are_found_by_name_and_names_cannot_leave_the_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "models" / "sub").mkdir(parents=True)
    (tmp_path / "models" / "sub" / "net.pth").write_bytes(b"x")
    (tmp_path / "models" / "readme.txt").write_bytes(b"x")
    (tmp_path / "secret.pth").write_bytes(b"x")
    monkeypatch.setenv("MEND_MODELS", os.fspath(tmp_path / "models"))
    monkeypatch.chdir(tmp_path / "models")
    assert "sub/net.pth" in model_folder.model_files() and not any("readme" in n for n in model_folder.model_files())
    assert model_folder.model_path("sub/net.pth").read_bytes() == b"x"
    with pytest.raises(InputError, match="there is no file .nothing.pth.; give its path, or put it into"):
        model_folder.model_path("nothing.pth")


def test_tiles_are_planned_with_what_comfyui_takes_back_from_other_models(monkeypatch) -> None:
    card, other = torch.device("meta"), torch.device("cpu")
    models = [SimpleNamespace(load_device=d, loaded_size=lambda: 5_000_000_000) for d in (card, other)]
    management = SimpleNamespace(get_free_memory=lambda device: 1e9, loaded_models=lambda: [*models, None])
    monkeypatch.setattr(host, "inside_comfyui", lambda: True)
    monkeypatch.setattr(host, "_management", lambda: management)
    assert host.free_memory(card) == 1_000_000_000
    assert host.working_memory(card) == int(0.6 * 6_000_000_000)


def test_free_memory_is_a_sane_number() -> None:
    free = host.free_memory(torch.device("cpu"))
    assert 10_000_000 < free < 10**13
    assert host.working_memory(torch.device("cpu")) <= host.CPU_WORKING_MEMORY


def test_newer_cores_are_told_the_sizes_of_their_caches() -> None:
    class Old:
        def __init__(self, server, cache_type=False, cache_size=None) -> None:
            self.given = cache_type, cache_size

    class New:
        def __init__(self, server, cache_type=False, cache_args=None) -> None:
            self.ram = cache_args["ram"], cache_args["ram_inactive"]

    assert comfyui._executor(Old, None).given == (False, None)
    assert comfyui._executor(New, None).ram == (0, 0)
