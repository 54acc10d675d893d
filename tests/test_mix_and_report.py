"""Strength without running again, and honest figures."""

from __future__ import annotations

import math

import pytest
import torch

from comfyui_mend.engine import alpha, blend, folders, host, mix, report
from comfyui_mend.errors import Cancelled, InputError
from comfyui_mend.nodes.degrade import DegradeImage
from comfyui_mend.nodes.inspect import CompareImages, ImageMetrics, ReportPage
from comfyui_mend.nodes.restore import RestorationMix


def test_strength_runs_from_the_original_to_the_restoration() -> None:
    original, restored = torch.rand(2, 3, 20, 30), torch.rand(2, 3, 20, 30)
    assert torch.allclose(mix.mix(original, restored, strength=0.0), original)
    assert torch.allclose(mix.mix(original, restored, strength=1.0), restored, atol=1e-6)
    half = mix.mix(original, restored, strength=0.5)
    assert torch.allclose(half, (original + restored) / 2, atol=1e-6)


def test_a_grey_picture_mixes_with_a_coloured_one_in_all_colours() -> None:
    grey, colour = torch.rand(1, 1, 8, 8), torch.rand(1, 3, 8, 8)
    for pair in ((grey, colour), (colour, grey)):
        assert torch.allclose(mix.mix(*pair, strength=0.5), (grey + colour) / 2, atol=1e-6)
        assert torch.allclose(blend.blend(*pair, torch.full((1, 1, 1, 1), 0.5)), (grey + colour) / 2, atol=1e-6)


def test_a_mask_says_where_whatever_its_size() -> None:
    original, restored = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    mixed = mix.mix(original, restored, mask=mask)
    assert mixed[..., :12].max() == 0 and mixed[..., 20:].min() == 1
    assert torch.equal(mix.mix(original, restored, mask=torch.zeros(1, 64, 64)), original)  # Load Image without alpha
    with pytest.raises(InputError, match="mask: 2 masks for 1 pictures"):
        mix.mix(original, restored, mask=torch.zeros(2, 8, 8))


def test_detail_and_structure_split_the_change() -> None:
    original = torch.full((1, 3, 64, 64), 0.5)
    coarse = original + 0.1
    fine = original + 0.1 * (torch.arange(64) % 2 * 2 - 1)
    assert (mix.mix(original, coarse, structure=0.0) - original).abs().max() < 1e-3
    assert (mix.mix(original, coarse, detail=0.0) - coarse).abs().max() < 1e-3
    assert (mix.mix(original, fine, detail=0.0) - original).abs().mean() < 5e-3
    assert (mix.mix(original, fine, structure=0.0) - fine).abs().mean() < 5e-3


def test_the_colour_anchor_keeps_overall_colour() -> None:
    original = torch.rand(1, 3, 64, 64) * 0.5
    shifted = original + torch.tensor([0.2, 0.0, 0.1])[:, None, None]
    assert (mix.mix(original, shifted, colour_anchor=1.0) - original).abs().max() < 0.01
    assert (mix.mix(original, shifted) - shifted).abs().max() < 1e-6


def test_an_enlarging_restoration_mixes_with_the_enlarged_original() -> None:
    assert mix.mix(torch.rand(1, 3, 10, 12), torch.rand(1, 3, 40, 48), strength=0.3).shape == (1, 3, 40, 48)


def test_low_frequencies_keep_a_constant_at_any_size() -> None:
    for size in ((1, 1), (3, 50), (200, 130)):
        image = torch.full((1, 3, *size), 0.3)
        for sigma in (0.3, 3.0, 60.0):
            assert torch.allclose(mix.low_frequencies(image, sigma), image, atol=1e-5)


def test_psnr_and_ssim_are_the_textbook_figures() -> None:
    reference = torch.rand(2, 3, 40, 40) * 0.8
    assert report.psnr(reference + 0.1, reference) == pytest.approx([20.0, 20.0], abs=1e-4)
    assert report.psnr(reference, reference) == [math.inf, math.inf]
    assert report.ssim(reference, reference) == pytest.approx([1.0, 1.0], abs=1e-5)
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is the independent witness for SSIM")
    noisy = (reference + 0.1 * torch.randn(reference.shape)).clamp(0, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    want = [
        skimage.structural_similarity(a.numpy(), b.numpy(), channel_axis=0, **options)
        for a, b in zip(noisy, reference, strict=True)
    ]
    assert report.ssim(noisy, reference) == pytest.approx(want, abs=2e-3)


def test_metrics_take_pictures_of_other_sizes_and_one_reference_for_all() -> None:
    text, means = report.metrics_table(torch.rand(3, 4, 20, 20), torch.rand(1, 3, 40, 40))
    assert text.count("picture") == 3 and "mean" in text and means.keys() == {"PSNR dB", "SSIM"}
    assert report.metrics_table(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))[1].keys() == {"PSNR dB"}


def test_a_comparison_has_a_column_per_picture_and_a_row_for_differences() -> None:
    images = [torch.rand(2, c, 64, 80) for c in (3, 1, 4)]
    plain = report.compare(images, ["a", "b", "c"])
    with_difference = report.compare(images, ["a", "b", "c"], zoom=4, difference=True)
    assert plain.shape[:2] == (2, 3) and plain.shape[3] == 3 * 80 + 8
    assert with_difference.shape[2] > 2 * 64
    with pytest.raises(InputError, match="batches of 2, 3"):
        report.compare([torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8)], ["a", "b"])


def test_colour_is_filled_in_under_transparency_only() -> None:
    colour, opacity = torch.rand(1, 3, 33, 20), torch.ones(1, 1, 33, 20)
    opacity[..., 10:20, 5:15] = 0
    filled = alpha.fill_transparent(colour, opacity)
    hidden = (opacity == 0).expand_as(colour)
    assert torch.equal(filled[~hidden], colour[~hidden])
    assert filled.isfinite().all() and filled.min() >= 0 and filled.max() <= 1
    nothing = alpha.fill_transparent(colour, torch.zeros_like(opacity))
    assert nothing.isfinite().all()


@pytest.mark.parametrize("size", [(256, 512), (8, 256), (256, 8), (5, 64), (64, 64)])
def test_colours_under_transparency_come_from_around_in_a_picture_of_any_shape(size) -> None:
    opaque = torch.zeros(1, 1, *size)
    opaque[..., : size[1] // 2] = 1
    filled = alpha.fill_transparent(torch.where(opaque > 0, 0.8, 0.0).expand(1, 3, -1, -1), opaque)
    assert (filled - 0.8).abs().max() < 1e-5


def test_an_unknown_choice_of_bands_is_named() -> None:
    with pytest.raises(InputError, match="bands: 'nonsense' is not one of Gaussian, guided"):
        mix.mix(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), bands="nonsense")


LOOKING = {
    "compare": lambda x: CompareImages.execute(x, x, difference=True),
    "metrics": lambda x: ImageMetrics.execute(x, x),
    "report": lambda x: ReportPage.execute(x, x, reference=x),
    "mix": lambda x: RestorationMix.execute(x, 1 - x, structure=0.5, bands="guided"),
    "degrade": lambda x: DegradeImage.execute(x, "defocus", second="jpeg"),
}


@pytest.mark.parametrize("use", LOOKING)
def test_cancel_stops_between_the_pictures_of_a_batch(use: str, tmp_path) -> None:
    folders.set_folders(output=tmp_path)
    asked: list[int] = []
    host.set_hooks(interrupt=lambda: bool(asked.append(1)) or len(asked) > 3)
    try:
        with pytest.raises(Cancelled):
            LOOKING[use](torch.rand(5, 32, 32, 3))
    finally:
        host.set_hooks()
    assert len(asked) == 4


def test_pictures_of_a_batch_come_out_as_alone_but_share_what_is_above_white() -> None:
    dark, bright = torch.rand(1, 3, 20, 30), 3 * torch.rand(1, 3, 20, 30) + 1
    batch = torch.cat([dark, bright])
    larger = torch.nn.functional.interpolate(batch, scale_factor=2)
    mixed = mix.mix(batch, larger, strength=2.0, structure=0.5, mask=torch.ones(2, 5, 5))
    wanted = mix.mix(batch[1:], larger[1:], strength=2.0, structure=0.5)
    torch.testing.assert_close(mixed[1:], wanted)
    alone = mix.mix(dark, larger[:1], strength=2.0, structure=0.5)
    assert alone.max() == 1 < mixed[0].max()
    sheets = report.compare([batch, larger], ["a", "b"], difference=True)
    torch.testing.assert_close(sheets[1:], report.compare([batch[1:], larger[1:]], ["a", "b"], difference=True))
    assert sheets.movedim(1, -1).is_contiguous() and mixed.movedim(1, -1).is_contiguous()
