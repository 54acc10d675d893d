"""The range of values a network was trained on, where its file does not say."""

from __future__ import annotations

from ..engine import input_range
from ..models.transweather import INPUT_RANGES
from . import sockets
from .api import Node, io
from .images import channels_first
from .inputs import one_of


class InputRange(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendInputRange",
            display_name="Input Range",
            category="Mend/restore",
            description="Sets the range of values that a TransWeather network is fed. Two of its released files do not say "
            "theirs; with the wrong one the whole picture has too much or too little contrast. Other networks pass through unchanged.",
            inputs=[
                sockets.Restorer.Input(
                    "restorer", tooltip="A TransWeather network; any other one passes through unchanged."
                ),
                io.Combo.Input(
                    "range",
                    options=list(INPUT_RANGES),
                    default="auto",
                    tooltip="auto: 0..1 for files with an uncertainty head (TUR), -1..1 for original ones. measure: "
                    "whichever changes the colours of the connected picture less.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="For measure: a picture, best an undamaged one; the network runs twice on a small copy.",
                ),
            ],
            outputs=[
                sockets.Restorer.Output(
                    "changed", display_name="restorer", tooltip="The same network with this setting."
                ),
                io.String.Output("text", display_name="text", tooltip="What was decided."),
            ],
        )

    @classmethod
    def validate_inputs(cls, range: str) -> bool | str:
        return one_of("range", range, INPUT_RANGES)

    @classmethod
    def execute(cls, restorer, range="auto", image=None) -> io.NodeOutput:
        changed, text = input_range.choose(restorer, range, None if image is None else channels_first(image))
        return io.NodeOutput(changed, text)


NODES = [InputRange]
