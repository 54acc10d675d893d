"""Train a copy of a restorer on the graph, and save it."""

from __future__ import annotations

from ..engine import train
from ..training import finetune
from . import sockets
from .api import ExecutionBlocker, Node, advanced, io
from .images import as_image
from .inputs import above, first_problem, one_of, seed_input

CATEGORY = "Mend/training"


class TrainRestorer(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendTrainRestorer",
            display_name="Train Restorer",
            category=CATEGORY,
            description="Trains a copy of a restorer (or codec, or prior) on your pictures. Shows how validation pictures "
            "come out while it learns; cancel keeps what was learned in output/mend/training, resume goes on from there.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="The network to begin with. It is copied, not changed."),
                sockets.Dataset.Input("dataset", tooltip="What to learn from."),
                io.Int.Input(
                    "steps",
                    default=500,
                    min=1,
                    max=10_000_000,
                    tooltip="How many batches to learn from. A few hundred adapt a network to own photos.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=2e-4,
                    min=1e-7,
                    max=1e-1,
                    step=1e-5,
                    round=1e-7,
                    tooltip="How far each step goes at most. It warms up, then falls to a hundredth. Too large forgets "
                    "what the network knew.",
                ),
                io.Int.Input(
                    "crop",
                    default=96,
                    min=16,
                    max=1024,
                    step=8,
                    tooltip="Side of the damaged crops in pixels, raised to what the network needs. Large ones show haze "
                    "and darkness better and take longer.",
                ),
                io.Int.Input("batch", default=4, min=1, max=256, tooltip="Crops per step."),
                seed_input("Chooses crops, damage and everything else that is drawn.", most=0xFFFFFFFF),
                io.String.Input(
                    "name", default="restorer", tooltip="Name of the run's folder below output/mend/training."
                ),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    tooltip="On: go on with the latest run of this name where it stopped; raise steps to train a finished "
                    "one further. Off: begin a new one.",
                ),
                advanced(
                    io.Combo.Input(
                        "keep",
                        options=list(finetune.KEEP),
                        default="best",
                        tooltip="best: the averaged weights that did best in validation. last: those at the end, for "
                        "objectives that are not after the smallest error.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "precision",
                        options=list(train.PRECISIONS),
                        default="fp32",
                        tooltip="bf16 is faster on newer GPUs and a little less exact.",
                    )
                ),
                sockets.Objective.Input(
                    "objective", optional=True, tooltip="How to learn. Nothing connected: as the network's paper does."
                ),
                advanced(
                    io.String.Input(
                        "freeze",
                        default="",
                        optional=True,
                        tooltip="Parts of the network that keep their weights, separated by commas, * for any letters: encoder_level*, or E for "
                        "AirNet's encoder. A wrong name is answered by a list of the parts.",
                    )
                ),
            ],
            outputs=[
                sockets.Restorer.Output(
                    "trained",
                    display_name="restorer",
                    tooltip="The trained network, ready for Restore or Save Restorer.",
                ),
                io.Image.Output(
                    "strip",
                    display_name="validation",
                    tooltip="Pictures it did not learn from: damaged, restored before and after training, clean.",
                ),
                io.Image.Output("plot", display_name="plot", tooltip="Loss and validation over the steps."),
                io.String.Output(
                    "text", display_name="text", tooltip="Validation before and after, and where it is saved."
                ),
                sockets.Restorer.Output(
                    "companion",
                    display_name="companion",
                    tooltip="What learned beside the network. With a Degradation Classification Objective its classifier: for "
                    "the Classifier Guidance Objective and, of NAFNet, SwinIR, Restormer and PromptIR, Classify Degradation. "
                    "With an Optimal Transport Objective its potential, for Potential Score.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, keep: str | None, precision: str | None) -> bool | str:
        return first_problem(one_of("keep", keep, finetune.KEEP), one_of("precision", precision, train.PRECISIONS))

    @classmethod
    def execute(
        cls,
        restorer,
        dataset,
        steps=500,
        learning_rate=2e-4,
        crop=96,
        batch=4,
        seed=0,
        name="restorer",
        resume=False,
        keep="best",
        precision="fp32",
        objective=None,
        freeze="",
    ) -> io.NodeOutput:
        above(0, learning_rate=learning_rate)
        done = train.train(
            restorer,
            dataset,
            objective,
            steps=steps,
            learning_rate=learning_rate,
            size=crop,
            batch=batch,
            seed=seed,
            name=name,
            resume=resume,
            keep=keep,
            precision=precision,
            frozen=freeze,
        )
        companion = done.companion or ExecutionBlocker(
            "companion: only training with a Degradation Classification or Optimal Transport Objective gives one"
        )
        return io.NodeOutput(done.restorer, as_image(done.strip), as_image(done.plot), done.text, companion)


class SaveRestorer(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSaveRestorer",
            display_name="Save Restorer",
            category=CATEGORY,
            description="Writes a network as a safetensors file into output/restoration, with its configuration and how it "
            "was trained. Load Restorer lists it after a refresh.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A trained network, or any other to convert."),
                io.String.Input(
                    "filename_prefix", default="my-restorer", tooltip="Name of the file; a number is added to it."
                ),
                io.Combo.Input(
                    "precision",
                    options=["fp16", "fp32"],
                    default="fp16",
                    tooltip="fp16 is half the size and as good to use.",
                ),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="Name of the file, as Load Restorer lists it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, precision: str | None) -> bool | str:
        return one_of("precision", precision, ["fp16", "fp32"])

    @classmethod
    def execute(cls, restorer, filename_prefix="my-restorer", precision="fp16") -> io.NodeOutput:
        name = train.save(restorer, filename_prefix, precision)
        return io.NodeOutput(name, ui={"text": (name,)})


NODES = [TrainRestorer, SaveRestorer]
