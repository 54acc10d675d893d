"""Training in two processes that torchrun starts: both have the same weights, those of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comfyui_mend.errors import ConfigError, InputError
from comfyui_mend.training import distributed

from . import two_processes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The weights that each of two processes ended with."""
    place = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "two_processes.py"), str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if sys.platform != "linux":
        environment.pop("GLOO_SOCKET_IFNAME")
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return place, [torch.load(place / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", two_processes.OBJECTIVES)
def test_both_processes_end_with_the_same_weights(both, name):
    _, (first, second) = both
    for key, value in first[name].items():
        assert torch.equal(value, second[name][key]), key


@pytest.mark.parametrize("name", ["pixel", "classes"])
def test_two_processes_learn_what_one_learns_from_the_whole_batch(both, tmp_path, name):
    _, (first, _) = both
    alone = two_processes.weights(two_processes.train(tmp_path, two_processes.OBJECTIVES[name]))
    begun = two_processes.weights(two_processes.train(tmp_path / "one", two_processes.OBJECTIVES[name], steps=1))
    assert alone.keys() == first[name].keys()
    for key, value in alone.items():
        # Adam's steps have the size of the learning rate whatever the gradient: rounding shows more than elsewhere.
        assert torch.allclose(value, first[name][key], atol=3e-5), key
    assert any((value - begun[key]).abs().max() > 1e-4 for key, value in alone.items())


def test_only_the_first_process_writes(both):
    place, _ = both
    for name in two_processes.OBJECTIVES:
        assert (place / name / "weights.safetensors").is_file()
        assert (place / name / "log.jsonl").read_text().count("validation") == 1


def test_without_torchrun_it_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun"), distributed.processes():
        pass


def test_alone_nothing_is_shared(monkeypatch, tmp_path):
    module = torch.nn.Linear(2, 2)
    assert distributed.wrap(module) is module and distributed.share() == (0, 1) and distributed.leads()
    assert distributed.mean({"loss": 2.0}) == {"loss": 2.0} and distributed.agree(True)
    monkeypatch.setattr(distributed, "share", lambda: (0, 3))
    with pytest.raises(InputError, match="3 processes"):
        two_processes.train(tmp_path, two_processes.OBJECTIVES["pixel"])
