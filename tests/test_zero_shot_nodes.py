"""Zero-shot nodes: builders, measurements, and single steps that chain into exactly the whole restoration."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.engine import host, loaded, model_folder, zero_shot
from comfyui_mend.engine import operator_builders as build
from comfyui_mend.errors import Cancelled, InputError
from comfyui_mend.guidance import cm4ir, fills, measurement, operators
from comfyui_mend.nodes import guidance, measurements, node_classes
from comfyui_mend.nodes import operators as operator_nodes

UNET = {
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (2,),
    "num_head_channels": 32,
}
OPERATORS = {
    **{f"downsample {kind}": build.downsampling(kind, 2.0) for kind in build.DOWNSAMPLING},
    **{
        f"blur {kind} {borders}": build.blur(kind, 5, 1.0, 2.0, 30.0, borders)
        for kind in build.BLURS
        for borders in build.BORDERS
        if (kind, borders) != ("motion", "zero")
    },
    "inpaint": build.inpainting(torch.zeros(1, 16, 16), 0.4, 3),
    "colourise": operators.Colourisation(),
    "denoise": operators.Denoising(),
    "compressed sensing": build.compressed_sensing(16, 0.5, 1),
}


def _prior(kind: str) -> zero_shot.NetworkPrior:
    torch.manual_seed(0)
    config = {"unet": UNET, "wrapper": "karras"} if kind == "consistency" else {"unet": {**UNET, "out_channels": 6}}
    module = models.create("guided-diffusion-unet", config)
    state = {k: torch.randn_like(v) * 0.1 if v.ndim > 1 else v for k, v in module.state_dict().items()}
    return zero_shot.network_prior(loaded.wrap(models.load(state)))


def _restorer() -> loaded.LoadedRestorer:
    return loaded.load(model_folder.model_path("wiring-nafnet.safetensors"))


@pytest.fixture(scope="module")
def consistency() -> zero_shot.NetworkPrior:
    return _prior("consistency")


@pytest.fixture(scope="module")
def epsilon() -> zero_shot.NetworkPrior:
    return _prior("epsilon")


@pytest.fixture(scope="module")
def small() -> measurement.Measurement:
    return measurement.measure(build.downsampling("bicubic", 4.0), torch.rand(2, 3, 16, 24), 0.05, 3)


def test_the_kind_of_a_prior_is_read_from_its_file(consistency, epsilon) -> None:
    assert (consistency.kind, epsilon.kind) == ("consistency", "epsilon")


def test_cm4ir_steps_chain_into_exactly_the_restoration(consistency, small) -> None:
    whole = guidance.ZeroShotRestore.execute(consistency, small, preset="by hand", seed=5).result[0]
    sigmas = guidance.Cm4irSigmas.execute(4, 250, 0.2).result[0]
    x = guidance.StartFromMeasurement.execute(consistency, small, sigmas, 5).result[0]
    for k in range(4):
        x, _, _, picture = guidance.Cm4irStep.execute(consistency, small, x, sigmas, k, 5).result
    assert torch.equal(picture, whole)
    assert torch.equal(guidance.StateToImage.execute(consistency, x).result[0], whole)


def test_with_the_starter_prior_holes_are_filled_smoothly_and_the_steps_still_chain() -> None:
    prior = zero_shot.network_prior(loaded.load(model_folder.model_path("mend-prior-starter.safetensors")))
    holes = measurement.measure(build.inpainting(torch.zeros(1, 24, 40), 0.5, 3), torch.rand(1, 3, 24, 40), 0.05, 3)
    whole = guidance.ZeroShotRestore.execute(prior, holes, seed=5).result[0]
    chosen = zero_shot.cm4ir_preset(zero_shot.AUTOMATIC, holes, prior)
    assert chosen.fill == "smooth"
    sigmas = guidance.Cm4irSigmas.execute(4, chosen.start, chosen.gamma).result[0]
    x = guidance.StartFromMeasurement.execute(prior, holes, sigmas, 5, chosen.zeta, "smooth").result[0]
    for k in range(4):
        x, _, _, picture = guidance.Cm4irStep.execute(prior, holes, x, sigmas, k, 5, chosen.zeta).result
    assert torch.equal(picture, whole)


def test_predict_back_project_and_mix_chain_into_exactly_the_restoration(consistency, small) -> None:
    whole = guidance.ZeroShotRestore.execute(consistency, small, preset="by hand", seed=5).result[0]
    sigmas = guidance.Cm4irSigmas.execute(4, 250, 0.2).result[0]
    x = guidance.StartFromMeasurement.execute(consistency, small, sigmas, 5).result[0]
    for k in range(4):
        x0, picture = guidance.PredictClean.execute(consistency, x, sigmas, k).result
        if k < 3:
            guided = guidance.BackProject.execute(consistency, small, x0).result[0]
            x = guidance.MixNoise.execute(guided, x, x0, sigmas, k, 5).result[0]
    assert torch.equal(picture, whole)
    with pytest.raises(InputError, match="last noise level"):
        guidance.MixNoise.execute(x0, x, x0, sigmas, 3)


def test_rdmd_steps_chain_into_exactly_the_restoration(epsilon, small) -> None:
    whole = guidance.ZeroShotRestore.execute(epsilon, small, scheme="RDMD", seed=5, steps=4, renewal=0.3).result[0]
    u, x = guidance.RdmdStart.execute(epsilon, small, 5).result
    for k in range(4):
        u, x, _, picture = guidance.RdmdStep.execute(epsilon, small, u, x, k, 5, 4, renewal=0.3).result
    assert torch.equal(picture, whole)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_has_a_picture_and_restores(name: str, consistency) -> None:
    operator, image = OPERATORS[name], torch.rand(1, 16, 16, 3)
    assert measurement.footprint(operator).shape[0] == 3
    found, seen = measurements.Measure.execute(operator, image, 0.05, 1).result
    assert seen.shape[-1] == 3 and float(seen.min()) >= 0 and float(seen.max()) <= 1
    restored = guidance.ZeroShotRestore.execute(consistency, found, seed=1, steps=2).result[0]
    assert restored.shape == image.shape and bool(torch.isfinite(restored).all())


def test_a_kernel_picture_of_any_allowed_size_has_a_footprint() -> None:
    kernel = build.kernel_from_picture(
        torch.rand(1, 3, 255, 131, generator=torch.Generator().manual_seed(0)), "circular"
    )
    small = build.downsampling("average", 4)
    for operator in (kernel, measurement.Composition(small, kernel), measurement.Composition(kernel, small)):
        assert float(measurement.footprint(operator).max()) == 1.0


def _chains() -> dict[str, list]:
    mask = build.inpainting(torch.rand(1, 64, 40, generator=torch.Generator().manual_seed(0)).round())
    blur, sensed = OPERATORS["blur gaussian reflect"], build.compressed_sensing(64, 0.5, 0)
    small = [build.downsampling(kind, factor) for kind in build.DOWNSAMPLING for factor in (5, 7)]
    chains = {"mask, blur": [mask, blur], "blur, mask, blur": [blur, mask, blur], "mask, mask": [mask, mask]}
    chains |= {f"blur, small {number}": [blur, one] for number, one in enumerate(small)}
    return chains | {
        "blur, sensing": [blur, sensed],
        "twice smaller": [*small[:2], blur],
        "mask, small": [mask, small[0]],
    }


@pytest.mark.parametrize("name", _chains())
def test_every_chain_of_operators_has_a_picture(name: str) -> None:
    first, *others = _chains()[name]
    for other in others:
        first, picture = operator_nodes.OperatorCompose.execute(first, other).result
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and 0 < float(picture.max()) <= 1


@pytest.mark.parametrize("name", ["downsample bicubic", "inpaint", "blur gaussian circular", "colourise"])
def test_rdmd_takes_every_kind_of_measurement(name: str, epsilon) -> None:
    found = measurement.measure(OPERATORS[name], torch.rand(1, 3, 16, 16), 0.02)
    restored = guidance.ZeroShotRestore.execute(epsilon, found, scheme="RDMD", steps=3).result[0]
    assert restored.shape == (1, 16, 16, 3) and bool(torch.isfinite(restored).all())


def test_a_seed_gives_the_same_picture_and_another_a_different_one(consistency, small) -> None:
    first, again, other = (
        guidance.ZeroShotRestore.execute(consistency, small, seed=s, steps=2).result[0] for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_noise_is_not_measured_where_the_picture_is_missing() -> None:
    operator = OPERATORS["inpaint"]
    found = measurement.measure(operator, torch.rand(1, 3, 16, 16), 0.5)
    assert float((found.y * (1 - operator.mask)).abs().max()) == 0


def test_noise_is_not_measured_where_any_composition_ends_with_a_mask() -> None:
    grey, mask = OPERATORS["colourise"], OPERATORS["inpaint"]
    masked_twice = operators.Composition(operators.Composition(mask, mask), grey)
    found = measurement.measure(masked_twice, torch.rand(1, 3, 16, 16), 0.5)
    assert float((found.y * (1 - mask.mask)).abs().max()) == 0


def test_a_real_picture_becomes_a_measurement_with_its_noise_estimated() -> None:
    clean = torch.linspace(0.2, 0.8, 96).expand(1, 3, 96, 96).movedim(1, -1)
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    found, noise = measurements.MeasurementFromImage.execute(build.downsampling("bicubic", 4.0), noisy).result
    assert noise == pytest.approx(0.05, rel=0.1) and found.size == (384, 384)
    with pytest.raises(InputError, match="no picture"):
        measurements.MeasurementFromImage.execute(OPERATORS["compressed sensing"], noisy)


@pytest.mark.parametrize("scheme", ["CM4IR", "RDMD"])
def test_a_picture_made_smaller_by_a_broken_factor_is_restored_whatever_the_operator_saw_before(
    scheme: str, epsilon
) -> None:
    operator = operator_nodes.OperatorDownsample.execute("any scale", 1.5).result[0]
    damaged = torch.rand(1, 33, 47, 3)
    for height, width in ((49, 69), (50, 71)):  # the first gives a measurement of that size too
        measurements.Measure.execute(operator, torch.rand(1, height, width, 3))
        found = measurements.MeasurementFromImage.execute(operator, damaged, 0.02).result[0]
        assert found.size == (49, 70)
        result = measurements.ApplyOperator.execute(operator, damaged, "pseudo-inverse").result[0]
        assert result.shape == (1, 49, 70, 3)
    restored = guidance.ZeroShotRestore.execute(epsilon, found, scheme=scheme, steps=2).result[0]
    assert restored.shape == (1, 49, 70, 3)


@pytest.mark.parametrize(("label", "name"), [("blur", "blur"), ("noise", "denoising"), ("rain", "denoising")])
def test_a_label_becomes_an_operator(label: str, name: str) -> None:
    image = torch.rand(1, 3, 32, 32)
    operator, noise, text = build.from_label(label, image)
    assert operator.name == name and noise > 0 and label in text


def test_the_width_of_a_blur_is_estimated_in_the_right_order() -> None:
    torch.manual_seed(0)
    frequency = torch.fft.fftfreq(128).square()
    spectrum = torch.randn(128, 128, dtype=torch.complex64) / (frequency[:, None] + frequency + 1e-5).sqrt()
    picture = torch.fft.ifft2(spectrum).real.expand(1, 3, -1, -1)
    widths = [build.blur_width(build.blur("gaussian", 19, s, s, 0, "circular").A(picture)) for s in (1.0, 2.0, 3.0)]
    assert widths == sorted(widths) and widths[1] == pytest.approx(2.0, abs=0.7)


def test_what_an_operator_keeps_and_loses_make_the_picture() -> None:
    image = torch.rand(1, 16, 16, 3) * 0.2 + 0.4
    kept, lost = (
        measurements.ApplyOperator.execute(OPERATORS["downsample average"], image, d).result[0]
        for d in ("what it keeps", "what it loses")
    )
    assert torch.allclose(kept + lost - 0.5, image, atol=1e-5)


def test_a_cancelled_restoration_stops(consistency, small) -> None:
    host.set_hooks(interrupt=lambda: True)
    try:
        with pytest.raises(Cancelled):
            guidance.ZeroShotRestore.execute(consistency, small)
    finally:
        host.set_hooks()


BLURRED = torch.rand(1, 3, 16, 16)
LONG_LOOPS = {
    "a pseudo-inverse": lambda blur: measurements.ApplyOperator.execute(blur, BLURRED.movedim(1, -1), "pseudo-inverse"),
    "a start": lambda blur: cm4ir.start(blur, BLURRED),
    "one step of a sampler": lambda blur: cm4ir.step(lambda x, *levels: x, blur, BLURRED, BLURRED, 0.5, 0.1, BLURRED),
    "a proximal step": lambda blur: blur.prox(BLURRED, BLURRED + 1, 1e-4),
    "a Gram matrix": lambda blur: blur.gram_inverse(BLURRED, 1e-4),
    "a smooth fill": lambda blur: fills.smooth_fill(BLURRED, (BLURRED[0, 0] > 0.5).float()),
}


@pytest.mark.parametrize("name", LONG_LOOPS)
def test_a_long_loop_inside_one_step_asks_before_every_iteration_whether_to_stop(name: str) -> None:
    blur, asked, seen = OPERATORS["blur gaussian reflect"], [], []
    host.set_hooks(interrupt=lambda: bool(seen.append(1)))
    try:
        LONG_LOOPS[name](blur)
        assert len(seen) > 10
        host.set_hooks(interrupt=lambda: asked.append(1) or len(asked) == 3)
        with pytest.raises(Cancelled):
            LONG_LOOPS[name](blur)
    finally:
        host.set_hooks()
    assert len(asked) == 3


def test_progress_counts_evaluations_and_shows_pictures(consistency, small) -> None:
    seen = []
    host.set_hooks(progress=lambda done, total, picture: seen.append((done, total, picture)))
    try:
        guidance.ZeroShotRestore.execute(consistency, small)
    finally:
        host.set_hooks()
    assert [s[:2] for s in seen] == [(k, 4) for k in range(1, 5)] and seen[0][2].size == (24, 16)


def test_what_cannot_work_is_refused_in_words(small) -> None:
    with pytest.raises(InputError, match="not whole"):
        build.downsampling("bicubic", 2.5)
    with pytest.raises(InputError, match="nothing would be known"):
        build.inpainting(torch.ones(1, 8, 8))
    with pytest.raises(InputError, match="above 0"):
        zero_shot.levels(torch.zeros(1))
    with pytest.raises(InputError, match="not a prior"):
        zero_shot.network_prior(_restorer())


def test_a_restorer_serves_as_a_prior(small) -> None:
    prior = guidance.PriorFromRestorer.execute(_restorer()).result[0]
    restored = guidance.ZeroShotRestore.execute(prior, small, preset="by hand", start=20, steps=2).result[0]
    assert restored.shape == (2, 16, 24, 3)


def test_the_families_are_listed() -> None:
    assert {"MendZeroShotRestore", "MendMeasure"} <= {node.GET_SCHEMA().node_id for node in node_classes()}
