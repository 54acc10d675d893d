"""Mend's own small denoiser: recognised from its file, local, any size, and learning what its objective asks."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from comfyui_mend import models
from comfyui_mend.engine import loaded, zero_shot
from comfyui_mend.errors import CheckpointError, ConfigError
from comfyui_mend.training import prior as training

ARCHITECTURE = models.registry.get("noise-unet")
SMALL = {"channels": 3, "widths": [8, 8], "blocks": [1, 1], "embedding": 8}
CONFIGS = {
    **ARCHITECTURE.variants,
    "grey, one size": {"channels": 1, "widths": [8], "blocks": [3], "embedding": 4},
    "uneven": {"channels": 3, "widths": [4, 12, 8, 16], "blocks": [2, 1, 3, 1], "embedding": 16},
}


def awake(config: dict, seed: int = 0) -> torch.nn.Module:
    """A network none of whose layers starts without effect."""
    torch.manual_seed(seed)
    module = models.create("noise-unet", config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 / math.sqrt(max(1, parameter[0].numel()))))
    return module


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hyper_parameter_is_found_in_the_shapes(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        state = models.create("noise-unet", config).state_dict()
    assert models.registry.detect(state) is ARCHITECTURE
    found = ARCHITECTURE.config_from_state_dict(state)
    assert {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in config.items()} == found


def test_settings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit together"):
        models.create("noise-unet", {**SMALL, "blocks": [1]})
    state = dict(models.create("noise-unet", SMALL).state_dict())
    state["head.weight"] = torch.zeros(8, 13, 3, 3)
    with pytest.raises(CheckpointError, match="head of shape"):
        models.load(state)


def test_the_receptive_field_is_as_stated() -> None:
    module, radius = awake(SMALL), ARCHITECTURE.receptive_field(SMALL)
    size = 4 * (radius // 2 + 8)
    x, t = torch.randn(1, 3, size, size), torch.tensor([-300.0])
    middle = size // 2
    for row in (middle, middle + 1, middle + 3):
        changed = x.clone()
        changed[..., row, middle] += 1
        places = (module(changed, t) - module(x, t))[0].abs().amax(dim=0).nonzero()
        reach = max(int((places[:, 0] - row).abs().max()), int((places[:, 1] - middle).abs().max()))
        assert radius / 2 < reach <= radius


def test_its_file_is_an_edm_prior_for_any_size(tmp_path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({k: v.half() for k, v in awake(SMALL).state_dict().items()}, str(path))
    prior = zero_shot.network_prior(loaded.load(path))
    assert prior.kind == "EDM"
    x = torch.rand(2, 3, 19, 27) * 2 - 1
    x0 = prior.run(x.shape, lambda session: session.prior(x, 0.3))
    assert x0.shape == x.shape and float(x0.abs().max()) <= 1
    barely = prior.run(x.shape, lambda session: session.prior(x, 0.001))
    assert float((barely - x).abs().mean()) < 0.01  # c_skip: with hardly any noise the picture comes back


def test_noise_levels_are_drawn_where_restoration_works_and_up_to_pure_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.cat([training.draw_sigmas(16, generator) for _ in range(200)])
    assert 0.15 < float(sigmas.median()) < 0.3
    assert 0.5 < float(((sigmas > 0.05) & (sigmas < 1)).float().mean()) < 0.9
    assert float(sigmas.max()) > 50 and float(sigmas.min()) >= 0.002


def test_a_few_steps_of_training_learn_to_denoise_and_resume(tmp_path) -> None:
    torch.manual_seed(0)
    photos = [torch.linspace(0, 255, 64).byte().expand(3, 64, 64).contiguous()]

    def trainer() -> training.PriorTrainer:
        return training.PriorTrainer(
            models.create("noise-unet", SMALL),
            training.CleanCrops(training.PhotoCrops(photos), torch.Generator().manual_seed(0)),
            training.Settings(
                steps=30,
                learning_rate=5e-3,
                warmup_steps=1,
                stages=(training.Stage(0, 32, 4),),
                optimizer="muon",
                first_and_last=training.FIRST_AND_LAST,
            ),
            tmp_path,
            training.Denoising(),
            validation={"clean": torch.cat(training.central_squares(photos, 32))},
        )

    run = trainer()
    before = run.score()
    after = run.run(bar=False)
    assert set(after) == {f"sigma {level}" for level in training.LEVELS}
    assert after["sigma 0.7"] > before["sigma 0.7"] + 0.5
    again = trainer()
    assert again.resume() and again.progress.step == 30


class Untouched(torch.nn.Module):
    """Adds nothing to what the scalings around it make of a picture, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = torch.nn.Parameter(torch.zeros(())), 0

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        return x * self.scale


def test_at_the_smallest_noise_level_a_consistency_model_returns_its_input() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = training.denoise(awake(SMALL), x, torch.tensor([training.SIGMA_MIN] * 2), boundary=True)
    assert torch.equal(found, x)


@pytest.mark.parametrize(("share", "gap"), [(0.0, 0.5), (0.34, 0.25), (0.9, 0.125), (1.0, 0.125)])
def test_consistency_tuning_compares_ever_closer_noise_levels(share: float, gap: float) -> None:
    module, clean = Untouched(), torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    objective = training.Consistency(lambda: share)
    loss, parts = objective(module, clean, clean, torch.Generator().manual_seed(2))
    assert float(parts["gap"]) == gap and module.calls == 2
    generator = torch.Generator().manual_seed(2)
    sigma = training.draw_sigmas(3, generator).clamp_min(2 * training.SIGMA_MIN)
    lower = (sigma * (1 - gap)).clamp_min(training.SIGMA_MIN)
    noise, x0 = torch.randn(clean.shape, generator=generator), clean * 2 - 1
    skips = [0.25 / ((s - training.SIGMA_MIN) ** 2 + 0.25) for s in (sigma, lower)]
    answers = [
        (k.reshape(-1, 1, 1, 1) * (x0 + s.reshape(-1, 1, 1, 1) * noise))
        for k, s in zip(skips, (sigma, lower), strict=True)
    ]
    error = (answers[0] - answers[1]).square().mean(dim=(1, 2, 3))
    assert float(loss.detach()) == pytest.approx(
        float((error * (sigma**2 + 0.25) / (0.5 * sigma) ** 2).mean() / gap), rel=1e-4
    )


def test_consistency_tuning_learns_from_the_higher_noise_level_alone() -> None:
    class Two(torch.nn.Module):
        """Answers with its first number when it is asked first (the goal), with its second afterwards."""

        def __init__(self) -> None:
            super().__init__()
            self.numbers, self.calls = torch.nn.Parameter(torch.zeros(2)), 0

        def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
            self.calls += 1
            return x * 0 + self.numbers[self.calls - 1]

    module, clean = Two(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    loss, _ = training.Consistency(lambda: 0.0)(module, clean, clean, torch.Generator().manual_seed(4))
    (slope,) = torch.autograd.grad(loss, [module.numbers])
    assert float(slope[0]) == 0 and abs(float(slope[1])) > 1e-4


def test_a_consistency_model_is_known_by_its_file(tmp_path) -> None:
    module = awake(SMALL)
    for tasks, kind in ((("prior",), "EDM"), (("prior", "consistency"), "consistency")):
        training.export(module, tmp_path / f"{kind}.safetensors", "noise-unet", SMALL, tasks)
        prior = zero_shot.network_prior(loaded.load(tmp_path / f"{kind}.safetensors"))
        assert prior.kind == kind
