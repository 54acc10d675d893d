"""Damage pictures on purpose: to try a restorer, to measure it, to make training pairs."""

from __future__ import annotations

import torch

from ..engine import host
from ..engine.values import check_values
from ..training.degradations import KINDS, Degradation, degrade, describe, parse
from .api import Node, advanced, io
from .images import as_image, channels_first
from .inputs import accepted, seed_input

_NONE = "none"


def _kind(name: str, default: str, which: str) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=[_NONE, *KINDS],
        default=default,
        tooltip=f"What happens to the picture {which}: "
        + ", ".join(f"{k} ({v.title})" for k, v in KINDS.items())
        + ".",
    )


def _strength(name: str, of: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=0.0,
        max=3.0,
        step=0.05,
        tooltip=f"How strong the {of} degradation is. 1: as photographs usually suffer; 0: hardly any.",
    )


class DegradeImage(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDegradeImage",
            display_name="Degrade Image",
            category="Mend/degradation",
            description="Damages a picture on purpose with up to three degradations in order: noise, blur, rain, snow, "
            "haze, darkness, JPEG ... The same seed gives the same damage. For trying, measuring and training restorers.",
            inputs=[
                io.Image.Input("image", tooltip="Clean pictures, any size. Transparency is kept as it is."),
                _kind("degradation", "rain", "first"),
                _strength("strength", "first"),
                seed_input(
                    "Chooses the parameters and every streak, flake and grain. All pictures of a batch get the same "
                    "parameters, each its own grain."
                ),
                _kind("second", _NONE, "next"),
                _strength("second_strength", "second"),
                _kind("third", _NONE, "last"),
                _strength("third_strength", "third"),
                advanced(
                    io.String.Input(
                        "recipe",
                        default="",
                        multiline=True,
                        tooltip="Exact parameters instead of the choices above, a line for every degradation, as the text "
                        "output writes them: 'noise: sigma 25' or 'jpeg: quality 10'. What a line leaves out is drawn.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output("damaged", display_name="image", tooltip="The damaged pictures, in 0..1."),
                io.String.Output("text", display_name="text", tooltip="What was done, with all parameters."),
            ],
        )

    @classmethod
    def validate_inputs(cls, recipe: str) -> bool | str:
        return accepted(parse, recipe)

    @classmethod
    def execute(
        cls,
        image,
        degradation="rain",
        strength=1.0,
        seed=0,
        second=_NONE,
        second_strength=1.0,
        third=_NONE,
        third_strength=1.0,
        recipe="",
    ) -> io.NodeOutput:
        chosen = ((degradation, strength), (second, second_strength), (third, third_strength))
        chain = parse(recipe) or [Degradation(kind, amount) for kind, amount in chosen if kind != _NONE]
        picture = channels_first(image)
        check_values(picture)
        colours = picture.shape[1] - (picture.shape[1] in (2, 4))  # what comes after the colours is transparency
        host.check_interrupt()
        progress = host.progress(len(picture) * len(chain))
        damaged, done = degrade(picture[:, :colours], chain, seed, tell=progress.update)
        return io.NodeOutput(as_image(torch.cat([damaged, picture[:, colours:]], dim=1)), describe(done))


NODES = [DegradeImage]
