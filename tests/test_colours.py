"""Colour Fix: pictures as they come on the graph."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend.engine.colours import METHODS, fix_colours
from comfyui_mend.errors import InputError
from comfyui_mend.nodes.colour import ColourFix


@pytest.mark.parametrize("method", METHODS)
def test_a_tinted_picture_gets_its_colours_back(method):
    original = torch.rand(2, 3, 40, 56) * 0.6 + 0.2
    tinted = original * torch.tensor([0.8, 1.0, 0.9])[:, None, None] + 0.05
    fixed = fix_colours(tinted, original, method)
    assert (fixed.mean((2, 3)) - original.mean((2, 3))).abs().max() < 0.01
    assert (fixed - original).abs().mean() < (tinted - original).abs().mean() / 2


def test_strength_zero_changes_nothing_and_inputs_stay_as_they_are():
    image, reference = torch.rand(1, 3, 20, 24), torch.rand(1, 3, 20, 24)
    before = image.clone(), reference.clone()
    assert torch.equal(fix_colours(image, reference, strength=0.0), image)
    fix_colours(image, reference)
    assert torch.equal(image, before[0]) and torch.equal(reference, before[1])


def test_transparency_is_kept_and_one_reference_of_another_size_serves_a_batch():
    image = torch.rand(3, 4, 20, 24)
    fixed = fix_colours(image, torch.rand(1, 3, 10, 12))
    assert torch.equal(fixed[:, 3], image[:, 3]) and not torch.equal(fixed[:, :3], image[:, :3])


@pytest.mark.parametrize(
    ("reference", "method", "text"),
    [((2, 3, 8, 8), "wavelet", "2 pictures for 3"), ((1, 1, 8, 8), "wavelet", "grey"), ((1, 3, 8, 8), "x", "wavelet")],
)
def test_what_does_not_fit_is_named(reference, method, text):
    with pytest.raises(InputError, match=text):
        fix_colours(torch.rand(3, 3, 8, 8), torch.rand(reference), method)


def test_the_node_returns_comfyui_images():
    (image,) = ColourFix.execute(torch.rand(1, 9, 7, 3), torch.rand(1, 5, 6, 3)).result
    assert image.shape == (1, 9, 7, 3) and image.dtype == torch.float32 and image.is_contiguous()
    assert "not one of wavelet, statistics" in ColourFix.validate_inputs("nothing")
