"""Measurements, made of pictures by operators, and what an operator does to a picture."""

from __future__ import annotations

from ..engine import host
from ..guidance import measurement as measured
from ..guidance import priors
from . import sockets
from .api import Node, io
from .images import as_image, colours_first
from .inputs import check_choices, seed_input
from .operators import CATEGORY


def _noise(**more) -> io.Float.Input:
    return io.Float.Input(
        "noise",
        min=more.pop("min", 0.0),
        max=1.0,
        step=0.005,
        round=0.0001,
        **more,
    )


class Measure(Node):
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
        found = measured.measure(operator, colours_first(image), noise, seed ^ 0x4D656E64)
        return io.NodeOutput(found, as_image(found.picture()))


class MeasurementFromImage(Node):
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
        picture = colours_first(image)
        level = float(priors.estimate_noise(picture).median()) if noise < 0 else noise
        return io.NodeOutput(measured.from_picture(operator, picture, level), level)


DIRECTIONS = ["apply", "adjoint", "pseudo-inverse", "what it keeps", "what it loses"]


class ApplyOperator(Node):
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
        x = colours_first(image) * 2 - 1
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


NODES = [Measure, MeasurementFromImage, ApplyOperator]
