"""CM4IR and RDMD: single steps chain into the sampler, and the knobs do what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import InputError
from comfyui_mend.guidance import cm4ir, filters, operators, priors, rdmd, schedules

UNET = {
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (2,),
    "num_head_channels": 32,
}


def _network(**config):
    module = models.create("guided-diffusion-unet", config).eval().requires_grad_(False)
    for parameter in module.parameters():  # the zero-initialised layers would hide everything
        parameter.copy_(torch.randn_like(parameter) * 0.1 if parameter.ndim > 1 else parameter)
    return module


@pytest.fixture
def consistency() -> priors.Prior:
    return priors.consistency_prior(_network(unet=UNET, wrapper="karras"))


@pytest.fixture
def epsilon() -> priors.Prior:
    return priors.epsilon_prior(_network(unet={**UNET, "out_channels": 6}))


def test_single_steps_chain_into_exactly_the_sampler(consistency) -> None:
    operator, truth = filters.bicubic_downsampling(4), torch.rand(2, 3, 24, 32) * 2 - 1
    y = operator.A(truth)
    sigmas = schedules.cm4ir_sigmas(4, 250, 0.2)
    draws = [torch.randn_like(truth) for _ in range(4)]
    x = cm4ir.start(operator, y) + float(sigmas[0]) * draws[0]
    want = cm4ir.sample(consistency, operator, y, x, sigmas, draws[1:], sigma_y=0.05, deltas=(0, 0.3, 0.05, 0.1))
    for k, delta in enumerate((0, 0.3, 0.05, 0.1)):
        x0 = cm4ir.predict(consistency, x, float(sigmas[k]), delta)
        if k == 3:
            break
        guided = cm4ir.back_project(operator, x0, y, 0.0, 0.05)
        x = cm4ir.mix_noise(guided, x, x0, float(sigmas[k]), float(sigmas[k + 1]), draws[k + 1])
    assert torch.equal(x0, want)


def test_rdmd_steps_chain_into_exactly_the_sampler(epsilon) -> None:
    operator, truth = filters.Resize(0.5), torch.rand(1, 3, 16, 24) * 2 - 1
    y = operator.A(truth)
    schedule = schedules.rdmd_schedule(4, 0.05, factor=2)
    noise = torch.randn_like(truth)
    draws = {i: torch.randn_like(truth) for i in range(4)}
    u, x = rdmd.start_super_resolution(y, (16, 24), float(schedule.sigmas[0]), noise)
    want, _ = rdmd.sample(epsilon, operator, y, u, x, schedule, lambda i, name: draws[i], zeta=0.3)
    for i in range(3):
        sigma, following = float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])
        r = rdmd.regularise(epsilon, u, float(schedule.regulariser_levels[i]))
        p = epsilon(x, sigma)
        u = rdmd.update(operator, y, u, r, p, schedule.regulariser_weight, float(schedule.rhos[i]))
        x = rdmd.renoise(x, u, sigma, following, zeta=0.3, noise=draws[i])
    assert torch.equal(u, want)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_leaving_out_what_has_no_weight_changes_nothing(tau: float, epsilon) -> None:
    calls = []
    counting = priors.Prior(lambda *a: calls.append(1) or epsilon.network(*a), epsilon.multiple_of)
    operator, y = filters.Resize(0.5), torch.rand(1, 3, 8, 8) * 2 - 1
    schedule = schedules.rdmd_schedule(5, 0.05, tau=tau, factor=2)
    u, x = rdmd.start_super_resolution(y, (16, 16), float(schedule.sigmas[0]), torch.randn(1, 3, 16, 16))
    results, counts = [], []
    for skip in (False, True):
        calls.clear()
        results.append(rdmd.sample(counting, operator, y, u, x, schedule, lambda i, n: None, skip_unused=skip))
        counts.append(len(calls))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert counts[0] == 10 and counts[1] <= 6


def test_without_measurement_noise_the_result_explains_the_measurement(consistency) -> None:
    operator, truth = filters.bicubic_downsampling(2), torch.rand(1, 3, 16, 16) * 2 - 1
    y, sigmas = operator.A(truth), schedules.cm4ir_sigmas()
    x = cm4ir.start(operator, y) + float(sigmas[0]) * torch.randn_like(truth)
    result = cm4ir.sample(consistency, operator, y, x, sigmas, [torch.randn_like(truth)] * 3, sigma_y=0.0)
    assert (operator.A(result) - y).abs().max() < 1e-3


def test_a_perfect_denoiser_restores_perfectly() -> None:
    truth = torch.rand(1, 3, 16, 16) * 2 - 1
    oracle = priors.Prior(lambda x, sigma, told: truth)
    operator, sigmas = operators.AveragePooling(4), schedules.cm4ir_sigmas()
    y = operator.A(truth)
    result = cm4ir.sample(oracle, operator, y, torch.randn_like(truth), sigmas, [truth] * 3, sigma_y=0.0)
    assert torch.allclose(result, truth, atol=1e-5)


def test_a_prior_takes_any_size(consistency, epsilon) -> None:
    for size in ((1, 1), (7, 5), (9, 16)):
        for prior in (consistency, epsilon):
            assert prior(torch.randn(2, 3, *size), 0.5).shape == (2, 3, *size)


def test_a_class_conditional_prior_asks_for_a_class() -> None:
    module = _network(unet={**UNET, "num_classes": 10}, wrapper="karras")
    with pytest.raises(InputError, match="choose one in 0..9"):
        priors.consistency_prior(module)(torch.zeros(1, 3, 8, 8), 1.0)
    with pytest.raises(InputError, match="outside 0..9"):
        priors.consistency_prior(module, 12)(torch.zeros(1, 3, 8, 8), 1.0)
    assert priors.consistency_prior(module, 3)(torch.zeros(2, 3, 8, 8), 1.0).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.2])
def test_the_noise_estimate_finds_the_noise(sigma: float) -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 128), torch.linspace(0, 1, 128), indexing="ij")
    smooth = torch.stack([x, y, x * y])[None]
    assert float(priors.estimate_noise(smooth + sigma * torch.randn(1, 3, 128, 128))[0]) == pytest.approx(
        sigma, rel=0.05
    )


def test_the_published_noise_levels() -> None:
    want = [0.8989, 0.8207, 0.6672, 0.2381]
    assert schedules.cm4ir_sigmas(4, 400, 0.7).tolist() == pytest.approx(want, abs=1e-4)
    assert schedules.quadratic_timesteps(100)[[0, 1, 2, 3, -1]].tolist() == [999, 899, 857, 825, 0]
    published = [999 - int(s) for s in np.sqrt(np.linspace(0, 1000**2, 117))[:-1]] + [0]
    assert schedules.quadratic_timesteps(117).tolist() == published
    assert cm4ir.preset("inpainting (bedroom)", 0.03).delta_in_scalings
    with pytest.raises(InputError, match="is unknown"):
        cm4ir.preset("dancing", 0.1)


def test_wrong_numbers_of_draws_or_deltas_are_refused(consistency) -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(InputError, match="4 steps need 3 draws"):
        cm4ir.sample(consistency, operators.Denoising(), x, x, schedules.cm4ir_sigmas(), [x])


def test_every_picture_of_a_batch_is_filled_by_its_own_mask():
    masks = (torch.rand(2, 1, 12, 10) > 0.4).float()
    y = torch.rand(2, 3, 12, 10) * masks
    both = cm4ir.start(operators.Inpainting(masks), y)
    for index in range(2):
        alone = cm4ir.start(operators.Inpainting(masks[index, 0]), y[index : index + 1])
        torch.testing.assert_close(both[index : index + 1], alone)
    assert both[masks.expand_as(both) == 0].abs().min() > 0
