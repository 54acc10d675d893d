"""Damage with a wanted intensity on the graph: GenDeg in a real ComfyUI, the small model and data sets everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_mend import models
from comfyui_mend.engine import degraders, folders
from comfyui_mend.engine import gendeg as engine
from comfyui_mend.engine.loaded import wrap
from comfyui_mend.errors import CheckpointError, InputError, MissingDependency
from comfyui_mend.guidance import gendeg, synthesis
from comfyui_mend.nodes import gendeg as nodes
from comfyui_mend.nodes import synthesis as synthesis_nodes
from comfyui_mend.training import degradation_model as training
from comfyui_mend.training import make_dataset

from . import comfyui_graphs
from .comfyui_process import run_script
from .make_gendeg_checkpoint import CORRECTION_CONFIG, write_gendeg
from .make_workflow import WORKFLOWS

SMALL = {"kinds": ("haze", "rain"), "widths": (8, 8), "condition": 8}


@pytest.fixture(scope="module")
def small():
    """An untrained degradation model of a few kilobytes."""
    torch.manual_seed(0)
    module = models.create("gendeg", SMALL).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.2)
    return degraders.SmallDegrader(wrap(models.load(module.state_dict(), config=SMALL)), usual_steps=2)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (40, 24)), ("b.jpg", (17, 9)), ("b.png", (12, 30))):
        Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    return folder


# The small model -----------------------------------------------------------------------------------------------------


def test_the_models_configuration_is_read_back_from_its_shapes():
    architecture = models.registry.get("mend-degradation-model")
    for config in (architecture.variants["Mend"], {**SMALL, "kinds": ("kind 0", "kind 1")}):
        with torch.device("meta"):
            state = models.create("gendeg", config).state_dict()
        assert models.registry.detect(state) is architecture
        assert architecture.config_from_state_dict(state) == config


def test_the_loss_is_the_weighted_error_of_the_denoised_residual():
    torch.manual_seed(0)
    module = models.create("gendeg", SMALL).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    residual, noise, clean = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    told = torch.tensor([0, 1]), torch.tensor([0.1, 0.2]), torch.tensor([0.05, 0.3]), torch.tensor([0.4, 3.0])
    denoised = module(residual + told[3][:, None, None, None] * noise, clean, *told)
    weight = (told[3] ** 2 + 1) / told[3] ** 2
    expected = weight * (denoised - residual).square().mean(dim=(1, 2, 3))
    assert torch.allclose(module.loss(residual, clean, *told, noise), expected, rtol=1e-4)


def test_a_large_pictures_noise_agrees_everywhere_on_its_mean():
    noise = synthesis.of_one_scene(torch.randn(1, 3, 256, 320, generator=torch.Generator().manual_seed(0)))
    means = torch.nn.functional.avg_pool2d(noise, 64)
    assert float(means.flatten(2).std(dim=2).max()) < 0.009  # of plain noise it would be 1 / 64
    assert abs(float(noise.std()) - 1) < 0.02


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (33, 16)])
def test_any_size_gets_the_wanted_mean(small, size):
    clean = torch.full((2, 3, *size), 0.5)
    found = degraders.synthesise(small, clean, "rain", 0.1, 0.08, seed=3)
    assert found.damaged.shape == clean.shape and found.mu.tolist() == pytest.approx([0.1, 0.1], abs=0.004)
    again = degraders.synthesise(small, clean, "rain", 0.1, 0.08, seed=3)
    assert torch.equal(found.damaged, again.damaged)
    if size != (1, 1):
        assert not torch.equal(found.damaged[0], found.damaged[1]), "each picture of a batch gets damage of its own"


def test_transparency_and_grey_stay(small):
    image = torch.rand(1, 4, 12, 12)
    assert torch.equal(degraders.synthesise(small, image, "haze", 0.1, 0.1, 0).damaged[:, 3], image[:, 3])
    assert degraders.synthesise(small, image[:, :1], "haze", 0.1, 0.1, 0).damaged.shape == (1, 1, 12, 12)


def test_what_the_model_cannot_do_is_said(small):
    image = torch.rand(1, 3, 8, 8)
    with pytest.raises(InputError, match="knows haze, rain"):
        degraders.synthesise(small, image, "snow", 0.1, 0.1, 0)
    with pytest.raises(InputError, match="mu"):
        degraders.synthesise(small, image, "haze", 0.0, 0.1, 0)
    with pytest.raises(InputError, match="no degradation model"):
        degraders.SmallDegrader(wrap(models.load(models.create("gendeg", CORRECTION_CONFIG).state_dict())))
    assert "outside" in degraders.synthesise(small, image, "haze", 0.5, 0.1, 0).text(small, "haze", 0.5, 0.1)


def test_the_shipped_model_knows_all_six_and_reaches_what_is_asked():
    image = torch.rand(1, 24, 40, 3, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.25
    for kind in gendeg.PRESETS:
        damaged, mu, sigma, text = synthesis_nodes.SynthesiseDegradation.execute(
            image, kind, 0.06, 0.05, seed=1, steps=2
        ).args
        assert damaged.shape == image.shape and mu == pytest.approx(0.06, abs=0.006) and 0 < sigma < 0.2
        assert kind in text


def test_training_writes_a_model_that_loads_and_goes_on_where_it_stopped(tmp_path):
    for folder, size in (("train", (150, 140)), ("validation", (130, 128))):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / folder / "a.png")
    command = ["--photos", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    threads = torch.get_num_threads()
    try:
        assert training.main([*command, "--steps", "1"]) == 0
        assert training.main([*command, "--steps", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    found = models.load(tmp_path / "run" / training.NAME)
    assert found.architecture.id == "mend-degradation-model" and tuple(found.module.kinds) == tuple(gendeg.PRESETS)
    assert json.loads(found.metadata["training"])["steps"] == 2
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_the_report_says_what_came_out_of_each_kind():
    clean = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pairs = {"haze": ((clean + 0.2).clamp(0, 1), clean)}
    lines = training.report(models.load(Path(training.CLASSIFIER).with_name(training.NAME)).module, pairs)
    assert len(lines) == 3 and lines[2].startswith("| haze | ") and lines[2].count("%") == 2


# Intensities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", gendeg.DATASETS)
def test_rebuilt_histograms_have_the_published_ranges_and_means(kind):
    for published in gendeg.DATASETS[kind].values():
        histogram = published.histogram()
        rows = [sum(row) for row in histogram.counts]
        width = gendeg.MU_RANGE[1] / len(rows)
        mean = sum((i + 0.5) * width * n for i, n in enumerate(rows)) / sum(rows)
        low, high = gendeg._support(rows, gendeg.MU_RANGE)
        assert mean == pytest.approx(published.mean, abs=0.003)
        assert published.mu[0] - 0.006 <= low and high <= published.mu[1] + 0.006


@pytest.mark.parametrize(("kind", "dataset"), [("rain", "ORD"), ("snow", "CSD")])
def test_intensities_of_hazy_data_sets_are_asked_for_with_haze(kind, dataset):
    draws = [gendeg.draw_intensity(kind, 0, index) for index in range(40)]
    assert {draw.dataset for draw in draws} > {dataset}
    for draw in draws:
        hazy = draw.dataset == dataset
        assert draw.ask_for(kind) == (f"{kind} and haze" if hazy else kind)
        assert draw.ask_for(kind, known=gendeg.PRESETS) == kind, "a generator that does not know the mixture"
    assert gendeg.caption("a street", f"{kind} and haze") == f"a street, in {kind}y and hazy conditions"
    assert gendeg.draw_intensity(f"{kind} and haze", 0).ask_for(f"{kind} and haze") == f"{kind} and haze"


def test_a_data_set_by_a_generator_that_knows_mixtures_asks_for_them(tmp_path):
    asked = []

    def paint(clean, kind, mu, sigma, seed):
        asked.append(kind)
        return clean * 0.9

    painter = make_dataset.Painter("GenDeg", ("rain", "rain and haze"), paint)
    photos = make_dataset.from_images(torch.rand(1, 3, 8, 8))
    make_dataset.make_dataset(photos, tmp_path, painter, ["rain"], make_dataset.Settings("GenDeg"), per_photo=40)
    rows = make_dataset.read_manifest(tmp_path).values()
    assert {row["degradation"] for row in rows} == {"rain"} and set(asked) == {"rain", "rain and haze"}
    assert sorted(row["asked"]["degradation"] for row in rows) == sorted(asked)


def test_the_sampler_node_repeats_itself_and_stays_in_the_presets():
    for kind, preset in gendeg.PRESETS.items():
        mu, sigma, text = nodes.IntensitySampler.execute(kind, seed=5, index=3).args
        assert (mu, sigma, text) == nodes.IntensitySampler.execute(kind, seed=5, index=3).args
        assert preset.mu[0] <= mu <= preset.mu[1] + 0.006 and 0 <= sigma <= preset.sigma[1] + 0.006
    assert nodes.IntensitySampler.execute("rain", 5, 3).args != nodes.IntensitySampler.execute("rain", 5, 4).args


def test_measured_intensities_of_one_clean_and_many_damaged_pictures():
    clean = torch.zeros(1, 4, 4, 3)
    mu, sigma, text = nodes.MeasureIntensity.execute(clean, torch.cat([clean, clean + 0.2])).args
    assert mu == pytest.approx(0.1) and sigma == pytest.approx(0.0, abs=1e-6) and len(text.splitlines()) == 2
    with pytest.raises(InputError, match="equal"):
        nodes.MeasureIntensity.execute(clean, torch.zeros(1, 4, 5, 3))


# GenDeg's parts without ComfyUI --------------------------------------------------------------------------------------


def _conditioner():
    torch.manual_seed(0)
    return wrap(models.load(models.create("gendeg", {"num_bins": 128}).state_dict()))


def test_an_intensity_becomes_part_of_a_conditioning_and_long_texts_are_cut_as_published():
    network, text = _conditioner(), [[torch.randn(1, 154, 768), {"pooled_output": 1}]]
    ((short, options),) = engine.with_intensity(network, text, 0.1, 0.2)
    ((whole, _),) = engine.with_intensity(network, text, 0.1, 0.2, whole=True)
    ((null, _),) = engine.with_intensity(network, text, None, None)
    assert short.shape == (1, 77, 768) and options == {"pooled_output": 1} and whole.shape == (1, 154, 768)
    assert torch.allclose(whole[:, :77], short, atol=1e-6) and not torch.allclose(null, short)
    with pytest.raises(InputError, match="Load GenDeg"):
        engine.conditioner_of(wrap(models.load(models.create("gendeg", CORRECTION_CONFIG).state_dict())))


def test_brackets_of_a_caption_are_characters():
    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return tokens

    assert engine.encode_text(Clip(), "a (red) door") == "a \\(red\\) door"


def test_structure_correction_keeps_to_its_strength():
    torch.manual_seed(0)
    network = wrap(models.load(models.create("gendeg", CORRECTION_CONFIG).state_dict()))
    clean, generated = torch.rand(2, 1, 13, 18, 3)
    (none,) = nodes.CorrectStructure.execute(network, clean, generated, 0.0).args
    (full,) = nodes.CorrectStructure.execute(network, clean, generated.expand(2, -1, -1, -1)).args
    assert torch.allclose(none, generated, atol=1e-6) and full.shape == (2, 13, 18, 3)
    assert not torch.allclose(full[:1], generated, atol=1e-3)
    with pytest.raises(InputError, match="nafnet_sd"):
        nodes.CorrectStructure.execute(_conditioner(), clean, generated)


def test_another_checkpoint_is_no_gendeg():
    with pytest.raises(CheckpointError, match="stats_proj"):
        engine.generator_weights({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)})


def test_outside_comfyui_the_nodes_on_stable_diffusion_say_what_is_missing():
    for attempt in (
        lambda: nodes.FractionalTimesteps.execute(None),
        lambda: nodes.GenDegGuider.execute(None, [], [], None, torch.zeros(1, 8, 8, 3)),
        lambda: nodes.DegraderFromGenDeg.execute(None, None, None, None),
    ):
        with pytest.raises(MissingDependency, match="ComfyUI"):
            attempt()


# Data sets -----------------------------------------------------------------------------------------------------------


def _make(photos, out, kinds=("haze", "noise"), tell=lambda *_: None, **settings):
    settings = make_dataset.Settings("simulation", **{"seed": 1, "largest": 20, **settings})
    pictures = make_dataset.from_folder(photos, out)
    return make_dataset.make_dataset(pictures, out, make_dataset.simulation(), kinds, settings, tell=tell)


def test_a_folder_becomes_pairs_with_a_manifest(photos, tmp_path):
    out = tmp_path / "out"
    report = _make(photos, out)
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert report.made == len(rows) == 6 and len({row["clean"] for row in rows}) == 3
    for row in rows:
        pair = [torch.from_numpy(np.array(Image.open(out / row[side]))).permute(2, 0, 1)[None] / 255 for side in
                ("clean", "damaged")]  # fmt: skip
        assert pair[0].shape == pair[1].shape and max(pair[0].shape[-2:]) <= 20
        mu, sigma = synthesis.measured(*pair)
        assert row["intensity"] == {"mu": pytest.approx(mu, abs=1e-4), "sigma": pytest.approx(sigma, abs=1e-4)}
        assert row["degradation"] in ("haze", "noise") and isinstance(row["seed"], int)
    assert "haze: 3 pairs" in report.text()


def test_an_interrupted_run_goes_on_to_the_same_pairs(photos, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _make(photos, whole)

    def stop(done, total, damaged):
        if damaged is not None and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _make(photos, broken, tell=stop)
    with (broken / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"clean": "clean/a.png", "dam')  # the machine went down while a line was written
    (broken / json.loads((broken / "manifest.jsonl").read_text().splitlines()[0])["damaged"]).unlink()
    report = _make(photos, broken)
    assert (report.made, report.found) == (5, 1)
    assert not list(broken.rglob("*.part"))
    ours, theirs = make_dataset.read_manifest(broken), make_dataset.read_manifest(whole)
    assert ours == theirs
    assert all((broken / name).read_bytes() == (whole / name).read_bytes() for name in theirs)
    assert _make(photos, broken).made == 0


def test_a_data_set_is_not_mixed_with_other_settings(photos, tmp_path):
    _make(photos, tmp_path / "out")
    with pytest.raises(InputError, match="another name"):
        _make(photos, tmp_path / "out", seed=2)
    with pytest.raises(InputError, match="fog"):
        _make(photos, tmp_path / "out", kinds=["fog"])
    assert _make(photos, tmp_path / "out", kinds=["low light"]).made == 3, "more kinds may join"


def test_an_unreadable_photograph_is_reported_and_passed_over(photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG nothing")
    report = _make(photos, tmp_path / "out")
    assert report.unreadable == ["broken"] and report.made == 6
    assert make_dataset.main([str(photos), "--out", str(tmp_path / "told"), "--by", "simulation"]) == 1


def test_the_command_writes_what_the_node_writes(photos, tmp_path, small):
    arguments = [str(photos), "--out", str(tmp_path / "a"), "--by", "simulation", "--degradations", "rain,snow"]
    assert make_dataset.main([*arguments, "--largest", "16"]) == 0
    folders.set_folders(output=tmp_path)
    manifest, count, text = synthesis_nodes.MakeDataset.execute(
        str(photos), "a", "rain, snow", "simulation", largest_side=16
    ).args
    assert count == 6 and Path(manifest) == tmp_path / "datasets" / "a" / "manifest.jsonl" and "6 pairs made" in text
    lines = [sorted((tmp_path / name / "manifest.jsonl").read_text().splitlines()) for name in ("a", "datasets/a")]
    assert lines[0] == lines[1]


def test_pictures_of_a_graph_are_made_once(tmp_path, small):
    folders.set_folders(output=tmp_path)
    image = torch.rand(2, 9, 12, 3)
    for expected in ("2 pairs made, 0", "0 pairs made, 2"):
        made = synthesis_nodes.MakeDataset.execute(name="x", degradations="haze", degrader=small, image=image)
        assert expected in made.args[2] and made.args[1] == 2
    row = next(iter(make_dataset.read_manifest(tmp_path / "datasets" / "x").values()))
    assert row["intensity"]["mu"] == pytest.approx(row["asked"]["mu"], abs=0.005)


def test_grey_pictures_of_a_graph_are_taken(tmp_path, small):
    folders.set_folders(output=tmp_path)
    made = synthesis_nodes.MakeDataset.execute(
        name="grey", degradations="haze", degrader=small, image=torch.rand(1, 9, 12, 1)
    )
    assert "1 pairs made" in made.args[2]


def test_the_data_sets_name_is_a_folder_name():
    assert synthesis_nodes.MakeDataset.validate_inputs("degrader", "my set") is True
    for name in ("", "..", "a/b", "/tmp"):
        assert isinstance(synthesis_nodes.MakeDataset.validate_inputs("degrader", name), str)


# A real ComfyUI ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_gendeg(folder)
    return folder


def _graph() -> dict:
    """The shipped workflow on a small picture with three steps, with the two results side by side."""
    graph = json.loads((WORKFLOWS / "api" / "gendeg.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] == "ImageScale":
            node["inputs"].update(width=128, height=64)
        if "steps" in node["inputs"] and node["class_type"] != "MendSynthesiseDegradation":
            node["inputs"]["steps"] = 3
    return graph


@pytest.mark.comfyui
def test_the_workflow_runs_in_comfyui_and_one_node_equals_the_chain(files, tmp_path):
    done = comfyui_graphs.run(tmp_path, {"gendeg": _graph()}, {"checkpoints": files, "restoration": files})["gendeg"]
    assert done.complete, done.problem
    assert done.log == []
    pictures = [np.asarray(Image.open(paths[0])).astype(int) for paths in done.images.values() if paths]
    assert len(pictures) == 2 and pictures[0].shape == (64, 128, 3) and pictures[0].std() > 1
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.comfyui
def test_sampling_in_comfyui_is_the_published_one(files, tmp_path):
    run_script("gendeg_reference.py", files, tmp_path / "result.json", place=tmp_path, timeout=900)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["averaged"] and found["spread"] > 0.01 and found["difference"] < 1e-4
    assert found["odd"] == [1, 3, 37, 75] and found["rounded"] < 0.001 and found["log"] == []
