"""MoCE-IR: configuration from shapes, routing per picture, editing a routing."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.engine import routes, tiling
from comfyui_mend.errors import CheckpointError, ConfigError, InputError
from comfyui_mend.models import moce_routing

ARCHITECTURE = models.registry.get("moce-ir")
CONFIGS = {
    **ARCHITECTURE.variants,
    "bias-free three levels": {
        "dim": 16,
        "num_blocks": (1, 2, 1),
        "num_dec_blocks": (2, 1),
        "heads": (1, 2, 2),
        "num_refinement_blocks": 2,
        "ffn_expansion_factor": 1.5,
        "LayerNorm_type": "BiasFree",
        "rank_type": "lin",
        "rank": 3,
        "num_experts": 3,
        "bias": True,
        "inp_channels": 1,
        "out_channels": 1,
    },
    "widths that no whole factor gives": {
        "dim": 46,
        "num_blocks": (1, 1),
        "num_dec_blocks": (1,),
        "heads": (1, 2),
        "num_refinement_blocks": 1,
        "ffn_expansion_factor": 2.2,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hyper_parameter_is_found_in_the_shapes(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        state = models.create("moce-ir", config).state_dict()
    assert models.registry.detect(state) is ARCHITECTURE
    found = ARCHITECTURE.config_from_state_dict(state)
    assert {k: found[k] for k in config} == dict(config)
    with torch.device("meta"):
        again = models.create("moce-ir", found).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("scale", ["min", "max"])
def test_the_scale_of_the_complexities_is_read_from_the_file(scale: str) -> None:
    config = {**CONFIGS["widths that no whole factor gives"], "complexity_scale": scale}
    found = ARCHITECTURE.config_from_state_dict(models.create("moce-ir", config).state_dict())
    assert found["complexity_scale"] == scale


def test_the_released_sizes_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        sizes = {
            n: sum(p.numel() for p in models.create("moce-ir", c).parameters())
            for n, c in ARCHITECTURE.variants.items()
        }
    assert sizes == {"S": 11_477_752, "base": 25_353_796}


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="topk is 5"):
        models.create("moce-ir", {"topk": 5})
    with pytest.raises(ConfigError, match="expert 0 would have no channels"):
        models.create("moce-ir", {"dim": 4})
    with pytest.raises(ConfigError, match="unexpected keyword"):
        models.create("moce-ir", {"width": 4})
    with pytest.raises(CheckpointError, match="no known rule gives experts of rank"):
        from comfyui_mend.models.moce_ir import _rank_rule

        _rank_rule([5, 9, 2, 1], 64)


def test_a_batch_routes_each_image_by_itself(moce) -> None:
    module = moce.restorer.module
    with torch.no_grad():  # a gate that really depends on the picture
        for stage in module.dec:
            for block in stage[2].layers:
                block.adapter.routing.gate[2].weight.normal_(std=30.0)
    images = torch.rand(6, 3, 32, 32) * torch.linspace(0.1, 1, 6)[:, None, None, None]
    together, routing = module.forward_with_routing(images)
    assert len(routing.choice.unique()) > 1
    alone = torch.cat([module(images[i : i + 1]) for i in range(6)])
    assert (together - alone).abs().max() < 1e-5


def test_a_routing_decides_what_runs_and_a_batch_of_one_serves_all(moce) -> None:
    module, images = moce.restorer.module, torch.rand(2, 3, 32, 32)
    own = module.route(images)
    assert torch.allclose(module(images, routing=own), module(images), atol=1e-6)
    forced = [module(images, routing=moce_routing.edit(own, "force", str(e), "all")) for e in range(4)]
    assert all((forced[0] - f).abs().max() > 1e-6 for f in forced[1:])
    frozen = moce_routing.freeze(own, 1)
    assert len(frozen) == 1
    assert torch.allclose(module(images, routing=frozen)[1], module(images[1:])[0], atol=1e-5)


def test_the_strength_of_a_single_expert_changes_nothing_and_a_blend_does(moce) -> None:
    module, image = moce.restorer.module, torch.rand(1, 3, 32, 32)
    own = module.route(image)
    one = moce_routing.edit(own, "force", "2", "all")
    weaker = moce_routing.Routing(one.logits, one.probabilities, one.gates * 0.3)
    assert torch.allclose(module(image, routing=one), module(image, routing=weaker), atol=1e-5)
    blended = moce_routing.edit(own, "blend", "2:0.5, 3:0.5", "all")
    assert (module(image, routing=one) - module(image, routing=blended)).abs().max() > 1e-6


def test_banning_takes_the_next_best_expert(moce) -> None:
    own = moce.restorer.module.route(torch.rand(3, 3, 32, 32))
    for expert in range(4):
        banned = moce_routing.edit(own, "ban", str(expert), "1-2")
        assert torch.equal(banned.gates[0], own.gates[0])
        assert (banned.choice[1:] != expert).all() and (banned.gates.count_nonzero(-1) == 1).all()
        kept = own.choice[1:] != expert
        assert torch.equal(banned.choice[1:][kept], own.choice[1:][kept])


@pytest.mark.parametrize(
    ("experts", "blocks", "message"),
    [
        ("7", "all", "there is no expert 7"),
        ("x", "all", "cannot read 'x'"),
        ("", "all", "names no expert"),
        ("1:-2", "all", "names no expert"),
        ("1", "0-9", "outside 0-2"),
        ("1", "a", "not a number or a range"),
    ],
)
def test_what_cannot_be_edited_is_said(moce, experts: str, blocks: str, message: str) -> None:
    own = moce.restorer.module.route(torch.rand(1, 3, 16, 16))
    with pytest.raises(InputError, match=message):
        moce_routing.edit(own, "force", experts, blocks)
    with pytest.raises(InputError, match="all experts are banned"):
        moce_routing.edit(own, "ban", "0,1,2,3", "all")


def test_a_routing_for_another_network_is_refused(moce) -> None:
    other = moce_routing.Routing(*(torch.zeros(10, 1, 4) for _ in range(3)))
    with pytest.raises(InputError, match="made for 10 decoder blocks and 1 images, this network has 3"):
        moce.restorer.module(torch.rand(1, 3, 16, 16), routing=other)


def test_routing_noise_depends_on_the_seed_alone(moce) -> None:
    images = torch.rand(2, 3, 24, 24)
    first, same, other = (routes.route(moce, images, noise=8.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.gates, same.gates)
    assert not torch.equal(first.noisy_logits, other.noisy_logits)
    quiet = routes.route(moce, images)
    assert quiet.noisy_logits is None and torch.equal(quiet.logits[0], other.logits[0])


def test_the_report_names_every_block_and_marks_what_was_taken(moce) -> None:
    routing = routes.route(moce, torch.rand(2, 3, 24, 24))
    text = moce_routing.describe(routing)
    assert text.count("block ") == 6 and "dec.0.2.layers.0: expert" in text and "image 1" in text


def test_the_sweep_shows_every_expert(moce) -> None:
    sweep = routes.sweep(moce, torch.rand(1, 3, 20, 28))
    assert sweep.shape == (5, 3, 20, 28)
    own = routes.route(moce, torch.rand(1, 3, 20, 28))
    assert own.gates.shape == (3, 1, 4)


def test_half_precision_keeps_the_fft_in_single_precision(moce) -> None:
    image = torch.rand(1, 3, 40, 24)
    module = moce.restorer.module
    routing = module.route(image)
    single = module(image, routing=routing)
    module.half()
    half = module(image.half(), routing=routing.to(torch.float16))
    module.float()
    assert half.dtype == torch.float16 and (half.float() - single).abs().max() < 0.02


def test_a_network_without_experts_cannot_be_routed() -> None:
    from support import local_restorer

    with pytest.raises(InputError, match="Local has no experts to route"):
        routes.route(local_restorer(), torch.rand(1, 3, 8, 8))


def test_every_size_from_one_pixel_comes_back_in_its_size(moce) -> None:
    for size in ((1, 1), (2, 9), (7, 5), (33, 47)):
        assert tiling.restore(moce, torch.rand(1, 3, *size)).shape[-2:] == size
