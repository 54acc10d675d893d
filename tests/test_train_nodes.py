"""Training on the graph: what is loaded stays as it is, runs can stop anywhere, and what comes out loads again."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.engine import folders, host, loaded, model_folder, tiling
from comfyui_mend.errors import Cancelled, CheckpointError, ConfigError, InputError
from comfyui_mend.nodes import classify as classify_nodes
from comfyui_mend.nodes import datasets as dataset_nodes
from comfyui_mend.nodes import input_range as input_range_nodes
from comfyui_mend.nodes import objectives as objective_nodes
from comfyui_mend.nodes import train as train_nodes
from comfyui_mend.nodes.api import ExecutionBlocker
from comfyui_mend.training import cli, cli_finetune, finetune, picture_files, trainer
from comfyui_mend.training.objectives import recipes
from comfyui_mend.training.objectives.base import Weighted

from .conftest import SMALL
from .test_tur import TRANSWEATHER
from .training_cases import LABELS, MOCE, NAFNET, RCOT, network, restorer, tuner


@pytest.fixture
def outputs(tmp_path):
    folders.set_folders(output=tmp_path / "output")
    yield tmp_path / "output"
    host.set_hooks()


# The trainer ----------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "pixel": (recipes.PixelObjective(), "dcpt", NAFNET),
    "TUR and routing": (
        Weighted(((recipes.UncertaintyObjective(), 1.0), (recipes.RoutingObjective(), 0.01))),
        "moce-ir",
        MOCE,
    ),
    "DCPT": (recipes.ClassificationObjective(blocks=1), "dcpt", NAFNET),
    "DA-RCOT": (recipes.TransportObjective(paired=False, width=4), "da-rcot", RCOT),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, name):
    objective, system, config = OBJECTIVES[name]
    given = restorer(system, config)
    whole = tuner(tmp_path / "a", objective, given).train()
    stopped = tuner(tmp_path / "b", objective, given)
    with pytest.raises(Cancelled):
        stopped.train(should_stop=lambda: stopped.progress.step == 2)
    assert (tmp_path / "b" / finetune.WEIGHTS).is_file()
    resumed = tuner(tmp_path / "b", objective, given)
    assert resumed.resume() and resumed.progress.step == 2
    again = resumed.train()
    moved = False
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[key]), key
        moved |= not torch.equal(value, given.module.state_dict()[key])
    assert moved and resumed.history == sorted(resumed.history)


def test_the_best_validated_weights_are_kept(tmp_path):
    one = tuner(tmp_path, steps=3, validate_steps=1)
    scores = iter([10.0, 30.0, 20.0])
    one.evaluate = lambda: {"noise": next(scores)}
    snapshots = []
    result = one.train(lambda t, v: snapshots.append({k: x.clone() for k, x in t.average.state_dict().items()}))
    assert one.progress.best == 30.0 and one.scores() == {"noise": 30.0}
    for key, value in result.module.state_dict().items():
        assert torch.equal(value, snapshots[1][key])
    one.keep = "last"
    for key, value in one.result().module.state_dict().items():
        assert torch.equal(value, snapshots[2][key])
    assert one.scores() == {"noise": 20.0}


def test_another_objective_cannot_take_over_a_run(tmp_path):
    one = tuner(tmp_path)
    one.step(), one.save()
    with pytest.raises(CheckpointError, match="start over"):
        tuner(tmp_path, recipes.PixelObjective("L1")).resume()


@pytest.mark.parametrize(
    ("system", "config", "objective", "frozen"),
    [
        ("dcpt", NAFNET, recipes.PixelObjective(), ("intro", "encoders.0", "ending")),
        ("moce-ir", MOCE, recipes.RoutingObjective(), ("patch_embed", "output")),
    ],
)
def test_frozen_parts_keep_their_weights_and_the_rest_learns(tmp_path, system, config, objective, frozen):
    given = restorer(system, config)
    one = tuner(tmp_path, objective, given, frozen=", ".join(frozen[:-1]) + f", {frozen[-1][:-1]}*")
    trained, before = one.train().module.state_dict(), given.module.state_dict()
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    kept = {name for name in before if name.startswith(tuple(f"{part}." for part in frozen))}
    assert changed and kept and not changed & kept
    assert one.provenance()["frozen"] == sorted(frozen)
    assert tuner(tmp_path, objective, given, frozen=", ".join(reversed(frozen))).resume(), "in another order"
    with pytest.raises(CheckpointError, match="frozen part"):
        tuner(tmp_path, objective, given).resume()


def test_a_frozen_encoder_moves_its_statistics_only(tmp_path):
    airnet = restorer("airnet", {"n_groups": 1, "n_blocks": 1, "n_feats": 16, "batch_size": 1})
    one = tuner(tmp_path, recipes.UncertaintyObjective(), airnet, frozen="E")
    trained, before = one.train().module.state_dict(), airnet.module.state_dict()
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    assert any("running_mean" in name and name.startswith("E.") for name in changed)
    assert not any(name.startswith("E.") and name.endswith(("weight", "bias")) for name in changed)
    assert any(name.startswith("R.") for name in changed)


@pytest.mark.parametrize(("names", "message"), [("nothing", "its parts are"), ("*", "is the whole network")])
def test_what_cannot_be_frozen_says_so(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        tuner(tmp_path, frozen=names)


def test_crops_are_raised_to_what_the_network_takes():
    assert finetune.crop_size(restorer(), 33) == 36
    assert finetune.crop_size(restorer("moce-ir", SMALL), 33) == 40


def test_what_cannot_be_trained_says_so():
    critic = restorer("da-rcot", {"kind": "potential", "patch_size": 32, "width": 4})
    with pytest.raises(InputError, match="critic"):
        finetune.trainable_copy(critic)


def test_runs_get_folders_of_their_own(tmp_path):
    assert finetune.run_folder(tmp_path, "a/../b", False).parent == tmp_path
    (tmp_path / "x_00001").mkdir(), (tmp_path / "x_00003").mkdir()
    assert finetune.run_folder(tmp_path, "x", True).name == "x_00003"
    assert finetune.run_folder(tmp_path, "x", False).name == "x_00004"
    assert finetune.run_folder(tmp_path, "y", True).name == "y_00001"


# On the graph ---------------------------------------------------------------------------------------------------------


def run_node(given: loaded.LoadedRestorer, objective=None, **options):
    """Train Restorer as a graph runs it: everything in inference mode."""
    with torch.inference_mode():
        photos = torch.rand(2, 48, 48, 3, generator=torch.Generator().manual_seed(0))
        data, preview, text = dataset_nodes.DatasetFromImages.execute(photos, "noise\nrain", shown=2, crop=32).args
        assert preview.shape[0] == 1 and preview.shape[-1] == 3 and "noise, rain" in text
        settings = {"steps": 3, "crop": 32, "batch": 2, **options}
        return train_nodes.TrainRestorer.execute(given, data, objective=objective, **settings).args


def test_training_inside_inference_mode_leaves_the_loaded_network_alone(moce, outputs):
    before = {k: v.clone() for k, v in moce.restorer.module.state_dict().items()}
    trained, strip, plot, text, companion = run_node(moce)
    assert isinstance(companion, ExecutionBlocker) and "Classification" in companion.message
    assert all(torch.equal(v, moce.restorer.module.state_dict()[k]) for k, v in before.items())
    assert not any(p.requires_grad for p in moce.restorer.module.parameters())
    after = trained.restorer.module.state_dict()
    assert any(not torch.equal(v, after[k]) for k, v in before.items())
    assert not any(p.requires_grad or p.is_inference() for p in trained.restorer.module.parameters())
    assert (
        strip.ndim == plot.ndim == 4 and "->" in text and (outputs / "mend/training/restorer_00001/last.pt").is_file()
    )


def test_weights_that_were_made_in_inference_mode_can_be_trained(outputs):
    with torch.inference_mode():
        given = loaded.wrap(restorer())
    assert next(given.restorer.module.parameters()).is_inference()
    trained, *_ = run_node(given)
    assert not next(trained.restorer.module.parameters()).is_inference()


def test_memory_is_free_after_training(moce, outputs, monkeypatch):
    kept = []
    original = finetune.FineTuner.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        kept.append(weakref.ref(self.optimizer))
        kept.append(weakref.ref(self.average))

    monkeypatch.setattr(finetune.FineTuner, "__init__", watched)
    run_node(moce)
    gc.collect()
    assert len(picture_files.pictures) == 0 and [ref() for ref in kept] == [None, None]


def test_the_same_seed_gives_the_same_network(moce, outputs):
    a, b = (run_node(moce, seed=7)[0].restorer.module.state_dict() for _ in range(2))
    c = run_node(moce, seed=8)[0].restorer.module.state_dict()
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and any(not torch.equal(v, c[k]) for k, v in a.items())


def test_cancelling_keeps_what_was_learned_and_resume_goes_on(moce, outputs):
    whole = run_node(moce, steps=4, name="whole")[0].restorer.module.state_dict()
    seen = []
    host.set_hooks(
        lambda done, total, picture: seen.append((done, total, picture)), lambda: bool(seen) and seen[-1][0] >= 2
    )
    with pytest.raises(Cancelled):
        run_node(moce, steps=4, name="run")
    folder = outputs / "mend/training/run_00001"
    assert models.load(folder / finetune.WEIGHTS).architecture.id == "moce-ir"
    assert any(picture is not None for _, _, picture in seen), "no preview was shown"
    host.set_hooks()
    again = run_node(moce, steps=4, name="run", resume=True)[0].restorer.module.state_dict()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["run_00001", "whole_00001"]
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


def test_a_saved_restorer_is_listed_and_loads_with_its_history(moce, outputs):
    with torch.inference_mode():
        trained, *_ = run_node(moce)
        (name,) = train_nodes.SaveRestorer.execute(trained, "mine/tuned", "fp32").args
    assert name == "mine/tuned_00001_.safetensors" and name in model_folder.model_files()
    again = loaded.load(model_folder.model_path(name)).restorer
    assert all(torch.equal(v, again.module.state_dict()[k]) for k, v in trained.restorer.module.state_dict().items())
    history = json.loads(again.metadata["training"])
    assert history["steps"] == 3 and set(history["psnr"]) == {"noise", "rain"}
    assert history["objective"]["kind"] == "sum" and history["data"]["pictures"] == 1


def test_a_classifier_that_was_trained_can_be_used_at_once(outputs):
    given = loaded.wrap(restorer())
    goal = objective_nodes.Classification.execute("classifier", blocks=1)[0]
    *_, classifier = run_node(given, goal)
    photo = torch.rand(1, 40, 36, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, label, *_ = classify_nodes.ClassifyDegradation.execute(classifier, photo).args
        assert found.labels == ("noise", "rain") and label in found.labels
        guided = objective_nodes.Guidance.execute(classifier, "Rain", guidance=0.1)[0]
    trained, *_, none = run_node(given, guided)
    assert isinstance(none, ExecutionBlocker)
    history = json.loads(trained.restorer.metadata["training"])
    assert history["objective"] == guided.describe() and history["objective"]["classifier"].endswith("classifier")
    with pytest.raises(InputError, match="no class"):
        objective_nodes.Guidance.execute(classifier, "haze")


def test_what_is_set_on_the_way_is_trained_so_and_kept_in_files(outputs):
    given = loaded.wrap(restorer("tur", TRANSWEATHER))
    set_so = input_range_nodes.InputRange.execute(given, "-1..1")[0]
    seen = []
    handle = given.restorer.module.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0].min())))
    tiling.restore(set_so, torch.zeros(1, 3, 32, 32))
    handle.remove()
    assert seen == [-1.0] and given.restorer.module.input_range == "0..1"
    trained, *_ = run_node(set_so, recipes.PixelObjective("L1", 0.0), keep="last")
    assert trained.restorer.module.input_range == "-1..1" and not trained.options
    for wired in (set_so, trained):
        name = train_nodes.SaveRestorer.execute(wired, "set")[0]
        read = models.load(model_folder.saved_models() / name)
        assert read.module.input_range == "-1..1"
        image = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(read(image), tiling.restore(wired, image, clamp=False), atol=1e-2, rtol=1e-2)


def test_what_a_file_cannot_keep_is_said_when_saving(outputs, caplog):
    given = loaded.wrap(restorer()).with_options(local_pooling=16, route="mode")
    name = train_nodes.SaveRestorer.execute(given, "pooled")[0]
    assert "cannot keep route" in caplog.text
    assert models.load(model_folder.saved_models() / name).module.train_size == (16, 16)


def test_a_file_and_the_same_trained_further_can_be_averaged(outputs, moce, tmp_path):
    for start, name in ((moce, "moce"), (loaded.wrap(restorer()), "nafnet")):
        first = tmp_path / f"{name}.safetensors"
        trainer.export(start.restorer.module, first, start.restorer.architecture.id, start.restorer.config)
        trained, *_ = run_node(loaded.wrap(models.load(first)))
        second = tmp_path / f"{name}-tuned.safetensors"
        finetune.write(trained.restorer, second)
        trainer.average_exports(first, second, 0.5, tmp_path / f"{name}-mean.safetensors")
        assert models.load(tmp_path / f"{name}-mean.safetensors").config["num_experts" if name == "moce" else "width"]


def test_exporting_a_fine_tuning_run_says_where_its_weights_are(tmp_path):
    tuner(tmp_path, steps=1).train()
    with pytest.raises(InputError, match="weights.safetensors"):
        cli.main(["export", str(tmp_path), str(tmp_path / "e.safetensors")])


def test_a_file_that_was_trained_before_keeps_its_earlier_history(moce, outputs):
    first, *_ = run_node(moce)
    second, *_ = run_node(first)
    history = json.loads(second.restorer.metadata["training"])
    assert history["earlier"]["steps"] == 3


def test_what_was_trained_of_mends_own_weights_keeps_their_licence(outputs):
    own = models.load(host.PACK / "weights" / "wiring-nafnet.safetensors")
    trained, *_ = run_node(loaded.wrap(own))
    assert trained.restorer.licence == own.licence != own.architecture.licence


def test_a_loss_that_reaches_nothing_that_learns_says_so(tmp_path):
    one = tuner(tmp_path, frozen="intro")
    one.module.requires_grad_(False)
    with pytest.raises(InputError, match="depends on nothing that learns.*freeze less"):
        one.step()


def test_nodes_make_what_they_say(outputs):
    combine = objective_nodes.CombineObjectives.execute
    pixel, routing = objective_nodes.Pixel.execute("L1", 0.0)[0], objective_nodes.Routing.execute(False)[0]
    both = combine(objective_1=pixel, weight_1=1.0, objective_3=routing, weight_3=0.01)[0]
    assert both.parts == ((pixel, 1.0), (routing, 0.01))
    assert objective_nodes.Uncertainty.execute("5task", "as in the paper")[0].accumulate is False
    assert objective_nodes.Transport.execute(False, width=8)[0] == recipes.TransportObjective(False, width=8)
    assert objective_nodes.Classification.execute("direct")[0].mode == "direct"
    assert objective_nodes.Denoising.execute("consistency", 7)[0] == recipes.DenoisingObjective(True, 7)
    with pytest.raises(ConfigError):
        combine()[0].start(network(restorer()), LABELS, 32)


def test_a_folder_may_be_given_from_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert folders.require_input_directory("mine") == Path("mine")
    monkeypatch.setattr(folders, "input_directories", lambda: [tmp_path / "in"])
    monkeypatch.setattr(folders, "inside_comfyui", lambda: True)
    with pytest.raises(InputError, match="full path"):
        folders.require_input_directory("mine")


def test_folder_nodes_find_the_shipped_pairs_and_check_early():
    folder = dataset_nodes.PairedFolder
    assert folder.validate_inputs("pairs") is True and "no folder" in folder.validate_inputs("nowhere")
    data, _, text = folder.execute("pairs", "weather", shown=1, crop=32).args
    listed, _, _ = dataset_nodes.DatasetManifest.execute("pairs", shown=1, crop=32).args
    assert set(listed.labels) == {"rain", "snow", "haze", "low-light", "noise"} and data.labels == ("weather",)
    assert dataset_nodes.CleanFolder.validate_inputs("pairs", "fog") is not True
    mixed, *_ = dataset_nodes.MixDatasets.execute(
        1, 32, dataset_1=data, weight_1=1.0, dataset_2=listed, weight_2=2.0
    ).args
    assert len(mixed.labels) == 6
    assert "not one of fp32, bf16" in train_nodes.TrainRestorer.validate_inputs("best", "fp8")


# The command line -----------------------------------------------------------------------------------------------------


def test_the_command_trains_what_the_nodes_train(tmp_path):
    model = tmp_path / "tiny.safetensors"
    finetune.write(restorer(), model)
    pairs = folders.SHIPPED_INPUTS / "pairs"
    arguments = ["--model", str(model), "--dataset", f"manifest:{pairs}@2", "--dataset", f"clean:{pairs / 'clean'}"]
    arguments += ["--degradations", "noise; rain + jpeg: quality 10", "--objective", "pixel:loss=L1,fft=0.5"]
    arguments += [
        "--objective",
        "tur@0.5",
        "--crop",
        "32",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli_finetune.main([*arguments, "--steps", "2"]) == 0
    assert cli_finetune.main([*arguments, "--steps", "3"]) == 0
    history = json.loads(models.load(tmp_path / "run" / finetune.WEIGHTS).metadata["training"])
    assert history["steps"] == 3 and history["data"]["mixture"][0]["weight"] == 2
    assert [p["weight"] for p in history["objective"]["parts"]] == [1.0, 0.5]


@pytest.mark.parametrize(
    "function, specs",
    [
        (cli_finetune.objective, ["none"]),
        (cli_finetune.objective, ["pixel:size=3"]),
        (cli_finetune.objective, ["pixel:fft=much"]),
        (cli_finetune.objective, ["da-rcot:paired=perhaps"]),
        (lambda specs: cli_finetune.dataset(specs, "noise", 0.1), ["folder"]),
    ],
)
def test_arguments_that_cannot_be_read_are_refused(function, specs):
    with pytest.raises(InputError):
        function(specs)


# A real ComfyUI -------------------------------------------------------------------------------------------------------
