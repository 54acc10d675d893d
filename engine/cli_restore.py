"""`mend restore`: restores photos without a graph."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import MendError
from . import host, loaded, mix, model_folder, tiling
from .photos import STARTER, read_photo, write_photo


def main(arguments: Sequence[str]) -> int:
    """Returns 0 if every photo was restored, 1 if one failed; a bad photo never stops the others."""
    args = _parser().parse_args(arguments)
    host.set_device(args.device)
    restorer = loaded.load(model_folder.model_path(args.model))
    failed = 0
    for photo in args.photos:
        target = (args.output or photo.parent) / f"{photo.stem}-restored{args.format or _suffix(photo)}"
        try:
            if target.exists() and not args.force:
                raise MendError(f"{photo}: {target} exists already; name another --output, or use --force")
            write_photo(_restore(restorer, photo, args), target)
        except MendError as error:
            sys.stderr.write(f"mend restore: {error}\n")
            failed += 1
        else:
            sys.stdout.write(f"{target}\n")
    return 1 if failed else 0


def _suffix(photo: Path) -> str:
    return photo.suffix if photo.suffix.lower() in (".png", ".webp", ".tif", ".tiff") else ".png"


def _restore(restorer: loaded.LoadedRestorer, photo: Path, args: argparse.Namespace) -> torch.Tensor:
    image = read_photo(photo)
    with tqdm(total=1, desc=photo.name, leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int, preview: object) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        host.set_hooks(progress=show)
        try:
            with torch.inference_mode():
                restored = tiling.restore(restorer, image, tile=args.tile, precision=args.precision)
                return (restored if args.strength == 1 else mix.mix(image, restored, strength=args.strength))[0]
        finally:
            host.set_hooks()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mend restore", description="Restores photos of any size.")
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    parser.add_argument(
        "--model", default=STARTER, help=f"a model file; {model_folder.NAMES} (default: the starter, {STARTER})"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where results go (default: beside each photo)")
    parser.add_argument("--format", choices=[".png", ".jpg", ".webp", ".tif"], help="file format of the results")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="0 the original, 1 the restoration (default), above 1 exaggerated"
    )
    parser.add_argument("--tile", type=int, default=0, help="side of a tile in pixels (default: by free memory)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--device", help="where to compute, as PyTorch names it (default: the best there is)")
    parser.add_argument("--force", action="store_true", help="write over results that exist")
    return parser
