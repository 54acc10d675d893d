"""See what is wrong with a picture, and let the graph choose by it."""

from __future__ import annotations

from typing import Any

from ..engine import classify
from . import sockets
from .api import Node, advanced, io
from .images import as_image, channels_first
from .inputs import above, held

CASES = 4
_UNCONNECTED = object()


class ClassifyDegradation(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendClassifyDegradation",
            display_name="Classify Degradation",
            category="Mend/degradation",
            description="Says what is wrong with each picture: rain, noise, haze, low light, blur ... with probabilities. "
            "Uses DCPT's classifier, which reads the inner features of a restoration network.",
            inputs=[
                sockets.Restorer.Input(
                    "classifier",
                    tooltip="From Load Restorer: a file with a classifier. One that has its network inside works by "
                    "itself; DCPT's own *_dc files need the network they were trained with.",
                ),
                io.Image.Input("image", tooltip="Pictures to judge, any size."),
                advanced(
                    io.Int.Input(
                        "window",
                        default=0,
                        min=0,
                        max=4096,
                        step=16,
                        tooltip="Larger pictures are looked at through windows of this side, at full resolution. 0: as the "
                        "file was trained, or 512.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "grid",
                        default=5,
                        min=1,
                        max=16,
                        tooltip="At most this many windows across and down, evenly spaced and averaged. 1: the centre only.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "labels",
                        default="",
                        tooltip="Names for the classes, separated by commas, if the file does not have them. Empty: the file's "
                        "own, or DCPT's published order.",
                    )
                ),
                sockets.Restorer.Input(
                    "network",
                    optional=True,
                    tooltip="For a classifier without its network: the pre-trained NAFNet, SwinIR, Restormer or PromptIR.",
                ),
            ],
            outputs=[
                sockets.Degradation.Output(
                    "degradation", display_name="degradation", tooltip="Probabilities and embedding of every picture."
                ),
                io.String.Output(
                    "label", display_name="label", tooltip="What the whole batch most probably suffers from."
                ),
                io.Image.Output(
                    "chart", display_name="chart", tooltip="The probabilities as bars, one chart per picture."
                ),
                io.String.Output(
                    "text", display_name="text", tooltip="The probabilities as text, one line per picture."
                ),
            ],
        )

    @classmethod
    def execute(cls, classifier, image, window=0, grid=5, labels="", network=None) -> io.NodeOutput:
        above(-1, window=window)
        above(0, grid=grid)
        names = [name.strip() for name in labels.split(",") if name.strip()]
        found = classify.classify(classifier, channels_first(image), network, labels=names, window=window, grid=grid)
        return io.NodeOutput(found, classify.overall(found)[0], as_image(classify.charts(found)), found.report())


class _Switch(Node):
    """Passes on one of its inputs, chosen by the degradation's label; only the branch that is chosen runs."""

    VALUE: Any
    WORD = ""

    @classmethod
    def _inputs(cls) -> list[io.Input]:
        slots = [
            sockets.Degradation.Input(
                "degradation", tooltip="From Classify Degradation. A batch is decided as a whole."
            ),
            cls.VALUE.Input(
                "otherwise",
                lazy=True,
                tooltip=f"The {cls.WORD} to take when no case below fits, or none is sure enough.",
            ),
            advanced(
                io.Float.Input(
                    "confidence",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Below this probability of the best label, otherwise is taken.",
                )
            ),
        ]
        slots += [
            io.String.Input(
                f"labels_{case}",
                default="",
                tooltip=f'Labels that choose {cls.WORD} {case}, separated by commas: "rain, snow". Empty: never.',
            )
            for case in range(1, CASES + 1)
        ]
        slots += [
            cls.VALUE.Input(
                f"{cls.WORD}_{case}", optional=True, lazy=True, tooltip=f"Taken when the label is one of labels {case}."
            )
            for case in range(1, CASES + 1)
        ]
        return slots

    @classmethod
    def _chosen(cls, degradation: Any, confidence: float, given: dict[str, Any]) -> str:
        """Name of the input to pass on."""
        cases = [given.get(f"labels_{case}", "") for case in range(1, CASES + 1)]
        index = classify.choose(held("degradation", degradation), cases, confidence)
        name = f"{cls.WORD}_{index + 1}" if index is not None else "otherwise"
        return name if given.get(name, _UNCONNECTED) is not _UNCONNECTED else "otherwise"

    @classmethod
    def check_lazy_status(cls, degradation, confidence=0.0, **given) -> list[str]:
        name = cls._chosen(degradation, confidence, given)
        return [name] if given.get(name) is None else []

    @classmethod
    def execute(cls, degradation, confidence=0.0, **given) -> io.NodeOutput:
        return io.NodeOutput(given[cls._chosen(degradation, confidence, given)], classify.overall(degradation)[0])


class SwitchRestorer(_Switch):
    VALUE, WORD = sockets.Restorer, "restorer"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSwitchRestorer",
            display_name="Switch Restorer by Degradation",
            category="Mend/degradation",
            description="Picks the restorer that suits the damage. Only the one that is picked is loaded.",
            inputs=cls._inputs(),
            outputs=[
                sockets.Restorer.Output("chosen", display_name="restorer", tooltip="The restorer that was picked."),
                io.String.Output("label", display_name="label", tooltip="The label it was picked by."),
            ],
        )


class SwitchImage(_Switch):
    VALUE, WORD = io.Image, "image"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSwitchImage",
            display_name="Switch Image by Degradation",
            category="Mend/degradation",
            description="Picks one of several ways to treat the picture by what is wrong with it. Only the nodes that lead "
            "to the one that is picked run.",
            inputs=cls._inputs(),
            outputs=[
                io.Image.Output("chosen", display_name="image", tooltip="The pictures that were picked."),
                io.String.Output("label", display_name="label", tooltip="The label they were picked by."),
            ],
        )


NODES = [ClassifyDegradation, SwitchRestorer, SwitchImage]
