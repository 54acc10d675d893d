"""MPMF-Net: coarse image in and out, exact chunks, whole-picture statistics."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, ConfigError, InputError
from comfyui_mend.models import mpmf_fusion, mpmf_net
from comfyui_mend.models.mpmf_net import CoarseImage, MPMFNet

SMALL = {
    "embed_dims": (6, 12, 24, 12, 6),
    "depths": (2, 2, 3, 2, 2, 1),
    "num_heads": (1, 2, 2, 1, 1),
    "attn_ratio": (0.5, 0.5, 0.5, 0.0, 0.0),
}


@pytest.fixture
def network() -> MPMFNet:
    return models.create("mpmf-net", SMALL).eval().requires_grad_(False)


FRACTIONS = {
    **SMALL,
    "mlp_ratios": (2.0, 2.0, 2.0, 2.4, 2.4),
    "depths": (22, 1, 2, 1, 2, 1),
    "attn_ratio": (0.7, 1.0, 1.0, 0.0, 0.0),
}


@pytest.mark.parametrize("config", [mpmf_net.VARIANTS["weather"], SMALL, FRACTIONS])
def test_every_setting_is_read_back_from_the_shapes(config: dict) -> None:
    architecture = models.registry.get("mpmf-net")
    with torch.device("meta"):
        state = architecture.build(config).state_dict()
        assert models.registry.detect(state) is architecture
        read = architecture.config_from_state_dict(state)
        again = models.create("mpmf-net", read).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
    assert {k: read[k] for k in config} == dict(config)


def test_weights_begin_smaller_in_a_deeper_network_as_published() -> None:
    torch.manual_seed(0)
    block = models.create("mpmf-net", SMALL).layer3.blocks[-1]
    gain = (8 * sum(SMALL["depths"])) ** -0.25
    for weight, share in ((block.mlp.mlp[0].weight, gain), (block.attn.QK.weight, 1.0)):
        std = share * (2 / sum(weight.shape[:2])) ** 0.5
        assert 0.85 * std < float(weight.detach().std()) < 1.15 * std
    assert not block.mlp.mlp[0].bias.any()


def test_the_released_network_has_its_published_size() -> None:
    with torch.device("meta"):
        module = models.create("mpmf-net", mpmf_net.VARIANTS["weather"])
    assert sum(p.numel() for p in module.parameters()) == 3_303_308


def test_a_file_saved_in_parallel_loads_without_its_computed_tables(network: MPMFNet, tmp_path) -> None:
    state = {f"module.{k}": v for k, v in network.state_dict().items() if "relative_positions" not in k}
    torch.save(state, tmp_path / "model_best.pth")
    loaded, x = models.load(tmp_path / "model_best.pth"), torch.rand(1, 3, 28, 32)
    assert loaded.architecture.id == "mpmf-net" and torch.allclose(loaded(x), network(x)[0], atol=1e-6)


def test_other_convolutions_are_refused_because_nothing_was_released_with_them() -> None:
    with pytest.raises(ConfigError, match="DWConv"):
        models.create("mpmf-net", {"conv_type": ("Conv",) * 5})
    with torch.device("meta"):
        state = models.create("mpmf-net", SMALL).state_dict()
    state = {k.replace("attn.conv.", "attn.conv.0."): v for k, v in state.items()}
    with pytest.raises(CheckpointError, match="DWConv"):
        models.registry.get("mpmf-net").config_from_state_dict(state)


def test_chunks_give_the_same_numbers_as_one_piece(network: MPMFNet, monkeypatch) -> None:
    x = torch.rand(2, 3, 40, 56)
    whole = network(x)[0]
    monkeypatch.setattr(mpmf_fusion, "ATTENTION_ELEMENTS", 3 * 56**2)
    assert torch.allclose(network(x)[0], whole, atol=1e-5)


def test_fusion_is_what_its_definition_says() -> None:
    b, g, h, w = 2, 4, 5, 7
    q, k, vu, vd = torch.randn(4, b, g, h, w)
    scale = torch.tensor([0.7])
    d2u, u2d = mpmf_fusion._along_columns(q, k, vu, vd, scale)
    a = (0.7 * torch.einsum("bgiw,bgjw->bwij", q, k)).softmax(dim=-1)
    assert torch.allclose(d2u, torch.einsum("bwij,bgjw->bgiw", a, vd), atol=1e-5)
    assert torch.allclose(u2d, torch.einsum("bwij,bgiw->bgjw", a, vu), atol=1e-5)
    d2u, u2d = mpmf_fusion._along_rows(q, k, vu, vd, scale)
    s = 0.7 * torch.einsum("bghi,bghj->bhij", q, k)
    assert torch.allclose(d2u, torch.einsum("bhij,bghj->bghi", s.softmax(dim=-1), vd), atol=1e-5)
    assert torch.allclose(u2d, torch.einsum("bhij,bghi->bghj", s.softmax(dim=-2), vu), atol=1e-5)
    d2u, u2d = mpmf_fusion._along_channels(q, k, vu, vd, scale)
    c = (0.7 * torch.einsum("bghw,bfhw->bgf", q, k)).softmax(dim=-1)
    assert torch.allclose(d2u, torch.einsum("bgf,bfhw->bghw", c, vd), atol=1e-5)
    assert torch.allclose(u2d, torch.einsum("bgf,bfhw->bghw", c, vu), atol=1e-5)


def test_the_networks_own_coarse_image_given_from_outside_changes_nothing(network: MPMFNet) -> None:
    x = torch.rand(1, 3, 32, 40)
    restored, coarse = network(x)
    assert torch.equal(coarse, network.coarse(x))
    assert torch.allclose(network(x, coarse)[0], restored, atol=1e-6)
    assert torch.allclose(network(x, torch.rand_like(coarse), blend=0.0)[0], restored, atol=1e-6)


def test_another_coarse_image_changes_the_result_and_blends(network: MPMFNet) -> None:
    x, guide = torch.rand(1, 3, 32, 40), torch.zeros(1, 3, 8, 10)
    restored, coarse = network(x, guide, blend=0.25)
    assert torch.allclose(coarse, 0.75 * network.coarse(x), atol=1e-6)
    assert not torch.allclose(restored, network(x)[0], atol=1e-5)
    with pytest.raises(InputError, match="coarse"):
        network(x, torch.zeros(1, 3, 32, 40))


def test_a_tile_takes_its_part_of_the_coarse_image() -> None:
    coarse = CoarseImage(torch.arange(80.0).reshape(1, 1, 8, 10))
    part = coarse.at(8, 12).over(torch.zeros(1, 3, 16, 32))
    assert part.shape == (1, 1, 4, 8)
    assert part[0, 0, 0, 0] == 23 and torch.equal(part[..., 6], part[..., 7])


@pytest.mark.parametrize("size", [(1, 1), (13, 29), (33, 50)])
def test_any_size_is_restored(network: MPMFNet, size: tuple[int, int]) -> None:
    x = torch.rand(1, 3, *size)
    restorer = models.Restorer(models.registry.get("mpmf-net"), {**mpmf_net.VARIANTS["weather"], **SMALL}, network)
    assert restorer(x).shape == x.shape
    assert restorer(x, coarse=CoarseImage(torch.rand(1, 3, 2, 2)), blend=0.5).shape == x.shape


def test_a_batch_is_normalised_picture_by_picture(network: MPMFNet) -> None:
    x = torch.rand(2, 3, 32, 32) * torch.tensor([1.0, 0.2])[:, None, None, None]
    assert torch.allclose(network(x)[0], torch.cat([network(x[:1])[0], network(x[1:])[0]]), atol=1e-5)


def test_sums_over_all_pixels_do_not_overflow_in_half_precision() -> None:
    q = torch.full((1, 2, 300, 300), 8.0, dtype=torch.float16)
    d2u, _ = mpmf_fusion._along_channels(q, q, q, q, torch.ones(1, dtype=torch.float16))
    assert d2u.isfinite().all() and d2u.dtype == torch.float16


def test_half_precision_stays_close(network: MPMFNet) -> None:
    x = torch.rand(1, 3, 32, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x)[0]
    assert (half - network(x)[0]).abs().max() < 0.1


def test_it_trains_after_it_ran_in_inference_mode(network: MPMFNet) -> None:
    mpmf_net._window_offsets.cache_clear()
    with torch.inference_mode():
        network(torch.rand(1, 3, 32, 32))
    network.requires_grad_(True)
    network(torch.rand(1, 3, 32, 32))[0].mean().backward()
    assert network.layer1.blocks[1].attn.attn.meta[0].weight.grad.abs().sum() > 0
