"""Compress pictures into files that restore while they are decoded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..codec import compress, rates
from ..codec.container import Bitstream
from ..codec.files import SUFFIX, read, write
from ..engine import folders, host, journal, model_folder
from ..engine.pictures import from_pil
from ..engine.values import check_image
from ..errors import InputError
from . import sockets
from .api import Node, advanced, io, ui
from .images import as_image, channels_first
from .inputs import ModelFile, above, accepted, check_choices, fingerprint, model_input, one_of

BY = ["quality", "bits per pixel", "file size"]


def _codec_input() -> io.Input:
    return sockets.Codec.Input("codec", tooltip="From Load Codec.")


def _quality_input() -> io.Input:
    return io.Int.Input(
        "quality",
        default=32,
        min=0,
        max=63,
        tooltip="0: smallest file, 63: best picture. One codec file holds all 64.",
    )


def _tile_input() -> io.Input:
    return advanced(
        io.Int.Input(
            "tile",
            default=1024,
            min=128,
            max=2048,
            step=16,
            tooltip="Larger pictures are coded in tiles of this side: it bounds the memory for encoding and decoding, "
            "and what has to be decoded for a region.",
        )
    )


def _pictures(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """IMAGE as [B, C, H, W]. Raises InputError for an empty batch and for NaN or infinite values."""
    pictures = channels_first(image)
    check_image(pictures, name)
    return pictures


def _check_streams(streams: Sequence[Bitstream]) -> None:
    if not streams:
        raise InputError("bitstream: the batch is empty; connect at least one picture to Encode Bitstream")


class LoadCodec(ModelFile, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadCodec",
            display_name="Load Codec",
            category="Mend/codec",
            description="Loads a compression network (all-in-one codec, S, L or smaller; found out from the file). "
            "Whoever decodes needs the same file.",
            inputs=[
                model_input(
                    "A codec file from models/restoration. mend-aio-codec-starter comes with Mend: a small beginner that "
                    "takes out some noise and rain while it decodes."
                )
            ],
            outputs=[sockets.Codec.Output("codec", display_name="codec", tooltip="For the other codec nodes.")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(compress.load(model_folder.model_path(model_name)))


class EncodeBitstream(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendEncodeBitstream",
            display_name="Encode Bitstream",
            category="Mend/codec",
            description="Compresses pictures of any size, at a quality or to a wanted rate or file size. What comes out is "
            "as many bytes as the file will have.",
            inputs=[
                _codec_input(),
                io.Image.Input("image", tooltip="Pictures to compress, damaged or not. Transparency is left out."),
                io.Combo.Input(
                    "by",
                    options=BY,
                    default="quality",
                    tooltip="What decides: the quality below, or the best quality that stays within the bits per pixel or "
                    "file size below (about seven trials).",
                ),
                _quality_input(),
                io.Float.Input(
                    "bits_per_pixel",
                    default=0.5,
                    min=0.01,
                    max=24.0,
                    step=0.01,
                    tooltip="For bits per pixel: the file may be no larger. 0.2 is little, 1 is much.",
                ),
                io.Float.Input(
                    "kilobytes",
                    default=50.0,
                    min=0.1,
                    max=100000.0,
                    step=1.0,
                    round=0.01,
                    tooltip="For file size: the file may be no larger, in units of 1,000 bytes, for each picture.",
                ),
                _tile_input(),
            ],
            outputs=[
                sockets.Bitstream.Output(
                    "bitstream", display_name="bitstream", tooltip="For Save Bitstream and Decode Bitstream."
                ),
                io.Float.Output(
                    "rate", display_name="bits_per_pixel", tooltip="Real bits per pixel, mean of the batch."
                ),
                io.String.Output("text", display_name="text", tooltip="Size, quality and rate of each picture."),
            ],
        )

    @classmethod
    def validate_inputs(cls, by: str) -> bool | str:
        return one_of("by", by, BY)

    @classmethod
    def execute(cls, codec, image, by="quality", quality=32, bits_per_pixel=0.5, kilobytes=50.0, tile=1024):
        above(-1, tile=tile)
        above(0, bits_per_pixel=bits_per_pixel, kilobytes=kilobytes)
        check_choices(cls, by=by)
        pictures, streams = _pictures(image), []
        pixels = pictures.shape[-2] * pictures.shape[-1]
        allowed = {"bits per pixel": int(bits_per_pixel * pixels / 8), "file size": int(1000 * kilobytes)}
        for number, picture in enumerate(pictures):
            with host.part_of_progress(number, len(pictures)):
                if by == "quality":
                    streams.append(compress.compress(codec, picture, quality, tile=tile))
                else:
                    streams.append(compress.compress_to_size(codec, picture, allowed[by], tile=tile))
        rate = sum(s.bits_per_pixel for s in streams) / len(streams)
        return io.NodeOutput(tuple(streams), rate, compress.describe(streams))


class DecodeBitstream(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        corner = {"default": 0, "min": 0, "max": 65535}
        return io.Schema(
            node_id="MendDecodeBitstream",
            display_name="Decode Bitstream",
            category="Mend/codec",
            description="Turns a bitstream back into a picture, restored on the way. Needs the codec file it was made with, "
            "and says so if it is another one or if the file is damaged.",
            inputs=[
                _codec_input(),
                sockets.Bitstream.Input("bitstream", tooltip="From Encode Bitstream or Load Bitstream."),
                advanced(io.Int.Input("left", **corner, tooltip="For a region: its left edge in pixels.")),
                advanced(io.Int.Input("top", **corner, tooltip="For a region: its upper edge in pixels.")),
                advanced(io.Int.Input("width", **corner, tooltip="Width of the region. 0: the whole picture.")),
                advanced(io.Int.Input("height", **corner, tooltip="Height of the region. 0: the whole picture.")),
            ],
            outputs=[io.Image.Output("restored", display_name="image", tooltip="Decoded pictures in 0..1.")],
        )

    @classmethod
    def execute(cls, codec, bitstream, left=0, top=0, width=0, height=0) -> io.NodeOutput:
        _check_streams(bitstream)
        if bool(width) != bool(height) or (not width and (left or top)):
            raise InputError("region: give both its width and its height, or leave all four at 0 for the whole picture")
        region = (left, top, width, height) if width else None
        if region is None and len({(s.width, s.height) for s in bitstream}) > 1:
            raise InputError("bitstream: its pictures differ in size and make no batch; decode them one by one")
        return io.NodeOutput(as_image(_decode(codec, bitstream, region)))


def _decode(codec, streams: tuple[Bitstream, ...], region: tuple[int, int, int, int] | None = None) -> torch.Tensor:
    """[B, 3, H, W]."""
    pictures = []
    for number, stream in enumerate(streams):
        with host.part_of_progress(number, len(streams)):
            pictures.append(compress.decompress(codec, stream, region=region))
    return torch.stack(pictures)


class SaveBitstream(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSaveBitstream",
            display_name="Save Bitstream",
            category="Mend/codec",
            description="Saves bitstreams as .mend files in the output folder, one for each picture.",
            inputs=[
                sockets.Bitstream.Input("bitstream", tooltip="From Encode Bitstream."),
                io.String.Input(
                    "filename_prefix",
                    default="mend/picture",
                    tooltip="Name of the files, with a folder before it if you like; a number is added.",
                ),
                advanced(
                    io.Boolean.Input(
                        "with_workflow",
                        default=False,
                        tooltip="Puts this workflow into the file, as PNGs have it: some kilobytes more.",
                    )
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, bitstream, filename_prefix="mend/picture", with_workflow=False) -> io.NodeOutput:
        _check_streams(bitstream)
        note = {}
        if with_workflow:
            found = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
            note = {name: json.dumps(value) for name, value in found.items() if value is not None}
        saved = write([replace(s, note=note or s.note) for s in bitstream], filename_prefix, folders.output_directory())
        lines = [f"{path.name}: {path.stat().st_size:,} bytes" for path in saved]
        return io.NodeOutput(ui=ui.PreviewText("\n".join(lines)))


class LoadBitstream(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadBitstream",
            display_name="Load Bitstream",
            category="Mend/codec",
            description="Reads a .mend file from the input folder; drop one on the node, or choose it. It is checked before "
            "anything is decoded.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.input_files(frozenset({SUFFIX})),
                    tooltip="A .mend file in the input folder.",
                )
            ],
            outputs=[
                sockets.Bitstream.Output("bitstream", display_name="bitstream", tooltip="For Decode Bitstream."),
                io.String.Output("text", display_name="text", tooltip="Size, quality and rate of the picture in it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return accepted(folders.require_input_path, file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str:
        return fingerprint(lambda: journal.identity(folders.require_input_path(file)), file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        streams = (read(folders.require_input_path(file)),)
        return io.NodeOutput(streams, compress.describe(streams))


class CompressRestore(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCompressRestore",
            display_name="Compress & Restore",
            category="Mend/codec",
            description="Compresses and decodes in one go: shows what a quality looks like and what it costs, and restores "
            "with a codec as with any other network.",
            inputs=[
                _codec_input(),
                io.Image.Input("image", tooltip="Pictures, damaged or not. Transparency is left out."),
                _quality_input(),
                _tile_input(),
            ],
            outputs=[
                io.Image.Output("restored", display_name="image", tooltip="What a reader of the file would see."),
                sockets.Bitstream.Output("bitstream", display_name="bitstream", tooltip="The file, to be saved."),
                io.String.Output("text", display_name="text", tooltip="Size, quality and rate of each picture."),
            ],
        )

    @classmethod
    def execute(cls, codec, image, quality=32, tile=1024) -> io.NodeOutput:
        above(-1, tile=tile)
        pictures, streams, decoded = _pictures(image), [], []
        for number, picture in enumerate(pictures):
            with host.part_of_progress(2 * number, 2 * len(pictures)):
                streams.append(compress.compress(codec, picture, quality, tile=tile))
            with host.part_of_progress(2 * number + 1, 2 * len(pictures)):
                decoded.append(compress.decompress(codec, streams[-1]))
        return io.NodeOutput(as_image(torch.stack(decoded)), tuple(streams), compress.describe(streams))


class RateReport(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRateReport",
            display_name="Rate Report",
            category="Mend/codec",
            description="Compresses a picture at several qualities and with JPEG and WebP, and plots fidelity (PSNR) against "
            "file size. Uses the first picture of a batch.",
            inputs=[
                _codec_input(),
                io.Image.Input("image", tooltip="What is compressed."),
                io.Int.Input(
                    "qualities",
                    default=5,
                    min=2,
                    max=64,
                    tooltip="How many of the codec's qualities to try, from lowest to highest. Each takes an encode and a "
                    "decode.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="The undamaged picture, if image is damaged: then restoring counts. Without it, results are "
                    "compared with image itself.",
                ),
            ],
            outputs=[
                io.Image.Output("plot", display_name="plot", tooltip="PSNR against bits per pixel."),
                io.String.Output(
                    "text", display_name="text", tooltip="Each quality, and what JPEG and WebP need for the same PSNR."
                ),
            ],
        )

    @classmethod
    def execute(cls, codec, image, qualities=5, reference=None) -> io.NodeOutput:
        picture = _pictures(image[:1])[0]
        clean = None if reference is None else _pictures(reference[:1], "reference")[0]
        found = rates.compare(codec, picture, clean, qualities)
        pixels = picture.shape[-2] * picture.shape[-1]
        plot = rates.plot(found, pixels, "picture itself" if clean is None else "reference")
        return io.NodeOutput(as_image(from_pil(plot)[None]), rates.describe(found, pixels))


NODES = [LoadCodec, EncodeBitstream, DecodeBitstream, SaveBitstream, LoadBitstream, CompressRestore, RateReport]
