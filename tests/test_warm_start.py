"""Training goes on from trained weights, also in a deeper network, and never from another network's."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError
from comfyui_mend.training.warm_start import begin_with

SMALL = {"dim": 8, "num_blocks": [1, 1], "num_dec_blocks": [1], "heads": [1, 2], "num_refinement_blocks": 1}
SMALL |= {"num_experts": 2, "rank_type": "constant", "rank": 2}
DEEPER = SMALL | {"num_blocks": [2, 3], "num_refinement_blocks": 2}


def network(config: dict, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.create("moce-ir", config).eval()


def test_a_deeper_network_begins_as_the_trained_one_and_learns_its_new_blocks():
    trained, deeper = network(SMALL, 0), network(DEEPER, 1)
    picture = torch.rand(1, 3, 16, 24)
    assert not torch.allclose(deeper(picture), trained(picture), atol=1e-2)
    added = begin_with(deeper, trained.state_dict(), "project_out")
    torch.testing.assert_close(deeper(picture), trained(picture))
    assert {name.rpartition(".layers.")[0] for name in added} == {"enc.0.0", "latent", "refinement"}
    deeper(picture).square().mean().backward()
    closing = [p for name, p in deeper.named_parameters() if name in added and "project_out.weight" in name]
    assert len(closing) == 2 * 4 and all(p.grad.any() for p in closing)


def test_the_same_network_begins_with_exactly_the_given_weights():
    trained, other = network(SMALL, 0), network(SMALL, 1)
    assert begin_with(other, trained.state_dict()) == []
    for name, value in other.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


@pytest.mark.parametrize(
    ("config", "closing", "named"),
    [
        (DEEPER, None, "enc.0.0.layers.1"),  # it does not say how its blocks are made silent
        (SMALL | {"dim": 16}, "project_out", "patch_embed.proj.weight"),
        ({**SMALL, "num_refinement_blocks": 0}, "project_out", "refinement.layers.0"),  # fewer blocks
    ],
)
def test_weights_of_another_network_are_refused_by_name_and_nothing_is_changed(config, closing, named):
    module = network(config, 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=named):
        begin_with(module, network(SMALL, 0).state_dict(), closing)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
