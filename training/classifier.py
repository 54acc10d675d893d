"""Mend's starter degradation classifier: DCPT's classifier on a small NAFNet of its own, in one file.

    python -m comfyui_mend.training.classifier --photos DIR --out weights/mend-degradation-classifier.safetensors

Network and features are DCPT's (models/dcpt_classifier.py). Its restoration term is left out: this network is there to look,
not to restore, so all of the small budget goes into telling damages apart. Its first filters start as derivatives.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..models.dcpt_classifier import ClassifiedNetwork, classify
from .data import PairStream, PhotoCrops, Task, load_photos
from .degradations import Degradation
from .objectives.dcpt import focal_loss
from .trainer import OWN_LICENCE, export

logger = logging.getLogger(__name__)

ARCHITECTURE = "dcpt-classified-network"
STRENGTHS = (0.6, 1.0)
KINDS: dict[str, tuple[str, ...]] = {
    "clean": (),
    "noise": ("noise", "noise", "channel-noise", "poisson"),
    "jpeg": ("jpeg",),
    "blur": ("blur", "defocus"),
    "motion blur": ("motion-blur",),
    "rain": ("rain",),
    "snow": ("snow",),
    "haze": ("haze",),
    "low light": ("low-light",),
}
"""Class names and the kinds of damage each stands for; one listed twice is drawn twice as often."""
CONFIG: dict[str, Any] = {
    "backbone": "nafnet",
    "net_g": {"width": 8, "enc_blk_nums": (0, 1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1, 0)},
    "net_dc": {"feature_dims": (8, 16, 32), "num_res_blocks": 1, "num_classes": len(KINDS)},
    "labels": tuple(KINDS),
    "window": 64,
}


def tasks() -> list[Task]:
    """One task a class, all equally likely."""
    return [
        Task(name, 1.0, tuple((Degradation(k, s),) for k in kinds for s in STRENGTHS) or ((),))
        for name, kinds in KINDS.items()
    ]


@torch.no_grad()
def start_from_derivatives(convolution: nn.Conv2d) -> None:
    """Sets the first eight filters of a 3x3 convolution over RGB to brightness, two colour differences and derivatives.

    The norms that follow hide amplitudes; noise, blocks and blur show in how strong fine detail is beside the rest.
    """
    box, point = torch.full((3, 3), 1 / 9), torch.zeros(3, 3)
    point[1, 1] = 1.0
    across = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    diagonal = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]])
    grey, red_blue, green = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]]) / 3
    filters = [(grey, box), (red_blue, 3 * box), (green, 3 * box), (grey, 4 * across), (grey, 4 * across.T)]
    filters += [(grey, 4 * (point - box)), (grey, 4 * diagonal), (red_blue, 4 * (point - box))]
    for index, (colours, kernel) in enumerate(filters):
        convolution.weight[index] = colours[:, None, None] * kernel
    convolution.bias.zero_()


class _Normalised(nn.Module):
    """The network with its embedding standardised before the last layer: without, that layer learns very slowly.

    The channel norms make every picture's embedding nearly the same. `folded` moves the standardisation into the layer.
    """

    def __init__(self, module: ClassifiedNetwork) -> None:
        super().__init__()
        self.module = module
        self.norm = nn.BatchNorm1d(module.net_dc.fc.in_features)

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        return self.module.net_dc.embed(self.module.net_g.decoder_features(image), image)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.module.net_dc.fc(self.norm(self.embed(image)))

    @torch.no_grad()
    def folded(self, images: Sequence[torch.Tensor]) -> ClassifiedNetwork:
        """The plain network, standardising by the statistics of `images`."""
        embedded = torch.cat([self.embed(image) for image in images])
        scale = self.norm.weight * (embedded.var(dim=0) + self.norm.eps).rsqrt()
        layer = self.module.net_dc.fc
        layer.bias += layer.weight @ (self.norm.bias - embedded.mean(dim=0) * scale)
        layer.weight *= scale
        return self.module.eval().requires_grad_(False)


def train(
    photos: Sequence[torch.Tensor],
    minutes: float,
    *,
    batch: int = 32,
    size: int = CONFIG["window"],
    rate: float = 5e-3,
    seed: int = 0,
) -> tuple[ClassifiedNetwork, int]:
    """Trains for `minutes` of wall time; returns the averaged (EMA) network in evaluation mode, and the steps taken."""
    torch.manual_seed(seed)
    module = models.create(ARCHITECTURE, CONFIG)
    start_from_derivatives(module.net_g.intro)
    network = _Normalised(module).train()
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)
    stream = PairStream(PhotoCrops(photos), tasks(), torch.Generator().manual_seed(seed))
    names, start, step, right = list(KINDS), time.monotonic(), 0, 0.0
    while (elapsed := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:  # warm-up, then a cosine over the time there is
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * elapsed))
        damaged, _, damages = stream.batch(batch, size)
        target = torch.tensor([names.index(d) for d in damages])
        logits = network(damaged.clamp(0, 1))
        loss = focal_loss(logits, target, gamma=0.0)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(network)
        step += 1
        right += float((logits.argmax(dim=1) == target).float().mean()) / 50
        if step % 50 == 0:
            logger.info("step %d, %.0f %% of the time, loss %.3f, right %.2f", step, 100 * elapsed, loss.item(), right)
            right = 0.0
    typical = [stream.batch(batch, size)[0].clamp(0, 1) for _ in range(24)]
    return average.module.folded(typical), step


@torch.no_grad()
def confusion(module: ClassifiedNetwork, photos: Sequence[torch.Tensor], draws: int = 2, seed: int = 1) -> torch.Tensor:
    """How often each class (row) of damaged photos is called each class (column); [classes, classes] of counts."""
    table, names = torch.zeros(len(KINDS), len(KINDS), dtype=torch.int64), list(KINDS)
    for row, task in enumerate(tasks()):
        for index, photo in enumerate(photos):
            for draw in range(draws):
                generator = torch.Generator().manual_seed(seed + 1000 * index + draw)
                image = photo[None].float() / 255
                for step in task.chains[(draws * index + draw) % len(task.chains)]:
                    image, _ = step(image, generator)
                image = (image.clamp(0, 1) * 255).round() / 255
                found = classify(
                    image, module.net_g, module.net_dc, names, multiple_of=8, window=CONFIG["window"], grid=5
                )
                table[row, names.index(found.label())] += 1
    return table


def markdown(table: torch.Tensor) -> str:
    """The confusion table in per cent of each row."""
    names = list(KINDS)
    lines = ["| damage \\ called | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, row in zip(names, table.tolist(), strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{100 * n / max(1, sum(row)):.0f}" for n in row) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    module, steps = train(load_photos(options.photos / "train"), options.minutes)
    config = json.loads(json.dumps(CONFIG))
    provenance = {"steps": steps, "minutes": options.minutes, "loss": "cross-entropy"}
    # Safe before the long look at validation.
    export(module, options.out, ARCHITECTURE, config, training=provenance, licence=OWN_LICENCE)
    table = confusion(module, load_photos(options.photos / "validation"))
    right = float(table.diagonal().sum() / table.sum())
    provenance |= {"validation": round(right, 4)}
    export(module, options.out, ARCHITECTURE, config, training=provenance, licence=OWN_LICENCE)
    options.out.with_suffix(".md").write_text(f"{steps} steps, {100 * right:.1f} % right\n\n{markdown(table)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
