"""The pixel-space prior: recognised from its file, right at its limits."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import ConfigError, InputError
from comfyui_mend.guidance import parametrisation

ARCHITECTURE = models.registry.get("guided-diffusion-unet")
SMALL = {
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (2,),
    "num_head_channels": 32,
}
CONFIGS = {
    **ARCHITECTURE.variants,
    "conv resampling, classes": {
        "unet": {**SMALL, "resblock_updown": False, "num_classes": 5, "num_head_channels": -1}
    },
    "fractional width": {"unet": {**SMALL, "model_channels": 64, "channel_mult": (0.5, 1, 2), "num_res_blocks": 2}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hyper_parameter_is_found_in_the_shapes(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        state = models.create("guided-diffusion-unet", config).state_dict()
    assert models.registry.detect(state) is ARCHITECTURE
    found = ARCHITECTURE.config_from_state_dict(state)
    assert found.get("wrapper") == config.get("wrapper")
    with torch.device("meta"):
        again = models.create("guided-diffusion-unet", found).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
    same = ("channel_mult", "attention_resolutions", "num_res_blocks", "model_channels")
    assert all(
        tuple(found["unet"][k]) == tuple(config["unet"][k])
        if isinstance(config["unet"][k], tuple)
        else found["unet"][k] == config["unet"][k]
        for k in same
    )


def test_a_class_is_needed_exactly_when_the_network_knows_classes() -> None:
    plain = models.create("guided-diffusion-unet", {"unet": SMALL})
    classes = models.create("guided-diffusion-unet", {"unet": {**SMALL, "num_classes": 5}})
    x, t = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    assert plain(x, t).shape == x.shape and classes(x, t, torch.tensor([4])).shape == x.shape
    with pytest.raises(InputError, match="needs a class"):
        classes(x, t)
    with pytest.raises(InputError, match="knows no classes"):
        plain(x, t, torch.tensor([0]))


def test_widths_that_the_normalisation_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 32"):
        models.create("guided-diffusion-unet", {"unet": {**SMALL, "model_channels": 40}})


def test_a_consistency_model_leaves_a_picture_at_the_smallest_noise_alone() -> None:
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sigma = torch.full((2,), parametrisation.SIGMA_MIN)
    assert torch.equal(parametrisation.consistency_denoised(x, sigma, output), x)
    assert torch.isfinite(parametrisation.edm_time(torch.zeros(1))).all()


def test_a_perfect_edm_network_returns_the_clean_picture() -> None:
    clean, noise, sigma = torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.tensor([3.0])
    x = clean + sigma * noise
    skip = 0.25 / (sigma**2 + 0.25)
    target = (clean - skip * x) / (sigma * 0.5 * parametrisation.edm_c_in(sigma))
    assert torch.allclose(parametrisation.edm_denoised(x, sigma, target), clean, atol=1e-5)


def _attention(module: torch.nn.Module) -> list[tuple[int, bool]]:
    return [(m.heads, m.heads_outermost) for m in module.modules() if hasattr(m, "heads_outermost")]


def test_heads_and_the_order_of_attention_can_be_set_beside_what_the_file_says() -> None:
    chosen = {"num_head_channels": 16, "use_new_attention_order": True}
    state = models.create("guided-diffusion-unet", {**SMALL, **chosen}).state_dict()
    assert set(_attention(models.load(state).module)) == {(1, True)}
    for overrides in (chosen, {"unet": chosen}):
        assert set(_attention(models.load(state, config=overrides).module)) == {(4, False)}


def test_the_way_up_may_have_heads_of_its_own() -> None:
    config = {**SMALL, "num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}
    assert [heads for heads, _ in _attention(models.create("guided-diffusion-unet", config))] == [2, 2, 4, 4]
