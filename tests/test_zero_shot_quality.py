"""The bench of zero-shot restoration: its simple methods do what they are known for, its table has every case."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_noise_unet import SMALL, awake

from comfyui_mend.bench import zero_shot_quality as bench
from comfyui_mend.engine import loaded, zero_shot
from comfyui_mend.engine.report import psnr
from comfyui_mend.guidance.measurement import measure


def scene(side: int = 64) -> torch.Tensor:
    """Soft blobs, [1, 3, side, side] in 0..1."""
    noise = torch.randn(1, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=(side, side), mode="bicubic")
    return (smooth * 0.15 + 0.5).clamp(0, 1)


def score(x: torch.Tensor, clean: torch.Tensor) -> float:
    return float(np.mean(psnr((x / 2 + 0.5).clamp(0, 1), clean)))


@pytest.mark.parametrize("name", list(bench.cases(64)))
def test_the_linear_optimum_beats_the_pseudo_inverse(name: str) -> None:
    operator, noise = bench.cases(64)[name]
    seen = measure(operator, scene(), noise, 1)
    assert score(bench.wiener(seen), scene()) > score(bench.pseudo_inverse(seen), scene()) + 1


def test_a_cubic_surface_goes_through_the_known_pixels() -> None:
    operator, _ = bench.cases(64)["inpainting, half of the pixels"]
    seen = measure(operator, scene())
    filled = bench.bicubic(seen)
    torch.testing.assert_close(operator.A(filled), seen.y)
    assert score(filled, scene()) > 40


def test_letters_hide_a_part_of_the_picture() -> None:
    assert 0.02 < float(bench.text_mask(128).mean()) < 0.4


def test_the_table_has_a_row_for_every_case(tmp_path) -> None:
    save_file(awake(SMALL).state_dict(), str(tmp_path / "small.safetensors"))
    prior = zero_shot.network_prior(loaded.load(tmp_path / "small.safetensors"))
    photo = (scene(40)[0] * 255).byte()
    scores = bench.compare([photo], 32, bench.methods(prior, 2))
    rows = bench.table(scores)
    assert len(rows) == 2 + len(bench.cases(32)) and all(row.count("|") == rows[0].count("|") for row in rows)
    assert all(np.isfinite(values).all() for found in scores.values() for values in found.values())
