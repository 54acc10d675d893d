"""MambaIR: all generations by their keys, four-direction reading, any size."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import ConfigError
from comfyui_mend.models.mambair import raster_orders

FLAT, UNET = models.registry.get("mambair"), models.registry.get("mambair-unet")
SMALL = {"embed_dim": 30, "depths": (1, 1), "d_state": 3, "mlp_ratio": 1.2}
SMALL_UNET = {"dim": 30, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "mlp_ratio": 1.2}
PARAMETERS = {
    **{
        "SR-x3": 20_606_503,
        "CAR": 15_771_025,
        "light-x4": 924_492,
        "light-x2-gen1": 1_363_320,
        "light-x2-gen0": 933_672,
    },
    **{"real denoising": 26_779_480, "real denoising, legacy": 31_506_136},
}


@pytest.mark.parametrize("architecture", [FLAT, UNET], ids=lambda a: a.id)
def test_every_generation_is_told_by_its_keys_and_shapes(architecture) -> None:
    for name, released in architecture.variants.items():
        shallow = {"depths": (2, 1)} if architecture is FLAT else {"num_blocks": (1, 2, 1, 1)}
        config = {**released, **shallow}
        with torch.device("meta"):
            state = models.create("mambair", config).state_dict()
        assert models.registry.detect(state) is architecture, name
        found = architecture.config_from_state_dict(state)
        assert {k: found[k] for k in config} == config, name
        with torch.device("meta"):
            again = models.create("mambair", found).state_dict()
        assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_released_sizes_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        module = models.create("mambair", {**FLAT.variants, **UNET.variants}[name])
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]


def test_option_files_of_older_generations_build_the_older_network() -> None:
    old = {"embed_dim": 60, "depths": (1,), "d_state": 16, "upsampler": "pixelshuffledirect", "img_size": 64}
    for mlp_ratio, generation in ((1.5, 1), (1.2, 0)):
        with torch.device("meta"):
            state = models.create("mambair", {**old, "mlp_ratio": mlp_ratio}).state_dict()
            named = models.create("mambair", {**old, "mlp_ratio": mlp_ratio, "arch": f"MambaIR_gen{generation}"})
        assert FLAT.config_from_state_dict(state)["light"] == generation
        assert list(named.state_dict()) == list(state)
    with torch.device("meta"):
        current = models.create("mambair", {**old, "mlp_ratio": 1.2, "arch": "MambaIR"})
    assert FLAT.config_from_state_dict(current.state_dict())["light"] == 2


def test_the_four_directions_are_rows_columns_and_both_backwards() -> None:
    assert raster_orders(2, 3, device=torch.device("cpu")).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


@pytest.mark.parametrize(
    "config",
    [
        *({**SMALL, "upsampler": "pixelshuffledirect", "upscale": 3, "light": light} for light in (0, 1, 2)),
        {**SMALL, "upsampler": "pixelshuffle", "upscale": 4},
        {**SMALL, "upsampler": "nearest+conv", "upscale": 4},
        {**SMALL, "upsampler": "", "upscale": 1, "in_chans": 1, "resi_connection": "3conv"},
        SMALL_UNET,
    ],
    ids=["light 0", "light 1", "light 2", "pixelshuffle", "nearest+conv", "same size", "u-net"],
)
def test_any_size_is_restored_to_scale(config) -> None:
    module = models.create("mambair", config).eval().requires_grad_(False)
    architecture = models.registry.detect(module.state_dict())
    found = architecture.config_from_state_dict(module.state_dict())
    assert {k: found[k] for k in config} == config
    restorer = models.Restorer(architecture, found, module)
    for height, width in ((1, 1), (5, 2), (11, 18)):
        restored = restorer(torch.rand(2, config.get("in_chans", 3), height, width))
        assert restored.shape[-2:] == (height * restorer.scale, width * restorer.scale)
        assert restored.isfinite().all()


def test_every_parameter_learns() -> None:
    module = models.create("mambair", {**SMALL, "upsampler": "pixelshuffledirect"})
    module(torch.rand(2, 3, 8, 12)).square().mean().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_impossible_settings_are_refused() -> None:
    for config, message in (
        ({"embed_dim": 16}, "16 channels are too few"),
        ({"light": 3, "upsampler": "pixelshuffledirect"}, "generation 3 is unknown"),
        ({"arch": "VMamba"}, "arch is 'VMamba'"),
        ({"scan_len": 4}, "unexpected keyword"),
    ):
        with pytest.raises(ConfigError, match=message):
            models.create("mambair", {**SMALL, **config})
