"""Pictures and masks with values that nobody expects: above white, not finite, none at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import local_restorer, wrapped

from comfyui_mend.engine import (
    blend,
    colours,
    ensemble,
    face_finding,
    faces,
    folders,
    mix,
    regions,
    report,
    residuals,
    shots,
    stabiliser,
    tiling,
    uncertainty,
    values,
)
from comfyui_mend.errors import InputError
from comfyui_mend.nodes.datasets import DatasetFromImages
from comfyui_mend.nodes.degrade import DegradeImage
from comfyui_mend.nodes.gendeg import MeasureIntensity
from comfyui_mend.nodes.inspect import CompareImages, ImageMetrics, ReportPage
from comfyui_mend.nodes.restore import RestorationMix

from .test_da_rcot import SMALL as RCOT
from .test_tur import SMALL as TUR

BRIGHT = torch.linspace(0, 3, 3 * 16 * 16).reshape(1, 3, 16, 16)
GREY = torch.full((1, 3, 16, 16), 0.5)
SOMEONE = face_finding.from_boxes([(0, torch.tensor([4.0, 4.0, 12.0, 12.0]))], 1, (16, 16))


def test_mixing_colours_and_blending_at_zero_give_a_bright_picture_back() -> None:
    assert torch.equal(mix.mix(BRIGHT, GREY, strength=0.0), BRIGHT)
    assert torch.equal(blend.blend(BRIGHT, GREY, torch.zeros(1, 1, 1, 1)), BRIGHT)
    for method in colours.METHODS:
        assert torch.equal(colours.fix_colours(BRIGHT, GREY, method, strength=0.0), BRIGHT)
    enlarged = mix.mix(BRIGHT[..., :8, :8], torch.zeros(1, 3, 16, 16), strength=0.0)
    assert enlarged.max() > 1.2
    assert mix.mix(GREY, GREY + 0.4, strength=2.0).max() == 1  # nothing bright went in


def test_every_restoring_node_keeps_what_is_above_white() -> None:
    local, tur, rcot = local_restorer(), wrapped("airnet", TUR["airnet"]), wrapped("da-rcot", RCOT)
    for restorer, restore in (
        (local, lambda n, x: ensemble.restore(n, x, 2)[0]),
        (tur, lambda n, x: uncertainty.restore(n, x)[0]),
        (rcot, lambda n, x: residuals.first_pass(n, x)[0]),
    ):
        restorer.restorer.module.requires_grad_(False)
        for image, most in ((BRIGHT * 4, None), (GREY, 1.0)):
            restored = restore(restorer, image)
            assert restored.min() >= 0 and (restored.max() > 1 if most is None else restored.max() <= most)


def test_a_face_that_was_not_changed_leaves_a_bright_picture_as_it_is() -> None:
    pasted, covered = faces.paste(BRIGHT, faces.align(BRIGHT, SOMEONE, 64), SOMEONE)
    assert covered.max() > 0 and (pasted - BRIGHT).abs().max() < 1e-5


USES: dict[str, Callable[[torch.Tensor], object]] = {
    "mix": lambda x: mix.mix(GREY, x),
    "blend": lambda x: blend.blend(GREY, x, torch.ones(1, 1, 1, 1)),
    "colours": lambda x: colours.fix_colours(GREY, x),
    "degrade": lambda x: DegradeImage.execute(x.movedim(1, -1)),
    "align": lambda x: faces.align(x, SOMEONE),
    "paste": lambda x: faces.paste(GREY, x, SOMEONE),
    "stabilise": lambda x: stabiliser.stabilise(x),
    "shots": lambda x: shots.scores(x),
    "restore": lambda x: tiling.restore(local_restorer(), x),
    "mask of mix": lambda x: mix.mix(GREY, GREY, mask=x[:, 0]),
    "mask of blend": lambda x: blend.weight_from_mask(x[:, 0], GREY),
    "mask of residual": lambda x: residuals.from_pictures(GREY, GREY, x[:, 0]),
    "mask of paste": lambda x: faces.paste(GREY, GREY, SOMEONE, mask=x[:, 0]),
    "mask of faces": lambda x: face_finding.boxes_of_mask(x[:, 0], 1, (16, 16)),
    "region": lambda x: regions.region(x[:, 0], 0.5),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20, -1e30])
@pytest.mark.parametrize("use", USES)
def test_values_that_nothing_can_be_computed_with_are_refused(use: str, bad: float) -> None:
    image = GREY.clone()
    image[0, 0, 3, 4] = bad
    with pytest.raises(InputError, match="1 values are (NaN or infinite|beyond 1e[+]09)"):
        USES[use](image)
    USES[use](GREY)


@pytest.mark.parametrize("size", [(0, 16), (16, 0)])
@pytest.mark.parametrize("use", [u for u in USES if u not in ("degrade",)])
def test_pictures_and_masks_without_pixels_are_refused(use: str, size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="empty"):
        USES[use](torch.zeros(1, 3, *size))


def test_empty_batches_are_refused_or_stay_empty(moce) -> None:
    nothing = torch.zeros(0, 3, 16, 16)
    for refuse in (shots.scores, lambda x: colours.fix_colours(x, x), lambda x: regions.degradation_map(moce, x)):
        with pytest.raises(InputError, match="image: empty"):
            refuse(nothing)
    assert len(mix.mix(nothing, nothing)) == 0
    with pytest.raises(InputError, match="cannot be brought to one size"):
        report.match_size(torch.zeros(1, 3, 0, 8), GREY)


def test_the_largest_values_of_half_precision_files_pass() -> None:
    values.check_image(torch.full((1, 3, 2, 2), 65504.0))


def test_infinity_is_found_in_half_precision_too() -> None:
    picture = torch.ones(1, 3, 2, 2, dtype=torch.float16)
    values.check_values(picture)
    picture[0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="1 values are NaN or infinite"):
        values.check_values(picture)


def test_a_mask_of_true_and_false_is_a_mask() -> None:
    picture, mask = torch.rand(1, 4, 4, 3), torch.ones(4, 4, dtype=torch.bool)
    mixed = RestorationMix.execute(picture, 1 - picture, mask=mask).result[0]
    torch.testing.assert_close(mixed, 1 - picture)


NODES: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    "compare": (CompareImages.execute, ("first", "second", "third")),
    "metrics": (ImageMetrics.execute, ("image", "reference")),
    "report": (ReportPage.execute, ("before", "after", "reference")),
    "intensity": (MeasureIntensity.execute, ("clean", "damaged")),
    "dataset": (DatasetFromImages.execute, ("clean", "damaged")),
}


@pytest.mark.parametrize("node", NODES)
def test_nodes_that_look_and_train_name_the_input_that_is_empty_or_not_finite(node: str, tmp_path) -> None:
    folders.set_folders(output=tmp_path)
    execute, names = NODES[node]
    whole = torch.rand(1, 128, 128, 3)
    broken = whole.clone()
    broken[0, 5, 6, 1] = float("nan")
    for name in names:
        given = dict.fromkeys(names, whole)
        with pytest.raises(InputError, match=f"^{name}: 1 values are NaN"):
            execute(**{**given, name: broken})
        with pytest.raises(InputError, match=f"^{name}: empty"):
            execute(**{**given, name: whole[:0]})
    with pytest.raises(InputError, match=f"^{names[0]}: empty"):
        execute(**dict.fromkeys(names, whole[:0]))


def test_a_report_says_which_input_has_how_many_pictures(tmp_path) -> None:
    folders.set_folders(output=tmp_path)
    one, two, three = (torch.rand(n, 16, 16, 3) for n in (1, 2, 3))
    with pytest.raises(InputError, match="before: 2 pictures, but after has 1"):
        ReportPage.execute(two, one)
    with pytest.raises(InputError, match="reference: 3 pictures, but after has 2"):
        ReportPage.execute(one, two, reference=three)
    with pytest.raises(InputError, match="maps: 768 values are NaN"):
        ReportPage.execute(one, two, maps=one * float("nan"))
    ReportPage.execute(one, two, reference=two, maps=one[:0])
