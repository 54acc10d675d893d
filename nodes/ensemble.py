"""Self-ensemble on the graph: a little better and steadier, for its price in time."""

from __future__ import annotations

from ..engine import ensemble, uncertainty
from . import sockets
from .api import Node, advanced, io
from .images import as_image, as_mask, channels_first
from .inputs import Precision, chosen, first_problem, one_of, tiling_inputs

COUNTS = {"2 (mirrored)": 2, "4 (mirrored both ways)": 4, "8 (and turned)": 8}


class SelfEnsemble(Precision, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSelfEnsemble",
            display_name="Self-Ensemble",
            category="Mend/restore",
            description="Restores the picture mirrored and turned in up to eight ways and averages: usually a little closer "
            "to the truth, at that many times the time. How far the eight disagree is a map of doubt for any network.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="Any network from Load Restorer."),
                io.Image.Input("image", tooltip="Pictures to restore: any size, grey, colour or with transparency."),
                io.Combo.Input(
                    "ways",
                    options=list(COUNTS),
                    default="8 (and turned)",
                    tooltip="How many ways to look at the picture: as many times the time, not the memory.",
                ),
                advanced(
                    io.Float.Input(
                        "white",
                        default=0.0,
                        min=0.0,
                        max=10.0,
                        step=0.001,
                        round=0.000001,
                        tooltip="Spread that is white in the mask. 0: nearly the largest one of this batch.",
                    )
                ),
                *tiling_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    "restored", display_name="image", tooltip="The average in 0..1, brighter where the input was."
                ),
                io.Mask.Output(
                    "spread", display_name="spread", tooltip="White where the ways disagree, from 0 to white."
                ),
                io.String.Output(
                    "text", display_name="text", tooltip="The spread in figures, on the scale of the picture."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, precision: str | None, ways: str | None) -> bool | str:
        return first_problem(one_of("ways", ways, COUNTS), super().validate_inputs(precision))

    @classmethod
    def execute(
        cls, restorer, image, ways="8 (and turned)", white=0.0, tile=0, overlap=-1, precision="auto"
    ) -> io.NodeOutput:
        count = COUNTS[chosen("ways", ways, COUNTS)]
        restored, raw = ensemble.restore(
            restorer, channels_first(image), count, tile=tile, overlap=overlap, precision=precision
        )
        level = uncertainty.white_level(raw, white)
        return io.NodeOutput(
            as_image(restored), as_mask(uncertainty.as_mask(raw, level)), uncertainty.describe(raw, level, "spread")
        )


NODES = [SelfEnsemble]
