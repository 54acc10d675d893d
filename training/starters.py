"""The networks that come with Mend: what each is, what it learns from, and how it is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .data import (
    DEBLUR_TASKS,
    STARTER_TASKS,
    WEATHER_TASKS,
    PairStream,
    PhotoCrops,
    SuperResolutionStream,
    Task,
    shrink,
)
from .objectives.restoration import Restoration
from .trainer import Stage, validation_set


def _near_identity(last: str) -> Callable[[nn.Module], None]:
    """Makes the residual that the layer `last` writes small: short runs have no time to find the identity."""
    return lambda module: module.get_submodule(last).weight.mul_(0.1)


def _interpolate(module: nn.Module) -> None:
    """Makes a directly shuffling network of scale 2 begin as an interpolation by parabolas.

    The first three features become the picture itself, and the last convolution looks at nothing else.
    """
    taps = torch.tensor(
        [0.15625, 0.9375, -0.09375]
    )  # the parabola through three pixels, a quarter pixel off the centre
    phases = torch.stack([taps, taps.flip(0)])
    first, last = module.conv_first, module.upsample[0]
    first.weight[:3] = 0.0
    first.weight[range(3), range(3), 1, 1] = 1.0
    first.bias[:3] = 0.0
    for tensor in (module.conv_after_body.weight[:3], module.conv_after_body.bias[:3], last.weight, last.bias):
        tensor.zero_()
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                last.weight[4 * channel + 2 * row + column, channel] = torch.outer(phases[row], phases[column])


@dataclass(frozen=True)
class Starter:
    """A recipe. `restores`: what the exported file says it is for. Under `scale` > 1 it enlarges; else it learns `tasks`."""

    file: str
    system: str
    config: Mapping[str, Any]
    restores: tuple[str, ...]
    objective: Restoration
    tasks: tuple[Task, ...] = ()
    scale: int = 1
    initialise: Callable[[nn.Module], None] | None = None
    closing: str | None = None  # the last layers of a residual block, where the network may be deepened between runs
    stages: tuple[Stage, ...] | None = None
    clip_each: float | None = None  # see trainer.Settings

    def pairs(self, crops: PhotoCrops, generator: torch.Generator) -> PairStream | SuperResolutionStream:
        """The stream of training pairs."""
        if self.scale > 1:
            return SuperResolutionStream(crops, self.scale, generator)
        return PairStream(crops, self.tasks, generator)

    def validation_set(self, photos: Sequence[torch.Tensor], size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What to validate with: damaged and clean crops of `size` pixels a case."""
        if self.scale == 1:
            return validation_set(photos, size)
        clean = validation_set(photos, size, {"clean": ()})["clean"][1]
        return {f"x{self.scale}": (shrink(clean, self.scale), clean)}


# Under the paper's L1, a hazy or dark crop, whose error has one sign everywhere, drowns the gradients of all others: in an
# hour nothing else improves. Under the logarithm of each crop's error alone, dark crops stay as they are, because its
# gradient grows as the error shrinks. The two together, and a floor for nearly perfect crops, let all kinds improve.
BLIND = Restoration(pixel=3.0, log=0.25, fft=0.1, floor=3e-4)
DEBLUR = Restoration(pixel=1.0, log=0.1, fft=0.1, floor=3e-4)


STARTERS: Mapping[str, Starter] = {
    "moce-ir": Starter(
        file="mend-moce-ir-starter.safetensors",
        system="moce-ir",
        config={
            "dim": 24,
            "num_blocks": [2, 2, 2, 3],
            "num_dec_blocks": [1, 1, 1],
            "heads": [1, 2, 4, 8],
            "num_refinement_blocks": 5,
            "ffn_expansion_factor": 2,
            "LayerNorm_type": "WithBias",
            "num_experts": 4,
            "topk": 1,
            "rank_type": "spread",
            "rank": 2,
        },
        restores=("denoise", "deblur", "derain", "dehaze", "desnow", "low-light", "jpeg"),
        objective=BLIND,
        tasks=STARTER_TASKS,
        initialise=_near_identity("output"),
        closing="project_out",
        stages=(Stage(0.0, 64, 12), Stage(0.25, 96, 6), Stage(0.65, 128, 4), Stage(0.9, 192, 2)),
        clip_each=2.0,
    ),
    "mpmf-weather": Starter(
        file="mend-mpmf-weather-starter.safetensors",
        system="mpmf-net",
        config={
            "embed_dims": [12, 24, 48, 24, 12],
            "depths": [1, 1, 2, 2, 2, 1],
            "mlp_ratios": [2.0, 4.0, 4.0, 2.0, 2.0],
            "num_heads": [1, 2, 2, 1, 1],
        },
        restores=("dehaze", "derain", "desnow"),
        objective=BLIND,
        tasks=WEATHER_TASKS,
        initialise=_near_identity("patch_unembed.proj.0"),
        stages=(Stage(0.0, 64, 12), Stage(0.4, 96, 6), Stage(0.8, 128, 4)),
    ),
    "acl-deblur": Starter(
        file="mend-acl-deblur-starter.safetensors",
        system="acl",
        config={"channels": 24, "blocks": [1, 1, 2], "head_dim": 12},
        restores=("deblur",),
        objective=DEBLUR,
        tasks=DEBLUR_TASKS,
        initialise=_near_identity("out"),
        stages=(Stage(0.0, 64, 12), Stage(0.4, 96, 6), Stage(0.8, 128, 4)),
    ),
    "nafnet-deblur": Starter(
        file="mend-nafnet-deblur-starter.safetensors",
        system="nafnet",
        config={
            "width": 24,
            "enc_blk_nums": [1, 2, 4],
            "middle_blk_num": 2,
            "dec_blk_nums": [1, 1, 1],
            "train_size": [192, 192],  # on larger pictures 0.2 dB better than means over all of them
        },
        restores=("deblur",),
        objective=DEBLUR,
        tasks=DEBLUR_TASKS,
        initialise=_near_identity("ending"),
        stages=(Stage(0.0, 96, 8), Stage(0.5, 128, 6), Stage(0.85, 192, 3)),
    ),
    "nafnet-weather": Starter(
        file="mend-nafnet-weather-starter.safetensors",
        system="nafnet",
        config={
            "width": 16,
            "enc_blk_nums": [1, 2, 4],
            "middle_blk_num": 4,
            "dec_blk_nums": [1, 1, 1],
            "train_size": [256, 256],  # haze is judged from much of the scene: 0.3 dB better than 192 at 384 pixels
        },
        restores=("dehaze", "derain", "desnow"),
        objective=BLIND,
        tasks=WEATHER_TASKS,
        initialise=_near_identity("ending"),
        stages=(Stage(0.0, 96, 8), Stage(0.5, 128, 6), Stage(0.85, 192, 3)),
    ),
    "mair-x2": Starter(
        file="mend-mair-x2-starter.safetensors",
        system="mair",
        config={
            "embed_dim": 36,
            "depths": [2, 2],
            "d_state": 1,
            "ssm_ratio": 1.1,
            "mlp_ratio": 1.6,
            "scan_len": 8,
            "upscale": 2,
            "upsampler": "pixelshuffledirect",
            "resi_connection": "1conv",
            "in_chans": 3,
            "img_range": 1.0,
        },
        restores=("super-resolution",),
        objective=Restoration(pixel=1.0, fft=0.02),
        scale=2,
        initialise=_interpolate,
        stages=(Stage(0.0, 64, 8), Stage(0.6, 96, 6)),
    ),
}
