"""`mend bench agreement`: are bitstreams written one way read another way, integer by integer?

One process encodes random pictures, each under one of several ways of computing; another process decodes each under another
way. Decoding fails if a single integer of a stream is not recovered (its checksum is in the file).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import models
from ..codec import coder
from ..codec.container import Bitstream
from ..codec.entropy import BitstreamError
from ..engine import host
from ..models.aio_codec import QUALITIES, AllInOneCodec
from . import machine, report

WAYS = {
    "1 thread": {"threads": 1},
    "2 threads": {"threads": 2},
    "without oneDNN": {"threads": 1, "mkldnn": False},
    "channels last": {"threads": 2, "layout": torch.channels_last},
    "autocast to bfloat16": {"threads": 1, "autocast": True},
    "in a batch of tiles": {"threads": 2, "tile": 96},
    "half precision (decoding only)": {"threads": 1, "half": True},
}
"""Ways of computing, by name. A picture is encoded one way and decoded another."""
ENCODERS = tuple(name for name, way in WAYS.items() if "half" not in way)
DECODERS = tuple(name for name, way in WAYS.items() if "tile" not in way)


def picture(number: int) -> tuple[torch.Tensor, int]:
    """Random picture [3, H, W] in 0..1 and quality: hills of random size under noise of random strength."""
    generator = torch.Generator().manual_seed(number)
    height, width, cells = (int(torch.randint(low, high, (), generator=generator)) for low, high in
                            ((24, 129), (24, 129), (2, 24)))  # fmt: skip
    hills = F.interpolate(torch.rand(1, 3, cells, cells, generator=generator), (height, width), mode="bicubic")[0]
    noise = torch.randn(3, height, width, generator=generator) * 0.3 * torch.rand((), generator=generator) ** 3
    quality = int(torch.randint(QUALITIES, (), generator=generator))
    return (hills + noise).clamp(0, 1), quality


def pair(number: int) -> tuple[str, str]:
    """The ways in which a picture is encoded and decoded; never the same, all combinations in turn."""
    encoder = ENCODERS[number % len(ENCODERS)]
    decoders = [name for name in DECODERS if name != encoder]
    return encoder, decoders[number // len(ENCODERS) % len(decoders)]


@contextmanager
def computing(codec: AllInOneCodec, name: str) -> Iterator[dict[str, int]]:
    """Within it the codec computes in the way of this name; gives what `coder.encode` needs to be told."""
    way = WAYS[name]
    with ExitStack() as stack:
        torch.set_num_threads(way["threads"])
        if not way.get("mkldnn", True):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if way.get("autocast"):
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        codec.to(torch.float16 if way.get("half") else torch.float32)
        codec.to(memory_format=way.get("layout", torch.contiguous_format))
        yield {"tile": way["tile"], "overlap": 16} if "tile" in way else {}


def _encode(codec: AllInOneCodec, folder: Path, images: int) -> None:
    for number in range(images):
        image, quality = picture(number)
        with computing(codec, pair(number)[0]) as settings:
            (folder / f"{number}.mend").write_bytes(coder.encode(codec, image, quality, **settings).to_bytes())


def _decode(codec: AllInOneCodec, folder: Path, images: int) -> None:
    failed, integers = {}, 0
    for number in range(images):
        stream = Bitstream.from_bytes((folder / f"{number}.mend").read_bytes())
        with computing(codec, pair(number)[1]):
            try:
                decoded = coder.decode(codec, stream)
            except BitstreamError as error:
                failed[number] = str(error)
            else:
                integers += decoded[0].numel() // 256 * codec.N_dim_compress.out_channels
    (folder / "result.json").write_text(json.dumps({"failed": failed, "integers": integers}))


def run(model: Path, images: int) -> tuple[dict[str, str], int]:
    """Encodes and decodes in two processes; returns the messages of pictures that failed, and how many integers passed."""
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("encode", "decode"):
            command = [sys.executable, "-m", __spec__.parent + ".codec_agreement", "--stage", stage]
            command += ["--model", str(model), "--images", str(images), "--folder", folder]
            subprocess.run(command, check=True)
        result = json.loads((Path(folder) / "result.json").read_text())
    return result["failed"], result["integers"]


def main(arguments: Sequence[str]) -> int:
    """Prints and, where asked, writes the result; exit status 1 if a picture failed."""
    parser = argparse.ArgumentParser(prog="mend bench agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=host.PACK / "weights" / "mend-aio-codec-starter.safetensors")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path, help="also write the result here (.md)")
    parser.add_argument("--stage", choices=["encode", "decode"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.stage:
        codec = models.load(args.model).module
        {"encode": _encode, "decode": _decode}[args.stage](codec, args.folder, args.images)
        return 0
    failed, integers = run(args.model, args.images)
    combinations = len({pair(n) for n in range(args.images)})
    lines = [
        "# Bitstreams written one way and read another",
        "",
        machine.command(f"agreement --images {args.images}"),
        "",
        f"{args.images} random pictures of 24 to 128 pixels a side, qualities 0 to 63, `{args.model.name}`; encoded in one "
        f"process and decoded in another, {combinations} combinations of: {', '.join(WAYS)}.",
        "",
        f"**{len(failed)} of {args.images} pictures** had an integer that was not recovered; some {integers:,} integers of y were.",
        "No GPU was there: that a stream written on a GPU is read on a CPU was not tried.",
        *(f"- {number}: {' to '.join(pair(int(number)))}: {message}" for number, message in failed.items()),
    ]
    report.publish(lines, args.out)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
