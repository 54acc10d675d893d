"""Uncertainty maps, blends of two restorations, and the self-ensemble, as the graph runs them."""

from __future__ import annotations

import pytest
import torch
from support import local_restorer, wrapped

from comfyui_mend.engine import blend, ensemble, host, input_range, loaded, tiling, uncertainty
from comfyui_mend.errors import Cancelled, InputError
from comfyui_mend.models.degradation import Degradation
from comfyui_mend.nodes import ensemble as ensemble_nodes
from comfyui_mend.nodes import uncertainty as nodes
from comfyui_mend.nodes.input_range import InputRange

from .test_tur import SMALL

AIRNET = {"n_groups": 1, "n_blocks": 1, "n_feats": 8, "if_uncertainty": True, "batch_size": 1, "contrastive": False}


def network(**changes) -> loaded.LoadedRestorer:
    return wrapped("airnet", {**AIRNET, **changes})


def picture(batch: int = 1, channels: int = 3, height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.rand(batch, height, width, channels)


def run(node, *args, **kwargs) -> tuple:
    return tuple(node.execute(*args, **kwargs).args)


def test_image_and_map_come_from_one_run_and_fit_the_picture() -> None:
    restorer, image = network(), picture(2)
    restored, mask, shown, text = run(nodes.RestoreWithUncertainty, restorer, image)
    want, raw = restorer.restorer.module.forward_with_uncertainty(image.movedim(-1, 1))
    torch.testing.assert_close(restored.movedim(-1, 1), want.clamp(0, 1), rtol=1e-4, atol=1e-5)
    level = uncertainty.white_level(raw.mean(dim=1))
    torch.testing.assert_close(mask, (raw.mean(dim=1) / level).clamp(0, 1), rtol=1e-3, atol=1e-4)
    assert shown.shape == (2, 40, 56, 3) and 0 <= float(shown.min()) and float(shown.max()) <= 1
    assert len(text.splitlines()) == 3 and f"{level:.4g}" in text


def test_tiles_give_the_map_of_the_whole_picture() -> None:
    """A network with zero offsets is local, so that both must agree."""
    restorer, image = network(), picture(1, 3, 96, 160)
    whole = run(nodes.RestoreWithUncertainty, restorer, image, white=1.0)
    tiled = run(nodes.RestoreWithUncertainty, restorer, image, white=1.0, tile=96, overlap=48)
    torch.testing.assert_close(tiled[0], whole[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tiled[1], whole[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_stays_grey_and_transparency_stays(channels: int) -> None:
    image = picture(1, channels)
    restored, mask, *_ = run(nodes.RestoreWithUncertainty, network(), image)
    assert restored.shape == image.shape and mask.shape == (1, 40, 56)
    if channels == 4:
        torch.testing.assert_close(restored[..., 3], image[..., 3])


def test_a_network_without_the_head_is_refused_with_a_way_out() -> None:
    for restorer in (network(if_uncertainty=False), local_restorer()):
        with pytest.raises(InputError, match="Self-Ensemble"):
            run(nodes.RestoreWithUncertainty, restorer, picture())


def test_the_same_white_makes_two_masks_comparable() -> None:
    raw = torch.rand(1, 8, 8)
    assert torch.equal(uncertainty.as_mask(raw, 2.0) * 2, uncertainty.as_mask(raw * 2, 4.0) * 2)
    assert uncertainty.white_level(torch.zeros(1, 4, 4)) > 0


def test_the_surer_picture_wins_and_equal_ones_share() -> None:
    first, second = torch.zeros(1, 8, 8, 3), torch.ones(1, 8, 8, 3)
    unsure = torch.full((1, 8, 8), 0.9)
    unsure[:, :4] = 0.1
    blended, weight = run(
        nodes.BlendRestorations,
        first,
        second,
        by="uncertainty",
        amount=1.0,
        uncertainty_first=unsure,
        uncertainty_second=torch.full((1, 8, 8), 0.3),
    )
    assert float(blended[:, :4].max()) < 0.2 and float(blended[:, 4:].min()) > 0.8
    torch.testing.assert_close(blended[..., 0], weight)
    assert torch.all(blend.weight_from_uncertainty(unsure[None], unsure[None]) == 0.5)


def test_a_blend_by_mask_takes_each_picture_where_it_says() -> None:
    first, second, mask = picture(2), picture(2), torch.zeros(1, 20, 28)
    mask[:, :, 14:] = 1
    blended, weight = run(nodes.BlendRestorations, first, second, by="mask", amount=1.0, mask=mask)
    torch.testing.assert_close(blended[:, :, :26], first[:, :, :26])
    torch.testing.assert_close(blended[:, :, 30:], second[:, :, 30:])
    soft = run(nodes.BlendRestorations, first, second, by="mask", amount=1.0, mask=mask, softness=6.0)[1]
    assert 0.01 < float(soft[0, 20, 20]) < 0.5 and float(weight[0, 20, 20]) == 0


def test_a_blend_by_degradation_follows_its_probability_per_picture() -> None:
    first, second = torch.zeros(2, 4, 4, 3), torch.ones(2, 4, 4, 3)
    found = Degradation(("rain", "haze"), torch.tensor([[0.75, 0.25], [0.1, 0.9]]), None, "dcpt")
    blended = run(nodes.BlendRestorations, first, second, by="degradation", amount=1.0, label="rain", degradation=found)
    torch.testing.assert_close(blended[0][:, 0, 0, 0], torch.tensor([0.75, 0.1]))
    with pytest.raises(InputError, match="snow"):
        run(nodes.BlendRestorations, first, second, by="degradation", label="snow", degradation=found)


def test_what_a_blend_needs_is_named_and_inputs_are_not_modified() -> None:
    first, second = picture(), picture(1, 3, 20, 28)
    kept = first.clone(), second.clone()
    blended, weight = run(nodes.BlendRestorations, first, second, amount=0.25)
    assert blended.shape == first.shape and torch.all(weight == 0.25)
    assert torch.equal(first, kept[0]) and torch.equal(second, kept[1])
    for by, name in (("mask", "mask"), ("uncertainty", "uncertainty_first"), ("degradation", "degradation")):
        with pytest.raises(InputError, match=name):
            run(nodes.BlendRestorations, first, second, by=by)
    with pytest.raises(InputError, match="2 and 3 pictures"):
        run(nodes.BlendRestorations, picture(2), picture(3))


@pytest.mark.parametrize("index", range(8))
def test_every_transform_is_undone(index: int) -> None:
    image = torch.rand(1, 3, 5, 7)
    assert torch.equal(ensemble.undo(ensemble.transform(image, index), index), image)


def test_the_eight_transforms_are_different() -> None:
    image = torch.rand(1, 1, 6, 6)
    seen = {tuple(ensemble.transform(image, i).flatten().tolist()) for i in range(8)}
    assert len(seen) == 8


@pytest.mark.parametrize("scale", [1, 2])
def test_the_ensemble_is_the_mean_over_transforms_and_its_spread(scale: int) -> None:
    restorer, image = local_restorer(scale), torch.rand(2, 3, 20, 28)
    mean, spread = ensemble.restore(restorer, image)
    each = [
        ensemble.undo(tiling.restore(restorer, ensemble.transform(image, i).contiguous(), clamp=False), i)
        for i in range(8)
    ]
    stack = torch.stack(each)
    torch.testing.assert_close(mean, stack.mean(dim=0).clamp(0, 1))
    torch.testing.assert_close(spread, stack.std(dim=0, correction=0).mean(dim=1), rtol=1e-3, atol=1e-5)


def test_an_equivariant_result_has_no_spread() -> None:
    restorer = local_restorer()
    for layer in restorer.restorer.module.layers:
        layer.weight.fill_(0.05)
    _, spread = ensemble.restore(restorer, torch.rand(1, 3, 24, 24))
    assert float(spread.max()) < 1e-5


def test_the_ensemble_shows_one_progress_bar_and_stops_when_told() -> None:
    seen: list[tuple[int, int]] = []
    host.set_hooks(progress=lambda done, total, picture: seen.append((done, total)))
    try:
        ensemble.restore(local_restorer(), torch.rand(1, 3, 24, 24))
        assert [done / total for done, total in seen] == [i / 8 for i in range(1, 9)]
        calls = iter(range(100))
        host.set_hooks(interrupt=lambda: next(calls) > 6)
        with pytest.raises(Cancelled):
            ensemble.restore(local_restorer(), torch.rand(1, 3, 24, 24))
    finally:
        host.set_hooks()


def test_the_ensemble_node_takes_transparency_and_says_what_it_found() -> None:
    image = picture(1, 4)
    restored, spread, text = run(ensemble_nodes.SelfEnsemble, local_restorer(2), image, ways="2 (mirrored)")
    assert restored.shape == (1, 80, 112, 4) and spread.shape == (1, 80, 112)
    assert "spread" in text
    assert ensemble_nodes.SelfEnsemble.validate_inputs("auto", "9") is not True


@pytest.mark.parametrize("name", SMALL)
def test_every_network_with_a_head_gives_a_map_in_the_size_of_the_picture(name: str) -> None:
    restored, raw = uncertainty.restore(wrapped(name, SMALL[name]), torch.rand(2, 3, 50, 70), tile=64)
    assert restored.shape == (2, 3, 50, 70) and raw.shape == (2, 50, 70)
    assert float(raw.min()) > 0 and raw.isfinite().all()


def transweather() -> loaded.LoadedRestorer:
    return wrapped("transweather", SMALL["transweather"])


def test_the_range_that_was_set_is_what_the_network_is_fed() -> None:
    restorer, image = transweather(), torch.rand(1, 48, 64, 3)
    x = image.movedim(-1, 1)
    for wanted, fed in (("auto", x), ("0..1", x), ("-1..1", x * 2 - 1)):
        changed, text = run(InputRange, restorer, wanted)
        torch.testing.assert_close(tiling.restore(changed, x), restorer.restorer.module(fed).clamp(0, 1))
        assert text.startswith(f"TransWeather is fed {'-1..1' if wanted == '-1..1' else '0..1'}")
    assert not restorer.options


def test_measuring_decides_once_for_all_tiles(monkeypatch) -> None:
    monkeypatch.setattr(input_range, "likely_input_range", lambda module, image: "-1..1")
    restorer, image = transweather(), torch.rand(1, 400, 300, 3)
    changed, text = run(InputRange, restorer, "measure", image)
    assert changed.options == {"input_range": "-1..1"} and "measured" in text
    with pytest.raises(InputError, match="connect a picture"):
        run(InputRange, restorer, "measure")


def test_networks_with_one_range_pass_unchanged() -> None:
    restorer = network()
    changed, text = run(InputRange, restorer, "-1..1")
    assert changed is restorer and "nothing to choose" in text
    assert InputRange.validate_inputs("0..255") is not True
