"""What networks can be trained for: each objective asks for what it says, and refuses networks that it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from comfyui_mend import models
from comfyui_mend.engine import classify, host, loaded, pictures, zero_shot
from comfyui_mend.errors import CheckpointError, ConfigError, InputError
from comfyui_mend.training import finetune
from comfyui_mend.training.objectives import rcot, recipes
from comfyui_mend.training.objectives.base import Batch, Pass, Weighted

from .conftest import SMALL
from .training_cases import LABELS, NAFNET, RCOT, batch, network, restorer, tuner


def test_a_sum_of_objectives_runs_the_network_once():
    net = network(restorer())
    calls = []
    net.module.register_forward_hook(lambda *_: calls.append(1))
    both = Weighted(((recipes.PixelObjective("L1", 0.0), 2.0), (recipes.PixelObjective("squared", 0.0), 3.0)))
    method = both.start(net, LABELS, 32)
    run = Pass(net, batch(), torch.Generator())
    loss, _ = method.loss(run)
    difference = run.restored - run.batch.clean
    assert len(calls) == 1
    assert torch.allclose(loss, 2 * difference.abs().mean() + 3 * difference.square().mean())


def test_routing_is_for_routed_networks_and_knows_complexity():
    with pytest.raises(ConfigError, match="MoCE-IR"):
        recipes.RoutingObjective().start(network(restorer()), LABELS, 32)
    losses = []
    for complexity in (False, True):
        net = network(restorer("moce-ir", SMALL))
        method = recipes.RoutingObjective(complexity).start(net, LABELS, 32)
        losses.append(float(method.loss(Pass(net, batch(), torch.Generator().manual_seed(0)))[0].detach()))
    assert losses[0] != losses[1]


def test_any_network_gets_an_uncertainty_head_that_is_not_part_of_the_result(tmp_path):
    one = tuner(tmp_path, recipes.UncertaintyObjective())
    head = [p.clone() for p in one.method.head.parameters()]
    result = one.train()
    assert any(not torch.equal(a, b) for a, b in zip(head, one.method.head.parameters(), strict=True))
    assert set(result.module.state_dict()) == set(restorer().module.state_dict())


def test_a_network_with_its_own_uncertainty_head_uses_that():
    case = json.loads((Path(__file__).parent / "data/parity/tur-uformer-small/case.json").read_text())
    given = restorer("tur", case["config"])
    net, size = network(given), finetune.crop_size(given, 32)
    method = recipes.UncertaintyObjective().start(net, LABELS, size)
    assert method.head is None and net.own_uncertainty
    loss, parts = method.loss(Pass(net, batch(3, size), torch.Generator()))
    loss.backward()
    assert next(p for n, p in net.module.named_parameters() if "var_conv" in n).grad.abs().sum() > 0
    assert parts["uncertainty"] > 0


def test_published_task_lists_take_our_names_and_refuse_others():
    start = recipes.UncertaintyObjective("7task").start
    net = network(restorer())
    method = start(net, ("low-light", "motion-blur", "noise"), 32)
    assert [method.tasks[n] for n in ("low-light", "motion-blur", "noise")] == ["dark", "blur", "noise"]
    assert recipes.UncertaintyObjective("3task").start(net, ("noise", "rain"), 32).criterion.accumulate
    assert not recipes.UncertaintyObjective("3task", False).start(net, ("rain",), 32).criterion.accumulate
    with pytest.raises(InputError, match="snow"):
        start(net, ("snow",), 32)


SWINIR = {"embed_dim": 12, "depths": (1,) * 6, "num_heads": (3,) * 6, "window_size": 4}


@pytest.mark.parametrize("system, config", [("dcpt", NAFNET), ("dcpt", SWINIR), ("moce-ir", SMALL), ("da-rcot", RCOT)])
def test_classification_reads_decoders_and_teaches_the_network(system, config):
    net = network(restorer(system, config))
    method = recipes.ClassificationObjective(blocks=1).start(net, LABELS, 32)
    dims = [b[0].conv1.in_channels for b in method.net_dc.bottleneck_layers]
    loss, parts = method.loss(Pass(net, batch(), torch.Generator().manual_seed(0)))
    loss.backward()
    first = next(p for n, p in net.module.named_parameters() if n.startswith(("intro", "patch_embed", "conv_first")))
    assert len(dims) >= 2 and first.grad.abs().sum() > 0 and 0 <= parts["right"] <= 1


def test_only_the_classifier_learns_where_asked(tmp_path):
    one = tuner(tmp_path, recipes.ClassificationObjective("classifier", blocks=1), steps=2)
    before = {k: v.clone() for k, v in one.module.state_dict().items()}
    classes = one.method.net_dc.fc.weight.clone()
    one.train()
    # Weight decay alone does not move parameters that have no gradient.
    assert all(torch.equal(v, one.module.state_dict()[k]) for k, v in before.items())
    assert not torch.equal(classes, one.method.net_dc.fc.weight)


@pytest.mark.parametrize("system, config", [("dcpt", NAFNET), ("dcpt", SWINIR), ("moce-ir", SMALL)])
def test_what_a_classifier_learned_is_written_beside_the_network(system, config, tmp_path):
    one = tuner(tmp_path, recipes.ClassificationObjective(blocks=1), restorer(system, config), steps=2)
    one.train()
    made = models.load(tmp_path / "classifier.safetensors")
    assert made.architecture.kind == "classifier" and tuple(made.config["labels"]) == LABELS
    alone = system == "moce-ir"  # it shows no maps to a classifier outside training
    head = made.module if alone else made.module.net_dc
    assert json.loads(made.metadata["training"])["objective"]["kind"] == "dcpt"
    for name, value in one.method.net_dc.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value.half().float(), atol=0, rtol=0)
    assert made.config.get("stages", "") == (", ".join(one.method.names) if alone else "")
    if not alone:
        assert made.multiple_of == one.restorer.multiple_of
        assert all(
            tuple(v) == tuple(made.config["net_g"][k]) for k, v in config.items() if isinstance(v, (tuple, list))
        )
        image = batch().damaged
        with torch.no_grad():
            expected = one.method.net_dc(one.module.decoder_features(image), image)
        torch.testing.assert_close(made.module(image), expected, atol=2e-3, rtol=2e-3)


def test_guidance_moves_the_features_towards_the_class_and_leaves_the_classifier(tmp_path):
    learned = tuner(tmp_path / "a", recipes.ClassificationObjective("classifier", blocks=1), steps=2)
    learned.train()
    file = str(tmp_path / "a" / "classifier.safetensors")
    for target in ("rain", "2"):
        goal = recipes.ClassifierGuidanceObjective(file, target, pixel=0.0)
        one = tuner(tmp_path / target, goal, steps=12)
        before = {k: v.clone() for k, v in one.method.net_dc.state_dict().items()}
        image = batch().damaged

        def sure(one=one, image=image):
            with torch.no_grad():
                return one.method.net_dc(one.module.decoder_features(image), image).log_softmax(1)[:, one.method.target]

        first = sure()
        one.train()
        assert (sure() > first).all()
        assert all(torch.equal(v, one.method.net_dc.state_dict()[k]) for k, v in before.items())
    assert one.provenance()["objective"]["classifier"] == "classifier.safetensors"


def test_guidance_adds_the_difference_to_the_clean_picture():
    net, one = network(restorer()), batch()
    dims = [f.shape[1] for f in net.module.decoder_features(one.damaged)]
    head = restorer("dcpt", {"feature_dims": dims, "num_res_blocks": 1, "num_classes": 2, "labels": ("a", "b")})
    goal = recipes.ClassifierGuidanceObjective(head, "B", pixel=2.0, weight=3.0)
    loss, parts = goal.start(net, LABELS, 32).loss(Pass(net, one, torch.Generator()))
    logits = head.module(net.module.decoder_features(one.damaged), one.damaged)
    expected = -logits.log_softmax(dim=1)[:, 1].mean()
    torch.testing.assert_close(parts["guidance"], expected)
    pixel = (net.module(one.damaged) - one.clean).abs().mean()
    torch.testing.assert_close(loss, 2 * pixel + 3 * expected)


def test_labels_come_before_numbers():
    config = {"feature_dims": (5,), "num_res_blocks": 1, "num_classes": 3, "labels": ("1", "2", "rain")}
    head = restorer("dcpt", config)
    found = [recipes.ClassifierGuidanceObjective(head, t).head_and_target()[1] for t in ("1", "2", "0", "RAIN")]
    assert found == [0, 1, 0, 2]


def test_guidance_by_another_classifier_is_another_run(tmp_path):
    heads = []
    for seed, labels in enumerate((("a", "b"), ("b", "a"), ("a", "b"))):
        dims = [f.shape[1] for f in restorer().module.decoder_features(batch().damaged)]
        config = {"feature_dims": dims, "num_res_blocks": 1, "num_classes": 2, "labels": labels}
        head = restorer("dcpt", config)
        head.module.fc.bias.fill_(seed // 2)
        heads.append(recipes.ClassifierGuidanceObjective(head, "a"))
    tuner(tmp_path, heads[0], steps=1).train()
    assert tuner(tmp_path, heads[0]).resume()
    for other in heads[1:]:
        with pytest.raises(CheckpointError, match="objective"):
            tuner(tmp_path, other).resume()


def test_a_classifier_of_named_stages_says_which_and_is_read_by_them(tmp_path):
    one = tuner(tmp_path, recipes.ClassificationObjective(stages="decoder*", blocks=1), steps=1)
    one.train()
    made = models.load(tmp_path / "classifier.safetensors")
    assert made.config["stages"] == "decoder0, decoder1"
    method = recipes.ClassifierGuidanceObjective(made, "rain").start(network(restorer()), LABELS, 32)
    assert method.names == ["decoder0", "decoder1"]
    with pytest.raises(InputError, match="decoder0, decoder1"):
        classify.classify(loaded.wrap(made), batch().damaged, loaded.wrap(restorer()))


def test_long_labels_come_back(tmp_path):
    labels = ("downsample + motion-blur + defocus + low-light + noise + poisson + jpeg", "rain")
    config = {"feature_dims": (5,), "num_res_blocks": 1, "num_classes": 2, "labels": labels}
    finetune.write(restorer("dcpt", config), tmp_path / "long.safetensors")
    assert tuple(models.load(tmp_path / "long.safetensors").config["labels"]) == labels


def test_guidance_by_what_does_not_fit_says_so():
    net = network(restorer())
    other = restorer("dcpt", {"feature_dims": (5, 10), "num_res_blocks": 1, "num_classes": 2, "labels": ("a", "b")})
    with pytest.raises(InputError, match="another network|feature maps"):
        recipes.ClassifierGuidanceObjective(other, "a").start(net, LABELS, 32)
    with pytest.raises(InputError, match="no class 'c'; it knows a, b"):
        recipes.ClassifierGuidanceObjective(other, "c").start(net, LABELS, 32)
    with pytest.raises(InputError, match="none is given"):
        recipes.ClassifierGuidanceObjective(target="a").start(net, LABELS, 32)
    with pytest.raises(InputError, match="no degradation classifier"):
        recipes.ClassifierGuidanceObjective(restorer(), "a").start(net, LABELS, 32)


def test_stages_that_do_not_halve_or_exist_are_named():
    net = network(restorer("moce-ir", SMALL))
    with pytest.raises(ConfigError, match="half"):
        recipes.ClassificationObjective(stages="dec.*.2, refinement").start(net, LABELS, 32)
    with pytest.raises(ConfigError, match="nowhere"):
        recipes.ClassificationObjective(stages="nowhere").start(net, LABELS, 32)
    with pytest.raises(InputError, match="two"):
        recipes.ClassificationObjective().start(net, ("noise",), 32)


def test_transport_without_pairs_never_looks_at_the_twin():
    net = network(restorer("da-rcot", RCOT))
    method = recipes.TransportObjective(paired=False, width=4).start(net, LABELS, 32)
    assert method.wants_other
    one = batch()
    other = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    losses = []
    for clean in (one.clean, torch.zeros_like(one.clean)):
        torch.manual_seed(1)
        fresh = recipes.TransportObjective(paired=False, width=4).start(net, LABELS, 32)
        run = Pass(net, Batch(one.damaged, clean, one.labels, other), torch.Generator().manual_seed(0))
        fresh.prepare(run)
        losses.append(float(fresh.loss(run)[0].detach()))
    assert losses[0] == losses[1]


def test_transport_teaches_potential_and_network_apart():
    net = network(restorer("da-rcot", RCOT))
    method = recipes.TransportObjective(width=4, critic_rate=1e-3).start(net, LABELS, 32)
    run = Pass(net, batch(), torch.Generator().manual_seed(0))
    before = [p.clone() for p in method.critic.parameters()]
    parts = method.prepare(run)
    after = [p.clone() for p in method.critic.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) and parts["penalty"] > 0
    assert all(p.grad is None for p in net.module.parameters())
    loss, parts = method.loss(run)
    loss.backward()
    assert "contrastive" in parts and "L1" in parts
    assert all(torch.equal(a, b) for a, b in zip(after, method.critic.parameters(), strict=True))
    assert net.module.output.weight.grad.abs().sum() > 0 and method.groups() == []


def test_transport_needs_crops_that_the_potential_takes():
    with pytest.raises(ConfigError, match="32"):
        recipes.TransportObjective().start(network(restorer()), LABELS, 40)


def test_noise_has_numbers_of_its_own():
    ids = rcot.degradation_ids(("rain", "noise", "haze + noise", "haze"))
    assert ids["noise"] < 3 and ids["haze + noise"] < 3 and {ids["rain"], ids["haze"]} == {3, 4}


PRIORS = {
    "consistency network": (
        "guided-diffusion-unet",
        {
            "unet": {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": ()},
            "wrapper": "karras",
        },
    ),
    "Mend's own": ("noise-unet", {"channels": 3, "widths": [8, 8], "blocks": [1, 1], "embedding": 8}),
}


@pytest.mark.parametrize("consistency", [False, True])
@pytest.mark.parametrize("which", PRIORS)
def test_priors_learn_to_denoise_and_say_what_they_became(tmp_path, which, consistency):
    system, config = PRIORS[which]
    torch.manual_seed(0)
    given = models.Restorer(models.registry.get(system), config, models.create(system, config), which)
    result = tuner(tmp_path, recipes.DenoisingObjective(consistency), given, steps=2).train()
    trained = models.load(tmp_path / finetune.WEIGHTS)
    assert trained.architecture.kind == "prior"
    assert any(not torch.equal(v, given.module.state_dict()[k]) for k, v in result.module.state_dict().items())
    kind = "consistency" if consistency else "EDM"
    assert zero_shot.network_prior(loaded.wrap(trained)).kind == kind


def test_the_shipped_prior_is_trained_as_the_denoiser_that_it_is(tmp_path):
    given = models.load(host.PACK / "weights" / "mend-prior-starter.safetensors")
    method = recipes.DenoisingObjective().start(network(given), LABELS, 32)
    photo = Image.open(host.PACK / "workflows" / "inputs" / "red_panda.jpg").crop((200, 100, 328, 228))
    picture = pictures.from_pil(photo)[None]
    error = (method.restore(network(given), picture).detach() - picture).square().mean()
    assert float(error) < 0.1 * (method.settings.shown / 2) ** 2


def test_objectives_refuse_networks_of_another_kind():
    with pytest.raises(ConfigError, match="codec"):
        recipes.RateDistortionObjective().start(network(restorer()), LABELS, 32)
    with pytest.raises(ConfigError, match="prior"):
        recipes.DenoisingObjective().start(network(restorer()), LABELS, 32)


@pytest.mark.parametrize("kind", ["codec", "prior"])
def test_objectives_for_restorers_name_the_one_that_is_for_others(kind):
    file = {"codec": "mend-aio-codec-starter", "prior": "mend-prior-starter"}[kind]
    net = network(models.load(host.PACK / "weights" / f"{file}.safetensors"))
    for made in (recipes.PixelObjective(), recipes.UncertaintyObjective(), recipes.TransportObjective(width=4)):
        with pytest.raises(ConfigError, match="Rate-Distortion" if kind == "codec" else "Denoising"):
            made.start(net, LABELS, 32)


def test_a_potential_that_was_trained_is_kept(tmp_path):
    one = tuner(tmp_path, recipes.TransportObjective(width=4), restorer("da-rcot", RCOT), steps=2)
    one.train()
    made = models.load(tmp_path / "potential.safetensors")
    image = batch().damaged
    with torch.no_grad():
        torch.testing.assert_close(made.module(image), one.method.critic(image), atol=2e-3, rtol=2e-3)


def test_every_objective_describes_itself_as_json():
    for made in recipes.OBJECTIVES.values():
        assert json.loads(json.dumps(made().describe()))["kind"] == made.kind
    assert isinstance(recipes.default_objective(restorer("moce-ir", SMALL).module), Weighted)
