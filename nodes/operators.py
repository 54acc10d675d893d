"""Say how a picture was damaged: linear operators."""

from __future__ import annotations

from ..engine import classify
from ..engine import operator_builders as build
from ..errors import InputError
from ..guidance import measurement as measured
from ..guidance import operators
from . import sockets
from .api import Node, advanced, io
from .images import as_image, channels_first, colours_first, connected_mask
from .inputs import above, check_choices, held, seed_input

CATEGORY = "Mend/zero-shot/operators"


def _outputs() -> list[io.Output]:
    return [
        sockets.Operator.Output("operator", display_name="operator", tooltip="The linear degradation A."),
        io.Image.Output(
            "picture",
            display_name="picture",
            tooltip="What one measured value looks at: the kernel, enlarged; for a mask the known pixels in white.",
        ),
    ]


def _built(operator: operators.Operator) -> io.NodeOutput:
    return io.NodeOutput(operator, as_image(measured.footprint(operator)[None]))


class OperatorDownsample(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOperatorDownsample",
            display_name="Operator: Downsample",
            category=CATEGORY,
            description="The picture was made smaller. Restoring undoes it: super-resolution.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(build.DOWNSAMPLING),
                    default="bicubic",
                    tooltip="bicubic: as Pillow and MATLAB shrink by whole factors. average: mean of blocks. bicubic, "
                    "circular: the Fourier kind. any scale: MATLAB's imresize, fractional factors too.",
                ),
                io.Float.Input(
                    "factor",
                    default=4.0,
                    min=1.0,
                    max=16.0,
                    step=1.0,
                    round=0.001,
                    tooltip="How many times smaller each side became.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, kind="bicubic", factor=4.0) -> io.NodeOutput:
        above(0, factor=factor)
        check_choices(cls, kind=kind)
        return _built(build.downsampling(kind, factor))


class OperatorBlur(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        pixels = {"min": 0.1, "max": 40.0, "step": 0.1}
        return io.Schema(
            node_id="MendOperatorBlur",
            display_name="Operator: Blur",
            category=CATEGORY,
            description="The picture was blurred: by a Gaussian, a box, a straight motion, or any kernel picture.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(build.BLURS),
                    default="gaussian",
                    tooltip="gaussian: soft focus. uniform: a box. motion: a straight shake. anisotropic: a Gaussian of two "
                    "widths. A connected kernel picture replaces this.",
                ),
                io.Int.Input(
                    "size",
                    default=9,
                    min=3,
                    max=95,
                    step=2,
                    tooltip="Side of the kernel in pixels (made odd); the length of a motion.",
                ),
                io.Float.Input("sigma", default=2.0, **pixels, tooltip="Width of a Gaussian in pixels."),
                advanced(
                    io.Float.Input(
                        "sigma_across",
                        default=5.0,
                        **pixels,
                        tooltip="Vertical width in pixels of the anisotropic kind; sigma is the horizontal one.",
                    )
                ),
                io.Float.Input(
                    "angle",
                    default=0.0,
                    min=-180.0,
                    max=180.0,
                    step=1.0,
                    tooltip="Direction of a motion in degrees, anticlockwise from the right.",
                ),
                advanced(
                    io.Combo.Input(
                        "borders",
                        options=list(build.BORDERS),
                        default="circular",
                        tooltip="What lies beyond the picture. circular: the other side (fast and exact). zero: black, as in "
                        "CM4IR. reflect: a mirror, as in RDMD and closest to photographs.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "official_layout",
                        default=False,
                        tooltip="With zero borders: repeats a defect of CM4IR's released blur, only to reproduce its "
                        "numbers. It is then not a blur.",
                    )
                ),
                io.Image.Input(
                    "kernel", optional=True, tooltip="A small picture of the blur: where a point of light went."
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        kind="gaussian",
        size=9,
        sigma=2.0,
        sigma_across=5.0,
        angle=0.0,
        borders="circular",
        official_layout=False,
        kernel=None,
    ) -> io.NodeOutput:
        check_choices(cls, kind=kind, borders=borders)
        if kernel is not None:
            if kernel.numel() == 0:
                raise InputError("kernel: there is no picture in this batch; connect one small picture of the blur")
            return _built(build.kernel_from_picture(channels_first(kernel), borders))
        return _built(build.blur(kind, size, sigma, sigma_across, angle, borders, official_layout))


class OperatorInpaint(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOperatorInpaint",
            display_name="Operator: Inpaint",
            category=CATEGORY,
            description="Parts of the picture are missing: scratches, text, holes, lost pixels.",
            inputs=[
                io.Mask.Input("mask", tooltip="White where the picture is missing, of the picture's size."),
                io.Float.Input(
                    "scattered",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.05,
                    tooltip="Share of further pixels lost at random, as in the published tests (0.8).",
                ),
                seed_input("Chooses the scattered pixels."),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, mask, scattered=0.0, seed=0) -> io.NodeOutput:
        return _built(build.inpainting(connected_mask(mask).float(), scattered, seed))


class OperatorColourise(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        weight = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.0001}
        return io.Schema(
            node_id="MendOperatorColourise",
            display_name="Operator: Colourise",
            category=CATEGORY,
            description="The picture lost its colours: grey is a weighted sum of red, green and blue.",
            inputs=[
                io.Float.Input("red", default=0.3333, **weight, tooltip="Weight of red in the grey value."),
                io.Float.Input("green", default=0.3334, **weight, tooltip="Weight of green in the grey value."),
                io.Float.Input("blue", default=0.3333, **weight, tooltip="Weight of blue in the grey value."),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, red: float, green: float, blue: float) -> bool | str:
        if None in (red, green, blue) or abs(red + green + blue - 1) < 0.02:
            return True
        return f"red, green and blue: sum to {red + green + blue:.3f}; grey needs weights that sum to 1"

    @classmethod
    def execute(cls, red=0.3333, green=0.3334, blue=0.3333) -> io.NodeOutput:
        return _built(operators.Colourisation((red, green, blue)))


class OperatorDenoise(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOperatorDenoise",
            display_name="Operator: Denoise",
            category=CATEGORY,
            description="Nothing happened to the picture but noise (its level belongs to the measurement).",
            inputs=[],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return _built(operators.Denoising())


class OperatorCompressedSensing(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOperatorCompressedSensing",
            display_name="Operator: Compressed Sensing",
            category=CATEGORY,
            description="Only some Walsh-Hadamard coefficients of a square picture were measured, as by a one-pixel camera.",
            inputs=[
                io.Combo.Input(
                    "side",
                    options=["32", "64", "128", "256", "512", "1024"],
                    default="256",
                    tooltip="Side of the pictures in pixels, a power of two.",
                ),
                io.Float.Input(
                    "share",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the coefficients was measured.",
                ),
                seed_input("Chooses the coefficients."),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, side="256", share=0.5, seed=0) -> io.NodeOutput:
        check_choices(cls, side=str(side))
        return _built(build.compressed_sensing(int(side), share, seed))


class OperatorCompose(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOperatorCompose",
            display_name="Compose Operators",
            category=CATEGORY,
            description="Two degradations one after the other, such as a blur and then a mask. Chain it for more.",
            inputs=[
                sockets.Operator.Input("first", tooltip="What happened to the picture first."),
                sockets.Operator.Input("second", tooltip="What happened to the result of the first."),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, first, second) -> io.NodeOutput:
        both = build.compose(first, second)
        return io.NodeOutput(both, as_image(measured.footprint(both)[None]))


class OperatorFromDegradation(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOperatorFromDegradation",
            display_name="Operator From Degradation",
            category=CATEGORY,
            description="Turns what the classifier found into an operator: blur with an estimated width, noise with an "
            "estimated level. What no linear operator describes (rain, haze) is treated as noise; the text says so.",
            inputs=[
                sockets.Degradation.Input("degradation", tooltip="From Classify Degradation."),
                io.Image.Input("image", tooltip="The damaged picture: noise level and blur width are estimated on it."),
                advanced(
                    io.Int.Input(
                        "factor", default=4, min=2, max=8, tooltip="Enlargement when the label says low resolution."
                    )
                ),
            ],
            outputs=[
                *_outputs(),
                io.Float.Output(
                    "noise", display_name="noise", tooltip="Estimated standard deviation of the noise, 0..1 scale."
                ),
                io.String.Output("text", display_name="text", tooltip="What was decided, and by which estimates."),
            ],
        )

    @classmethod
    def execute(cls, degradation, image, factor=4) -> io.NodeOutput:
        label, _ = classify.overall(held("degradation", degradation))
        operator, noise, text = build.from_label(label, colours_first(image), factor)
        return io.NodeOutput(operator, as_image(measured.footprint(operator)[None]), noise, text)


NODES = [
    OperatorDownsample,
    OperatorBlur,
    OperatorInpaint,
    OperatorColourise,
    OperatorDenoise,
    OperatorCompressedSensing,
    OperatorCompose,
    OperatorFromDegradation,
]
