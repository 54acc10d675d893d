"""Degradations: shapes, seeds, physics, and the text that says what was done."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend.errors import InputError
from comfyui_mend.training import damage
from comfyui_mend.training import degradations as d


def photo(height: int = 48, width: int = 40, channels: int = 3, batch: int = 1) -> torch.Tensor:
    """A smooth picture with edges, the same every time."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None, :].expand(height, width)
    layers = [0.2 + 0.6 * y, 0.8 - 0.5 * x, ((6 * x).long() % 2) * 0.5 + 0.2]
    return torch.stack(layers[:channels])[None].repeat(batch, 1, 1, 1)


@pytest.mark.parametrize("kind", d.KINDS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 3, 5), (1, 1, 17, 33), (2, 3, 48, 40)])
def test_every_kind_takes_every_size_and_stays_in_range(kind, shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    damaged, done = d.degrade(image, [d.Degradation(kind)], seed=3)
    assert damaged.shape == image.shape and damaged.dtype == image.dtype
    assert damaged.isfinite().all() and damaged.min() >= 0 and damaged.max() <= 1
    assert done[0][0] == kind and done[0][1]


@pytest.mark.parametrize("kind", d.KINDS)
def test_a_seed_gives_the_same_picture_and_the_input_is_left_alone(kind):
    image = photo()
    before = image.clone()
    first, _ = d.degrade(image, [d.Degradation(kind)], seed=11)
    torch.manual_seed(5)  # the global generator has no say
    second, _ = d.degrade(image, [d.Degradation(kind)], seed=11)
    assert torch.equal(first, second) and torch.equal(image, before)
    assert not torch.equal(first, d.degrade(image, [d.Degradation(kind)], seed=12)[0])


@pytest.mark.parametrize("kind", [k for k in d.KINDS if k != "jpeg"])
def test_gradients_reach_the_clean_picture(kind):
    image = photo(24, 24).requires_grad_()
    damaged, _ = d.Degradation(kind)(image, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(damaged.sum(), image)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_the_differentiable_jpeg_is_close_to_the_codec():
    image = photo(40, 56).requires_grad_()
    smooth = damage.jpeg_differentiable(image, 30)
    assert (smooth - damage.jpeg(image, 30)).abs().mean() < 0.03
    assert torch.autograd.grad(smooth.sum(), image)[0].abs().sum() > 0


def test_noise_has_the_standard_deviation_asked_for():
    grey = torch.full((1, 3, 200, 200), 0.5)
    noisy, _ = d.degrade(grey, [d.Degradation("noise", 1, {"sigma": 25.0})], seed=0, clamp=False)
    assert abs(float((noisy - grey).std()) * 255 - 25) < 0.3
    noise = damage.poisson_noise(grey, 50, torch.Generator().manual_seed(0)) - grey
    assert abs(float(noise.std()) - (0.5 / 50) ** 0.5) < 0.002


def test_channels_can_have_noise_of_their_own():
    grey = torch.full((1, 3, 100, 100), 0.5)
    noise = damage.gaussian_noise(grey, [5.0, 0.0, 40.0], torch.Generator().manual_seed(0)) - grey
    assert [round(v) for v in (noise.std(dim=(0, 2, 3)) * 255).tolist()] == [5, 0, 40]


def test_blurs_keep_a_flat_picture_flat_and_kernels_sum_to_one():
    flat = torch.full((1, 3, 20, 30), 0.3)
    for blurred in (damage.gaussian_blur(flat, 2.0), damage.motion_blur(flat, 15, 30), damage.defocus_blur(flat, 3.2)):
        assert torch.allclose(blurred, flat, atol=1e-5)
    assert float(damage.line_kernel(15, 70).sum()) == pytest.approx(1, abs=1e-5)


def test_motion_blur_smears_along_its_direction_only():
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    smeared = damage.motion_blur(point, 15, 0)[0, 0]
    assert (smeared[15] > 1e-3).sum() >= 15 and (smeared[:, 15] > 1e-3).sum() <= 3


def test_haze_follows_koschmieders_law():
    image, depth = photo(), torch.rand(1, 1, 48, 40)
    hazy = damage.haze(image, 1.5, [0.8, 0.9, 1.0], depth)
    transmission = torch.exp(-1.5 * depth)
    light = torch.tensor([0.8, 0.9, 1.0])[None, :, None, None]
    assert torch.allclose(hazy, image * transmission + light * (1 - transmission), atol=1e-6)


def test_strength_zero_is_nearly_nothing_and_more_is_worse():
    image = photo()

    def error(kind: str, strength: float) -> float:
        return float((d.degrade(image, [d.Degradation(kind, strength)], seed=4)[0] - image).abs().mean())

    for kind in d.KINDS:
        assert error(kind, 0) < 1e-6, kind
        assert error(kind, 0.3) <= error(kind, 1.5) + 1e-3, kind


def test_the_order_of_a_mixture_matters_and_is_told():
    image = photo()
    chain = [d.Degradation("noise", 1, {"sigma": 40.0}), d.Degradation("blur", 1, {"sigma": 2.0})]
    first, done = d.degrade(image, chain, 0)
    second, _ = d.degrade(image, chain[::-1], 0)
    assert (first - image).std() < (second - image).std()
    assert d.describe(done) == "noise: sigma 40\nblur: sigma 2"


def test_a_batch_shares_parameters_but_not_the_grain():
    same = photo().repeat(2, 1, 1, 1)
    damaged, _ = d.degrade(same, [d.Degradation("rain", 2.0)], 1)
    assert not torch.equal(damaged[0], damaged[1])


@pytest.mark.parametrize("kind", d.KINDS)
def test_the_text_says_enough_to_do_it_again(kind):
    damaged, done = d.degrade(photo(), [d.Degradation(kind)], 9)
    again, repeated = d.degrade(photo(), d.parse(d.describe(done)), 9)
    assert (damaged - again).abs().mean() < 2e-3 and d.describe(repeated) == d.describe(done)


@pytest.mark.parametrize("text", ["fog", "noise: level 3", "noise: sigma loud", "noise: sigma"])
def test_a_recipe_that_cannot_be_read_says_where(text):
    with pytest.raises(InputError, match=text.split(":")[0]):
        d.parse(text)


def test_the_node_keeps_transparency_and_obeys_a_recipe():
    from comfyui_mend.nodes.degrade import DegradeImage

    image = torch.cat([photo(), torch.full((1, 1, 48, 40), 0.25)], dim=1).movedim(1, -1)
    damaged, text = DegradeImage.execute(image, recipe="noise: sigma 25").args
    assert text == "noise: sigma 25" and damaged.shape == image.shape
    assert torch.equal(damaged[..., 3], image[..., 3]) and not torch.equal(damaged, image)
    assert "fog" in DegradeImage.validate_inputs("fog") and DegradeImage.validate_inputs("") is True
    untouched, text = DegradeImage.execute(image, degradation="none").args
    assert torch.equal(untouched, image) and text == "nothing"


@pytest.mark.parametrize("kind", d.KINDS)
def test_telling_how_far_it_is_changes_no_picture_of_a_batch(kind) -> None:
    batch, chain, told = torch.rand(3, 3, 33, 47), [d.Degradation(kind), d.Degradation("noise")], []
    whole = d.degrade(batch, chain, 5)[0]
    torch.testing.assert_close(d.degrade(batch, chain, 5, tell=told.append)[0], whole, atol=1e-6, rtol=0)
    assert sum(told) == 2 * len(batch)
