"""GenDeg's two files in the released layout, with made-up weights and a small U-Net: generator and structure correction.

python tests/make_gendeg_checkpoint.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    from .make_sd_checkpoints import Table, sd15_shapes, write_sd15
except ImportError:  # run as a script
    from make_sd_checkpoints import Table, sd15_shapes, write_sd15

GENERATOR, CORRECTION = "gendeg.ckpt", "nafnet_sd.ckpt"
CORRECTION_CONFIG = {"img_channel": 6, "width": 8, "enc_blk_nums": (1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1)}


def write_gendeg(folder: str | Path, averaged: bool = True) -> dict[str, Path]:
    """Both files under their released names: {"generator", "correction"}: path. averaged: with the U-Net's EMA copy."""
    from comfyui_mend import models
    from comfyui_mend.models.gendeg import averaged_name

    folder = Path(folder)
    extra = {"betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2}
    if averaged:
        shapes = {key: shape for key, shape in sd15_shapes(8).items() if key.startswith("model.")}
        own = Table(77, size=1 << 20).fill(shapes)  # not those of the raw U-Net, so that a mistake shows
        extra |= {averaged_name(key.removeprefix("model.")): value for key, value in own.items()}
        extra |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1, dtype=torch.int32)}
    generator = write_sd15(folder, GENERATOR, gendeg=True, extra=extra)
    torch.manual_seed(5)
    module = models.create("gendeg", CORRECTION_CONFIG)
    with torch.no_grad():
        module.ending.weight.mul_(0.2)
    torch.save({"state_dict": module.state_dict()}, folder / CORRECTION)
    return {"generator": generator, "correction": folder / CORRECTION}


def main(arguments: Sequence[str]) -> int:
    paths = write_gendeg(Path(arguments[0])).values()
    sys.stdout.writelines(f"{path} {path.stat().st_size / 1e6:.1f} MB\n" for path in paths)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
