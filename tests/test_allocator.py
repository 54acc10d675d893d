"""Keeping freed memory while a network runs on the CPU: same results, and all of it goes back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from comfyui_mend.bench.machine import resident
from comfyui_mend.engine import allocator, host, tiling

needed = pytest.mark.skipif(not allocator.available(), reason="no GNU C library, or its allocator was set by hand")


@needed
def test_freed_memory_stays_inside_and_goes_back_afterwards():
    before = resident()
    with allocator.kept():
        with allocator.kept():
            torch.ones(25_000_000)
        assert resident() - before > 90_000_000, "still kept by the outer one"
    assert resident() - before < 30_000_000


@needed
def test_memory_goes_back_after_an_error():
    before = resident()
    with pytest.raises(ZeroDivisionError), allocator.kept():
        torch.ones(25_000_000)
        raise ZeroDivisionError
    assert resident() - before < 30_000_000


def test_only_large_work_on_a_cpu_with_room_is_kept(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(host, "free_memory", lambda target: 2_000_000_000)
    assert host._keeps(cpu, 500_000_000)
    assert not host._keeps(cpu, 1_000_000), "the C library does well by itself"
    assert not host._keeps(cpu, 1_000_000_000), "no room for what is kept"
    assert not host._keeps(torch.device("cuda"), 500_000_000)


def test_parts_of_large_pictures_are_smaller_where_memory_is_kept(moce, monkeypatch):
    sides = {}
    for kept in (True, False):
        monkeypatch.setattr(allocator, "available", lambda kept=kept: kept)
        sides[kept] = tiling.choose_tile(moce, 30_000, 30_000, torch.float32, torch.device("cpu"))
    assert sides[True] < sides[False] <= sides[True] * 1.4


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_users_set_for_themselves_is_left_alone(name):
    code = "from comfyui_mend.engine import allocator\nassert not allocator.available()\nwith allocator.kept(): pass"
    environment = {**os.environ, name: "glibc.malloc.arena_max=2" if name == "GLIBC_TUNABLES" else "131072"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
