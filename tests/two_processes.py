"""Started by torchrun in each process: trains a tiny network and writes its weights to OUT/RANK.pt.

torchrun --nproc_per_node 2 tests/two_processes.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from comfyui_mend.training import distributed, finetune
from comfyui_mend.training.objectives import recipes
from comfyui_mend.training.objectives.base import Objective

CONFIG = {"width": 4, "enc_blk_nums": (1,), "middle_blk_num": 1, "dec_blk_nums": (1,)}
OBJECTIVES: dict[str, Objective] = {
    "pixel": recipes.PixelObjective("L1"),
    "transport": recipes.TransportObjective(width=4, critic_rate=1e-3),
    "classes": recipes.ClassificationObjective(blocks=1),
}


def train(folder: Path, objective: Objective, steps: int = 2) -> finetune.FineTuner:
    """Trains by steps of four crops, shared out among the processes there are."""
    from comfyui_mend import models
    from comfyui_mend.training import dataset_sources, task_text

    torch.manual_seed(0)
    architecture = models.registry.find("dcpt", CONFIG)
    restorer = models.Restorer(architecture, CONFIG, architecture.build(CONFIG))
    photos = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    source = dataset_sources.images(photos, tasks=task_text.tasks_from_text("noise\nrain"))
    settings = finetune.settings(steps, size=32, batch=4, learning_rate=1e-3, validation_size=32)
    tuner = finetune.FineTuner(finetune.trainable_copy(restorer), source, objective, settings, folder, held_out=1)
    tuner.train()
    return tuner


def weights(tuner: finetune.FineTuner) -> dict[str, torch.Tensor]:
    """Of the network, its average and what the method trains beside it."""
    parts = {"module": tuner.module, "average": tuner.average, "method": tuner.method}
    return {f"{name}.{key}": p.detach().clone() for name, part in parts.items() for key, p in part.named_parameters()}


def main(out: str) -> None:
    torch.set_num_threads(1)
    with distributed.processes("gloo"):
        rank = distributed.share()[0]
        found = {name: weights(train(Path(out) / name, objective)) for name, objective in OBJECTIVES.items()}
        assert distributed.agree(rank == 1) and not distributed.agree(False)
        torch.save(found, Path(out) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
