"""What the zero-shot nodes refuse, in words: LATENTs and masks that do not fit, and choices that no menu offers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from comfyui_mend.engine import operator_builders as build
from comfyui_mend.errors import InputError
from comfyui_mend.guidance import measurement, operators
from comfyui_mend.nodes import guidance, measurements, zero_shot_samplers
from comfyui_mend.nodes import operators as operator_nodes

SIGMAS = torch.tensor([1.0, 0.5, 0.0])
SEEN = measurement.measure(operators.Denoising(), torch.rand(2, 3, 8, 12), 0.05)


class Unused:
    """A prior in pixels that must not be asked for anything."""

    name = "unused"

    def run(self, size: tuple[int, ...], body: Callable[..., Any]) -> Any:
        raise AssertionError("the LATENT has to be refused before the network is put on the device")


def latent(*shape: int) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(shape)}


GOOD = latent(2, 3, 8, 12)
OF_THE_PRIOR = {
    "PredictClean x": ("Start From Measurement", lambda s: guidance.PredictClean.execute(Unused(), s, SIGMAS)),
    "Regularise u": ("RDMD Start", lambda s: guidance.Regularise.execute(Unused(), s)),
    "StateToImage state": ("a step, or a SAMPLER", lambda s: guidance.StateToImage.execute(Unused(), s)),
}
OF_THE_MEASUREMENT = {
    "BackProject x0": ("Predict Clean", lambda s: guidance.BackProject.execute(Unused(), SEEN, s)),
    "Cm4irStep x": ("Start From Measurement", lambda s: guidance.Cm4irStep.execute(Unused(), SEEN, s, SIGMAS)),
    "RdmdStep u": ("RDMD Start", lambda s: guidance.RdmdStep.execute(Unused(), SEEN, s, GOOD)),
    "RdmdStep x": ("RDMD Start", lambda s: guidance.RdmdStep.execute(Unused(), SEEN, GOOD, s)),
}
OF_ONE_STEP = {
    "MixNoise guided": ("Back-Project", lambda s: guidance.MixNoise.execute(s, GOOD, GOOD, SIGMAS)),
    "MixNoise x": ("Start From Measurement", lambda s: guidance.MixNoise.execute(GOOD, s, GOOD, SIGMAS)),
    "MixNoise x0": ("Predict Clean", lambda s: guidance.MixNoise.execute(GOOD, GOOD, s, SIGMAS)),
}
FOUR_CHANNELS, A_VIDEO, NOTHING = (2, 4, 8, 12), (1, 16, 2, 8, 12), (0, 3, 8, 12)
WRONG_SIZE, WRONG_BATCH, ONE_FOR_TWO = (2, 3, 12, 8), (3, 3, 8, 12), (1, 3, 8, 12)


@pytest.mark.parametrize("level", [float("inf"), float("nan")])
def test_a_noise_level_that_is_no_number_is_refused_before_the_network_is_asked(level: float) -> None:
    with pytest.raises(InputError, match="sigmas: .* no finite number"):
        guidance.StartFromMeasurement.execute(Unused(), SEEN, torch.tensor([level, 0.0]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in OF_THE_PRIOR for shape in (FOUR_CHANNELS, A_VIDEO, NOTHING)),
        *(
            (name, shape)
            for name in (*OF_THE_MEASUREMENT, *OF_ONE_STEP)
            for shape in (FOUR_CHANNELS, A_VIDEO, NOTHING, WRONG_SIZE, WRONG_BATCH, ONE_FOR_TWO)
        ),
    ],
)
def test_a_latent_that_is_no_state_is_refused_and_the_node_that_makes_one_is_named(
    name: str, shape: tuple[int, ...]
) -> None:
    maker, attempt = {**OF_THE_PRIOR, **OF_THE_MEASUREMENT, **OF_ONE_STEP}[name]
    with pytest.raises(InputError) as refused:
        attempt(latent(*shape))
    text = str(refused.value)
    assert name.split()[1] in text and str(list(shape)) in text and maker in text
    if name in OF_THE_MEASUREMENT:
        assert "needed is [2, 3, 8, 12], in pixels" in text


class Identity(Unused):
    """A prior that finds every state clean."""

    def run(self, size: tuple[int, ...], body: Callable[..., Any]) -> Any:
        return body(guidance.zero_shot.Session(lambda x, *levels: x, torch.device("cpu")))


@dataclass
class OnLatents(Identity):
    """A prior that says that its states are latents."""

    vae: object


def test_one_measurement_serves_many_states_and_a_prior_on_latents_has_its_own_shape() -> None:
    one = measurement.measure(operators.Denoising(), torch.rand(1, 3, 8, 12))
    guided, picture = guidance.BackProject.execute(Identity(), one, latent(3, 3, 8, 12)).result
    assert guided["samples"].shape == (3, 3, 8, 12) and picture.shape == (3, 8, 12, 3)
    x0 = guidance.PredictClean.execute(OnLatents(vae=object()), latent(2, 4, 1, 2), SIGMAS).result[0]
    assert x0["samples"].shape == (2, 4, 1, 2)
    with pytest.raises(InputError, match=r"needed is \[2, any, any, any\], in the latents"):
        guidance.BackProject.execute(OnLatents(vae=object()), SEEN, latent(3, 4, 1, 2))


@pytest.mark.parametrize("name", [*OF_THE_PRIOR, *OF_THE_MEASUREMENT])
def test_a_latent_of_values_that_cannot_be_computed_with_is_refused_under_its_name(name: str) -> None:
    _, attempt = {**OF_THE_PRIOR, **OF_THE_MEASUREMENT}[name]
    with pytest.raises(InputError, match=f"^{name.split()[1]}: 576 values are NaN"):
        attempt({"samples": torch.full((2, 3, 8, 12), float("nan"))})


def test_a_latent_in_half_precision_meets_any_operator() -> None:
    smaller = measurement.measure(build.downsampling("any scale", 2.0), torch.rand(1, 3, 8, 12))
    x0 = {"samples": torch.rand(1, 3, 8, 12).half()}
    guided, _ = guidance.BackProject.execute(Identity(), smaller, x0).result
    whole, _ = guidance.BackProject.execute(Identity(), smaller, {"samples": x0["samples"].float()}).result
    assert torch.equal(guided["samples"], whole["samples"])


@pytest.mark.parametrize("height", [80, 40])
@pytest.mark.parametrize("where", ["alone", "after a blur", "before a blur", "after shrinking"])
def test_a_mask_takes_the_size_of_the_picture_that_it_meets(where: str, height: int, caplog) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    holes = operator_nodes.OperatorInpaint.execute(mask).result[0]
    blur, smaller = build.blur("gaussian", 5, 1.0, 1.0, 0.0, "circular"), build.downsampling("average", 2)
    operator, factor = {
        "alone": (holes, 1),
        "after a blur": (build.compose(blur, holes), 1),
        "before a blur": (build.compose(holes, blur), 1),
        "after shrinking": (build.compose(smaller, holes), 2),
    }[where]
    build._told.clear()
    image = torch.rand(2, height, 100, 3)
    with caplog.at_level(logging.WARNING):
        made = [measurements.Measure.execute(operator, image, 0.0).result[0] for _ in range(2)]
    told = f"mask: 64 x 64 pixels, resized to {100 // factor} x {height // factor}"
    assert [r.getMessage() for r in caplog.records] == [told]
    half = height // factor // 2
    known = made[0].y[:, :, half + 3 :]
    assert made[0].size == (height, 100) and bool((known != 0).all())
    assert where == "before a blur" or float(made[0].y[:, :, :half].abs().max()) == 0

    small = torch.rand(2, height // factor, 100 // factor, 3)
    real = measurements.MeasurementFromImage.execute(operator, small, 0.05).result[0]
    assert real.size == (height, 100)
    for direction in measurements.DIRECTIONS:
        seen = small if direction in ("adjoint", "pseudo-inverse") else image
        measurements.ApplyOperator.execute(operator, seen, direction)


def test_the_empty_mask_of_loadimage_marks_nothing_and_scattered_pixels_stay_single(caplog) -> None:
    build._told.clear()
    image = torch.rand(1, 80, 100, 3)
    empty = operator_nodes.OperatorInpaint.execute(torch.zeros(1, 64, 64)).result[0]
    with caplog.at_level(logging.WARNING):
        seen = measurements.Measure.execute(empty, image, 0.0).result[1]
    torch.testing.assert_close(seen, image)
    assert "marks nothing as missing" in caplog.text
    scattered = operator_nodes.OperatorInpaint.execute(torch.zeros(1, 64, 64), 0.8, 3).result[0]
    found = measurements.Measure.execute(scattered, image, 0.0).result[0]
    as_published = build.inpainting(torch.zeros(1, 80, 100), 0.8, 3)
    assert torch.equal(found.operator.mask, as_published.mask)


def test_nothing_follows_compressed_sensing() -> None:
    sensed = build.compressed_sensing(64, 1.0, 0)
    for first in (sensed, build.compose(build.blur("gaussian", 9, 2.0, 2.0, 0.0, "reflect"), sensed)):
        with pytest.raises(InputError, match="first: what compressed sensing measures is no picture"):
            build.compose(first, build.downsampling("bicubic", 4))
    assert build.compose(sensed, operators.Denoising()).output_size(64, 64) == (1, 4096)


def test_masks_belong_to_all_pictures_or_one_to_each() -> None:
    masks = torch.zeros(3, 8, 8)
    operator = operator_nodes.OperatorInpaint.execute(masks).result[0]
    with pytest.raises(InputError, match="3 masks for 2 pictures; connect one for all or one for each"):
        measurements.Measure.execute(operator, torch.rand(2, 8, 8, 3))
    assert measurements.Measure.execute(operator, torch.rand(3, 8, 8, 3)).result[1].shape == (3, 8, 8, 3)


def test_a_kernel_without_a_picture_is_refused() -> None:
    with pytest.raises(InputError, match="kernel: there is no picture.*connect one"):
        operator_nodes.OperatorBlur.execute(kernel=torch.zeros(0, 5, 5, 3))


def test_a_kernel_or_mask_that_cannot_be_computed_with_is_refused_under_its_name() -> None:
    for value in (float("nan"), float("inf")):
        for borders in ("circular", "reflect"):
            kernel = torch.ones(1, 5, 5, 3)
            kernel[0, 2, 2] = value
            with pytest.raises(InputError, match="^kernel: 3 values are NaN or infinite"):
                operator_nodes.OperatorBlur.execute(kernel=kernel, borders=borders)
        with pytest.raises(InputError, match="^mask: 81 values are NaN or infinite"):
            operator_nodes.OperatorInpaint.execute(torch.full((1, 9, 9), value))
    with pytest.raises(InputError, match="^mask: empty.*connect at least one mask"):
        operator_nodes.OperatorInpaint.execute(torch.zeros(0, 9, 9))
    with pytest.raises(InputError, match="^mask: expected a batch of masks"):
        operator_nodes.OperatorInpaint.execute(torch.zeros(1, 1, 9, 9))
    assert operator_nodes.OperatorInpaint.execute(torch.zeros(9, 9)).result[0].mask.shape == (1, 1, 9, 9)


MENUS = [
    (guidance.LoadPrior, "kind", ("mend-prior-starter.safetensors",)),
    (guidance.LoadPrior, "precision", ("mend-prior-starter.safetensors",)),
    *((guidance.ZeroShotRestore, n, (Unused(), SEEN)) for n in ("scheme", "preset", "noise_sign", "result")),
    (guidance.StartFromMeasurement, "fill", (Unused(), SEEN, SIGMAS)),
    (guidance.MixNoise, "noise_sign", (GOOD, GOOD, GOOD, SIGMAS)),
    (guidance.Cm4irStep, "noise_sign", (Unused(), SEEN, GOOD, SIGMAS)),
    (operator_nodes.OperatorDownsample, "kind", ()),
    (operator_nodes.OperatorBlur, "kind", ()),
    (operator_nodes.OperatorBlur, "borders", ()),
    (operator_nodes.OperatorCompressedSensing, "side", ()),
    (measurements.ApplyOperator, "direction", (operators.Denoising(), torch.rand(1, 8, 8, 3))),
    (zero_shot_samplers.SamplerCm4ir, "noise_sign", (SEEN,)),
    (zero_shot_samplers.SamplerRdmd, "result", (SEEN,)),
]


@pytest.mark.parametrize(
    ("node", "name", "others", "value"),
    [
        *((*menu, "nonsense") for menu in MENUS),
        (operator_nodes.OperatorCompressedSensing, "side", (), "48"),
        (operator_nodes.OperatorCompressedSensing, "side", (), 48),
    ],
)
def test_a_choice_that_a_wire_or_the_api_brings_must_be_in_the_menu(node, name: str, others: tuple, value) -> None:
    menu = next(slot.options for slot in node.GET_SCHEMA().inputs if slot.id == name)
    offered = re.escape(f"{name}: '{value}' is not one of {', '.join(menu)}; choose")
    with pytest.raises(InputError, match=offered):
        node.execute(*others, **{name: value})


def test_every_menu_of_a_zero_shot_node_is_checked() -> None:
    checked = {(node, name) for node, name, _ in MENUS}
    for node in (*guidance.NODES, *operator_nodes.NODES, *measurements.NODES, *zero_shot_samplers.NODES):
        for slot in node.GET_SCHEMA().inputs or []:
            if getattr(slot, "options", None) and slot.id != "model_name":
                assert (node, slot.id) in checked, (node, slot.id)


def test_what_a_wire_brings_is_not_checked_before_it_is_known() -> None:
    assert guidance.LoadPrior.validate_inputs(None) is True
    assert isinstance(guidance.LoadPrior.fingerprint_inputs(model_name=None), str)
    assert operator_nodes.OperatorColourise.validate_inputs(None, 0.5, None) is True
    assert zero_shot_samplers.SamplerCm4ir.validate_inputs(None) is True
