"""How sure a network is, on the graph; and two restorations made into one."""

from __future__ import annotations

from ..engine import blend, uncertainty
from ..errors import InputError
from . import sockets
from .api import Node, advanced, io
from .images import as_image, as_mask, channels_first, connected_mask
from .inputs import Precision, chosen, one_of, tiling_inputs

WAYS = ["amount", "mask", "uncertainty", "degradation"]


class RestoreWithUncertainty(Precision, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRestoreWithUncertainty",
            display_name="Restore With Uncertainty",
            category="Mend/restore",
            description="Restores, and shows where the network finds it hard. For networks retrained with TUR (AirNet, "
            "Uformer, TransWeather), which carry a head for it; others say so and Self-Ensemble has a map for them.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A network with an uncertainty head."),
                io.Image.Input("image", tooltip="Pictures to restore: any size, grey, colour or with transparency."),
                io.Float.Input(
                    "white",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    round=0.000001,
                    tooltip="Uncertainty that is white in the mask. 0: nearly the largest one of this batch. Give two "
                    "networks the same value to compare or blend their masks.",
                ),
                *tiling_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    "restored", display_name="image", tooltip="Restored pictures in 0..1, brighter where the input was."
                ),
                io.Mask.Output(
                    "uncertainty",
                    display_name="uncertainty",
                    tooltip="White where the network is unsure, from 0 to white.",
                ),
                io.Image.Output(
                    "map",
                    display_name="map",
                    tooltip="The same in false colour, stretched to each picture's own range.",
                ),
                io.String.Output(
                    "text", display_name="text", tooltip="Mean, smallest and largest value on the network's own scale."
                ),
            ],
        )

    @classmethod
    def execute(cls, restorer, image, white=0.0, tile=0, overlap=-1, precision="auto") -> io.NodeOutput:
        restored, raw = uncertainty.restore(
            restorer, channels_first(image), tile=tile, overlap=overlap, precision=precision
        )
        level = uncertainty.white_level(raw, white)
        mask, picture = uncertainty.as_mask(raw, level), uncertainty.heat_map(raw)
        return io.NodeOutput(as_image(restored), as_mask(mask), as_image(picture), uncertainty.describe(raw, level))


class BlendRestorations(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendBlendRestorations",
            display_name="Blend Restorations",
            category="Mend/restore",
            description="Two restorations of the same picture made into one: where a mask says, where one network is less "
            "sure than the other, or as far as a degradation is probable. Runs no network.",
            inputs=[
                io.Image.Input("first", tooltip="One restoration. Sets the size."),
                io.Image.Input("second", tooltip="The other one; scaled to the first if sizes differ."),
                io.Combo.Input(
                    "by",
                    options=WAYS,
                    default="amount",
                    tooltip="amount: everywhere alike. mask: the second where the mask is white. uncertainty: whichever "
                    "is surer, pixel by pixel. degradation: the second as far as the named degradation is probable.",
                ),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Weight of the second picture; for the other ways its largest weight: 1 lets them decide fully.",
                ),
                advanced(
                    io.Float.Input(
                        "softness",
                        default=0.0,
                        min=0.0,
                        max=200.0,
                        step=0.5,
                        tooltip="Blurs the border between the two: sigma in pixels.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "label",
                        default="",
                        tooltip="For degradation: its name, such as rain; empty: the most probable one.",
                    )
                ),
                io.Mask.Input("mask", optional=True, tooltip="For mask: white takes the second picture."),
                io.Mask.Input(
                    "uncertainty_first", optional=True, tooltip="For uncertainty: where the first is unsure (white)."
                ),
                io.Mask.Input(
                    "uncertainty_second",
                    optional=True,
                    tooltip="The same for the second, made with the same white level. Without it the first's decides alone.",
                ),
                sockets.Degradation.Input(
                    "degradation", optional=True, tooltip="For degradation: from Classify Degradation."
                ),
            ],
            outputs=[
                io.Image.Output("blended", display_name="image", tooltip="The blend, at the first picture's size."),
                io.Mask.Output("weight", display_name="weight", tooltip="Where the second picture was used: white."),
            ],
        )

    @classmethod
    def validate_inputs(cls, by: str) -> bool | str:
        return one_of("by", by, WAYS)

    @classmethod
    def execute(
        cls,
        first,
        second,
        by="amount",
        amount=0.5,
        softness=0.0,
        label="",
        mask=None,
        uncertainty_first=None,
        uncertainty_second=None,
        degradation=None,
    ) -> io.NodeOutput:
        by = chosen("by", by, WAYS)
        a, b = channels_first(first), channels_first(second)
        needed = {"mask": mask, "uncertainty": uncertainty_first, "degradation": degradation}
        if by in needed and needed[by] is None:
            raise InputError(f"{'uncertainty_first' if by == 'uncertainty' else by}: connect it to blend by {by}")
        if by == "mask":
            weight = blend.weight_from_mask(connected_mask(mask), a)
        elif by == "uncertainty":
            given = {"uncertainty_first": uncertainty_first, "uncertainty_second": uncertainty_second}
            weight = blend.weight_from_uncertainty(
                *(None if m is None else blend.weight_from_mask(connected_mask(m), a, n) for n, m in given.items())
            )
        elif by == "degradation":
            weight = blend.weight_from_degradation(degradation, label or degradation.label(), max(len(a), len(b)))
        else:
            weight = a.new_ones(1, 1, 1, 1)
        weight = blend.softened(weight.to(a) * amount, softness)
        blended = blend.blend(a, b, weight)
        return io.NodeOutput(as_image(blended), as_mask(weight.expand(len(blended), 1, *a.shape[-2:])[:, 0]))


NODES = [RestoreWithUncertainty, BlendRestorations]
