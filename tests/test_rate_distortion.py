"""The codec's training objective: counts what coding would cost, and its gradients reach every part."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import ConfigError
from comfyui_mend.training.objectives.rate_distortion import FIRST_QUALITIES, RateDistortion, straight_through

SMALL = {"dim": 8, "N_ch": 16, "z_ch": 32, "num_blocks": (1, 1, 1, 1), "heads": (1, 1, 2, 2)}


@pytest.fixture
def codec() -> torch.nn.Module:
    torch.manual_seed(3)
    return models.create("aio-codec", SMALL)


def pictures(side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    clean = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4, generator=generator), (side, side), mode="bilinear")
    return clean + 0.1 * torch.randn(clean.shape, generator=generator), clean


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_rounding_passes_the_gradient_straight_through() -> None:
    x = torch.tensor([0.4, 1.7], requires_grad=True)
    straight_through(x).mul(torch.tensor([2.0, 3.0])).sum().backward()
    assert straight_through(x).tolist() == [0.0, 2.0] and x.grad.tolist() == [2.0, 3.0]


def test_the_loss_is_weighted_distortion_plus_rate(codec) -> None:
    damaged, clean = pictures()
    with torch.no_grad():
        codec.N_dim_compress.weight.mul_(20)  # values of several steps, so that noise costs what rounding does
    loss, parts = RateDistortion(pairs=((63,),), clean=0)(codec, damaged, clean, seeded())
    restored, latent = codec(damaged, 63)
    distortion = (restored - clean).square().sum(dim=1).mean()
    bits = sum(b.sum() for b in codec.estimate_bits(latent)) / damaged[:, 0].numel()
    assert torch.allclose(parts["distortion"], distortion, rtol=1e-4)
    assert torch.allclose(parts["bits_per_pixel"], bits, rtol=0.3)
    assert torch.allclose(loss, 2048 * parts["distortion"] + parts["bits_per_pixel"], rtol=1e-5)


def test_gradients_reach_every_parameter(codec) -> None:
    damaged, clean = pictures()
    loss, _ = RateDistortion()(codec, damaged, clean, seeded())
    loss.backward()
    without = [name for name, p in codec.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    assert all(codec.get_submodule(m).weight.grad.abs().sum() > 0 for m in ("N_dim_compress", "refine"))


def test_a_few_steps_lower_the_loss(codec) -> None:
    damaged, clean = pictures()
    objective, optimiser = RateDistortion(pairs=FIRST_QUALITIES, clean=0), torch.optim.Adam(codec.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        loss, _ = objective(codec, damaged, clean, seeded())  # the same qualities and noise each time
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_crops_of_any_size_are_padded_and_the_same_seed_gives_the_same_loss(codec) -> None:
    damaged, clean = pictures(40)
    first, second = (RateDistortion()(codec, damaged, clean, seeded())[0] for _ in range(2))
    assert torch.isfinite(first) and torch.equal(first, second)


def test_clean_pictures_are_mixed_in_as_often_as_asked(codec) -> None:
    damaged, clean = pictures()
    always = RateDistortion(pairs=((0,),), clean=1)(codec, damaged * 0, clean, seeded())[0]
    assert torch.equal(always, RateDistortion(pairs=((0,),), clean=1)(codec, clean, clean, seeded())[0])


@pytest.mark.parametrize("settings", [{"anchors": 0}, {"pairs": ((64,),)}, {"pairs": ((),)}, {"clean": 2}])
def test_settings_that_cannot_work_are_refused(settings) -> None:
    with pytest.raises(ConfigError):
        RateDistortion(**settings)
