"""Masks of where to restore."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend.engine import classify, mix, regions
from comfyui_mend.errors import InputError
from comfyui_mend.models.degradation import Degradation


def test_a_region_rises_around_its_threshold_over_its_softness():
    values = torch.linspace(0, 1, 101).expand(1, 4, -1)
    soft = regions.region(values, 0.5, 0.2)
    assert soft[0, 0, 39] == 0 and soft[0, 0, 61] == 1 and abs(float(soft[0, 0, 50]) - 0.5) < 1e-5
    assert (soft.diff(dim=-1) >= 0).all()
    hard = regions.region(values, 0.5)
    assert set(hard.unique().tolist()) == {0.0, 1.0} and hard[0, 0, 50] == 1 and hard[0, 0, 49] == 0
    assert torch.equal(regions.region(values, 0.5, invert=True), 1 - hard)


def test_feathering_keeps_a_region_of_everything_or_nothing():
    for value in (0.0, 1.0):
        assert torch.allclose(regions.region(torch.full((1, 9, 40), value), 0.5, feather=30.0), torch.tensor(value))


def fake_classify(classifier, image, network=None, *, labels=(), window=0, grid=5):
    """Says "noise" as far as a window is bright."""
    bright = image.mean(dim=(1, 2, 3))
    return Degradation(("clean", "noise", "haze"), torch.stack([1 - bright, bright * 0.9, bright * 0.1], dim=1))


@pytest.fixture
def classifier(moce, monkeypatch):
    monkeypatch.setattr(classify, "classify", fake_classify)
    return moce


@pytest.mark.parametrize("size", [(200, 300), (64, 64), (20, 130), (65, 64), (1, 1)])
def test_the_map_has_the_pictures_size_and_is_probable_where_the_damage_is(size, classifier):
    image = torch.zeros(2, 3, *size)
    image[1, ..., size[1] // 2 :] = 1
    found, label = regions.degradation_map(classifier, image, window=64)
    assert found.shape == (2, *size) and label == "noise"
    assert found[0].max() == 0
    if size[1] > 64:
        assert found[1, :, -1].min() > 0.8 * 0.9 and found[1, :, 0].max() < 0.2
        assert (found[1].diff(dim=-1) >= -1e-6).all()


def test_the_windows_reach_both_edges_and_overlap_by_half_unless_limited():
    assert regions._starts(300, 64, 64) == [0, 30, 59, 88, 118, 148, 177, 206, 236]
    assert regions._starts(300, 64, 3) == [0, 118, 236]
    assert regions._starts(64, 64, 8) == [0]
    assert regions._starts(1000, 64, 1) == [0]


def test_a_label_is_found_whatever_its_case_and_an_unknown_one_named(classifier):
    image = torch.full((1, 3, 64, 64), 0.25)
    assert regions.degradation_map(classifier, image, "HAZE", window=64)[1] == "haze"
    assert regions.degradation_map(classifier, image, window=64)[1] == "noise"  # not "clean", though more probable
    with pytest.raises(InputError, match="label: 'rain' is unknown; this classifier knows: clean, noise, haze"):
        regions.degradation_map(classifier, image, "rain", window=64)


def test_guided_bands_keep_a_change_of_tone_inside_its_edges():
    original = torch.zeros(1, 3, 64, 64)
    original[..., 32:] = 0.5
    restored = original.clone()
    restored[..., 32:] += 0.2  # brighter right half: structure that ends at an edge
    low = {b: mix.mix(original, restored, detail=0.0, split=6.0, bands=b) for b in mix.FILTERS}
    spilt = {b: float((m - original)[..., :32].abs().mean()) for b, m in low.items()}
    kept = {b: float((m - restored)[..., 32:].abs().mean()) for b, m in low.items()}
    assert spilt["guided"] < 0.1 * spilt["Gaussian"] and kept["guided"] < 0.1 * kept["Gaussian"]


def test_guided_bands_add_up_to_the_whole_change():
    original, restored = torch.rand(2, 3, 40, 50), torch.rand(2, 3, 40, 50)
    change = restored - original
    low = mix.guided_low_frequencies(change, restored.mean(dim=1, keepdim=True), 3.0)
    assert low.std() < change.std()
    halves = mix.mix(original, restored, structure=0.5, detail=0.5001, bands="guided")
    assert (halves - mix.mix(original, restored, strength=0.5)).abs().max() < 1e-3
