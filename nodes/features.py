"""The feature maps inside encoder-decoder networks: take them out, look at them, change them, decode them."""

from __future__ import annotations

from ..engine import feature_maps
from . import sockets
from .api import Node, io
from .images import as_image, channels_first


class EncodeFeatures(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendEncodeFeatures",
            display_name="Encode Features",
            category="Mend/features",
            description="Runs only the first half of an encoder-decoder network (MoCE-IR, NAFNet, Restormer, PromptIR, "
            "SwinIR of DCPT) and gives its feature maps, to look at, change and decode.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="An encoder-decoder network."),
                io.Image.Input("image", tooltip="Pictures to encode; whole, so they must fit into memory."),
            ],
            outputs=[
                sockets.Features.Output(
                    "features", display_name="features", tooltip="One map per level, shallow to deep."
                ),
                io.String.Output("text", display_name="text", tooltip="Size and spread of every level."),
            ],
        )

    @classmethod
    def execute(cls, restorer, image) -> io.NodeOutput:
        found = feature_maps.encode(restorer, channels_first(image))
        return io.NodeOutput(found, feature_maps.describe(found))


class ShowFeatures(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendShowFeatures",
            display_name="Show Features",
            category="Mend/features",
            description="Feature maps as colours: the three directions in which they vary most become red, green and blue. "
            "Places of one colour look alike to the network.",
            inputs=[
                sockets.Features.Input("features", tooltip="From Encode Features."),
                io.Int.Input(
                    "level",
                    default=-1,
                    min=-1,
                    max=31,
                    tooltip="0: the shallowest map in its own size, and so on. -1: all of them side by side.",
                ),
            ],
            outputs=[io.Image.Output("picture", display_name="image", tooltip="A picture for each picture encoded.")],
        )

    @classmethod
    def execute(cls, features, level=-1) -> io.NodeOutput:
        return io.NodeOutput(as_image(feature_maps.picture(features, level)))


class BlendFeatures(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendBlendFeatures",
            display_name="Blend Features",
            category="Mend/features",
            description="Mixes the feature maps of two pictures of one size, level by level. To see what a level carries, "
            "take it from the other picture.",
            inputs=[
                sockets.Features.Input("features", tooltip="The ones to change; the picture itself stays theirs."),
                sockets.Features.Input("other", tooltip="From the same network and a picture of the same size."),
                io.String.Input(
                    "amounts",
                    default="0.5",
                    tooltip="How much of the other: one number for all levels, or one a level, shallow to deep: 0, 0, 0, 1.",
                ),
            ],
            outputs=[sockets.Features.Output("blended", display_name="features", tooltip="The mix.")],
        )

    @classmethod
    def execute(cls, features, other, amounts="0.5") -> io.NodeOutput:
        return io.NodeOutput(features.blend(other, feature_maps.numbers(amounts, len(features.maps), "amounts")))


class DecodeFeatures(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDecodeFeatures",
            display_name="Decode Features",
            category="Mend/features",
            description="Runs the second half of the network on feature maps and gives the restored picture.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="The network that made the features."),
                sockets.Features.Input("features", tooltip="From Encode Features, changed or not."),
                io.String.Input(
                    "gains",
                    default="1",
                    tooltip="Multiplies the maps: one number for all, or one a level, shallow to deep: 1, 1, 1, 0.5.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "restored", display_name="image", tooltip="Restored pictures in 0..1, brighter where the input was."
                )
            ],
        )

    @classmethod
    def execute(cls, restorer, features, gains="1") -> io.NodeOutput:
        scaled = features.scaled(feature_maps.numbers(gains, len(features.maps), "gains"))
        return io.NodeOutput(as_image(feature_maps.decode(restorer, scaled)))


NODES = [EncodeFeatures, ShowFeatures, BlendFeatures, DecodeFeatures]
