"""Pictures to bitstreams and back on the host's device: memory, progress, and the search for a wanted file size."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..engine import host, loaded, tiling
from ..engine.loaded import LoadedRestorer
from ..errors import CheckpointError, InputError, OutOfMemoryError
from ..models.aio_codec import LATENT_STRIDE, QUALITIES
from . import coder
from .container import Bitstream

logger = logging.getLogger(__name__)

SMALLEST_TILE = 128


def load(path: str | Path) -> LoadedRestorer:
    """Loads a codec file, shared with whoever loaded it before. Raises CheckpointError if it holds another network."""
    codec = loaded.load(path)
    if codec.restorer.architecture.kind != "codec":
        raise CheckpointError(
            f"model: {Path(path).name} is {codec.restorer.architecture.title}, which does not compress; choose a codec file"
        )
    return codec


@torch.inference_mode(False)  # weights change precision and back, and must stay ordinary tensors
def compress(
    codec: LoadedRestorer,
    image: torch.Tensor,
    quality: int,
    *,
    tile: int = coder.DEFAULT_TILE,
    overlap: int = coder.DEFAULT_OVERLAP,
) -> Bitstream:
    """One picture [1..4, H, W] in 0..1 at a quality index in 0..63; transparency is left out.

    Tiles are halved if memory runs out. Raises InputError, OutOfMemoryError, MissingDependency.
    """
    coder.check_tile(tile, overlap)
    image = rgb(image)
    height, width = image.shape[1:]
    side = min(tile or max(height, width), max(height, width))

    def work(tiles: tuple[int, int]) -> Bitstream:
        with codec.managed.on_device(_activations(codec, side * min(side, height, width))) as (module, _):
            progress = host.progress(coder.part_count(height, width, *tiles))
            return coder.encode(module, image, quality, tile=tiles[0], overlap=tiles[1], step=progress.update)

    def halves() -> Iterator[tuple[int, int]]:
        nonlocal side
        yield tile, overlap
        narrow = overlap
        while side > SMALLEST_TILE:
            side = max(SMALLEST_TILE, tiling.round_up(side // 2, LATENT_STRIDE))
            narrow = min(narrow, side // 4)
            logger.warning("out of memory: compressing in tiles of %d pixels", side)
            yield side, narrow

    try:
        return host.first_that_fits(work, halves())
    except host.DidNotFitError:
        raise _too_little_memory(codec, side) from None


def compress_to_size(codec: LoadedRestorer, image: torch.Tensor, size: int, **settings: int) -> Bitstream:
    """The best quality whose file is no larger than `size` bytes, in about six trials. Raises InputError if none is."""
    low, high, best = 0, QUALITIES - 1, None
    smallest = 0
    trials = (QUALITIES - 1).bit_length()
    for trial in range(trials + 1):
        if low > high:
            break
        # A file that is far too large is common, and quality 0 tells at once whether there is any that fits.
        quality = 0 if trial == 0 else (low + high + 1) // 2
        with host.part_of_progress(trial, trials + 1):
            stream = compress(codec, image, quality, **settings)
        if stream.size <= size:
            best, low = stream, quality + 1
        elif quality == 0:
            smallest = stream.size
            break
        else:
            high = quality - 1
    if best is None:
        raise InputError(
            f"target: {size:,} bytes; at the lowest quality this picture takes {smallest:,}. Ask for more, or scale it down"
        )
    return best


@torch.inference_mode(False)
def decompress(
    codec: LoadedRestorer,
    stream: Bitstream,
    *,
    region: tuple[int, int, int, int] | None = None,
    quality: int | None = None,
) -> torch.Tensor:
    """The restored picture [3, H, W] in 0..1, or the region (left, top, width, height); arguments as `coder.decode`."""
    parts = coder.part_count(stream.height, stream.width, stream.tile, stream.overlap)
    pixels = min(stream.tile or stream.height, stream.height) * min(stream.tile or stream.width, stream.width)

    def work() -> torch.Tensor:
        with codec.managed.on_device(_activations(codec, pixels)) as (module, _):
            step = host.progress(parts).update
            return coder.decode(module, stream, region=region, quality=quality, step=step)

    try:
        return host.attempt(work)
    except host.DidNotFitError:
        raise _too_little_memory(codec, stream.tile or max(stream.height, stream.width)) from None


def describe(streams: Sequence[Bitstream]) -> str:
    """A line for each: size, quality, rate."""
    return "\n".join(
        f"{s.width} x {s.height}, quality {s.quality}: {s.size:,} bytes, {s.bits_per_pixel:.3f} bits per pixel"
        for s in streams
    )


def rgb(image: torch.Tensor) -> torch.Tensor:
    """[3, H, W] of a picture with 1 to 4 channels, for its colours to be compressed."""
    if image.ndim != 3 or not 1 <= image.shape[0] <= 4 or min(image.shape) < 1:
        raise InputError(f"image: expected [C, H, W] with 1 to 4 channels, got {tuple(image.shape)}")
    return tiling.as_rgb(image[None].float())[0].clamp(0, 1)


def _activations(codec: LoadedRestorer, pixels: int) -> int:
    return int(pixels * tiling.bytes_per_pixel(codec, torch.float32))


def _too_little_memory(codec: LoadedRestorer, side: int) -> OutOfMemoryError:
    title = codec.restorer.architecture.title
    return OutOfMemoryError(
        f"{title}: a tile of {side} pixels does not fit into memory; close other programs or models"
    )
