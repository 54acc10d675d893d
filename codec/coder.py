"""Pictures to bitstreams and back, tile by tile, with the all-in-one codec.

Entropy parameters are computed in float64, so that a stream written on one device is read on any other; a checksum of the
integers reports a drift instead of showing garbage.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from ..engine.tiling import Axis, plan_axis, round_up
from ..errors import CheckpointError, InputError
from ..models.aio_codec import HYPER_STRIDE, LATENT_STRIDE, AllInOneCodec, check_quality, entropy_precision
from . import tables
from .container import LARGEST_PART, LARGEST_PICTURE, LARGEST_SIDE, Bitstream, Part
from .entropy import BitstreamError, Decoder, Encoder

DEFAULT_TILE, DEFAULT_OVERLAP = 1024, 32
Step = Callable[[], None]


def fingerprint(codec: AllInOneCodec) -> bytes:
    """16 bytes that identify a codec's weights, whatever their precision on this device was made from (float32)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(codec.state_dict().items()):
        digest.update(name.encode() + str(tuple(value.shape)).encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.digest()


def _plan(height: int, width: int, tile: int, overlap: int) -> tuple[Axis, Axis]:
    """How a picture, padded to multiples of 16, is cut; the same for encoder and decoder."""
    sides = [round_up(length, LATENT_STRIDE) for length in (height, width)]
    axes = [plan_axis(s, min(tile or s, s), overlap, LATENT_STRIDE) for s in sides]
    return axes[0], axes[1]


def check_tile(tile: int, overlap: int) -> None:
    """Raises InputError for a plan that no picture can be cut by."""
    if tile % LATENT_STRIDE or not 0 <= tile <= LARGEST_SIDE or overlap < 0 or (tile and overlap >= tile):
        raise InputError(
            f"tile and overlap: {tile} and {overlap}; tile must be a multiple of 16 and larger than overlap, or 0 to code "
            "the picture whole"
        )


def part_count(height: int, width: int, tile: int, overlap: int) -> int:
    """How many parts a picture is coded in."""
    rows, columns = _plan(height, width, tile, overlap)
    return len(rows.starts) * len(columns.starts)


def _places(rows: Axis, columns: Axis) -> Iterator[tuple[int, int, int]]:
    for i, top in enumerate(rows.starts):
        for j, left in enumerate(columns.starts):
            yield i * len(columns.starts) + j, top, left


def _integers(plane: torch.Tensor) -> np.ndarray:
    return plane[0].round().to("cpu", torch.int32).numpy()


def _checksum(planes: list[np.ndarray]) -> int:
    value = 0
    for plane in planes:
        value = zlib.crc32(np.ascontiguousarray(plane, dtype="<i4").tobytes(), value)
    return value


def _check_finite(*tensors: torch.Tensor) -> None:
    """Raises CheckpointError if the codec computed NaN or infinity from numbers that were none."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise CheckpointError(
            "codec: it computes NaN or infinite values for this picture: the codec file is damaged or its training "
            "failed; download it again, or choose another one"
        )


def _table_index(scales: torch.Tensor) -> np.ndarray:
    """Gaussian tables of one plane [N/2, h, w] for its scales [1, N/2, h, w]."""
    _check_finite(scales)
    return tables.scale_index(scales[0]).cpu().numpy()


def _channel_index(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[0])[:, None, None], shape)


@torch.no_grad()
def encode(
    codec: AllInOneCodec,
    image: torch.Tensor,
    quality: int,
    *,
    tile: int = DEFAULT_TILE,
    overlap: int = DEFAULT_OVERLAP,
    step: Step = lambda: None,
) -> Bitstream:
    """Compresses one picture [3, H, W] in 0..1 at a quality index in 0..63.

    tile: side of the parts of larger pictures, a multiple of 16; 0 codes the picture whole, and overlap means nothing.
    step is called per part. Raises InputError for a picture or setting that cannot be coded, CheckpointError for a codec
    that computes NaN, MissingDependency without constriction.
    """
    if image.ndim != 3 or image.shape[0] != 3 or min(image.shape) < 1 or max(image.shape[1:]) > LARGEST_SIDE:
        raise InputError(
            f"image: expected [3, H, W] with sides of 1 to {LARGEST_SIDE} pixels, got {tuple(image.shape)}"
        )
    if image.shape[1] * image.shape[2] > LARGEST_PICTURE:
        raise InputError(
            f"image: {image.shape[2]} x {image.shape[1]} pixels are more than a .mend file may hold "
            f"({LARGEST_PICTURE:,}); scale it down, or cut it and compress the pieces"
        )
    if not bool(torch.isfinite(image).all()):
        raise InputError("image: it contains NaN or infinite values")
    check_tile(tile, overlap)
    device = codec.refine.weight.device
    index = check_quality(quality, 1, device)
    height, width = image.shape[1:]
    rows, columns = _plan(height, width, tile, overlap)
    if rows.tile * columns.tile > LARGEST_PART:
        raise InputError(f"tile: {tile} leaves parts of {columns.tile} x {rows.tile} pixels; choose 1024, at most 2048")
    cut = part_count(height, width, tile, overlap) > 1
    parts = []
    hyper = tables.hyper_tables(codec.bit_estimator_z)
    for _, top, left in _places(rows, columns):
        piece = _piece(image, top, left, rows.tile, columns.tile).to(device)
        y, z = codec.analyse(piece[None], index)
        latent = codec.quantise(y, z, portable=True)
        _check_finite(y, z, *latent.planes)
        encoder, planes = Encoder(), [_integers(p) for p in (latent.z_hat, *latent.planes)]
        encoder.plane(planes[0], _channel_index(planes[0].shape), hyper)
        for plane, scales in zip(planes[1:], latent.scales, strict=True):
            encoder.plane(plane, _table_index(scales), tables.gaussian_tables())
        parts.append(Part(*encoder.finish(), _checksum(planes)))
        step()
    quality_index = int(index[0])
    size = (tile, overlap) if cut else (0, 0)
    return Bitstream(width, height, quality_index, fingerprint(codec), tuple(parts), *size)


def _piece(image: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """A tile [3, height, width]; what lies beyond the picture repeats its border."""
    piece = image[:, top : top + height, left : left + width]
    missing = (height - piece.shape[1], width - piece.shape[2])
    return F.pad(piece[None], (0, missing[1], 0, missing[0]), mode="replicate")[0] if any(missing) else piece


@torch.no_grad()
def decode(
    codec: AllInOneCodec,
    stream: Bitstream,
    *,
    region: tuple[int, int, int, int] | None = None,
    quality: int | None = None,
    step: Step = lambda: None,
) -> torch.Tensor:
    """The restored picture [3, H, W] in 0..1, or a region (left, top, width, height) of it, decoding only its parts.

    quality: synthesis gain of another index than the one it was coded with (an effect, not a rate).
    Raises BitstreamError if the stream is damaged or was made with other weights, CheckpointError for a codec that
    computes NaN.
    """
    if stream.fingerprint != fingerprint(codec):
        raise BitstreamError("bitstream: made with another codec file; load the one that it was encoded with")
    device = codec.refine.weight.device
    index = check_quality(stream.quality if quality is None else quality, 1, device)
    rows, columns = _plan(stream.height, stream.width, stream.tile, stream.overlap)
    if len(stream.parts) != len(rows.starts) * len(columns.starts):
        raise BitstreamError("bitstream: the number of its parts does not fit its size")
    x0, y0, w, h = region or (0, 0, stream.width, stream.height)
    if x0 < 0 or y0 < 0 or w < 1 or h < 1 or x0 + w > stream.width or y0 + h > stream.height:
        raise InputError(f"region: {x0}, {y0}, {w} x {h} is outside the picture, {stream.width} x {stream.height}")
    result = torch.zeros(3, h, w)
    hyper = tables.hyper_tables(codec.bit_estimator_z)
    size = (rows.tile // LATENT_STRIDE, columns.tile // LATENT_STRIDE)
    for number, top, left in _places(rows, columns):
        if top >= y0 + h or top + rows.tile <= y0 or left >= x0 + w or left + columns.tile <= x0:
            continue
        y_hat = _decode_latent(codec, stream.parts[number], hyper, size)
        piece = codec.synthesise(y_hat, index)[0].float().cpu()
        _check_finite(piece)
        i, j = divmod(number, len(columns.starts))
        piece = piece * rows.windows[i][:, None] * columns.windows[j]
        upper, lower = max(top, y0), min(top + rows.tile, y0 + h)
        first, last = max(left, x0), min(left + columns.tile, x0 + w)
        inside = piece[:, upper - top : lower - top, first - left : last - left]
        result[:, upper - y0 : lower - y0, first - x0 : last - x0] += inside
        step()
    return result.clamp_(0, 1)


def _decode_latent(codec: AllInOneCodec, part: Part, hyper: tables.Tables, size: tuple[int, int]) -> torch.Tensor:
    """y_hat [1, N, h, w] of one part: z, then the first plane, whose values give the second one's scales."""
    decoder = Decoder(part.stream, part.escapes)
    channels = codec.bit_estimator_z.f1.h.shape[1]
    shape = (channels, *(-(-s // HYPER_STRIDE) for s in size))
    planes = [decoder.plane(_channel_index(shape), hyper)]
    with entropy_precision(codec, portable=True) as convert:

        def tensor(plane: np.ndarray) -> torch.Tensor:
            return convert(torch.from_numpy(plane)[None])

        common = codec.common_parameters(tensor(planes[0]), size)
        gaussian = tables.gaussian_tables()
        planes.append(decoder.plane(_table_index(codec.first_scales(common)), gaussian))
        scales, spatial = codec.second_scales(tensor(planes[1]), common)
        planes.append(decoder.plane(_table_index(scales), gaussian))
        if _checksum(planes) != part.checksum:
            raise BitstreamError(
                "bitstream: its integers were not recovered: damaged, or this device computes differently"
            )
        return codec.dequantise([tensor(p) for p in planes[1:]], common, spatial)
