"""Where to restore: masks from what is wrong, or from how sure a network is."""

from __future__ import annotations

from ..engine import regions
from ..engine.pictures import false_colour
from . import sockets
from .api import Node, advanced, io
from .images import as_image, as_mask, channels_first, connected_mask
from .inputs import above


def _shape_inputs(threshold: float, softness: float, what: str) -> list[io.Input]:
    step = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001}
    return [
        io.Float.Input("threshold", default=threshold, **step, tooltip=f"The region is where {what} reaches this."),
        io.Float.Input(
            "softness",
            default=softness,
            **step,
            tooltip="Width of the rise from black to white around the threshold. 0: a hard edge.",
        ),
        io.Float.Input(
            "feather",
            default=4.0,
            min=0.0,
            max=500.0,
            step=0.5,
            tooltip="Blurs the region's border: sigma in pixels.",
        ),
        io.Boolean.Input("invert", default=False, tooltip="Turns the mask round: white everywhere else."),
    ]


class RegionFromMap(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRegionFromMap",
            display_name="Region From Map",
            category="Mend/restore",
            description="Makes a mask from a map of doubt (Restore With Uncertainty, Self-Ensemble) or any other mask: where it "
            "reaches a threshold, with a soft border. For Restoration Mix and Blend Restorations.",
            inputs=[
                io.Mask.Input("map", tooltip="An uncertainty, a spread, a weight: any mask with values from 0 to 1."),
                *_shape_inputs(0.5, 0.2, "the map"),
            ],
            outputs=[io.Mask.Output("region", display_name="mask", tooltip="White in the region.")],
        )

    @classmethod
    def execute(cls, map, threshold=0.5, softness=0.2, feather=4.0, invert=False) -> io.NodeOutput:
        return io.NodeOutput(as_mask(regions.region(connected_mask(map), threshold, softness, feather, invert)))


class RegionFromDegradation(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRegionFromDegradation",
            display_name="Region From Degradation",
            category="Mend/degradation",
            description="Judges the picture window by window and makes a mask of where it suffers from a degradation. As mask "
            "of Restoration Mix it leaves alone what is not damaged.",
            inputs=[
                sockets.Restorer.Input(
                    "classifier", tooltip="From Load Restorer: a file with a degradation classifier."
                ),
                io.Image.Input("image", tooltip="Pictures to judge, larger than the classifier's window."),
                io.String.Input(
                    "label",
                    default="",
                    tooltip="Name of the degradation, such as noise; clean finds what is undamaged. Empty: whatever the "
                    "batch suffers from most.",
                ),
                *_shape_inputs(0.5, 0.5, "its probability"),
                advanced(
                    io.Int.Input(
                        "window",
                        default=0,
                        min=0,
                        max=4096,
                        step=16,
                        tooltip="Side of the windows in pixels: smaller ones find smaller regions and are less sure. 0: as "
                        "the classifier was trained.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "grid",
                        default=8,
                        min=1,
                        max=64,
                        tooltip="At most this many windows across and down. Each runs the classifier once.",
                    )
                ),
                sockets.Restorer.Input(
                    "network",
                    optional=True,
                    tooltip="For a classifier without its network, as in Classify Degradation.",
                ),
            ],
            outputs=[
                io.Mask.Output("region", display_name="mask", tooltip="White where the picture suffers from it."),
                io.Image.Output("map", display_name="map", tooltip="The probability itself in false colour."),
                io.String.Output("found", display_name="label", tooltip="The degradation that was looked for."),
            ],
        )

    @classmethod
    def execute(
        cls,
        classifier,
        image,
        label="",
        threshold=0.5,
        softness=0.5,
        feather=4.0,
        invert=False,
        window=0,
        grid=8,
        network=None,
    ) -> io.NodeOutput:
        above(-1, window=window)
        above(0, grid=grid)
        found, label = regions.degradation_map(
            classifier, channels_first(image), label.strip(), network, window=window, grid=grid
        )
        mask = regions.region(found, threshold, softness, feather, invert)
        return io.NodeOutput(as_mask(mask), as_image(false_colour(found).movedim(0, 1)), label)


NODES = [RegionFromMap, RegionFromDegradation]
