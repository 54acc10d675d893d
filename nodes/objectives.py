"""Objectives to train by: each is one way to learn, and they add up."""

from __future__ import annotations

from ..training.objectives.base import Weighted
from ..training.objectives.dcpt import MODES
from ..training.objectives.pixel import PIXEL_LOSSES
from ..training.objectives.recipes import (
    ClassificationObjective,
    ClassifierGuidanceObjective,
    DenoisingObjective,
    PixelObjective,
    RateDistortionObjective,
    RoutingObjective,
    TransportObjective,
    UncertaintyObjective,
)
from . import sockets
from .api import Node, advanced, io
from .inputs import chosen, first_problem, one_of

CATEGORY = "Mend/training"
SLOTS = 4
_TUR_SETTINGS = ["data set", "3task", "5task", "7task"]
_ACCUMULATE = {"as published": None, "as released": True, "as in the paper": False}
_PRIORS = ["denoising", "consistency"]


def _objective_output() -> list[io.Output]:
    return [
        sockets.Objective.Output(
            "objective", display_name="objective", tooltip="For Train Restorer or Combine Objectives."
        )
    ]


def _stages_input(empty: str) -> io.Input:
    """Which decoder stages a classifier looks at; `empty` says which they are by default."""
    tooltip = "Names of the decoder stages to look at, separated by commas; * stands for any letters. Empty: "
    return advanced(io.String.Input("stages", default="", tooltip=f"{tooltip}{empty}."))


class Pixel(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPixelObjective",
            display_name="Pixel Objective",
            category=CATEGORY,
            description="Come close to the clean picture: in its pixels and in its spectrum. The plain way to train.",
            inputs=[
                io.Combo.Input(
                    "loss",
                    options=list(PIXEL_LOSSES),
                    default="Charbonnier",
                    tooltip="Charbonnier: absolute difference, smooth at zero. log error: every crop counts alike, however "
                    "badly it is damaged; good where haze or darkness drown the rest.",
                ),
                io.Float.Input(
                    "fft",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Weight of the difference of spectra, which keeps fine detail in sight. 0: without.",
                ),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def validate_inputs(cls, loss: str | None) -> bool | str:
        return one_of("loss", loss, PIXEL_LOSSES)

    @classmethod
    def execute(cls, loss="Charbonnier", fft=0.1) -> io.NodeOutput:
        return io.NodeOutput(PixelObjective(loss, fft))


class Routing(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRoutingObjective",
            display_name="Routing Objective",
            category=CATEGORY,
            description="For MoCE-IR: makes its routers use all experts. Add it to a Pixel Objective with a weight of 0.01.",
            inputs=[
                io.Boolean.Input(
                    "complexity_bias",
                    default=True,
                    tooltip="Prefer cheap experts where they do, as the paper has it. Off: all experts alike, as the "
                    "published commands train.",
                ),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def execute(cls, complexity_bias=True) -> io.NodeOutput:
        return io.NodeOutput(RoutingObjective(complexity_bias))


class Uncertainty(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendUncertaintyObjective",
            display_name="Task Uncertainty Objective (TUR)",
            category=CATEGORY,
            description="For several kinds of damage at once: learns how uncertain each kind leaves the network, and lets "
            "hard kinds pull less. Takes the place of a Pixel Objective.",
            inputs=[
                io.Combo.Input(
                    "tasks",
                    options=_TUR_SETTINGS,
                    default="data set",
                    tooltip="Which kinds there are: those of the data set, or one of the published lists.",
                ),
                advanced(
                    io.Combo.Input(
                        "accumulate",
                        options=list(_ACCUMULATE),
                        default="as published",
                        tooltip="The released 3- and 5-task code counts tasks with small numbers several times. as "
                        "published: as each list was trained; own tasks by the paper's formula.",
                    )
                ),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def validate_inputs(cls, tasks: str | None, accumulate: str | None) -> bool | str:
        return first_problem(one_of("tasks", tasks, _TUR_SETTINGS), one_of("accumulate", accumulate, _ACCUMULATE))

    @classmethod
    def execute(cls, tasks="data set", accumulate="as published") -> io.NodeOutput:
        tasks = chosen("tasks", tasks, _TUR_SETTINGS)
        return io.NodeOutput(UncertaintyObjective(tasks, _ACCUMULATE[chosen("accumulate", accumulate, _ACCUMULATE)]))


class Classification(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendClassificationObjective",
            display_name="Degradation Classification Objective (DCPT)",
            category=CATEGORY,
            description="Pre-training: the network reproduces clean pictures while a classifier must tell from its features "
            "what is wrong with damaged ones. Afterwards train it as usual, with a second Train Restorer.",
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="dcpt",
                    tooltip="dcpt: as in the paper. direct: restore instead of reproduce. classifier: only the classifier "
                    "learns, the network stays as it is.",
                ),
                io.Float.Input(
                    "gamma",
                    default=2.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Focal loss: the larger, the less pictures count that are classified well already.",
                ),
                _stages_input("those of the published networks"),
                advanced(
                    io.Int.Input(
                        "blocks",
                        default=2,
                        min=1,
                        max=8,
                        tooltip="Residual blocks per stage of the classifier. Published: 2.",
                    )
                ),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def validate_inputs(cls, mode: str | None) -> bool | str:
        return one_of("mode", mode, MODES)

    @classmethod
    def execute(cls, mode="dcpt", gamma=2.0, stages="", blocks=2) -> io.NodeOutput:
        return io.NodeOutput(ClassificationObjective(chosen("mode", mode, list(MODES)), gamma, stages, blocks))


class Guidance(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendClassifierGuidanceObjective",
            display_name="Classifier Guidance Objective (DCPT)",
            category=CATEGORY,
            description="Restoring one kind of damage, guided by a degradation classifier that was trained on this kind of "
            "network: it must find that kind of damage in the network's features. The classifier stays as it is.",
            inputs=[
                sockets.Restorer.Input(
                    "classifier",
                    tooltip="From Train Restorer with a Degradation Classification Objective, or a DCPT *_dc file; of the same "
                    "kind of network.",
                ),
                io.String.Input("target", default="", tooltip="The class to find: one of the classifier's labels."),
                io.Float.Input(
                    "pixel",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Weight of the difference to the clean picture. 0: guidance only, for Combine Objectives.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Weight of the classifier's verdict. Published: 1.",
                ),
                _stages_input("those that the classifier was trained with"),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def execute(cls, classifier, target="", pixel=1.0, guidance=1.0, stages="") -> io.NodeOutput:
        made = ClassifierGuidanceObjective(classifier.restorer, target, pixel, guidance, stages)
        made.head_and_target()  # said now rather than after the data set was read
        return io.NodeOutput(made)


class Transport(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendTransportObjective",
            display_name="Optimal Transport Objective (DA-RCOT)",
            category=CATEGORY,
            description="A potential network learns to tell clean pictures from restored ones, the restorer to please it "
            "at the least cost. Works without pairs. Crops must be multiples of 32; half the potential's learning rate "
            "suits the restorer.",
            inputs=[
                io.Boolean.Input(
                    "paired",
                    default=True,
                    tooltip="On: also come close to the clean twin. Off: learn from clean pictures that have nothing to do "
                    "with the damaged ones.",
                ),
                io.Float.Input(
                    "transport_cost",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="What it costs to change the picture (the paper's sigma): larger stays closer to the input.",
                ),
                io.Float.Input(
                    "pair_weight",
                    default=10000.0,
                    min=0.0,
                    max=1000000.0,
                    step=100.0,
                    tooltip="Weight of the difference to the clean twin (the paper's Sigma), if paired.",
                ),
                advanced(
                    io.Float.Input(
                        "contrastive",
                        default=0.1,
                        min=0.0,
                        max=10.0,
                        step=0.01,
                        tooltip="Weight of the contrast between kinds of damage in the residual's embedding; needs a "
                        "DA-RCOT network.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "corrected_contrast",
                        default=False,
                        tooltip="On: the contrast with dot products, as meant. Off: as published, which hardly has a "
                        "gradient.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "gradient_penalty",
                        default=10.0,
                        min=0.0,
                        max=1000.0,
                        step=0.5,
                        tooltip="Keeps the potential's slope near one.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "width",
                        default=64,
                        min=4,
                        max=128,
                        step=4,
                        tooltip="Channels in the potential's first layer. Published: 64 (30 million parameters).",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "potential_rate",
                        default=1e-4,
                        min=1e-6,
                        max=1e-2,
                        step=1e-5,
                        round=1e-6,
                        tooltip="Learning rate of the potential.",
                    )
                ),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def execute(
        cls,
        paired=True,
        transport_cost=1.0,
        pair_weight=10000.0,
        contrastive=0.1,
        corrected_contrast=False,
        gradient_penalty=10.0,
        width=64,
        potential_rate=1e-4,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            TransportObjective(
                paired,
                transport_cost,
                pair_weight,
                contrastive,
                corrected_contrast,
                gradient_penalty,
                width,
                potential_rate,
            )
        )


class RateDistortion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRateDistortionObjective",
            display_name="Rate-Distortion Objective",
            category=CATEGORY,
            description="For the all-in-one codec: few bits, and pictures close to clean ones, at qualities drawn anew "
            "each step. Load the codec with Load Restorer.",
            inputs=[
                io.Int.Input(
                    "qualities",
                    default=2,
                    min=1,
                    max=8,
                    tooltip="How many of the 64 qualities each step is computed for.",
                ),
                io.Float.Input(
                    "clean_share",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the pictures that are compressed undamaged.",
                ),
                advanced(
                    io.Int.Input(
                        "shown_quality", default=40, min=0, max=63, tooltip="The quality that validation looks at."
                    )
                ),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def execute(cls, qualities=2, clean_share=0.2, shown_quality=40) -> io.NodeOutput:
        return io.NodeOutput(RateDistortionObjective(qualities, clean_share, shown_quality))


class Denoising(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDenoisingObjective",
            display_name="Denoising Objective",
            category=CATEGORY,
            description="For pixel priors, the diffusion and consistency networks of zero-shot restoration: learn what your "
            "clean pictures look like. Load the prior with Load Restorer.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=_PRIORS,
                    default="denoising",
                    tooltip="denoising: for diffusion networks (ADM). consistency: for consistency networks, which need one "
                    "evaluation.",
                ),
                advanced(
                    io.Int.Input(
                        "levels",
                        default=40,
                        min=2,
                        max=1280,
                        tooltip="Noise levels between which consistency is asked for. More are harder and better.",
                    )
                ),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def validate_inputs(cls, kind: str | None) -> bool | str:
        return one_of("kind", kind, _PRIORS)

    @classmethod
    def execute(cls, kind="denoising", levels=40) -> io.NodeOutput:
        return io.NodeOutput(DenoisingObjective(chosen("kind", kind, _PRIORS) == "consistency", levels))


class CombineObjectives(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        numbers = range(1, SLOTS + 1)
        return io.Schema(
            node_id="MendCombineObjectives",
            display_name="Combine Objectives",
            category=CATEGORY,
            description="Several objectives added up, each with its weight. The network runs once per step for all of them.",
            inputs=[
                *(
                    io.Float.Input(
                        f"weight_{n}",
                        default=1.0,
                        min=0.0,
                        max=10000.0,
                        step=0.01,
                        round=0.0001,
                        tooltip=f"Weight of objective {n}.",
                    )
                    for n in numbers
                ),
                *(
                    sockets.Objective.Input(
                        f"objective_{n}", optional=True, tooltip="From an objective node; may be left out."
                    )
                    for n in numbers
                ),
            ],
            outputs=_objective_output(),
        )

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        found = ((given.get(f"objective_{n}"), given.get(f"weight_{n}", 1.0)) for n in range(1, SLOTS + 1))
        return io.NodeOutput(Weighted(tuple((o, w) for o, w in found if o is not None)))


NODES = [Pixel, Routing, Uncertainty, Classification, Guidance, Transport, RateDistortion, Denoising, CombineObjectives]
