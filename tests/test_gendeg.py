"""GenDeg: conditioning by intensity, structure correction, averaged weights, samplers and the training step."""

from __future__ import annotations

import random

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, InputError
from comfyui_mend.guidance import gendeg
from comfyui_mend.guidance import latent_diffusion as ld
from comfyui_mend.models.gendeg import averaged_name, intensity_bin, with_averaged_weights

CORRECTION = {"img_channel": 6, "width": 8, "enc_blk_nums": (1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 2)}


def _correction():
    torch.manual_seed(0)
    module = models.create("gendeg", CORRECTION).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith(("beta", "gamma")):
            parameter.normal_(std=0.3)
    return module


def _checkpoint() -> dict:
    """A few entries of the released layout: raw and averaged U-Net, autoencoder, the two layers."""
    names = ["diffusion_model.input_blocks.0.0.weight", "diffusion_model.out.2.bias"]
    state = {f"model.{name}": torch.zeros(3) for name in names}
    state |= {averaged_name(name): torch.full((3,), float(i + 1)) for i, name in enumerate(names)}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    conditioner = models.create("gendeg", {"num_bins": 128})
    return {"first_stage_model.quant_conv.weight": torch.ones(2), **state, **conditioner.state_dict()}


@pytest.mark.parametrize("identity", ["gendeg-conditioner", "gendeg-correction"])
def test_the_released_setting_is_read_back_from_its_shapes(identity):
    architecture = models.registry.get(identity)
    config = architecture.variants["GenDeg"]
    with torch.device("meta"):
        state = models.create("gendeg", config).state_dict()
    assert models.registry.detect(state) is architecture
    assert architecture.config_from_state_dict(state) == config


@pytest.mark.parametrize(
    ("value", "index"), [(0.0, 0), (0.00546875, 1), (0.1, 18), (0.35, 64), (0.6999, 127), (0.7, 127), (9.0, 127)]
)
def test_an_intensity_falls_into_the_bin_whose_lower_edge_it_reaches(value, index):
    assert intensity_bin(value) == index


def test_a_value_on_an_edge_falls_where_the_published_edges_lie():
    assert intensity_bin(0.37799999999999995, (0.0, 0.7), 100) == 54


@pytest.mark.parametrize("value", [-0.01, float("nan")])
def test_an_intensity_below_zero_is_refused(value):
    with pytest.raises(InputError, match="below"):
        intensity_bin(value)


def test_the_projection_is_that_of_one_hot_rows_beside_the_text():
    module = models.create("gendeg", {"num_bins": 16, "context_dim": 24}).requires_grad_(False)
    torch.nn.init.normal_(module.cc_projection.weight)
    text, bins = torch.randn(2, 77, 24), torch.tensor([[0, 5], [16, 16]])
    one_hot = torch.nn.functional.one_hot(bins, 17).float()
    stats = module.stats_proj(one_hot).transpose(1, 2)
    assert torch.allclose(module(text, bins), module.cc_projection(torch.cat([text, stats], -1)), atol=1e-5)
    twice = module(text.repeat(1, 2, 1), bins)
    assert torch.allclose(twice[:, 77:], twice[:, :77], atol=1e-6)


def test_features_of_another_text_encoder_are_refused():
    module = models.create("gendeg", {"num_bins": 16, "context_dim": 24})
    with pytest.raises(InputError, match=r"Stable Diffusion 1\.5"):
        module(torch.randn(1, 77, 32), module.null_bins())
    with pytest.raises(InputError, match="multiple of 77"):
        module(torch.randn(1, 80, 24), module.null_bins())


def test_the_averaged_weights_take_the_place_of_the_raw_ones():
    state, moved = with_averaged_weights(_checkpoint())
    assert moved == 2 and not any(key.startswith("model_ema.") for key in state)
    assert state["model.diffusion_model.input_blocks.0.0.weight"].tolist() == [1.0] * 3
    assert state["first_stage_model.quant_conv.weight"].tolist() == [1.0] * 2
    pruned = {k: v for k, v in _checkpoint().items() if not k.startswith("model_ema.")}
    assert with_averaged_weights(pruned) == (pruned, 0)


def test_half_an_average_is_refused():
    state = _checkpoint()
    del state["model_ema.diffusion_modelout2bias"]
    with pytest.raises(CheckpointError, match="lack 1 of 2"):
        with_averaged_weights(state)


def test_the_conditioner_is_found_in_the_whole_checkpoint(tmp_path):
    torch.save({"state_dict": _checkpoint(), "global_step": 1}, tmp_path / "gendeg.ckpt")
    found = models.load(tmp_path / "gendeg.ckpt")
    assert found.architecture.id == "gendeg-conditioner" and found.config["num_bins"] == 128


def test_the_correction_is_told_from_a_plain_nafnet_and_takes_any_size(tmp_path):
    module = _correction()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "nafnet_sd.ckpt")
    found = models.load(tmp_path / "nafnet_sd.ckpt")
    assert found.architecture.id == "gendeg-correction" and found.config == CORRECTION
    clean, generated = torch.rand(2, 2, 3, 21, 30)
    assert torch.equal(found.module(clean, generated), module(clean, generated))
    with pytest.raises(InputError, match="equal in size"):
        module(clean, generated[..., :8])


def test_measured_intensities_are_those_of_the_eight_bit_pair():
    clean = torch.zeros(2, 3, 4, 4)
    degraded = clean.clone()
    degraded[0, :, :2] = 0.2
    mu, sigma = gendeg.measure_intensity(clean, degraded)
    assert mu.tolist() == pytest.approx([0.1, 0.0]) and sigma.tolist() == pytest.approx([0.1, 0.0])


def test_drawn_intensities_lie_in_filled_bins_and_repeat_with_the_seed():
    histogram = gendeg.JointHistogram([[0, 0], [0, 5], [2, 0], [0, 0]], (0.0, 0.4), (0.0, 0.2))
    sampler = gendeg.IntensitySampler({"a": histogram}, [1.0], uniform_every=10)
    draws = [sampler.draw(k, random.Random(k)) for k in range(40)]
    assert draws == [sampler.draw(k, random.Random(k)) for k in range(40)]
    for draw in draws:
        assert 0.1 <= draw.mu <= 0.3 and 0.0 <= draw.sigma <= 0.2
        assert draw.uniform or (draw.sigma >= 0.1) == (draw.mu < 0.2)
    assert [k for k, draw in enumerate(draws) if draw.uniform] == [0, 10, 20, 30]


def test_an_empty_histogram_says_so():
    with pytest.raises(InputError, match="no pair"):
        gendeg.JointHistogram([[0, 0], [0, 0]]).draw(random.Random(0))


def test_times_and_noise_levels_are_inverses_between_the_tables_entries():
    times = torch.tensor([0.0, 0.3, 399.5, 988.909, 999.0])
    assert torch.allclose(ld.time_at(ld.sigma_at(times)), times.double(), atol=1e-6)
    assert ld.linear_time_sigmas(100)[[0, 99, 100]].tolist() == pytest.approx([14.6146, 0.0291675, 0.0], abs=1e-4)


def test_guidance_with_all_scales_one_is_the_full_prediction():
    full, image, nothing = torch.randn(3, 1, 4, 2, 2)
    assert torch.allclose(ld.three_way_guidance(full, image, nothing, 1.0, 1.0), full, atol=1e-6)


def test_the_guided_denoiser_asks_for_text_and_picture_picture_and_neither():
    seen = []

    def network(x, time, context):
        seen.append((x, context))
        return torch.zeros_like(x[:, :4])

    context, null, picture = torch.ones(2, 77, 8), torch.zeros(1, 77, 8), torch.full((2, 4, 3, 3), 5.0)
    gendeg.guided_denoiser(network, context, null, picture)(torch.randn(2, 4, 3, 3), torch.tensor(2.0))
    (x, contexts) = seen[0]
    assert [float(p[4:].mean()) for p in x] == [5, 5, 5, 5, 0, 0]
    assert [float(c.mean()) for c in contexts] == [1, 1, 0, 0, 0, 0]


def test_conditions_leave_as_in_the_published_training():
    context, null = torch.ones(4, 2, 3), torch.zeros(1, 2, 3)
    picture = torch.ones(4, 4, 2, 2)
    text, image = gendeg.drop_conditions(context, null, picture, torch.tensor([0.03, 0.07, 0.12, 0.5]))
    assert text[:, 0, 0].tolist() == [0, 0, 1, 1] and image[:, 0, 0, 0].tolist() == [1, 0, 0, 1]


def test_a_training_step_learns_the_noise():
    weight = torch.zeros(1, requires_grad=True)
    latent, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)

    def network(x, time, context):
        return weight * noise

    step = gendeg.training_step(network, latent, torch.zeros(2, 1, 1), latent, torch.tensor([0, 999]), noise)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(noise.square().mean())) and weight.grad < 0
    assert torch.allclose(step.x_noisy[1], noise[1], atol=0.3)


def test_a_caption_ends_with_the_published_words():
    assert gendeg.caption("a street, at night.", "haze") == "a street, at night, in hazy conditions"
    assert gendeg.caption("", "raindrop") == "with raindrops in it"
