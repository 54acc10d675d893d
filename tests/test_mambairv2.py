"""MambaIRv2: routing modes, shifted windows, configuration from shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, ConfigError, InputError
from comfyui_mend.models import mambairv2
from comfyui_mend.models.mambairv2 import RouteMode

ARCHITECTURE = models.registry.get("mambairv2")
SMALL = {
    **{"embed_dim": 12, "depths": (2,), "num_heads": (2,), "d_state": 3, "mlp_ratio": 1.0, "inner_rank": 4},
    **{"num_tokens": 6, "window_size": 4, "upsampler": "pixelshuffledirect", "upscale": 2},
}
PARAMETERS = {
    "light-x3": 780_587,
    "small-x2": 9_621_935,
    "base-x4": 23_050_713,
    "large-x2": 34_090_523,
    "CAR": 22_651_705,
}


@pytest.fixture
def restorer() -> models.Restorer:
    module = models.create("mambairv2", SMALL).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and not name.endswith("A_logs"):
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return models.Restorer(ARCHITECTURE, ARCHITECTURE.config_from_state_dict(module.state_dict()), module)


def test_every_hyper_parameter_is_found_in_the_shapes() -> None:
    for name, released in ARCHITECTURE.variants.items():
        config = {**released, "depths": released["depths"][:2], "num_heads": released["num_heads"][:2]}
        with torch.device("meta"):
            state = models.create("mambairv2", config).state_dict()
        assert models.registry.detect(state) is ARCHITECTURE, name
        found = ARCHITECTURE.config_from_state_dict(state)
        assert {k: found[k] for k in config} == config, name
    unusual = {**SMALL, "num_heads": (3,), "light": False, "convffn_kernel_size": 3, "qkv_bias": False, "in_chans": 1}
    with torch.device("meta"):
        state = models.create("mambairv2", unusual).state_dict()
    found = ARCHITECTURE.config_from_state_dict(state)
    assert {k: found[k] for k in unusual} == unusual


@pytest.mark.parametrize("name", ["light-x3", "small-x2", "base-x4", "large-x2", "CAR"])
def test_the_released_sizes_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        module = models.create("mambairv2", ARCHITECTURE.variants[name])
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]
    assert ARCHITECTURE.config_from_state_dict(module.state_dict())["depths"] == ARCHITECTURE.variants[name]["depths"]


def test_any_size_is_restored_to_scale_and_padded_as_a_mirror(restorer) -> None:
    for height, width in ((1, 1), (2, 9), (4, 4), (11, 21)):
        image = torch.rand(2, 3, height, width)
        restored = restorer(image)
        assert restored.shape == (2, 3, 2 * height, 2 * width) and restored.isfinite().all()
        padding = ((0, 0), (0, 0), (0, -height % 4), (0, -width % 4))
        mirrored = torch.from_numpy(np.pad(image.numpy(), padding, mode="symmetric"))
        assert torch.equal(restorer(mirrored)[..., : 2 * height, : 2 * width], restored)


@pytest.mark.parametrize("mode", mambairv2.ROUTE_MODES)
def test_a_batch_routes_each_image_by_itself(restorer, mode: str) -> None:
    images = torch.rand(3, 3, 9, 10)
    route = RouteMode(mode, seed=5, samples=2)
    alone = torch.cat([restorer(image[None], route=route) for image in images])
    assert (restorer(images, route=route) - alone).abs().max() < 1e-4  # of values up to 4


def test_a_seed_decides_the_draws_and_the_mean_is_the_mean_of_seeds(restorer) -> None:
    image = torch.rand(1, 3, 12, 12)
    draws = [restorer(image, route=RouteMode("sample", seed=seed)) for seed in (7, 8, 9)]
    assert torch.equal(draws[0], restorer(image, route=RouteMode("sample", seed=7)))
    assert (draws[0] - draws[1]).abs().max() > 1e-6
    mean = restorer(image, route=RouteMode("mean", seed=7, samples=3))
    assert torch.allclose(mean, sum(draws) / 3, atol=1e-6)
    assert torch.equal(restorer(image), restorer(image, route=RouteMode("argmax", seed=3)))


def test_samples_follow_the_route_probabilities() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5]).expand(1, 40_000, 4)
    classes = mambairv2.sampled(1)(logits)
    frequency = torch.bincount(classes.flatten(), minlength=4) / 40_000
    assert torch.allclose(frequency, logits[0, 0].softmax(-1), atol=0.01)
    certain = torch.full((1, 500, 3), -1e4)
    certain[..., 2] = 0.0
    assert (mambairv2.sampled(1)(certain) == 2).all()


def test_given_gumbel_noise_decides_like_the_published_code() -> None:
    logits, noise = torch.randn(2, 50, 4), torch.randn(2, 50, 4)
    expected = (logits.log_softmax(-1) + noise).argmax(-1)
    assert torch.equal(mambairv2.perturbed([noise])(logits), expected)


def test_shifted_windows_do_not_see_across_the_border() -> None:
    module = mambairv2.WindowAttention(8, 2, window=4, shift=2).eval().requires_grad_(False)
    index = mambairv2.relative_position_index(4)
    qkv = torch.randn(1, 8, 12, 24)
    changed = qkv.clone()
    changed[:, :2] += 10.0  # the top rows, which the shift rolls next to the bottom ones
    difference = (module(changed, index) - module(qkv, index)).abs().amax(dim=(0, 2, 3))
    assert (difference[:2] > 1e-3).all() and difference[2:].max() == 0


def test_windows_attend_as_the_formula_says() -> None:
    """Against attention written out over all pairs of pixels of the picture, masked to windows."""
    heads, window, height, width, dim = 3, 4, 8, 12, 9
    module = mambairv2.WindowAttention(dim, heads, window, shift=2).eval().requires_grad_(False)
    module.proj.weight.copy_(torch.eye(dim))
    module.proj.bias.zero_()
    torch.nn.init.normal_(module.relative_position_bias_table)
    qkv = torch.randn(2, height, width, 3 * dim)
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    cell = torch.stack([(y + 2) // window, (x + 2) // window], dim=-1)  # windows of the shifted grid, cut at the border
    together = (cell[:, None] == cell).all(-1)
    dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
    rows = (dy * (2 * window - 1) + dx).clamp(0, (2 * window - 1) ** 2 - 1)
    bias = module.relative_position_bias_table[rows].permute(2, 0, 1)
    query, key, value = qkv.flatten(1, 2).unflatten(-1, (3, heads, 3)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * 3**-0.5 + bias
    mixed = scores.masked_fill(~together, float("-inf")).softmax(-1) @ value
    expected = mixed.transpose(1, 2).flatten(2).view(2, height, width, dim)
    assert torch.allclose(module(qkv, mambairv2.relative_position_index(window)), expected, atol=1e-5)


def test_the_classes_of_every_layer_can_be_looked_at(restorer) -> None:
    image = torch.rand(2, 3, 7, 9)
    classes = restorer.module.routes(image)
    assert classes.shape == (2, 2, 7, 9) and 0 <= classes.min() and classes.max() < 6
    assert len(classes.unique()) > 1
    drawn = restorer.module.routes(image, mambairv2.sampled(3))
    assert not torch.equal(drawn, classes)


def test_every_parameter_learns_the_routes_included() -> None:
    module = models.create("mambairv2", SMALL)
    with torch.inference_mode():
        module.eval()(torch.rand(1, 3, 8, 8))
    module.train()(torch.rand(2, 3, 8, 8)).square().mean().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert module.layers[0].residual_group.layers[0].assm.route[2].weight.grad.abs().max() > 0


def test_half_precision_runs(restorer) -> None:
    image = torch.rand(1, 3, 8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert restorer(image).isfinite().all()
    restorer.module.to(torch.bfloat16)
    assert restorer(image.bfloat16()).isfinite().all()


def test_impossible_settings_and_absurd_files_are_refused() -> None:
    for config, message in (
        ({"num_heads": (5,)}, "divisor of 12"),
        ({"num_heads": (2, 2)}, "one entry a group"),
        ({"embed_dim": 14, "num_heads": (2,), "mlp_ratio": 1.08}, "must be even"),
        ({"arch": "MambaIR"}, "arch is 'MambaIR'"),
        ({"heads": 3}, "unexpected keyword"),
    ):
        with pytest.raises(ConfigError, match=message):
            models.create("mambairv2", {**SMALL, **config})
    with pytest.raises(InputError, match="route mode is 'best'"):
        RouteMode("best")
    with pytest.raises(InputError, match="samples is 0"):
        RouteMode("mean", samples=0)
    with torch.device("meta"):
        state = models.create("mambairv2", SMALL).state_dict()
        state["layers.0.residual_group.layers.0.win_mhsa.relative_position_bias_table"] = torch.empty(50, 2)
    with pytest.raises(CheckpointError, match="belongs to no window"):
        ARCHITECTURE.config_from_state_dict(state)
