"""Whether a face is still the same person after restoration, as a number."""

from __future__ import annotations

from ..engine import face_identity, journal
from . import sockets
from .api import Node, io
from .images import as_image, channels_first
from .inputs import accepted, fingerprint


class FaceIdentity(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = face_identity.files()
        return io.Schema(
            node_id="MendFaceIdentity",
            display_name="Face Identity Distance",
            category="Mend/faces",
            description="How far faces moved away from the person they show: the cosine distance of SFace's embeddings before "
            "and after. 0: the same; beyond 0.637 SFace takes them for another person. Needs OpenCV and SFace's file.",
            inputs=[
                io.Image.Input("before", tooltip="The pictures before restoration, or others of the same people."),
                io.Image.Input("after", tooltip="The restored pictures, as many; at any size."),
                sockets.Faces.Input(
                    "faces", tooltip="Where the faces lie: from Find Faces, Mark Faces or Align Faces."
                ),
                io.Combo.Input(
                    "model_name",
                    options=files,
                    default=face_identity.FILE if face_identity.FILE in files else files[0],
                    tooltip="The network that recognises faces: OpenCV's SFace, an ONNX file in models/restoration.",
                ),
                sockets.Faces.Input(
                    "faces_after",
                    optional=True,
                    tooltip="Where the same faces lie in the second pictures, in the same order, if elsewhere.",
                ),
            ],
            outputs=[
                io.Float.Output("distance", display_name="distance", tooltip="Mean over all faces, 0 to 2."),
                io.String.Output(
                    "report", display_name="report", tooltip="A line per face, and what the numbers mean."
                ),
                io.Image.Output(
                    "comparison",
                    display_name="image",
                    tooltip="Each face before and after as the network saw it, under its distance.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        return accepted(face_identity.path, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **others) -> str:
        return fingerprint(lambda: journal.identity(face_identity.path(model_name)), model_name)

    @classmethod
    def execute(cls, before, after, faces, model_name, faces_after=None) -> io.NodeOutput:
        recogniser = face_identity.load(face_identity.path(model_name))
        found = face_identity.compare(recogniser, channels_first(before), channels_first(after), faces, faces_after)
        return io.NodeOutput(found.mean, found.describe(), as_image(found.picture))


NODES = [FaceIdentity]
