"""DA-RCOT on the graph: restore once, look at what was removed, restore again knowing it."""

from __future__ import annotations

from ..engine import loaded, model_folder, residuals
from . import sockets
from .api import Node, io
from .images import as_image, channels_first, connected_mask
from .inputs import ModelFile, Precision, model_input, tiling_inputs


class FirstPass(Precision, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFirstPass",
            display_name="First Pass",
            category="Mend/residual",
            description="DA-RCOT's first restoration, without condition, and what it removed: the residual that Restore "
            "With Residual would condition on.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A DA-RCOT network."),
                io.Image.Input("image", tooltip="Pictures to restore, of any size."),
                io.Float.Input(
                    "gain",
                    default=2.0,
                    min=0.1,
                    max=50.0,
                    step=0.1,
                    tooltip="Amplification of the residual picture, which is only for looking at.",
                ),
                *tiling_inputs(),
            ],
            outputs=[
                io.Image.Output("restored", display_name="image", tooltip="The first restoration."),
                sockets.Residual.Output("residual", display_name="residual", tooltip="Degraded minus restored."),
                io.Image.Output(
                    "removed",
                    display_name="removed",
                    tooltip="The residual as a picture: grey where nothing was removed.",
                ),
            ],
        )

    @classmethod
    def execute(cls, restorer, image, gain=2.0, tile=0, overlap=-1, precision="auto") -> io.NodeOutput:
        restored, residual = residuals.first_pass(
            restorer, channels_first(image), tile=tile, overlap=overlap, precision=precision
        )
        return io.NodeOutput(as_image(restored), residual, as_image(residuals.picture(residual, gain)))


class EncodeResidual(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendEncodeResidual",
            display_name="Encode Residual",
            category="Mend/residual",
            description="Makes DA-RCOT's condition from any restoration: another method's, an edited first pass, the one "
            "of another frame. What counts is the difference between the two pictures.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="The DA-RCOT network that will use it."),
                io.Image.Input("degraded", tooltip="The picture before restoration."),
                io.Image.Input("restored", tooltip="Any restoration of it; scaled to the same size if it is not."),
                io.Float.Input(
                    "gain",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Scales the difference: above 1 claims that more is wrong than was removed.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the difference counts: white fully, black not at all."
                ),
            ],
            outputs=[
                sockets.Residual.Output("residual", display_name="residual", tooltip="For Restore With Residual."),
                io.Image.Output("removed", display_name="removed", tooltip="The difference; grey where there is none."),
                io.Image.Output(
                    "embedding",
                    display_name="embedding",
                    tooltip="What the network sees in it: principal components of the deepest embedding as colours.",
                ),
            ],
        )

    @classmethod
    def execute(cls, restorer, degraded, restored, gain=1.0, mask=None) -> io.NodeOutput:
        residual = residuals.from_pictures(
            channels_first(degraded), channels_first(restored), connected_mask(mask), gain
        )
        encoded = residuals.encode(restorer, residual)
        return io.NodeOutput(
            encoded, as_image(residuals.picture(encoded)), as_image(residuals.embedding_picture(encoded))
        )


class RestoreWithResidual(Precision, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRestoreWithResidual",
            display_name="Restore With Residual",
            category="Mend/residual",
            description="DA-RCOT's conditioned restoration, with its two numbers: how strongly it heeds the residual, and "
            "how often it goes round.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A DA-RCOT network."),
                io.Image.Input("image", tooltip="Pictures to restore, of any size."),
                io.Float.Input(
                    "strength",
                    default=residuals.STRENGTH,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    round=0.001,
                    tooltip="0: the first pass itself. 0.8: as published. More than 1 overdoes it.",
                ),
                io.Int.Input(
                    "iterations",
                    default=1,
                    min=1,
                    max=20,
                    tooltip="1: as published. Each further one starts from the residual of the result before.",
                ),
                *tiling_inputs(),
                sockets.Residual.Input(
                    "residual",
                    optional=True,
                    tooltip="From First Pass or Encode Residual; without it the network makes its own.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "restored", display_name="image", tooltip="Restored pictures in 0..1, brighter where the input was."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        restorer,
        image,
        strength=residuals.STRENGTH,
        iterations=1,
        tile=0,
        overlap=-1,
        precision="auto",
        residual=None,
    ) -> io.NodeOutput:
        restored = residuals.restore(
            restorer,
            channels_first(image),
            residual,
            strength=strength,
            iterations=iterations,
            tile=tile,
            overlap=overlap,
            precision=precision,
        )
        return io.NodeOutput(as_image(restored))


class LoadPotential(ModelFile, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadPotential",
            display_name="Load Potential",
            category="Mend/residual",
            description="Loads the critic of a DA-RCOT file (released files hold it beside the restorer), for Potential "
            "Score.",
            inputs=[model_input("A DA-RCOT file from models/restoration; the same one that Load Restorer takes.")],
            outputs=[sockets.Restorer.Output("potential", display_name="potential", tooltip="For Potential Score.")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(loaded.load(model_folder.model_path(model_name), system="da-rcot-potential"))


class PotentialScore(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPotentialScore",
            display_name="Potential Score",
            category="Mend/residual",
            description="How clean pictures look to DA-RCOT's critic, patch by patch. Scores have no unit: compare "
            "pictures of one scene, such as several restorations.",
            inputs=[
                sockets.Restorer.Input("potential", tooltip="From Load Potential."),
                io.Image.Input("image", tooltip="Pictures to score; the batch shares one colour scale."),
            ],
            outputs=[
                io.Float.Output(
                    "score", display_name="score", tooltip="Mean over patches and pictures; larger is cleaner."
                ),
                io.Image.Output(
                    "map", display_name="map", tooltip="Scores of the patches as heat maps, one per picture."
                ),
                io.String.Output(
                    "text", display_name="text", tooltip="Mean, worst and best patch, one line per picture."
                ),
            ],
        )

    @classmethod
    def execute(cls, potential, image) -> io.NodeOutput:
        scores = residuals.score(potential, channels_first(image))
        return io.NodeOutput(
            float(scores.mean()), as_image(residuals.score_picture(scores)), residuals.score_text(scores)
        )


NODES = [FirstPass, EncodeResidual, RestoreWithResidual, LoadPotential, PotentialScore]
