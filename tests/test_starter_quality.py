"""The bench of the starter weights: its classical methods do what they are known for, its table has every case."""

from __future__ import annotations

import torch
from test_trainer import TINY, pictures

from comfyui_mend import models
from comfyui_mend.bench import starter_quality
from comfyui_mend.training import damage, data, trainer


def scene() -> torch.Tensor:
    return pictures(1, 96)[0][None].float() / 255


def test_the_noise_level_is_estimated():
    noisy = damage.gaussian_noise(scene(), 20.0, torch.Generator().manual_seed(0))
    assert abs(starter_quality.noise_level(noisy) - 20) < 2


def test_the_dark_channel_prior_removes_haze():
    clean = scene() ** 2  # dark enough to have dark channels
    hazy = damage.haze(clean, 1.2, 0.9, torch.full((1, 1, 96, 96), 0.7))
    restored = starter_quality.dehaze(hazy).clamp(0, 1)
    assert trainer.psnr(restored, clean) > trainer.psnr(hazy, clean) + 1


def test_the_directional_median_removes_upright_streaks():
    clean = scene()
    rainy = damage.rain_streaks(clean, 0.002, 20, 0, 0.9, torch.Generator().manual_seed(0))
    assert trainer.psnr(starter_quality.derain(rainy), clean) > trainer.psnr(rainy, clean) + 3


def test_the_table_has_a_row_for_every_case(tmp_path):
    trainer.export(models.create("moce-ir", TINY), tmp_path / "t.safetensors", "moce-ir", TINY)
    restorer = models.load(tmp_path / "t.safetensors")
    known = {"rain": {"classical": [20.0, 0.5], "method": "a broom"}}
    scores = starter_quality.measure(restorer, pictures(2, 64), 32, classical=False, known=known)
    rows = starter_quality.table(scores)
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(data.VALIDATION)
    assert any(row.startswith("| rain |") and "| a broom | 20.00 / 0.500 |" in row for row in rows)


def test_only_the_kinds_of_damage_that_are_asked_for_are_measured(tmp_path):
    trainer.export(models.create("moce-ir", TINY), tmp_path / "t.safetensors", "moce-ir", TINY)
    restorer = models.load(tmp_path / "t.safetensors")
    scores = starter_quality.measure(restorer, pictures(1, 64), 32, classical=False, only=["rain", "clean"])
    assert list(scores) == ["clean", "rain"]
