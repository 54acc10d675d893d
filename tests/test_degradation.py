"""The value that says what is wrong with a picture."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend.errors import InputError
from comfyui_mend.models.degradation import Degradation

RAIN = Degradation(("rain", "haze"), torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.0, 0.0]]), "dcpt")
HAZE = Degradation(("rain", "haze"), torch.tensor([[0.1, 0.9], [0.3, 0.7]]), torch.zeros(2, 3), "dcpt")


def test_the_label_is_the_most_probable_one():
    assert RAIN.label() == "rain"
    assert [HAZE.label(i) for i in range(2)] == ["haze", "haze"]
    assert HAZE.report().splitlines()[1] == "picture 1: haze 70.0 %, rain 30.0 %"


def test_indexing_keeps_a_batch():
    assert len(HAZE[1]) == len(HAZE[1:]) == len(HAZE[[0]]) == 1
    assert torch.equal(HAZE[1].probabilities, HAZE.probabilities[1:])


def test_one_degradation_serves_any_batch_and_two_serve_only_two():
    assert len(RAIN.expand(5)) == 5
    with pytest.raises(InputError, match="2 pictures"):
        HAZE.expand(5)


def test_mixing_interpolates_what_both_have():
    mixed = RAIN.mix(HAZE, 0.25)
    torch.testing.assert_close(mixed.probabilities[0], torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(mixed.embedding[:, 0], torch.tensor([0.75, 0.75]))
    only_embedding = RAIN.mix(Degradation(embedding=torch.ones(1, 3), source="dcpt"), 1.0)
    assert only_embedding.probabilities is None and only_embedding.labels == ()


def test_different_methods_do_not_mix():
    with pytest.raises(InputError, match="do not mix"):
        RAIN.mix(Degradation(embedding=torch.ones(1, 3), source="vlu-net"), 0.5)


def test_a_degradation_says_something():
    with pytest.raises(InputError):
        Degradation(source="dcpt")
    with pytest.raises(InputError, match="labels"):
        Degradation(("rain",), torch.ones(1, 2))


def test_an_unknown_label_names_the_known_ones():
    with pytest.raises(InputError, match="rain, haze"):
        RAIN.probability("snow")
