"""Real bitstreams: exact, small, safe."""

from __future__ import annotations

import copy
import dataclasses
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_mend import models
from comfyui_mend.codec import coder, container, entropy, tables
from comfyui_mend.errors import CheckpointError, InputError, MendError
from comfyui_mend.models import aio_codec, aio_codec_rates

pytest.importorskip("constriction", reason="bitstreams are coded by the package constriction")

SMALL = {"dim": 8, "N_ch": 24, "z_ch": 32, "num_blocks": (1, 1, 1, 1), "heads": (1, 1, 2, 2)}


@pytest.fixture(scope="module")
def codec() -> aio_codec.AllInOneCodec:
    """Random weights, spread so that symbols of all sizes and escapes occur."""
    torch.manual_seed(3)
    module = models.create("aio-codec", SMALL).eval().requires_grad_(False)
    for name, value in module.named_parameters():
        if "bit_estimator" in name:
            value.copy_(torch.randn_like(value) * 0.5)
        elif name.endswith("conv_out.bias"):
            value.copy_(torch.rand_like(value) + 0.5)
    module.N_dim_compress.weight.mul_(12)
    return module


def test_every_convolution_starts_as_the_published_ones() -> None:
    module = models.create("aio-codec", SMALL)
    convolutions = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.bias is None or not m.bias.any() for m in convolutions)
    for m in convolutions:
        if m.weight.numel() > 2000:
            fans = (m.weight.shape[0] + m.weight.shape[1]) * m.weight[0, 0].numel()
            assert float(m.weight.detach().std()) == pytest.approx((2 / fans) ** 0.5, rel=0.1)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (33, 47), (100, 64)])
def test_a_picture_of_any_size_comes_back_as_the_network_decodes_it(codec, size) -> None:
    image = torch.rand(3, *size)
    stream = container.Bitstream.from_bytes(coder.encode(codec, image, 40).to_bytes())
    decoded = coder.decode(codec, stream)
    padded = coder._piece(image, 0, 0, *(coder.round_up(s, 16) for s in size))[None]
    quality = torch.tensor([40])
    latent = codec.quantise(*codec.analyse(padded, quality), portable=True)
    want = codec.synthesise(latent.y_hat, quality)[0, :, : size[0], : size[1]].clamp(0, 1)
    assert decoded.shape == image.shape and torch.allclose(decoded, want, atol=1e-5)


def test_fifty_pictures_are_decoded_without_one_wrong_integer(codec) -> None:
    for number in range(50):
        image = torch.rand(3, 17 + number, 80 - number) ** (0.3 + number / 20)
        coder.decode(codec, coder.encode(codec, image, number))  # raises if its integers were not recovered


def test_a_stream_written_with_other_threads_is_read(codec) -> None:
    threads, image = torch.get_num_threads(), torch.rand(3, 64, 96)
    try:
        torch.set_num_threads(1)
        stream = coder.encode(codec, image, 20)
        torch.set_num_threads(2)
        coder.decode(codec, stream)
    finally:
        torch.set_num_threads(threads)


def test_the_file_is_as_large_as_the_tables_promise(codec) -> None:
    image = torch.rand(3, 128, 192)
    stream = coder.encode(codec, image, 63)
    latent = codec.quantise(*codec.analyse(image[None], torch.tensor([63])), portable=True)
    hyper, gaussian = tables.hyper_tables(codec.bit_estimator_z), tables.gaussian_tables()
    z = coder._integers(latent.z_hat)
    bits = tables.table_bits(z, coder._channel_index(z.shape), hyper).sum()
    for plane, scales in zip(latent.planes, latent.scales, strict=True):
        bits += tables.table_bits(coder._integers(plane), tables.scale_index(scales[0]).numpy(), gaussian).sum()
    escapes = sum(len(p.escapes) for p in stream.parts)
    assert escapes > 0  # they are exercised
    assert len(stream.to_bytes()) - escapes <= 1.01 * bits / 8 + 64


def test_tables_are_proper_and_every_symbol_survives_them() -> None:
    gaussian = tables.gaussian_tables()
    rng = np.random.default_rng(0)
    indexes = rng.integers(0, 256, 20_000)
    symbols = np.rint(rng.normal(size=20_000) * tables.scale_table().numpy()[indexes] * 1.5).astype(np.int64)
    symbols[::500] = rng.integers(-30_000, 30_000, 40)
    assert all(gaussian.counts(i).min() >= 1 and gaussian.counts(i).sum() == 65_536 for i in range(256))
    encoder = entropy.Encoder()
    encoder.plane(symbols, indexes, gaussian)
    assert np.array_equal(entropy.Decoder(*encoder.finish()).plane(indexes, gaussian), symbols)


def test_large_pictures_are_coded_in_tiles_and_a_region_needs_only_its_own(codec) -> None:
    image = torch.rand(3, 150, 210)
    stream = coder.encode(codec, image, 30, tile=64, overlap=16)
    assert len(stream.parts) > 6
    whole, decoded = coder.decode(codec, stream), []
    part = coder.decode(codec, stream, region=(70, 20, 50, 40), step=lambda: decoded.append(1))
    assert torch.allclose(part, whole[:, 20:60, 70:120], atol=1e-5)
    assert len(decoded) < len(stream.parts) / 2
    with pytest.raises(InputError, match="outside the picture"):
        coder.decode(codec, stream, region=(200, 0, 50, 10))


def test_another_codec_refuses_the_stream(codec) -> None:
    stream = coder.encode(codec, torch.rand(3, 16, 16), 5)
    other = models.create("aio-codec", SMALL).eval().requires_grad_(False)
    with pytest.raises(entropy.BitstreamError, match="made with another codec"):
        coder.decode(other, stream)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no .mend file"),
        (b"<!DOCTYPE html>", "web page"),
        (b"MEND\x01", "cut off within its header"),
        (b"MEND\x07" + bytes(60), "version 7"),
        (b"PK\x03\x04", "no .mend file"),
    ],
)
def test_what_is_no_bitstream_is_named(data: bytes, message: str) -> None:
    with pytest.raises(entropy.BitstreamError, match=message):
        container.Bitstream.from_bytes(data)


def _mutate(data: bytes, rng: random.Random) -> bytes:
    """One random change, its checksum made right half of the time so that it gets past the first gate."""
    changed = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        changed = changed[: rng.randrange(len(changed))]
    elif kind == 1:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        at = rng.randrange(len(changed))
        changed[at : at + rng.randrange(1, 9)] = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
    else:
        at = rng.randrange(4, container._HEADER.size)
        changed[at] = rng.randrange(256)
    if rng.random() < 0.5 and len(changed) >= container._HEADER.size:
        body = bytes(changed[container._HEADER.size :])
        struct.pack_into("<I", changed, 22, len(body))
        struct.pack_into("<I", changed, container._HEADER.size - 4, container.checksum(bytes(changed), body))
    return bytes(changed)


def _survives(codec, count: int) -> int:
    rng, refused = random.Random(11), 0
    data = coder.encode(codec, torch.rand(3, 20, 36), 50, tile=16, overlap=0).to_bytes()
    for _ in range(count):
        try:
            result = coder.decode(codec, container.Bitstream.from_bytes(_mutate(data, rng)))
            assert result.numel() <= 3 * container.LARGEST_PICTURE
        except MendError:
            refused += 1
    return refused


def test_two_hundred_mutated_streams_are_refused_or_decoded_never_worse(codec) -> None:
    assert _survives(codec, 200) > 150


@pytest.mark.slow
def test_five_thousand_mutated_streams_are_refused_or_decoded_never_worse(codec) -> None:
    assert _survives(codec, 5000) > 3500


def test_settings_that_cannot_work_are_refused(codec) -> None:
    image = torch.rand(3, 16, 16)
    for bad in (
        {"quality": 64},
        {"quality": -1},
        {"quality": 3, "tile": 50},
        {"quality": 3, "tile": 32, "overlap": 40},
    ):
        with pytest.raises(InputError):
            coder.encode(codec, image, **bad)
    with pytest.raises(InputError, match="NaN"):
        coder.encode(codec, image * float("nan"), 3)
    for side in [(65_535, 5_000), (20_000, 20_000)]:  # nothing is computed: these have no memory of their own
        with pytest.raises(InputError, match=r"more than a \.mend file may hold"):
            coder.encode(codec, torch.zeros(1).expand(3, *side), 3)


def test_every_plan_that_encoding_accepts_is_read_back(codec) -> None:
    """The height's padding to 16 counts for the largest part, no more: 1024 x 4096 is one, 1025 would be too high."""
    stream = coder.encode(codec, torch.rand(3, 16, 16), 5)
    tiled = container.Bitstream(5_000, 1_024, 5, stream.fingerprint, stream.parts * 2, tile=4_096, overlap=32)
    assert container.Bitstream.from_bytes(tiled.to_bytes()) == tiled
    with pytest.raises(entropy.BitstreamError, match="makes no sense"):
        container.Bitstream.from_bytes(dataclasses.replace(tiled, height=1_025).to_bytes())


def test_tile_0_codes_a_picture_whole_whatever_the_overlap(codec) -> None:
    image = torch.rand(3, 40, 70)
    stream = coder.encode(codec, image, 20, tile=0)
    assert stream == coder.encode(codec, image, 20) and len(stream.parts) == 1
    assert torch.equal(coder.decode(codec, stream), coder.decode(codec, coder.encode(codec, image, 20, tile=1024)))


def test_symbols_beyond_the_largest_are_clamped_and_read_back(codec) -> None:
    loud = copy.deepcopy(codec)
    loud.N_dim_compress.weight.mul_(3e5)
    image = torch.rand(3, 32, 48)
    latent = loud.quantise(*loud.analyse(image[None], torch.tensor([40])), portable=True)
    largest = max(float(plane.abs().max()) for plane in (latent.z_hat, *latent.planes))
    assert largest == entropy.LARGEST_SYMBOL
    stream = container.Bitstream.from_bytes(coder.encode(loud, image, 40).to_bytes())
    want = loud.synthesise(latent.y_hat, torch.tensor([40]))[0].clamp(0, 1)
    assert torch.allclose(coder.decode(loud, stream), want, atol=1e-5)


@pytest.mark.parametrize("side", ["enc", "dec"])
def test_a_codec_that_computes_nan_is_named_as_the_cause(codec, side: str) -> None:
    broken = copy.deepcopy(codec)
    getattr(broken, f"q_scale_{side}").fill_(-1)
    with pytest.raises(CheckpointError, match="the codec file is damaged"):
        coder.decode(broken, coder.encode(broken, torch.rand(3, 16, 16), 5))


class _AppleLike(TorchDispatchMode):
    """The meta device as one that has no float64, and that tensors can be fetched from (as zeros)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        wide = isinstance(result, torch.Tensor) and result.is_meta and result.dtype == torch.float64
        assert not wide, f"{func} makes float64 where there is none"
        return result


def test_no_float64_is_asked_of_a_device_without_it(monkeypatch) -> None:
    monkeypatch.setattr(aio_codec_rates, "_WITHOUT_FLOAT64", ("meta",))
    with torch.device("meta"):
        codec = models.create("aio-codec", SMALL).eval().requires_grad_(False)
    quality = torch.zeros(1, dtype=torch.int64, device="meta")
    with _AppleLike():
        y, z = codec.analyse(torch.rand(1, 3, 32, 48, device="meta"), quality)
        latent = codec.quantise(y, z, portable=True)
        assert codec.synthesise(latent.y_hat, quality).is_meta
        assert tables.scale_index(torch.rand(4, device="meta")).device.type == "cpu"
    assert latent.y_hat.dtype == torch.float64 and latent.y_hat.device.type == "cpu"
    assert {(p.device.type, p.dtype) for p in codec.parameters()} == {("meta", torch.float32)}


@pytest.mark.parametrize("prefix", ["generator.", "module.generator.", "generator.module."])
def test_what_a_released_file_holds_beside_the_generator_is_ignored(codec, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in codec.state_dict().items()}
    outside = "module." if prefix.startswith("module.") else ""
    state |= {f"{outside}step_counter": torch.zeros(1), f"{outside}discriminator.w": torch.zeros(3)}
    loaded = models.load({"state_dict": state, "meta": {"epoch": 3}})
    assert loaded.architecture.id == "aio-codec"
    assert all(torch.equal(value, codec.state_dict()[name]) for name, value in loaded.module.state_dict().items())


def test_texts_travel_with_a_picture_and_do_not_count_as_its_rate(codec) -> None:
    plain = coder.encode(codec, torch.rand(3, 16, 16), 5)
    noted = dataclasses.replace(plain, note={"workflow": '{"nodes": []}', "prompt": "größer"})
    back = container.Bitstream.from_bytes(noted.to_bytes())
    assert back == noted and back.size == plain.size == len(plain.to_bytes()) < len(noted.to_bytes())
    assert torch.equal(coder.decode(codec, back), coder.decode(codec, plain))


def test_a_text_that_no_reader_would_take_is_not_written(codec, monkeypatch) -> None:
    monkeypatch.setattr(container, "LARGEST_NOTE", 100)
    stream = coder.encode(codec, torch.rand(3, 16, 16), 5)
    with pytest.raises(InputError, match="without the workflow"):
        dataclasses.replace(stream, note={"workflow": "x" * 100}).to_bytes()


@pytest.mark.parametrize(
    "tail",
    [b"x", b"NOTE\x00\x00\x00\x00", b"NOTE\x02\x00\x00\x00[]", b"NOTE" + struct.pack("<I", 10) + zlib.compress(b"[]")],
)
def test_a_damaged_text_is_refused(codec, tail: bytes) -> None:
    data = coder.encode(codec, torch.rand(3, 16, 16), 5).to_bytes()
    body = data[container._HEADER.size :] + tail
    header = bytearray(data[: container._HEADER.size])
    struct.pack_into("<I", header, 22, len(body))
    struct.pack_into("<I", header, container._HEADER.size - 4, container.checksum(bytes(header), body))
    with pytest.raises(entropy.BitstreamError, match="behind its last part|is damaged"):
        container.Bitstream.from_bytes(bytes(header) + body)


def test_a_header_cannot_ask_for_more_memory_than_a_part_may_take(codec) -> None:
    stream = coder.encode(codec, torch.rand(3, 16, 16), 5)
    for lying in (
        container.Bitstream(60_000, 4_000, 5, stream.fingerprint, stream.parts),
        container.Bitstream(200, 200, 5, stream.fingerprint, stream.parts, tile=50, overlap=7),
    ):
        with pytest.raises(entropy.BitstreamError, match="makes no sense"):
            container.Bitstream.from_bytes(lying.to_bytes())


@pytest.mark.parametrize("name", ["S", "L"])
def test_every_hyper_parameter_of_the_released_sizes_is_found_in_the_shapes(name: str) -> None:
    architecture = models.registry.get("aio-codec")
    config = architecture.variants[name]
    with torch.device("meta"):
        module = models.create("aio-codec", config)
    assert sum(p.numel() for p in module.parameters()) == {"S": 38_388_407, "L": 66_811_819}[name]
    state = module.state_dict()
    assert models.registry.detect(state) is architecture and len(state) == 560
    assert architecture.config_from_state_dict(state) == dict(config)
