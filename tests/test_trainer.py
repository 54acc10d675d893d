"""Training: the loss falls, a run can stop anywhere, and what it writes loads again."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json

import pytest
import torch
from PIL import Image

from comfyui_mend import models
from comfyui_mend.errors import Cancelled, CheckpointError, ConfigError, InputError
from comfyui_mend.training import cli, data, photos, trainer
from comfyui_mend.training.accelerate import accelerate, compile_blocks
from comfyui_mend.training.degradations import Degradation
from comfyui_mend.training.objectives.restoration import Restoration, charbonnier
from comfyui_mend.training.starters import STARTERS

TINY = {
    **STARTERS["moce-ir"].config,
    "dim": 8,
    "num_blocks": [1, 1],
    "num_dec_blocks": [1],
    "heads": [1, 2],
    "num_refinement_blocks": 0,
}
STAGES = (trainer.Stage(0.0, 32, 2),)


def pictures(count: int = 3, size: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return list((smooth * 255).byte())


def run(folder, steps=6, **settings) -> trainer.Trainer:
    torch.manual_seed(0)
    tasks = (data.Task("noise", 1.0, ((Degradation("noise"),),)),)
    pairs = data.PairStream(data.PhotoCrops(pictures()), tasks, torch.Generator().manual_seed(1))
    chosen = trainer.Settings(steps=steps, stages=STAGES, warmup_steps=2, validate_every=0, **settings)
    validation = trainer.validation_set(pictures(2), 32, {"noise": (Degradation("noise"),)})
    return trainer.Trainer(accelerate(models.create("moce-ir", TINY)), pairs, chosen, folder, validation=validation)


def test_the_loss_falls(tmp_path):
    one = run(tmp_path, steps=30, learning_rate=4e-3, ema_decay=0.9)
    first = trainer.validate(one.average, one.validation)["noise"]
    assert one.run(bar=False)["noise"] > first + 1


def test_resuming_changes_nothing(tmp_path):
    whole = run(tmp_path / "a", workers=2)
    whole.run(bar=False)
    stopped = run(tmp_path / "b", workers=2)
    with pytest.raises(Cancelled):
        stopped.run(should_stop=lambda: stopped.progress.step == 3, bar=False)
    resumed = run(tmp_path / "b", workers=2)
    assert resumed.resume() and resumed.progress.step == 3
    resumed.run(bar=False)
    for a, b in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.average.parameters(), resumed.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_log_has_the_means_of_the_steps_since_a_stop(tmp_path):
    first = run(tmp_path, steps=20)
    with pytest.raises(Cancelled):
        first.run(should_stop=lambda: first.progress.step == 15, bar=False)
    resumed, losses = run(tmp_path, steps=20), []
    resumed.resume()
    resumed.run(bar=False, on_step=lambda values: losses.append(values["loss"]))
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["step"] == 20 and line["loss"] == pytest.approx(sum(losses) / 5, abs=2e-6)


def test_workers_give_the_gradients_of_one(tmp_path):
    class Plain:
        def __call__(self, module, damaged, clean, generator):
            return charbonnier(module(damaged), clean), {}

    gradients = []
    for workers in (1, 2):
        one = run(tmp_path / str(workers), workers=workers)
        one.objective = Plain()
        damaged, clean, _ = one.pairs.batch(4, 32)
        one._backward(damaged, clean)
        gradients.append([p.grad for p in one.module.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_gradient_of_every_pair_is_clipped_before_they_are_added_up(tmp_path):
    class Plain:
        def __call__(self, module, damaged, clean, generator):
            return charbonnier(module(damaged), clean) * scale.pop(0), {}

    def gradients(factors, pairs, **settings):
        scale[:] = factors
        one.settings = dataclasses.replace(one.settings, **settings)
        one._backward(*pairs)
        return torch.cat([p.grad.flatten() for p in one.module.parameters() if p.grad is not None])

    scale = []
    one = run(tmp_path)
    one.objective = Plain()
    damaged, clean, _ = one.pairs.batch(2, 32)
    batch, pairs = (damaged, clean), [(damaged[i : i + 1], clean[i : i + 1]) for i in range(2)]
    whole = gradients([1.0], batch)
    assert torch.allclose(gradients([1.0, 1.0], batch, clip_each=1e6), whole, atol=1e-6)
    # A pair whose loss is a thousand times larger counts as much as any other, each with a length of at most 0.01.
    first, second = (gradients([1.0], pair, clip_each=None) for pair in pairs)
    expected = 0.5 * 0.01 * (first / first.norm() + second / second.norm())
    assert torch.allclose(gradients([1.0, 1000.0], batch, clip_each=0.01), expected, atol=1e-6)


def test_blocks_are_compiled_once_each_and_a_network_without_any_is_refused(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    module = compile_blocks(accelerate(models.create("moce-ir", TINY)))
    names = {id(layer): name for name, layer in module.named_modules()}
    found = [names[id(layer)] for layer in compiled]
    decoder = [f"dec.0.2.layers.0.{part}" for part in ("shared", "mixer", "ffn")]
    assert found == ["enc.0.0.layers.0", "latent.layers.0", *decoder]
    with pytest.raises(InputError, match="NAFNet"):
        compile_blocks(models.create("nafnet", STARTERS["nafnet-deblur"].config))


def test_stages_are_read_from_a_text():
    stages = cli._stages("0:128x4 0.8:192x2")
    assert stages == (trainer.Stage(0.0, 128, 4), trainer.Stage(0.8, 192, 2))
    for wrong in ("", "128x4", "0:128", "0.2:128x4", "0:128x4 0.8:100x2", "0:128x0", "0:64x4 0.9:128x2 0.5:192x2"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli._stages(wrong)


def test_the_average_follows_the_weights_slowly(tmp_path):
    one = run(tmp_path, learning_rate=1e-2)
    start = copy.deepcopy(one.average.state_dict())
    one.run(bar=False)
    key = "output.weight"
    moved = (one.module.state_dict()[key] - start[key]).abs().mean()
    followed = (one.average.state_dict()[key] - start[key]).abs().mean()
    assert 0 < followed < moved


def test_the_rate_warms_up_and_ends_low(tmp_path):
    one = run(tmp_path, steps=100)
    rates = []
    for step in range(100):
        one.progress.step = step
        rates.append(one.learning_rate())
    assert rates[0] < rates[1] and rates[-1] < 0.01 * max(rates)


def test_a_checkpoint_of_another_network_is_refused_by_name(tmp_path):
    run(tmp_path).save()
    torch.manual_seed(0)
    other = run(tmp_path)
    other.module = models.create("moce-ir", {**TINY, "dim": 16})
    with pytest.raises(CheckpointError, match="last.pt"):
        other.resume()


def test_a_run_needs_an_end():
    with pytest.raises(ConfigError):
        trainer.Settings()


def test_an_exported_file_loads_by_itself(tmp_path):
    module = models.create("moce-ir", TINY)
    path = tmp_path / "tiny.safetensors"
    trainer.export(module, path, "moce-ir", TINY, ("denoise", "derain"), {"steps": 3})
    restorer = models.load(path)
    assert restorer.architecture.id == "moce-ir" and tuple(restorer.config["num_blocks"]) == (1, 1)
    image = torch.rand(1, 3, 17, 22)
    padded = torch.nn.functional.pad(image, (0, 0, 0, 1), mode="reflect")
    assert torch.allclose(restorer(image), module(padded)[..., :17, :22], atol=5e-3)


def test_faster_layers_compute_the_same():
    torch.manual_seed(0)
    for norm in ("WithBias", "BiasFree"):
        plain = models.create("moce-ir", {**TINY, "LayerNorm_type": norm, "heads": [2, 4]})
        fast = accelerate(copy.deepcopy(plain))
        image = torch.rand(2, 3, 32, 48)
        expected, got = plain(image), fast(image)
        assert torch.allclose(expected, got, atol=1e-5)
        assert list(plain.state_dict()) == list(fast.state_dict())
        weights = [
            torch.autograd.grad(out.square().mean(), net.output.weight)[0]
            for net, out in ((plain, expected), (fast, got))
        ]
        assert torch.allclose(*weights, rtol=1e-3, atol=1e-6)


def test_the_objective_trains_the_routers():
    module = models.create("moce-ir", TINY)
    image = torch.rand(3, 3, 32, 32)
    loss, parts = Restoration()(module, image, image, torch.Generator().manual_seed(0))
    gate = module.dec[0][2].layers[0].adapter.routing.freq_gate.weight
    assert set(parts) == {"balance", "pixel", "fft"} and torch.autograd.grad(loss, gate)[0].abs().sum() > 0


def test_crops_are_random_and_resumable():
    crops = data.PhotoCrops(pictures())
    stream = data.PairStream(crops, data.STARTER_TASKS, torch.Generator().manual_seed(3))
    damaged, clean, names = stream.batch(40, 24)
    assert damaged.shape == clean.shape == (40, 3, 24, 24) and len(set(names)) > 5
    assert clean.min() >= 0 and clean.max() <= 1 and damaged.isfinite().all()
    again, _, _ = data.PairStream(crops, data.STARTER_TASKS, torch.Generator().manual_seed(3)).batch(40, 24)
    assert torch.equal(damaged, again)


def test_the_split_depends_on_the_name_only():
    assert photos.is_validation("erase_kingfisher") and not photos.is_validation("erase_kitten")


def test_the_command_trains_resumes_and_exports(tmp_path):
    for part, count in (("train", 3), ("validation", 2)):
        (tmp_path / "photos" / part).mkdir(parents=True)
        for index, picture in enumerate(pictures(count, 224)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / part / f"{index}.png")
    arguments = ["starter", "--photos", str(tmp_path / "photos"), "--out", str(tmp_path / "run"), "--workers", "1"]
    arguments += ["--config", json.dumps({**TINY, "dim": 8})]
    assert cli.main([*arguments, "--steps", "2"]) == 0
    assert cli.main([*arguments, "--steps", "3"]) == 0
    restorer = models.load(tmp_path / "run" / STARTERS["moce-ir"].file)
    assert json.loads(restorer.metadata["training"])["steps"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert set(lines[-1]["validation"]) == set(data.VALIDATION)


def test_muon_moves_matrices_and_resumes(tmp_path):
    whole = run(tmp_path / "a", steps=4, optimizer="muon")
    before = {name: value.clone() for name, value in whole.module.state_dict().items()}
    whole.run(bar=False)
    moved = {n: p for n, p in whole.module.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-5}
    assert len(moved) > 50 and all(not torch.equal(before[name], p) for name, p in moved.items())
    stopped = run(tmp_path / "b", steps=4, optimizer="muon")
    with pytest.raises(Cancelled):
        stopped.run(should_stop=lambda: stopped.progress.step == 2, bar=False)
    resumed = run(tmp_path / "b", steps=4, optimizer="muon")
    assert resumed.resume()
    resumed.run(bar=False)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_an_unknown_optimizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adamw or muon"):
        run(tmp_path, optimizer="sgd")


def test_the_enlarger_begins_as_an_interpolation_and_learns_from_shrunk_crops():
    recipe = STARTERS["mair-x2"]
    torch.manual_seed(0)
    module = models.create(recipe.system, recipe.config).eval()
    with torch.no_grad():
        recipe.initialise(module)
        small, clean, _ = recipe.pairs(data.PhotoCrops(pictures()), torch.Generator().manual_seed(2)).batch(2, 48)
        assert small.shape == (2, 3, 24, 24) and clean.shape == (2, 3, 48, 48)
        enlarged = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic")
        inner = (..., slice(4, -4), slice(4, -4))  # convolutions see black beyond the border
        begun, bicubic = (trainer.psnr(image[inner], clean[inner]).mean() for image in (module(small), enlarged))
    assert begun > bicubic
    cases = recipe.validation_set(pictures(2), 48)
    assert cases["x2"][0].shape[-1] == 24 and trainer.validate(module, cases)["x2"] > 20


@pytest.mark.parametrize("which", ["mpmf-weather", "acl-deblur", "nafnet-weather", "nafnet-deblur"])
def test_the_other_starters_begin_near_the_picture_and_learn_all_their_layers(which):
    recipe = STARTERS[which]
    torch.manual_seed(0)
    module = models.create(recipe.system, recipe.config).train()
    with torch.no_grad():
        recipe.initialise(module)
    generator = torch.Generator().manual_seed(2)
    damaged, clean, tasks = recipe.pairs(data.PhotoCrops(pictures()), generator).batch(3, 32)
    assert {task.name for task in recipe.tasks} >= set(tasks) and not torch.equal(damaged, clean)
    loss, parts = recipe.objective(module, damaged, clean, generator)
    assert ("coarse" in parts) == (which == "mpmf-weather")
    assert float(parts["pixel"]) < float(charbonnier(damaged, clean)) + 0.1
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    scores = trainer.validate(
        models.Restorer(models.registry.get(recipe.system), recipe.config, module.eval()),
        recipe.validation_set(pictures(2), 32),
    )
    assert set(scores) == set(data.VALIDATION)


def test_hazy_and_dark_crops_show_more_of_a_photograph():
    ramp = torch.linspace(0, 255, 256).byte().expand(3, 256, 256)

    def spread(smallest):
        crops, generator = data.PhotoCrops([ramp]), torch.Generator().manual_seed(3)
        return max(float(crops.sample(32, generator, smallest).std()) for _ in range(40))

    assert spread(0.12) > 1.5 * spread(0.5)


def test_two_exported_files_are_averaged_and_say_so(tmp_path):
    files, shares = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], (0.75, 0.25)
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        trainer.export(models.create("moce-ir", TINY), file, "moce-ir", TINY, ("denoise",), {"steps": seed, "psnr": {}})
    mixed = tmp_path / "mixed.safetensors"
    assert cli.main(["average", *map(str, files), str(mixed), "--share", "0.25"]) == 0
    (first, _), (second, _), (found, metadata) = (trainer.read_weights(file) for file in (*files, mixed))
    for name, value in found.items():
        want = shares[0] * first[name].float() + shares[1] * second[name].float()
        assert value.dtype == torch.float16 and torch.allclose(value.float(), want, atol=1e-3)
    assert json.loads(metadata["mend.training"]) == {
        "averaged": [{"share": share, "steps": seed, "psnr": {}} for seed, share in enumerate(shares)]
    }
    assert models.load(mixed).tasks == ("denoise",)


def test_files_of_different_networks_are_not_averaged(tmp_path):
    for dim in (8, 16):
        config = {**TINY, "dim": dim}
        trainer.export(models.create("moce-ir", config), tmp_path / f"{dim}.safetensors", "moce-ir", config)
    with pytest.raises(CheckpointError, match="another network"):
        trainer.average_exports(tmp_path / "8.safetensors", tmp_path / "16.safetensors", 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()
