"""Say how a picture was damaged: linear operators, and measurements made with them."""

from __future__ import annotations

from ..engine import classify, host, tiling
from ..engine import operator_builders as build
from ..engine.values import check_image
from ..errors import InputError
from ..guidance import measurement as measured
from ..guidance import operators, priors
from . import sockets
from .api import advanced, io
from .images import as_image, channels_first, connected_mask
from .inputs import check_choices, seed_input

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


def _colours(image):
    """IMAGE as [B, 3, H, W] without transparency."""
    picture = channels_first(image)
    check_image(picture)
    return tiling.as_rgb(picture)


def _noise(**more) -> io.Float.Input:
    return io.Float.Input(
        "noise",
        min=more.pop("min", 0.0),
        max=1.0,
        step=0.005,
        round=0.0001,
        **more,
    )


class OperatorDownsample(io.ComfyNode):
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
                    "circular: the Fourier kind. any scale: MATLAB's imresize, broken factors too.",
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
        check_choices(cls, kind=kind)
        return _built(build.downsampling(kind, factor))


class OperatorBlur(io.ComfyNode):
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


class OperatorInpaint(io.ComfyNode):
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


class OperatorColourise(io.ComfyNode):
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


class OperatorDenoise(io.ComfyNode):
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


class OperatorCompressedSensing(io.ComfyNode):
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


class OperatorCompose(io.ComfyNode):
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


class OperatorFromDegradation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOperatorFromDegradation",
            display_name="Operator From Degradation",
            category=CATEGORY,
            description="Turns what the classifier found into an operator: blur with an estimated width, noise with an "
            "estimated level. What no linear operator describes (rain, haze) is treated as noise, and said so.",
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
        operator, noise, text = build.from_label(classify.overall(degradation)[0], _colours(image), factor)
        return io.NodeOutput(operator, as_image(measured.footprint(operator)[None]), noise, text)


class Measure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMeasure",
            display_name="Measure",
            category=CATEGORY,
            description="Damages a clean picture by an operator and noise, to try a restoration where the truth is known.",
            inputs=[
                sockets.Operator.Input("operator", tooltip="What happens to the picture."),
                io.Image.Input("image", tooltip="Clean pictures; transparency is left out."),
                _noise(default=0.05, tooltip="Standard deviation of the added noise; 0.05 is 12.75 of 255."),
                seed_input("Chooses the noise."),
            ],
            outputs=[
                sockets.Measurement.Output(
                    "measurement", display_name="measurement", tooltip="For Zero-Shot Restore and the single steps."
                ),
                io.Image.Output("observed", display_name="image", tooltip="The measurement as a picture."),
            ],
        )

    @classmethod
    def execute(cls, operator, image, noise=0.05, seed=0) -> io.NodeOutput:
        host.check_interrupt()
        # The pictures' own draws must differ from those of a restoration with the same seed.
        picture = _colours(image)
        found = measured.measure(operator.fitted(*picture.shape[-2:]), picture, noise, seed ^ 0x4D656E64)
        return io.NodeOutput(found, as_image(found.picture()))


class MeasurementFromImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMeasurementFromImage",
            display_name="Measurement From Image",
            category=CATEGORY,
            description="Takes a real damaged picture as the measurement: it is what the operator left of the picture to find.",
            inputs=[
                sockets.Operator.Input("operator", tooltip="How the picture was damaged, as well as you know."),
                io.Image.Input(
                    "image", tooltip="The damaged pictures: small ones for super-resolution, grey ones to colour."
                ),
                _noise(
                    default=-1.0,
                    min=-1.0,
                    tooltip="Standard deviation of its noise on the 0..1 scale. -1 estimates it from the picture.",
                ),
            ],
            outputs=[
                sockets.Measurement.Output(
                    "measurement", display_name="measurement", tooltip="For Zero-Shot Restore and the single steps."
                ),
                io.Float.Output("noise_level", display_name="noise", tooltip="The noise level in use."),
            ],
        )

    @classmethod
    def execute(cls, operator, image, noise=-1.0) -> io.NodeOutput:
        picture = _colours(image)
        level = float(priors.estimate_noise(picture).median()) if noise < 0 else noise
        operator = operator.fitted(*picture.shape[-2:], measured=True)
        return io.NodeOutput(measured.from_picture(operator, picture, level), level)


DIRECTIONS = ["apply", "adjoint", "pseudo-inverse", "what it keeps", "what it loses"]


class ApplyOperator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendApplyOperator",
            display_name="Apply Operator",
            category=CATEGORY,
            description="Runs an operator on pictures: forwards, its adjoint, its pseudo-inverse, or the part of a picture "
            "that it keeps or loses.",
            inputs=[
                sockets.Operator.Input("operator", tooltip="The linear degradation A."),
                io.Image.Input("image", tooltip="Pictures; for adjoint and pseudo-inverse measured ones."),
                io.Combo.Input(
                    "direction",
                    options=DIRECTIONS,
                    default="apply",
                    tooltip="apply: A. adjoint: A'. pseudo-inverse: A+. what it keeps: A+ A. what it loses: the rest.",
                ),
                io.Float.Input(
                    "damping",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.00001,
                    tooltip="Tames the pseudo-inverse: 0 is exact and lets noise grow, more is softer.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "result", display_name="image", tooltip="The result; what it loses is shown around middle grey."
                )
            ],
        )

    @classmethod
    def execute(cls, operator, image, direction="apply", damping=0.0) -> io.NodeOutput:
        check_choices(cls, direction=direction)
        x = _colours(image) * 2 - 1
        operator = operator.fitted(*x.shape[-2:], measured=direction in ("adjoint", "pseudo-inverse"))
        if direction == "apply":
            result = operator.A(x)
        elif direction == "adjoint":
            result = operator.A_adjoint(x)
        elif direction == "pseudo-inverse":
            result = operator.A_dagger(x, damping)
        else:
            result = operator.A_dagger(operator.A(x), damping)
            result = x - result if direction == "what it loses" else result
        if result.shape[1] == 1:
            result = result.expand(-1, 3, -1, -1)
        return io.NodeOutput(as_image((result / 2 + 0.5).clamp(0, 1)))


NODES = [
    OperatorDownsample,
    OperatorBlur,
    OperatorInpaint,
    OperatorColourise,
    OperatorDenoise,
    OperatorCompressedSensing,
    OperatorCompose,
    OperatorFromDegradation,
    Measure,
    MeasurementFromImage,
    ApplyOperator,
]
