"""Tiny networks, data and runs that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import torch

from comfyui_mend import models
from comfyui_mend.training import dataset_sources, datasets, finetune, task_text
from comfyui_mend.training.objectives import recipes
from comfyui_mend.training.objectives.base import Batch, Network

NAFNET = {"width": 4, "enc_blk_nums": (1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1)}
RCOT = {"dim": 4, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 1, 1, 1)}
MOCE = {"dim": 8, "num_blocks": (1, 1), "num_dec_blocks": (1,), "heads": (1, 2), "num_refinement_blocks": 0}
LABELS = ("noise", "rain", "haze")


def restorer(system: str = "dcpt", config: dict | None = None) -> models.Restorer:
    """A tiny network with seeded weights."""
    config = config or NAFNET
    torch.manual_seed(0)
    architecture = models.registry.find(system, config)
    module = architecture.build(config).eval().requires_grad_(False)
    return models.Restorer(architecture, dict(config), module, "tiny.safetensors")


def source(labels: tuple[str, ...] = LABELS) -> datasets.Dataset:
    coarse = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    photos = torch.nn.functional.interpolate(coarse, (48, 48), mode="bicubic").clamp(0, 1)
    return dataset_sources.images(photos, tasks=task_text.tasks_from_text("\n".join(labels)))


def tuner(folder: Path, objective=None, given: models.Restorer | None = None, steps=4, **more) -> finetune.FineTuner:
    own = {k: more.pop(k) for k in ("validate_steps", "keep", "frozen") if k in more}
    settings = finetune.settings(steps, size=32, batch=3, learning_rate=1e-3, validation_size=32, **more)
    made = finetune.trainable_copy(given or restorer())
    return finetune.FineTuner(
        made, source(), objective or recipes.PixelObjective(), settings, folder, held_out=1, **own
    )


def network(given: models.Restorer) -> Network:
    return Network(given.architecture, given.config, finetune.trainable_copy(given).module)


def batch(count: int = 3, size: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(2)
    clean = torch.rand(count, 3, size, size, generator=generator)
    damaged = (clean + 0.1 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    return Batch(damaged, clean, LABELS[:count])
