"""Steady video from networks that know single pictures only: shots, one decision per shot, motion, flicker."""

from __future__ import annotations

from ..engine import stabiliser
from ..engine.pictures import curves, from_pil
from ..engine.shots import THRESHOLD, first_frames, hold, scores
from ..errors import InputError
from . import sockets
from .api import Node, advanced, io
from .images import as_image, channels_first


def _shots_input(what: str) -> io.Input:
    return sockets.Shots.Input(
        "shots", optional=True, tooltip=f"From Detect Shots: {what}. Without it all frames are one shot."
    )


class DetectShots(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDetectShots",
            display_name="Detect Shots",
            category="Mend/video",
            description="Finds the cuts in a batch of frames: where colours and outlines change at the same time. A pan, a "
            "fade or a flash is no cut.",
            inputs=[
                io.Image.Input("image", tooltip="The frames of a video in order."),
                io.Float.Input(
                    "threshold",
                    default=THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How different two frames must be to count as a cut; the figure shows every frame's value.",
                ),
                advanced(
                    io.Int.Input(
                        "shortest", default=1, min=1, max=10_000, tooltip="Shots have at least this many frames."
                    )
                ),
            ],
            outputs=[
                sockets.Shots.Output("shots", display_name="shots", tooltip="Where each shot begins."),
                io.Image.Output("first", display_name="first frames", tooltip="The first frame of every shot."),
                io.Image.Output("figure", display_name="figure", tooltip="How much each frame looks like a cut."),
                io.String.Output("text", display_name="text", tooltip="The shots as text."),
            ],
        )

    @classmethod
    def execute(cls, image, threshold=THRESHOLD, shortest=1) -> io.NodeOutput:
        pictures = channels_first(image)
        values = scores(pictures)
        starts = first_frames(values, threshold, shortest)
        points = list(enumerate(values))[1:] or [(0, 0.0)]
        limit = [(points[0][0], threshold), (points[-1][0], threshold)]
        figure = curves({"change": points, "threshold": limit}, "frame", "change", f"{len(starts)} shot(s)")
        ends = [start - 1 for start in starts[1:]] + [len(image) - 1]
        text = "\n".join(f"shot {n}: frames {a}-{b}" for n, (a, b) in enumerate(zip(starts, ends, strict=True), 1))
        return io.NodeOutput(starts, as_image(pictures[starts]), as_image(from_pil(figure)[None]), text)


class HoldPerShot(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendHoldPerShot",
            display_name="Hold Per Shot",
            category="Mend/video",
            description="Holds what a network decides per picture (a route, a degradation) for a whole shot: every frame "
            "gets the decision of its shot's first frame, so that nothing changes within a shot.",
            inputs=[
                sockets.Shots.Input("shots", tooltip="From Detect Shots, for the same frames."),
                io.Image.Input("image", tooltip="The frames that were decided for."),
                sockets.Routing.Input("routing", optional=True, tooltip="From Route, one decision per frame."),
                sockets.Degradation.Input(
                    "degradation", optional=True, tooltip="From Encode Degradation or others, one per frame."
                ),
            ],
            outputs=[
                sockets.Routing.Output("held_routing", display_name="routing", tooltip="For Restore Image."),
                sockets.Degradation.Output(
                    "held_degradation", display_name="degradation", tooltip="For Restore Image."
                ),
            ],
        )

    @classmethod
    def execute(cls, shots, image, routing=None, degradation=None) -> io.NodeOutput:
        given = {"routing": routing, "degradation": degradation}
        if routing is None and degradation is None:
            raise InputError("routing or degradation: connect one of them to hold")
        return io.NodeOutput(*(None if v is None else hold(n, v, shots, len(image)) for n, v in given.items()))


class StabiliseFrames(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendStabiliseFrames",
            display_name="Stabilise Frames",
            category="Mend/video",
            description="Takes the flicker out of frames that were restored one by one: averages along the motion what "
            "frames have in common. Where the motion is not certain, or something new appears, the frame stays as it is.",
            inputs=[
                io.Image.Input("image", tooltip="The frames of a video in order, after restoration."),
                io.Float.Input(
                    "strength",
                    default=stabiliser.STRENGTH,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="Largest weight of the past. 0: off. 0.8: averages over about five frames.",
                ),
                advanced(
                    io.Float.Input(
                        "tolerance",
                        default=stabiliser.TOLERANCE,
                        min=0.005,
                        max=0.5,
                        step=0.005,
                        round=0.001,
                        tooltip="How different a spot may look and still count as the same. Larger: steadier, and sooner or "
                        "later ghosts.",
                    )
                ),
                _shots_input("nothing is mixed across a cut"),
            ],
            outputs=[io.Image.Output("steady", display_name="image", tooltip="The same frames, steadier.")],
        )

    @classmethod
    def execute(cls, image, strength=stabiliser.STRENGTH, tolerance=stabiliser.TOLERANCE, shots=(0,)) -> io.NodeOutput:
        return io.NodeOutput(as_image(stabiliser.stabilise(channels_first(image), strength, tolerance, shots)))


class Flicker(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFlicker",
            display_name="Flicker",
            category="Mend/video",
            description="Measures how much a video flickers: how far each frame is from the one before it, moved along the "
            "motion (warping error, Lai et al. 2018), in grey levels of 255. Compares two versions of a video.",
            inputs=[
                io.Image.Input("image", tooltip="The frames of a video in order; the motion is estimated here."),
                io.Image.Input("before", optional=True, tooltip="Another version of the same frames to compare with."),
                _shots_input("no difference is taken across a cut"),
            ],
            outputs=[
                io.Image.Output("figure", display_name="figure", tooltip="The error of every frame."),
                io.Float.Output("flicker", display_name="flicker", tooltip="Of the image, in grey levels of 255."),
                io.String.Output("text", display_name="text", tooltip="The same in words, with the comparison."),
            ],
        )

    @classmethod
    def execute(cls, image, before=None, shots=(0,)) -> io.NodeOutput:
        videos = {"image": channels_first(image)}
        if before is not None:
            if before.shape[:3] != image.shape[:3]:
                raise InputError(f"before: {tuple(before.shape)} cannot be compared with image {tuple(image.shape)}")
            videos["before"] = channels_first(before)
        found = list(stabiliser.warping_errors(list(videos.values()), shots))
        if not found:
            raise InputError("image: flicker needs at least two frames of one shot")
        errors = dict(zip(videos, zip(*found, strict=True), strict=True))
        values = {name: stabiliser.flicker(of_video) for name, of_video in errors.items()}
        frames = [index for index in range(1, len(image)) if index not in shots]
        series = {n: [(f, stabiliser.flicker([e])) for f, e in zip(frames, v, strict=True)] for n, v in errors.items()}
        text = f"flicker {values['image']:.2f} of 255"
        if before is not None and values["image"] > 0:
            text += f", before {values['before']:.2f}: {values['before'] / values['image']:.1f} times as much"
        figure = from_pil(curves(series, "frame", "of 255", "Warping error"))
        return io.NodeOutput(as_image(figure[None]), values["image"], text)


NODES = [DetectShots, HoldPerShot, StabiliseFrames, Flicker]
