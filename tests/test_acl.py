"""The re-designed ACL and MILA's block."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, ConfigError
from comfyui_mend.models import acl

SMALL = {"channels": 8, "blocks": (1, 1, 1), "head_dim": 4, "lem_ratio": 2.0, "dilations": (1, 2, 4)}


def _create(**changes) -> torch.nn.Module:
    return models.create("acl", {**SMALL, **changes}).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "config",
    [
        *acl.VARIANTS.values(),
        {**SMALL, "head_dim": 32},
        {**SMALL, "head_dim": 32, "lepe": False, "mlp_ratio": 2.0, "blocks": (1, 2, 3)},
        {**SMALL, "head_dim": 32, "lem_ratio": 1.5, "dilations": (1, 2)},
        {**SMALL, "head_dim": 32, "channels": 12, "lem_ratio": 1.3, "mlp_ratio": 1.7},
    ],
)
def test_every_setting_is_read_back_from_the_shapes(config: dict) -> None:
    architecture = models.registry.get("acl")
    with torch.device("meta"):
        state = architecture.build(config).state_dict()
        assert models.registry.detect(state) is architecture
        read = architecture.config_from_state_dict(state)
        again = models.create("acl", read).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
    assert {k: read[k] for k in config} == dict(config)


@pytest.mark.parametrize("key", ["mend.config", "acl_config"])
def test_what_shapes_do_not_say_comes_from_the_metadata(key: str, tmp_path) -> None:
    module = _create(dilations=(1, 3, 5), rope=False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    config = {**SMALL, "dilations": (1, 3, 5), "rope": False}
    file, x = tmp_path / "acl.safetensors", torch.rand(1, 3, 16, 20)
    save_file(module.state_dict(), str(file), {key: json.dumps(config)})
    torch.testing.assert_close(models.load(file)(x), module(x))


@pytest.mark.parametrize(("variant", "count"), [("S", 3_487_843), ("B", 7_587_987)])
def test_the_variants_have_the_sizes_they_are_specified_with(variant: str, count: int) -> None:
    with torch.device("meta"):
        module = models.create("acl", acl.VARIANTS[variant])
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 30)])
def test_any_size_comes_back_in_its_size(size: tuple[int, int]) -> None:
    out = models.load(_create().state_dict())(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, *size)
    assert out.isfinite().all()


def test_attention_reaches_across_the_whole_picture() -> None:
    """Which is why tiles cannot be equal to the whole, and why the architecture says so."""
    module = _create()
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    x = torch.rand(1, 3, 96, 96)
    changed = x.clone()
    changed[..., -4:, -4:] += 1
    assert (module(changed) - module(x))[..., :4, :4].abs().max() > 1e-6
    assert models.registry.get("acl").global_statistics


def test_bfloat16_stays_close() -> None:
    module, x = _create(), torch.rand(1, 3, 32, 32)
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (module(x).float() - want).abs().max() < 0.03
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_every_parameter() -> None:
    module = models.create("acl", SMALL)
    module(torch.rand(2, 3, 16, 16)).square().mean().backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_it_says_that_it_is_not_the_official_network() -> None:
    architecture = models.registry.get("acl")
    assert "re-designed" in architecture.title
    assert "own design" in architecture.paper


def test_settings_that_cannot_work_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        _create(channels=6)
    with pytest.raises(ConfigError, match="do not split"):
        _create(channels=20, head_dim=6)
    state = {k: v.to("meta") for k, v in _create().state_dict().items()}
    with pytest.raises(CheckpointError):
        models.load({k: v for k, v in state.items() if not k.startswith("decoder.2")})


def test_milas_block_loads_with_and_without_its_rotations() -> None:
    config = {"dim": 32, "input_resolution": (6, 5), "num_heads": 1, "mlp_ratio": 2.0}
    module = models.create("acl", config).eval()
    x = torch.randn(1, 9, 7, 32)
    loaded = models.load(module.state_dict())
    assert loaded.architecture.id == "mila-block"
    assert {k: loaded.config[k] for k in config} == config
    torch.testing.assert_close(loaded.module(x), module(x))
