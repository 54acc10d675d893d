"""DA-RCOT: two passes, the residual between them as a value, the potential, and the transport objective."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.engine import loaded, residuals
from comfyui_mend.errors import InputError
from comfyui_mend.models.da_rcot import MRCNet, Potential, Residual
from comfyui_mend.training.objectives import rcot

SMALL = {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 4, 8)}


@pytest.fixture
def network() -> MRCNet:
    return models.create("da-rcot", SMALL).eval().requires_grad_(False)


def restorer(network: MRCNet) -> models.Restorer:
    return models.Restorer(models.registry.get("da-rcot"), SMALL, network)


def shapes(module: torch.nn.Module) -> dict:
    return {k: v.shape for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", ["da-rcot", "da-rcot-potential"])
def test_every_setting_is_read_back_from_the_released_shapes(name: str) -> None:
    architecture = models.registry.get(name)
    for config in architecture.variants.values():
        with torch.device("meta"):
            state = architecture.build(config).state_dict()
            assert models.registry.detect(state) is architecture
            read = architecture.config_from_state_dict(state)
            assert shapes(models.create("da-rcot", read)) == {k: v.shape for k, v in state.items()}
        assert {k: read[k] for k in config} == dict(config)


def test_other_settings_are_read_back_too() -> None:
    config = {**SMALL, "num_blocks": (1, 2, 1, 3), "ffn_expansion_factor": 1.7, "layer_norm": "BiasFree", "bias": True}
    with torch.device("meta"):
        state = models.create("da-rcot", config).state_dict()
    read = models.registry.get("da-rcot").config_from_state_dict(state)
    assert {k: read[k] for k in config} == config


def test_the_trainers_file_holds_both_networks_and_each_takes_its_own() -> None:
    with torch.device("meta"):
        transport, critic = models.create("da-rcot", SMALL), models.create("da-rcot", {"patch_size": 32, "width": 8})
        state = {f"Tnet.{k}": v for k, v in transport.state_dict().items()}
        state |= {f"Fnet.{k}": v for k, v in critic.state_dict().items()}
    for name, module in (("da-rcot", transport), ("da-rcot-potential", critic)):
        architecture = models.registry.get(name)
        assert architecture.prepare_state_dict(state).keys() == module.state_dict().keys()
        assert architecture.detect(architecture.prepare_state_dict(state))


def pickled_by_the_trainer(monkeypatch, **networks: torch.nn.Module) -> dict:
    """Whole modules whose classes live in a module called model_res, as released files hold them."""
    module = types.ModuleType("model_res")
    monkeypatch.setitem(sys.modules, "model_res", module)
    for network in networks.values():
        for part in network.modules():
            if type(part).__module__.startswith("comfyui_mend"):
                name = type(part).__name__
                if not hasattr(module, name):
                    setattr(module, name, type(name, (torch.nn.Module,), {"__module__": "model_res"}))
                part.__class__ = getattr(module, name)
    return {"epoch": 55, **networks}


def test_a_pickle_of_whole_modules_gives_both_networks_without_running_it(tmp_path, monkeypatch) -> None:
    transport, critic = models.create("da-rcot", SMALL), models.create("da-rcot", {"patch_size": 32, "width": 8})
    x, patch = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected, score = transport(x)[0], critic(patch)
    path = tmp_path / "model_allMRCNet128__30_1.0_5D.pth"
    torch.save(pickled_by_the_trainer(monkeypatch, Tnet=transport, Fnet=critic), path)
    monkeypatch.delitem(sys.modules, "model_res")
    loaded = models.load(path)
    assert loaded.architecture.id == "da-rcot" and loaded.config["num_blocks"] == (1, 1, 1, 1)
    assert torch.allclose(loaded(x), expected, atol=1e-6)
    loaded = models.load(path, system="da-rcot-potential")
    assert loaded.config["patch_size"] == 32 and torch.allclose(loaded.module(patch), score, atol=1e-6)


def test_strength_zero_is_the_first_pass(network: MRCNet) -> None:
    x = torch.rand(1, 3, 16, 24)
    assert torch.equal(network.restore(x, strength=0.0)[0], network.first_pass(x))
    assert torch.equal(network.restore(x, iterations=0)[0], network.first_pass(x))


def test_the_residual_of_the_first_pass_given_from_outside_changes_nothing(network: MRCNet) -> None:
    x = torch.rand(2, 3, 16, 24)
    residual = Residual(x - network.first_pass(x))
    own, found = network.restore(x)
    assert torch.allclose(network.restore(x, residual)[0], own, atol=1e-5)
    assert torch.allclose(network.restore(x, network.encode_residual(residual))[0], own, atol=1e-5)
    assert torch.allclose(found.image, residual.image, atol=1e-5)


def test_another_residual_and_another_iteration_change_the_result(network: MRCNet) -> None:
    x = torch.rand(1, 3, 16, 24)
    own = network.restore(x)[0]
    assert not torch.allclose(network.restore(x, Residual(torch.randn_like(x)))[0], own, atol=1e-4)
    assert not torch.allclose(network.restore(x, iterations=3)[0], own, atol=1e-6)


def test_a_batch_is_restored_image_by_image(network: MRCNet) -> None:
    x = torch.rand(3, 3, 16, 16)
    both = network.restore(x)[0]
    assert torch.allclose(both, torch.cat([network.restore(x[i : i + 1])[0] for i in range(3)]), atol=1e-5)


def test_a_tile_takes_its_part_of_the_residual(network: MRCNet) -> None:
    x = torch.rand(1, 3, 40, 56)
    whole = network.encode_residual(Residual(torch.randn_like(x)))
    part = whole.at(8, 16).fit(16, 24)
    assert torch.equal(part.image, whole.image[..., 8:24, 16:40])
    assert [tuple(e.shape[-2:]) for e in part.embeddings] == [(2, 3), (4, 6), (8, 12)]
    assert torch.equal(part.embeddings[1], whole.embeddings[1][..., 2:6, 4:10])
    network.restore(x[..., 8:24, 16:40], whole.at(8, 16))


def test_a_residual_of_a_smaller_picture_is_refused(network: MRCNet) -> None:
    with pytest.raises(InputError, match="residual: made for 16x16"):
        network.restore(torch.rand(1, 3, 32, 32), Residual(torch.zeros(1, 3, 16, 16)))


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (17, 30)])
def test_any_size_is_restored_with_and_without_a_residual(network: MRCNet, size: tuple[int, int]) -> None:
    x = torch.rand(1, 3, *size)
    restore = restorer(network)
    assert restore(x).shape == x.shape
    assert restore(x, residual=Residual(torch.zeros_like(x))).shape == x.shape
    assert restore(x, residual=network.encode_residual(Residual(torch.zeros_like(x)))).shape == x.shape


def test_half_precision_stays_close(network: MRCNet) -> None:
    x = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network.restore(x)[0]
    assert (half - network.restore(x)[0]).abs().max() < 0.1


def test_the_potential_scores_a_picture_of_any_size_patch_by_patch() -> None:
    critic = Potential(patch_size=32, width=8).eval()
    with torch.no_grad():
        assert critic.score_map(torch.rand(2, 3, 70, 33)).shape == (2, 3, 2)
        assert critic.score_map(torch.rand(1, 3, 5, 9)).shape == (1, 1, 1)
        image = torch.rand(1, 3, 32, 64)
        assert torch.allclose(critic.score_map(image)[0, 0, 1], critic(image[..., 32:])[0], atol=1e-6)
    with pytest.raises(InputError, match="32x32"):
        critic(torch.rand(1, 3, 40, 32))


def test_the_corrected_contrastive_term_prefers_grouped_embeddings_and_the_published_one_hardly_does() -> None:
    ids = torch.tensor([0, 0, 3, 3])
    base = torch.randn(2, 64, 8, 8)
    grouped = torch.stack([base[0], base[0], base[1], base[1]])
    mixed = torch.stack([base[0], base[1], base[0], base[1]])
    assert rcot.contrastive_loss(grouped, ids, corrected=True) < 0.1 * rcot.contrastive_loss(mixed, ids, corrected=True)
    published = rcot.contrastive_loss(grouped, ids), rcot.contrastive_loss(mixed, ids)
    assert all(abs(float(v) - 6) < 0.1 for v in published)


def test_a_single_sample_trains() -> None:
    critic = Potential(patch_size=32, width=8)
    x, y = torch.rand(2, 1, 3, 32, 32)
    restored = (x * 0.9).requires_grad_(True)
    loss = rcot.map_loss(critic, x, restored, torch.tensor([4]), y, torch.randn(1, 8, 2, 2))
    loss.total.backward()
    assert float(loss.contrastive) == 0 and restored.grad.isfinite().all()


def test_the_potential_learns_to_prefer_clean_pictures() -> None:
    critic = Potential(patch_size=32, width=8)
    optimiser = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
    target = torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32).contiguous()
    restored = (target + 0.2 * torch.randn_like(target)).clamp(0, 1)
    for _ in range(10):
        loss = rcot.critic_loss(critic, restored, target)
        loss = loss + rcot.gradient_penalty(critic, restored, target, torch.rand(2, 1, 1, 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert critic(target).mean() > critic(restored).mean()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_first_pass_keeps_grey_pictures_grey_and_transparency(network: MRCNet, channels: int) -> None:
    image = torch.rand(1, channels, 16, 24)
    restored, residual = residuals.first_pass(loaded.wrap(restorer(network)), image)
    assert restored.shape == image.shape and residual.image.shape == (1, 3, 16, 24)
    if channels in (2, 4):
        assert torch.equal(restored[:, -1], image[:, -1])


def test_the_keys_stand_in_the_released_order() -> None:
    with torch.device("meta"):
        keys = list(models.create("da-rcot", SMALL).state_dict())
    parts = list(dict.fromkeys(key.split(".")[0] for key in keys))
    first = parts.index("up3_2")
    assert parts[first : first + 4] == ["up3_2", "reduce_chan_level2", "resup3_2", "resreduce_chan_level2"]
