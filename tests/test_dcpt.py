"""DCPT's networks, its classifier and its pre-training step."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, ConfigError, InputError
from comfyui_mend.models import dcpt_classifier
from comfyui_mend.models.layers.attention import transposed_attention
from comfyui_mend.models.layers.pooling import local_mean
from comfyui_mend.models.layers.window import window_partition, window_reverse
from comfyui_mend.training.objectives.dcpt import dcpt_step, focal_loss

IDS = ("nafnet", "dcpt-swinir", "dcpt-restormer", "restormer", "promptir", "dcpt-classifier")
NAFNET = {"width": 8, "enc_blk_nums": (1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1)}
SWINIR = {"embed_dim": 12, "depths": (1, 2, 1, 1, 1, 1), "num_heads": (3,) * 6, "window_size": 4}
RESTORMER = {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 2, 4)}
PROMPTIR = {"dim": 48, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 4, 8)}
CLASSIFIER = {"feature_dims": (8, 16), "num_res_blocks": 1, "num_classes": 5}
PAIR = {"backbone": "nafnet", "mode": "dcpt", "net_g": NAFNET, "net_dc": CLASSIFIER, "hook_prefix": "decoder"}
SMALL = {"nafnet": NAFNET, "dcpt-swinir": SWINIR, "dcpt-restormer": RESTORMER, "restormer": RESTORMER}


def _filled(architecture: str, config: dict) -> torch.nn.Module:
    """A network every parameter of which has an effect (published initialisations are partly zero)."""
    module = models.create(architecture, config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith(("beta", "gamma")):
            parameter.normal_(std=0.3)
    return module


def _restorer(architecture: str, config: dict | None = None) -> models.Restorer:
    config = SMALL[architecture] if config is None else config
    return models.Restorer(models.registry.get(architecture), config, _filled(architecture, config))


def _meta(architecture: str, config: dict) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return models.create(architecture, config).state_dict()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (NAFNET, "NAFNet"),
        (SWINIR, "SwinIR"),
        (RESTORMER, "Restormer"),
        ({**PROMPTIR, "ffn_expansion_factor": 2.66, "LayerNorm_type": "BiasFree"}, "Restormer"),
        (PROMPTIR, "PromptIR"),
        (CLASSIFIER, "DegradationClassifier"),
        (PAIR, "ClassifiedNetwork"),
    ],
)
def test_the_settings_choose_among_the_networks_of_the_system(config, name):
    with torch.device("meta"):
        assert type(models.create("dcpt", config)).__name__ == name


@pytest.mark.parametrize(("architecture", "variant"), [(i, v) for i in IDS for v in models.registry.get(i).variants])
def test_every_released_setting_is_read_back_from_its_shapes(architecture, variant):
    registered = models.registry.get(architecture)
    config = registered.variants[variant]
    state = _meta(architecture, config)
    assert models.registry.detect(state) is registered
    found = registered.config_from_state_dict(state)
    known = {k: v for k, v in config.items() if k not in registered.metadata_keys}
    assert {k: found[k] for k in known} == known
    rebuilt = _meta(architecture, found)
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in state.items()}


def test_a_classifier_with_its_network_is_read_back_from_its_shapes():
    state = _meta("dcpt", PAIR)
    found = models.registry.detect(state)
    assert found.id == "dcpt-classified-network"
    config = found.config_from_state_dict(state)
    assert config["net_g"]["enc_blk_nums"] == (1, 1) and config["net_dc"]["feature_dims"] == (8, 16)
    assert _meta("dcpt", config).keys() == state.keys()


def test_original_nafnet_names_load_as_dcpts():
    state = _meta("nafnet", NAFNET)
    original = {k.replace("decoder", "decoders."): v for k, v in state.items()}
    assert original.keys() != state.keys()
    assert models.registry.get("nafnet").prepare_state_dict(original).keys() == state.keys()


def test_promptirs_dead_layers_and_prefix_are_dropped():
    state = _meta("promptir", PROMPTIR)
    original = {f"net.{k}": v for k, v in state.items()}
    original |= {f"net.chnl_reduce{i}.weight": torch.empty(1, device="meta") for i in (1, 2, 3)}
    original |= {f"net.reduce_noise_channel_{i}.weight": torch.empty(1, device="meta") for i in (1, 2, 3)}
    assert models.registry.get("promptir").prepare_state_dict(original).keys() == state.keys()


@pytest.mark.parametrize("architecture", SMALL)
def test_a_released_file_loads_out_of_its_wrapper(architecture, tmp_path):
    module = _filled(architecture, SMALL[architecture])
    state = {f"module.{k}": v for k, v in module.state_dict().items()}
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save({"params": zeros, "params_ema": state}, tmp_path / "net_g_latest.pth")
    given = {k: v for k, v in SMALL[architecture].items() if k in ("num_heads", "window_size")}
    restorer = models.load(tmp_path / "net_g_latest.pth", config=given)
    assert restorer.architecture.id == architecture
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(restorer(image), module(image))


def test_the_name_of_a_released_file_tells_its_pooling(tmp_path):
    torch.save({"params_ema": _filled("nafnet", NAFNET).state_dict()}, tmp_path / "nafnet_dcpt_cdd.pth")
    (tmp_path / "mine.pth").write_bytes((tmp_path / "nafnet_dcpt_cdd.pth").read_bytes())
    assert models.load(tmp_path / "nafnet_dcpt_cdd.pth").module.train_size == (128, 128)
    assert models.load(tmp_path / "nafnet_dcpt_cdd.pth", config={"train_size": None}).module.train_size is None
    assert models.load(tmp_path / "mine.pth").module.train_size is None


def test_a_classifier_with_its_network_loads_with_its_labels(tmp_path):
    pair = models.create("dcpt", {**PAIR, "net_dc": {**CLASSIFIER, "num_classes": 3}})
    labels = {"labels": ["clean", "noise", "rain"]}
    metadata = {"mend.architecture": "dcpt-classified-network", "mend.config": json.dumps(labels)}
    save_file(pair.state_dict(), tmp_path / "classifier.safetensors", metadata=metadata)
    restorer = models.load(tmp_path / "classifier.safetensors")
    assert restorer.architecture.kind == "classifier" and list(restorer.config["labels"]) == labels["labels"]
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(restorer.module(image), pair(image))
    with pytest.raises(InputError, match="classifier"):
        restorer(image)


def test_a_descendant_of_restormer_is_not_taken_for_it():
    state = _meta("restormer", RESTORMER)
    assert models.registry.get("restormer").detect(state)
    assert not models.registry.get("restormer").detect({**state, "prompt.weight": torch.empty(1, device="meta")})


def test_a_dual_pixel_restormer_is_refused_by_name():
    state = {**_meta("restormer", RESTORMER), "skip_conv.weight": torch.empty(16, 8, 1, 1, device="meta")}
    with pytest.raises(CheckpointError, match="dual-pixel"):
        models.registry.get("restormer").config_from_state_dict(state)


def test_settings_that_cannot_work_are_refused():
    for architecture, change in (
        ("nafnet", {"dec_blk_nums": (1,)}),
        ("dcpt-swinir", {"num_heads": (5,) * 6}),
        ("dcpt-swinir", {"upscale": 2}),
        ("dcpt-restormer", {"heads": (3, 2, 2, 4)}),
        ("dcpt-restormer", {"colour": 1}),
    ):
        with pytest.raises(ConfigError):
            models.create(architecture, {**SMALL[architecture], **change})
    with pytest.raises(ConfigError):
        models.create("promptir", {**PROMPTIR, "dim": 32})


@pytest.mark.parametrize("architecture", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (5, 33), (37, 18)])
def test_any_size_comes_back_in_its_size(architecture, size):
    restored = _restorer(architecture)(torch.rand(2, 3, *size))
    assert restored.shape == (2, 3, *size) and torch.isfinite(restored).all()


@pytest.mark.parametrize("architecture", SMALL)
def test_half_precision_stays_close(architecture):
    restorer, image = _restorer(architecture), torch.rand(1, 3, 32, 32)
    full = restorer(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = restorer(image).float()
    assert (half - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("architecture", SMALL)
def test_images_of_a_batch_do_not_influence_each_other(architecture):
    restorer, images = _restorer(architecture), torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(restorer(images)[1:], restorer(images[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [(3, 5), (40, 4), (7, 40), (1, 1)])
def test_a_local_mean_is_the_mean_of_every_window(window):
    x = torch.rand(2, 3, 12, 16) + 100
    cut = (min(window[0], 12), min(window[1], 16))
    torch.testing.assert_close(local_mean(x, window), F.avg_pool2d(x, cut, stride=1), rtol=1e-6, atol=1e-4)


def test_local_pooling_changes_large_pictures_only():
    image = torch.rand(1, 3, 24, 40)
    module = _filled("nafnet", NAFNET)
    plain = module(image)
    torch.testing.assert_close(module(image, local_pooling=32), plain)  # windows of 48 pixels hold all of it
    local = module(image, local_pooling=8)
    assert (local - plain).abs().max() > 1e-4
    module.train_size = (8, 8)
    assert torch.equal(module(image), local) and torch.equal(module(image, local_pooling=0), plain)


def test_windows_are_put_back_where_they_were():
    x = torch.rand(2, 8, 12, 5)
    windows = window_partition(x, 4)
    assert torch.equal(windows[1], x[0, :4, 4:8].reshape(16, 5))
    assert torch.equal(window_reverse(windows, 4, 8, 12), x)


def test_swinir_wraps_around_the_border():
    module, image = _filled("dcpt-swinir", SWINIR), torch.rand(1, 3, 24, 24)
    changed = image.clone()
    changed[..., :4, :4] += 0.5
    assert (module(changed) - module(image))[..., -4:, -4:].abs().max() > 1e-6


def test_relu_attention_is_what_its_formula_says():
    query, key, value = torch.randn(3, 2, 4, 6, 5).unbind(0)
    temperature = torch.rand(2, 1, 1) + 0.5
    q, k, v = (t.reshape(2, 2, 2, 30) for t in (query, key, value))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * temperature
    expected = (F.relu(scores) @ v).reshape(2, 4, 6, 5)
    torch.testing.assert_close(transposed_attention(query, key, value, temperature, "relu"), expected)


def test_promptir_takes_the_mixture_it_is_given():
    module, image = _filled("promptir", PROMPTIR), torch.rand(1, 3, 16, 16)
    weights = module.prompt_weights(image)
    assert weights.shape == (1, 3, 5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 3))
    restored = module(image)
    torch.testing.assert_close(module(image, prompt_weights=weights), restored)
    one_hot = torch.eye(5)[torch.tensor([[0, 1, 2]])]
    assert (module(image, prompt_weights=one_hot) - restored).abs().max() > 1e-5


def test_decoder_features_come_highest_resolution_first():
    module = _filled("nafnet", NAFNET)
    assert [f.shape[1:] for f in module.decoder_features(torch.rand(1, 3, 16, 24))] == [(8, 16, 24), (16, 8, 12)]


def test_a_picture_is_classified_whatever_its_size():
    pair = models.create("dcpt", PAIR).eval().requires_grad_(False)
    for size in ((1, 1), (21, 40), (90, 70)):
        found = dcpt_classifier.classify(torch.rand(2, 3, *size), pair.net_g, pair.net_dc, multiple_of=4, window=32)
        assert found.labels == ("rain", "noise", "haze", "low light", "motion blur")
        assert found.embedding.shape == (2, 16)
        torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(2))


def test_a_small_picture_is_classified_by_the_logits_of_the_whole():
    pair, image = models.create("dcpt", PAIR).eval().requires_grad_(False), torch.rand(1, 3, 16, 16)
    found = dcpt_classifier.classify(image, pair.net_g, pair.net_dc, multiple_of=4)
    torch.testing.assert_close(found.probabilities, pair(image).softmax(dim=-1))


def test_windows_reach_every_corner_of_a_large_picture():
    parts = dcpt_classifier.windows(torch.arange(100.0 * 80).reshape(1, 1, 100, 80), 32, 3)
    assert len(parts) == 9 and all(p.shape[2:] == (32, 32) for p in parts)
    assert parts[0][0, 0, 0, 0] == 0 and parts[-1][0, 0, -1, -1] == 100 * 80 - 1


def test_swinirs_full_size_maps_are_classified():
    network = models.create("dcpt", SWINIR).eval().requires_grad_(False)
    classifier = models.create("dcpt", {"feature_dims": (12, 12, 12), "num_classes": 3, "downsample": True}).eval()
    found = dcpt_classifier.classify(torch.rand(1, 3, 20, 30), network, classifier, ("a", "b", "c"), multiple_of=4)
    assert found.label() in ("a", "b", "c")
    tokens = [torch.rand(1, 256, 12) for _ in range(3)]
    maps = [t.transpose(1, 2).reshape(1, 12, 16, 16) for t in tokens]
    torch.testing.assert_close(classifier(tokens), classifier(maps))


def test_a_classifier_of_another_network_says_so():
    network = models.create("dcpt", NAFNET).eval()
    with pytest.raises(InputError, match="another network"):
        dcpt_classifier.classify(
            torch.rand(1, 3, 16, 16), network, models.create("dcpt", {**CLASSIFIER, "feature_dims": (12, 16)})
        )
    with pytest.raises(InputError, match="feature maps"):
        dcpt_classifier.classify(
            torch.rand(1, 3, 16, 16), network, models.create("dcpt", {"feature_dims": (8, 16, 32)})
        )
    with pytest.raises(InputError, match="no decoder features"):
        dcpt_classifier.classify(torch.rand(1, 3, 16, 16), torch.nn.Identity(), models.create("dcpt", CLASSIFIER))


def test_focal_loss_without_focus_is_cross_entropy():
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, -100, 3, 2, 1])
    torch.testing.assert_close(focal_loss(logits, target, gamma=0.0), F.cross_entropy(logits, target))
    assert focal_loss(logits, target, gamma=2.0) < F.cross_entropy(logits, target)
    assert focal_loss(logits, torch.full((6,), -100)) == 0


def test_pretraining_reaches_both_networks_and_the_frozen_mode_only_one():
    pair = models.create("dcpt", PAIR)
    for module in pair.net_g.modules():  # zero as initialised: no gradient would pass
        if hasattr(module, "beta"):
            torch.nn.init.normal_(module.beta)
            torch.nn.init.normal_(module.gamma)
    degraded, clean, label = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), torch.tensor([0, 3])
    step = dcpt_step(pair.net_g, pair.net_dc, degraded, clean, label)
    torch.testing.assert_close(step.pixel, (pair.net_g(clean) - clean).abs().mean())
    step.total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in pair.net_g.parameters())
    pair.zero_grad()
    dcpt_step(pair.net_g, pair.net_dc, degraded, clean, label, mode="classifier").total.backward()
    assert all(p.grad is None for p in pair.net_g.parameters())
    assert pair.net_dc.fc.weight.grad.abs().max() > 0
    direct = dcpt_step(pair.net_g, pair.net_dc, degraded, clean, label, mode="direct")
    torch.testing.assert_close(direct.pixel, (pair.net_g(degraded) - clean).abs().mean())
    with pytest.raises(ConfigError):
        dcpt_step(pair.net_g, pair.net_dc, degraded, clean, label, mode="both")


def test_a_networks_own_id_takes_settings_that_its_system_could_not_tell_apart():
    config = {"dim": 48, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 4, 8)}
    with torch.device("meta"):
        assert type(models.create("dcpt-restormer", config)).__name__ == "Restormer"
        assert type(models.create("dcpt", config)).__name__ == "PromptIR"
