"""Giving a restored picture the colours of another."""

from __future__ import annotations

from ..engine import colours
from .api import Node, advanced, io
from .images import as_image, channels_first
from .inputs import one_of


class ColourFix(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendColourFix",
            display_name="Colour Fix",
            category="Mend/restore",
            description="Gives a picture the colours of a reference, usually the picture it was restored from: diffusion "
            "restorers, among them OSDFace, drift in colour. Details stay.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures whose colours have drifted."),
                io.Image.Input(
                    "reference",
                    tooltip="Where the colours come from: one picture, or one per picture; scaled to the image's size.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(colours.METHODS),
                    default="wavelet",
                    tooltip="wavelet: low frequencies come from the reference, which must show the same scene. "
                    "statistics: only the mean and spread of each channel, for any reference.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="0 leaves the picture as it is, 1 takes the reference's colours in full.",
                ),
                advanced(
                    io.Int.Input(
                        "levels",
                        default=5,
                        min=1,
                        max=8,
                        tooltip="wavelet only: how often the blur's radius doubles. More levels take over only the very "
                        "low frequencies; 5 is published.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(
                    "fixed", display_name="image", tooltip="The pictures in 0..1, brighter where the input was."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, method: str) -> bool | str:
        return one_of("method", method, colours.METHODS)

    @classmethod
    def execute(cls, image, reference, method="wavelet", strength=1.0, levels=5) -> io.NodeOutput:
        fixed = colours.fix_colours(channels_first(image), channels_first(reference), method, strength, levels)
        return io.NodeOutput(as_image(fixed))


NODES = [ColourFix]
