"""`mend bench tiles`: how far a picture restored in tiles is from the same picture restored whole, per network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ..engine import host, loaded, model_folder, tiling
from ..engine.photos import read_photo
from . import machine


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    host.set_device("cpu")
    print(f"{machine.command('tiles', *arguments)}; in steps of 0..255\n")
    print("| network | picture | tile | reach | mean difference | largest | of the restoration's own mean change |")
    print("|---|---|---|---|---|---|---|")
    for name in args.model:
        network = loaded.load(model_folder.model_path(name))
        image = read_photo(args.picture)[:, :3, : args.size, : args.size] if args.picture else _scene(args.size)
        for tile in args.tile:
            mean, largest, share = difference(network, image, tile)
            radius = network.restorer.architecture.receptive_field(network.restorer.config)
            size = f"{image.shape[-1]}x{image.shape[-2]}"
            reach = "whole picture" if radius is None else f"{radius} px"
            print(
                f"| {name} | {size} | {tile} | {reach} | {255 * mean:.4f} | {255 * largest:.2f} | {100 * share:.2f} % |",
                flush=True,
            )
    return 0


def difference(network: loaded.LoadedRestorer, image: torch.Tensor, tile: int) -> tuple[float, float, float]:
    """Mean and largest |tiled - whole|, and the mean as a share of |whole - image| (of |whole| for enlargers)."""
    with torch.inference_mode():
        whole = tiling.restore(network, image, tile=max(image.shape[-2:]), precision="fp32")
        tiled = tiling.restore(network, image, tile=tile, precision="fp32")
    change = whole - image if whole.shape == image.shape else whole
    apart = (tiled - whole).abs()
    return float(apart.mean()), float(apart.max()), float(apart.mean() / change.abs().mean().clamp_min(1e-9))


def _scene(side: int) -> torch.Tensor:
    """A picture [1, 3, side, side] with smooth areas, edges and noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mend bench tiles", description=__doc__)
    parser.add_argument("--model", nargs="*", default=["mend-moce-ir-starter.safetensors"], help="model files")
    parser.add_argument("--picture", help="a photograph; otherwise a made-up scene")
    parser.add_argument("--size", type=int, default=256, help="side of the square that is restored")
    parser.add_argument("--tile", nargs="*", type=int, default=[128])
    parser.add_argument("--threads", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
