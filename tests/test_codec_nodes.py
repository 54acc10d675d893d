"""Compression on the graph and on the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from comfyui_mend import __main__ as command_line
from comfyui_mend.codec import coder, compress, files, rates
from comfyui_mend.engine import folders, host
from comfyui_mend.engine.loaded import LoadedRestorer
from comfyui_mend.engine.pictures import from_pil
from comfyui_mend.errors import CheckpointError, InputError, OutOfMemoryError
from comfyui_mend.nodes import codec as nodes

pytest.importorskip("constriction", reason="bitstreams are coded by the package constriction")

NAME = "mend-aio-codec-starter.safetensors"


@pytest.fixture(scope="module")
def codec() -> LoadedRestorer:
    return nodes.LoadCodec.execute(NAME).result[0]


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """IMAGE [1, 72, 100, 3]."""
    picture = Image.open(folders.SHIPPED_INPUTS / "red_panda.jpg").convert("RGB").resize((100, 72))
    return from_pil(picture)[None].movedim(1, -1)


@pytest.fixture
def output(tmp_path):
    folders.set_folders(inputs=[tmp_path], output=tmp_path)
    return tmp_path


def decode(codec, streams, **region) -> torch.Tensor:
    return nodes.DecodeBitstream.execute(codec, streams, **region).result[0]


def test_a_batch_becomes_one_stream_a_picture_and_comes_back(codec, photo) -> None:
    batch = torch.cat([photo, photo.flip(2)])
    streams, rate, text = nodes.EncodeBitstream.execute(codec, batch, quality=50).result
    restored = decode(codec, streams)
    assert len(streams) == 2 and restored.shape == batch.shape and text.count("quality 50") == 2
    assert rate == pytest.approx(sum(8 * s.size / 7200 for s in streams) / 2)
    assert (restored - batch).square().mean() < 0.01


def test_more_quality_costs_more_and_looks_better(codec, photo) -> None:
    low, high = (nodes.CompressRestore.execute(codec, photo, quality=q).result for q in (5, 60))
    assert low[1][0].size < high[1][0].size
    assert (high[0] - photo).square().mean() < (low[0] - photo).square().mean()
    assert torch.equal(high[0], decode(codec, high[1]))


@pytest.mark.parametrize(("by", "value", "limit"), [("bits per pixel", 1.0, 900), ("file size", 0.7, 700)])
def test_a_wanted_rate_or_size_is_kept_and_used(codec, photo, by, value, limit) -> None:
    settings = {"bits_per_pixel": value, "kilobytes": value}
    stream = nodes.EncodeBitstream.execute(codec, photo, by=by, **settings).result[0][0]
    assert stream.size <= limit
    if stream.quality < 63:
        better = nodes.EncodeBitstream.execute(codec, photo, quality=stream.quality + 1).result[0][0]
        assert better.size > limit


def test_an_impossible_size_is_refused_with_the_smallest_possible_one(codec, photo) -> None:
    with pytest.raises(InputError, match="at the lowest quality this picture takes"):
        nodes.EncodeBitstream.execute(codec, photo, by="file size", kilobytes=0.1)


def test_a_region_is_the_same_part_of_the_whole_picture(codec, photo) -> None:
    streams = nodes.EncodeBitstream.execute(codec, photo, quality=40).result[0]
    part = decode(codec, streams, left=10, top=20, width=30, height=40)
    assert torch.allclose(part, decode(codec, streams)[:, 20:60, 10:40], atol=1e-5)
    with pytest.raises(InputError, match="width and its height"):
        decode(codec, streams, left=10)


def test_grey_pictures_and_transparency_are_taken(codec, photo) -> None:
    for image in (photo[..., :1], torch.cat([photo, torch.ones_like(photo[..., :1])], dim=-1)):
        assert nodes.CompressRestore.execute(codec, image).result[0].shape == photo.shape


def test_pictures_of_different_sizes_make_no_batch(codec, photo) -> None:
    streams = [nodes.EncodeBitstream.execute(codec, p).result[0][0] for p in (photo, photo[:, :40])]
    with pytest.raises(InputError, match="differ in size"):
        decode(codec, tuple(streams))


def test_files_are_numbered_and_read_back_with_the_workflow_they_carry(codec, photo, output) -> None:
    streams = nodes.EncodeBitstream.execute(codec, photo).result[0]
    hidden = SimpleNamespace(prompt={"1": {"class_type": "LoadImage"}}, extra_pnginfo={"workflow": {"nodes": []}})
    node = type("Locked", (), {"hidden": hidden})
    execute = nodes.SaveBitstream.execute.__func__
    execute(node, streams * 2, "sub/a")
    execute(node, streams, "sub/a", True)
    assert sorted(p.name for p in (output / "sub").iterdir()) == [f"a_{k:05}_.mend" for k in (1, 2, 3)]
    again, text = nodes.LoadBitstream.execute("sub/a_00003_.mend").result
    assert json.loads(again[0].note["workflow"]) == {"nodes": []} and "quality 32" in text
    assert torch.equal(decode(codec, again), decode(codec, streams))
    assert nodes.LoadBitstream.validate_inputs("../a.mend") is not True


@pytest.mark.parametrize("node", [nodes.EncodeBitstream, nodes.CompressRestore, nodes.RateReport])
def test_an_empty_batch_and_values_that_are_no_numbers_are_refused(codec, photo, node) -> None:
    with pytest.raises(InputError, match="image: empty"):
        node.execute(codec, photo[:0])
    with pytest.raises(InputError, match="image: 21600 values are NaN"):
        node.execute(codec, photo * float("nan"))


def test_the_report_refuses_a_reference_it_cannot_compare_with(codec, photo) -> None:
    for reference, message in [
        (photo[:0], "reference: empty"),
        (photo * float("nan"), "reference: 21600 values are NaN"),
    ]:
        with pytest.raises(InputError, match=message):
            nodes.RateReport.execute(codec, photo, 2, reference)


def test_no_bitstream_at_all_is_neither_decoded_nor_saved(codec, output) -> None:
    for work in (lambda: nodes.DecodeBitstream.execute(codec, ()), lambda: nodes.SaveBitstream.execute(())):
        with pytest.raises(InputError, match="bitstream: the batch is empty"):
            work()


def test_a_file_that_could_not_be_read_again_is_not_written(codec, photo, output, monkeypatch) -> None:
    streams = nodes.EncodeBitstream.execute(codec, photo).result[0]
    monkeypatch.setattr(files, "LARGEST_FILE", len(streams[0].to_bytes()) - 1)
    with pytest.raises(InputError, match="choose a lower quality"):
        nodes.SaveBitstream.execute(streams, "large")
    assert not list(output.glob("*.mend"))


def test_a_file_name_that_a_wire_brings_is_not_known_before_the_run() -> None:
    assert nodes.LoadBitstream.validate_inputs(None) is True
    assert nodes.LoadBitstream.fingerprint_inputs(None) == nodes.LoadBitstream.fingerprint_inputs(None)


def test_a_restorer_is_no_codec() -> None:
    with pytest.raises(CheckpointError, match="does not compress"):
        nodes.LoadCodec.execute("wiring-nafnet.safetensors")


def test_weights_stay_ordinary_tensors_after_a_run_of_the_graph(codec, photo) -> None:
    with torch.inference_mode():
        nodes.CompressRestore.execute(codec, photo)
    assert not any(p.is_inference() for p in codec.restorer.module.parameters())
    assert all(p.dtype == torch.float32 for p in codec.restorer.module.parameters())


def test_tiles_are_halved_when_memory_runs_out(codec, photo, monkeypatch) -> None:
    whole, tried = coder.encode, []

    def scarce(module, image, quality, *, tile, **rest):
        tried.append(tile)
        if tile > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return whole(module, image, quality, tile=tile, **rest)

    monkeypatch.setattr(coder, "encode", scarce)
    image, limit = photo[0].movedim(-1, 0).repeat(1, 4, 4), 256
    assert compress.compress(codec, image, 20).tile == 208 and tried == [1024, 208]
    limit = 0
    with pytest.raises(OutOfMemoryError, match="does not fit"):
        compress.compress(codec, image, 20)


def test_a_choice_that_came_over_a_wire_and_is_none_is_named(codec, photo) -> None:
    with pytest.raises(InputError, match="by: 'zz' is not one of quality, bits per pixel, file size"):
        nodes.EncodeBitstream.execute(codec, photo, by="zz")


def test_a_cancelled_run_stops(codec, photo) -> None:
    host.set_hooks(interrupt=lambda: True)
    try:
        with pytest.raises(Exception, match="cancelled"):
            nodes.EncodeBitstream.execute(codec, photo)
    finally:
        host.set_hooks()


def test_the_report_compares_with_jpeg_and_webp(codec, photo) -> None:
    plot, text = nodes.RateReport.execute(codec, photo, qualities=2).result
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and plot.std() > 0.05
    assert text.count("quality") == 2 and "JPEG" in text and "WebP" in text


def test_sizes_at_a_fidelity_lie_between_the_measured_ones() -> None:
    curve = [rates.Point(1, 100, 20.0), rates.Point(2, 400, 30.0)]
    assert rates.size_at(curve, 25.0) == pytest.approx(200)
    assert rates.size_at(curve, 31.0) is None and rates.size_at(curve, 30.0) == pytest.approx(400)
    assert rates.spread_qualities(8) == [0, 9, 18, 27, 36, 45, 54, 63]
    assert rates.spread_qualities(7) == [0, 11, 21, 32, 42, 53, 63]  # halves go up


def test_the_command_line_compresses_and_decodes(tmp_path, capsys) -> None:
    picture = tmp_path / "a.png"
    Image.open(folders.SHIPPED_INPUTS / "palace.jpg").resize((96, 64)).save(picture)
    model = ["--model", NAME]
    assert command_line.main(["encode", str(picture), "--bpp", "1.5", *model]) == 0
    assert (tmp_path / "a.mend").stat().st_size <= 96 * 64 * 1.5 / 8
    assert command_line.main(["encode", str(picture), *model]) == 1  # nothing is overwritten
    out = ["--output", str(tmp_path / "out")]
    assert command_line.main(["decode", str(tmp_path / "a.mend"), *model, *out, "--region", "8,8,40,20"]) == 0
    assert Image.open(tmp_path / "out" / "a.png").size == (40, 20)
    assert command_line.main(["decode", str(tmp_path / "a.mend"), "--info"]) == 0
    assert "96 x 64" in capsys.readouterr().out
    assert command_line.main(["decode", str(picture), *model, *out, "--force"]) == 1
    assert "no .mend file" in capsys.readouterr().err
