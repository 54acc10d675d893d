"""MPMF-Net on the graph: weather removal with its coarse clean image out and in."""

from __future__ import annotations

from ..engine import coarse as coarse_images
from . import sockets
from .api import Node, io
from .images import as_image, channels_first
from .inputs import Precision, tiling_inputs


class CoarseImage(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCoarseImage",
            display_name="Coarse Image",
            category="Mend/weather",
            description="The coarse clean image that MPMF-Net guesses at a quarter of the size before it restores. Quick: "
            "the main network does not run. Edit it and give it to Remove Weather.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="An MPMF-Net network."),
                io.Image.Input("image", tooltip="Pictures with fog, rain, snow or night."),
            ],
            outputs=[
                io.Image.Output("coarse", display_name="coarse", tooltip="A quarter of the size, clamped to 0..1."),
            ],
        )

    @classmethod
    def execute(cls, restorer, image) -> io.NodeOutput:
        return io.NodeOutput(as_image(coarse_images.predict(restorer, channels_first(image)).image.clamp(0, 1)))


class RemoveWeather(Precision, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRemoveWeather",
            display_name="Remove Weather",
            category="Mend/weather",
            description="MPMF-Net with its coarse image as an input: give your own guess of the clean picture (a graded or "
            "hand-corrected small one) and blend it with the network's.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="An MPMF-Net network."),
                io.Image.Input("image", tooltip="Pictures with fog, rain, snow or night, of any size."),
                io.Float.Input(
                    "blend",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How much of the connected coarse image to use: 0 only the network's own, 1 only yours. "
                    "Without one connected it has no effect.",
                ),
                *tiling_inputs(
                    "This network looks at the whole picture, so tiles change the result: take the largest you can.",
                    step=4,
                ),
                io.Image.Input(
                    "coarse",
                    optional=True,
                    tooltip="A clean-looking version, small or large: only its colours at a quarter of the size are used.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "restored", display_name="image", tooltip="Restored pictures in 0..1, brighter where the input was."
                ),
                io.Image.Output(
                    "used", display_name="coarse", tooltip="The coarse image that was used, enlarged to the full size."
                ),
            ],
        )

    @classmethod
    def execute(cls, restorer, image, blend=1.0, tile=0, overlap=-1, precision="auto", coarse=None) -> io.NodeOutput:
        restored, used = coarse_images.restore(
            restorer,
            channels_first(image),
            None if coarse is None else channels_first(coarse),
            amount=blend,
            tile=tile,
            overlap=overlap,
            precision=precision,
        )
        return io.NodeOutput(as_image(restored), as_image(used))


NODES = [CoarseImage, RemoveWeather]
