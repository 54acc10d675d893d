"""VLU-Net's degradation vector on the graph: from a picture, a region or a text; mixed; looked at."""

from __future__ import annotations

from ..engine import degradations
from . import sockets
from .api import Node, advanced, io
from .images import as_image, channels_first, connected_mask
from .inputs import held, one_of


class EncodeDegradation(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendEncodeDegradation",
            display_name="Encode Degradation",
            category="Mend/degradation",
            description="What VLU-Net's CLIP finds wrong with a picture, or with a region of it: a vector that steers the "
            "restoration, and how likely each known degradation is. Restore Image does the same by itself; here it can "
            "be looked at, mixed, or taken from another picture.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A VLU-Net with its CLIP (the Lightning .ckpt files)."),
                io.Image.Input(
                    "image", tooltip="Pictures to look at: those to restore, or others with the same fault."
                ),
                io.Combo.Input(
                    "view",
                    options=list(degradations.VIEWS),
                    default="centre",
                    tooltip="centre: the central square, as published. whole: squares covering the picture, averaged. "
                    "close-ups: up to nine 256-pixel squares at true resolution, for faults that shrinking hides.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Look only at the rectangle around the white part. An all-black mask is no restriction.",
                ),
                advanced(
                    io.Boolean.Input(
                        "average",
                        default=False,
                        optional=True,
                        tooltip="One degradation for the whole batch, so that the frames of a video do not flicker.",
                    )
                ),
            ],
            outputs=[
                sockets.Degradation.Output(
                    "degradation", display_name="degradation", tooltip="For Restore Image and Mix Degradations."
                ),
                io.Image.Output(
                    "chart", display_name="chart", tooltip="The likelihoods as bars, one sheet per picture."
                ),
                io.String.Output("text", display_name="text", tooltip="The same as text, one line per picture."),
            ],
        )

    @classmethod
    def validate_inputs(cls, view: str) -> bool | str:
        return one_of("view", view, degradations.VIEWS)

    @classmethod
    def execute(cls, restorer, image, view="centre", mask=None, average=False) -> io.NodeOutput:
        found = degradations.encode(restorer, channels_first(image), connected_mask(mask), view, average)
        return io.NodeOutput(found, as_image(degradations.degradation_picture(found)), found.report())


class DegradationFromText(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDegradationFromText",
            display_name="Degradation From Text",
            category="Mend/degradation",
            description="Steers VLU-Net by a description instead of by what CLIP sees. Both live in one space; the paper "
            "does not evaluate this use.",
            inputs=[
                sockets.Restorer.Input(
                    "restorer", tooltip="A VLU-Net with both of CLIP's towers (the Lightning files)."
                ),
                io.String.Input(
                    "text",
                    default="image with rain",
                    tooltip="The texts it was tuned on: image with noise, many noise, large amount of noise, haze, rain, "
                    "blur, low light. Other words need a CLIP connected.",
                ),
                advanced(
                    io.Clip.Input(
                        "clip",
                        optional=True,
                        tooltip="Any SD 1.5 or SDXL text encoder: only its tokenizer is used, so that any words work.",
                    )
                ),
            ],
            outputs=[
                sockets.Degradation.Output(
                    "degradation", display_name="degradation", tooltip="For Restore Image and Mix Degradations."
                ),
                io.String.Output("report", display_name="text", tooltip="How likely each known degradation is."),
            ],
        )

    @classmethod
    def execute(cls, restorer, text="image with rain", clip=None) -> io.NodeOutput:
        found = degradations.from_text(restorer, text, clip)
        return io.NodeOutput(found, found.report())


class MixDegradations(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMixDegradations",
            display_name="Mix Degradations",
            category="Mend/degradation",
            description="Interpolates two degradations of one method: between two pictures, or from what was seen towards "
            "what you say.",
            inputs=[
                sockets.Degradation.Input("first", tooltip="Taken whole at amount 0."),
                sockets.Degradation.Input("second", tooltip="Taken whole at amount 1; from the same method."),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=-1.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="0 the first, 1 the second; beyond that exaggerates.",
                ),
            ],
            outputs=[sockets.Degradation.Output("mixed", display_name="degradation", tooltip="The mixture.")],
        )

    @classmethod
    def execute(cls, first, second, amount=0.5) -> io.NodeOutput:
        return io.NodeOutput(held("first", first).mix(held("second", second), amount))


class PromptWeights(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPromptWeights",
            display_name="Prompt Weights",
            category="Mend/degradation",
            description="Which of its learned prompt maps VLU-Net takes for a degradation, in each of its eight stages. "
            "Prompts have no names: entry 3 is not the third degradation.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A VLU-Net network."),
                sockets.Degradation.Input("degradation", tooltip="From Encode Degradation, From Text or Mix."),
            ],
            outputs=[
                io.Image.Output("map", display_name="map", tooltip="Stages by prompts; the strongest is framed."),
                io.String.Output("text", display_name="text", tooltip="The same as a table, averaged over the batch."),
            ],
        )

    @classmethod
    def execute(cls, restorer, degradation) -> io.NodeOutput:
        weights = degradations.prompt_weights(restorer, held("degradation", degradation))
        return io.NodeOutput(as_image(degradations.prompt_picture(weights)), degradations.prompt_text(weights))


NODES = [EncodeDegradation, DegradationFromText, MixDegradations, PromptWeights]
