"""Load a restoration network and run it; mix its result with the original."""

from __future__ import annotations

from ..engine import loaded, mix, model_folder, tiling
from . import sockets
from .api import Node, advanced, io
from .images import as_image, channels_first, connected_mask
from .inputs import ModelFile, Precision, model_input, tiling_inputs


class LoadRestorer(ModelFile, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadRestorer",
            display_name="Load Restorer",
            category="Mend/restore",
            description="Loads a restoration network. What it is and how it is built is read from the file itself; "
            "released checkpoints load as they are. Files go to models/restoration; the starter weights are built in.",
            inputs=[
                model_input(
                    "A .safetensors, .pth, .pt or .ckpt file from models/restoration, or a starter network "
                    "that comes with Mend. Pickled files are read without running anything in them."
                )
            ],
            outputs=[
                sockets.Restorer.Output(
                    "restorer", display_name="restorer", tooltip="The network, for Restore and others."
                ),
            ],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(loaded.load(model_folder.model_path(model_name)))


class Restore(Precision, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRestore",
            display_name="Restore Image",
            category="Mend/restore",
            description="Restores pictures of any size: pads, cuts into tiles where memory asks for it, blends them "
            "without seams, keeps transparency. Works on batches and videos frame by frame.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="From Load Restorer."),
                io.Image.Input("image", tooltip="Pictures to restore: any size, grey, colour or with transparency."),
                *tiling_inputs(),
                sockets.Routing.Input(
                    "routing",
                    optional=True,
                    tooltip="For MoCE-IR: take these experts instead of the network's own choice (Route, Edit Routing).",
                ),
                sockets.Degradation.Input(
                    "degradation",
                    optional=True,
                    tooltip="For VLU-Net: what is wrong with the picture, instead of what the network would find itself.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "restored", display_name="image", tooltip="Restored pictures in 0..1, brighter where the input was."
                )
            ],
        )

    @classmethod
    def execute(cls, restorer, image, tile=0, overlap=-1, precision="auto", routing=None, degradation=None):
        given = {"routing": routing, "degradation": degradation}
        restored = tiling.restore(
            restorer,
            channels_first(image),
            tile=tile,
            overlap=overlap,
            precision=precision,
            context={name: value for name, value in given.items() if value is not None},
        )
        return io.NodeOutput(as_image(restored))


class RestorationMix(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        weight = {"min": 0.0, "max": 2.0, "step": 0.05, "round": 0.001}
        return io.Schema(
            node_id="MendRestorationMix",
            display_name="Restoration Mix",
            category="Mend/restore",
            description="How much of the restoration to keep, where, and of what kind. Runs no network: play with it "
            "without waiting.",
            inputs=[
                io.Image.Input(
                    "original", tooltip="The picture before restoration; scaled up if the restorer enlarges."
                ),
                io.Image.Input("restored", tooltip="The picture after restoration."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    **weight,
                    tooltip="0: the original, 1: the restoration, above 1: overdone.",
                ),
                advanced(
                    io.Float.Input(
                        "structure",
                        default=1.0,
                        **weight,
                        tooltip="Strength of the change in coarse structure and tone.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "detail",
                        default=1.0,
                        **weight,
                        tooltip="Strength of the change in fine detail, texture and noise.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "split",
                        default=3.0,
                        min=0.3,
                        max=100.0,
                        step=0.1,
                        tooltip="Where detail ends and structure begins, in pixels (sigma of a Gaussian).",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "colour_anchor",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        tooltip="Pulls overall colour and brightness back to the original's, against colour shifts. "
                        "Leave at 0 for low light and haze, where the shift is the point.",
                    )
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where to restore: white fully, black not at all."),
                advanced(
                    io.Combo.Input(
                        "bands",
                        options=list(mix.FILTERS),
                        default=mix.FILTERS[0],
                        optional=True,
                        tooltip="How detail and structure are told apart: Gaussian by size alone; guided keeps to edges, so "
                        "that a changed tone does not glow over them.",
                    )
                ),
            ],
            outputs=[io.Image.Output("mixed", display_name="image", tooltip="The mix, at the restored size.")],
        )

    @classmethod
    def execute(
        cls,
        original,
        restored,
        strength=1.0,
        structure=1.0,
        detail=1.0,
        split=3.0,
        colour_anchor=0.0,
        mask=None,
        bands=mix.FILTERS[0],
    ) -> io.NodeOutput:
        mixed = mix.mix(
            channels_first(original),
            channels_first(restored),
            strength=strength,
            mask=connected_mask(mask),
            structure=structure,
            detail=detail,
            split=split,
            colour_anchor=colour_anchor,
            bands=bands,
        )
        return io.NodeOutput(as_image(mixed))


NODES = [LoadRestorer, Restore, RestorationMix]
