"""`mend encode` and `mend decode`: pictures to .mend files and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..engine import host, model_folder
from ..engine.photos import read_photo, write_photo
from ..errors import MendError
from . import compress
from .container import Bitstream
from .files import SUFFIX, contents, read


def encode(arguments: Sequence[str]) -> int:
    """`mend encode`: returns 0 if every picture was compressed, 1 if one failed; one never stops the others."""
    parser = _parser("encode", "Compresses pictures into .mend files.", "pictures", "PICTURE")
    by = parser.add_mutually_exclusive_group()
    by.add_argument("--quality", type=int, default=32, help="0 smallest file .. 63 best picture (default: 32)")
    by.add_argument("--bpp", type=float, help="the best quality within this many bits per pixel")
    by.add_argument("--size", type=int, metavar="BYTES", help="the best quality within this file size")
    parser.add_argument("--tile", type=int, default=1024, help="side of the parts of large pictures (default: 1024)")
    args = parser.parse_args(arguments)
    codec = _codec(args)

    def work(picture: Path) -> None:
        target = _target(picture, args, SUFFIX)
        image = read_photo(picture)[0]
        if args.bpp is None and args.size is None:
            stream = compress.compress(codec, image, args.quality, tile=args.tile)
        else:
            limit = args.size if args.bpp is None else int(args.bpp * image.shape[1] * image.shape[2] / 8)
            stream = compress.compress_to_size(codec, image, limit, tile=args.tile)
        _write(target, stream)
        sys.stdout.write(f"{target}: {compress.describe([stream])}\n")

    return _each("encode", args.pictures, work)


def decode(arguments: Sequence[str]) -> int:
    """`mend decode`: returns 0 if every file was decoded, 1 if one failed; one never stops the others."""
    parser = _parser("decode", "Decompresses .mend files, restoring while decoding.", "files", "FILE")
    parser.add_argument("--format", choices=[".png", ".jpg", ".webp", ".tif"], default=".png", help="default: .png")
    parser.add_argument("--region", type=_region, metavar="LEFT,TOP,WIDTH,HEIGHT", help="decode only a part")
    parser.add_argument("--info", action="store_true", help="say what is in the files and the texts they carry instead")
    args = parser.parse_args(arguments)
    codec = None if args.info else _codec(args)

    def work(file: Path) -> None:
        if codec is None:
            stream = read(file)
            lines = [f"{file}: {compress.describe([stream])}", *(f"{n}: {text}" for n, text in stream.note.items())]
            sys.stdout.write("\n".join(lines) + "\n")
            return
        target = _target(file, args, args.format)
        write_photo(compress.decompress(codec, read(file), region=args.region), target)
        sys.stdout.write(f"{target}\n")

    return _each("decode", args.files, work)


def _parser(name: str, what: str, inputs: str, one: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mend {name}", description=what)
    parser.add_argument(inputs, nargs="+", type=Path, metavar=one)
    parser.add_argument("--model", help=f"a codec file; to decode, the same again; {model_folder.NAMES}")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where results go (default: beside each file)")
    parser.add_argument("--device", help="where to compute, as PyTorch names it (default: the best there is)")
    parser.add_argument("--force", action="store_true", help="write over results that exist")
    return parser


def _codec(args: argparse.Namespace) -> compress.LoadedRestorer:
    host.set_device(args.device)
    if args.model is None:
        raise MendError("name the codec's file with --model; mend-aio-codec-starter.safetensors comes with Mend")
    return compress.load(model_folder.model_path(args.model))


def _region(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError("four whole numbers: left, top, width, height")
    return numbers


def _target(source: Path, args: argparse.Namespace, suffix: str) -> Path:
    target = (args.output or source.parent) / f"{source.stem}{suffix}"
    if target.exists() and not args.force:
        raise MendError(f"{source}: {target} exists already; name another --output, or use --force")
    return target


def _write(target: Path, stream: Bitstream) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(contents(stream))
    except OSError as error:
        raise MendError(f"{target}: cannot be written ({error.strerror or error})") from None


def _each(command: str, paths: Sequence[Path], work: Callable[[Path], None]) -> int:
    failed = 0
    for path in paths:
        try:
            with torch.inference_mode():
                work(path)
        except MendError as error:
            sys.stderr.write(f"mend {command}: {error}\n")
            failed += 1
    return 1 if failed else 0
