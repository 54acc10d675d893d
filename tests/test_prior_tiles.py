"""A prior in parts gives the picture in one piece where its network is local, and says so where it is not."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file
from test_noise_unet import SMALL, awake

from comfyui_mend import models
from comfyui_mend.engine import allocator, host, loaded, tiling, zero_shot
from comfyui_mend.errors import OutOfMemoryError

SIZE = (2, 3, 200, 264)


@pytest.fixture
def prior(tmp_path) -> zero_shot.NetworkPrior:
    save_file(awake(SMALL).state_dict(), str(tmp_path / "small.safetensors"))
    return zero_shot.network_prior(loaded.load(tmp_path / "small.safetensors"), precision="fp32")


def evaluate(prior: zero_shot.NetworkPrior, size: tuple[int, ...] = SIZE) -> torch.Tensor:
    x = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return prior.run(size, lambda session: session.prior(x, torch.tensor([0.2, 0.5])[: size[0]]))


def short_of_memory(monkeypatch: pytest.MonkeyPatch, prior: zero_shot.NetworkPrior, pixels: int) -> None:
    """Leaves memory for that many pixels."""
    budget = pixels * tiling.bytes_per_pixel(prior.loaded, torch.float32)
    monkeypatch.setattr(allocator, "available", lambda: False)  # tiles as on every other system
    monkeypatch.setattr(host, "working_memory", lambda device: int(budget))


@pytest.mark.parametrize("pixels", [200 * 264, 128 * 128, 80 * 80])
def test_image_by_image_and_in_tiles_the_result_is_that_of_the_whole(prior, monkeypatch, pixels) -> None:
    whole = evaluate(prior)
    short_of_memory(monkeypatch, prior, pixels)
    torch.testing.assert_close(evaluate(prior), whole, atol=2e-5, rtol=0)


def test_tiles_shrink_when_memory_runs_out_after_all(prior, monkeypatch, caplog) -> None:
    whole, module = evaluate(prior), prior.loaded.restorer.module
    forward, sides = module.forward, []

    def greedy(x, *rest):
        sides.append(x.shape[-1])
        if x.shape[-1] > 100:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x, *rest)

    monkeypatch.setattr(module, "forward", greedy)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(evaluate(prior), whole, atol=1e-3, rtol=0)  # half of 68 is a short overlap
    assert "tiles of" in caplog.text and min(sides) < 100 < max(sides)
    monkeypatch.setattr(module, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(OutOfMemoryError, match="not even a tile"):
        evaluate(prior)


def test_a_network_that_sees_everything_says_that_tiles_change_it(tmp_path, monkeypatch, caplog) -> None:
    small = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1), "attention_resolutions": (2,)}
    torch.manual_seed(0)
    state = models.create("guided-diffusion-unet", {"unet": small}).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, str(tmp_path / "wide.safetensors"))
    prior = zero_shot.network_prior(loaded.load(tmp_path / "wide.safetensors"), precision="fp32")
    short_of_memory(monkeypatch, prior, 64 * 64)
    with caplog.at_level(logging.WARNING):
        assert evaluate(prior, (1, 3, 72, 96)).shape == (1, 3, 72, 96)
    assert "differs from that in one piece" in caplog.text
