"""MoCE-IR's experts on the graph: see which ones a picture takes, and choose others."""

from __future__ import annotations

import torch

from ..engine import report, routes
from ..models import moce_routing
from . import sockets
from .api import Node, advanced, io
from .images import as_image, channels_first
from .inputs import held, seed_input

ACTIONS = ["force", "blend", "ban", "freeze frame", "average batch"]


class Route(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRoute",
            display_name="Route",
            category="Mend/routing",
            description="Which experts MoCE-IR would take for each picture, without restoring it. The choice is made per "
            "picture, from the whole of it.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A MoCE-IR network."),
                io.Image.Input("image", tooltip="Pictures to decide for; large ones are looked at reduced."),
                advanced(
                    io.Float.Input(
                        "noise",
                        default=0.0,
                        min=0.0,
                        max=10.0,
                        step=0.1,
                        tooltip="Random exploration of the choice. 0: always the same choice (recommended). 1: as in the "
                        "published evaluation.",
                    )
                ),
                advanced(seed_input("Seed of that noise; does nothing at noise 0.")),
            ],
            outputs=[
                sockets.Routing.Output("routing", display_name="routing", tooltip="One decision per block and picture.")
            ],
        )

    @classmethod
    def execute(cls, restorer, image, noise=0.0, seed=0) -> io.NodeOutput:
        return io.NodeOutput(routes.route(restorer, channels_first(image), noise, seed))


class EditRouting(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendEditRouting",
            display_name="Edit Routing",
            category="Mend/routing",
            description="Changes the choice of experts: force or blend some, ban some, or hold one frame's choice for a "
            "whole video so that it does not flicker. Chain several for different blocks.",
            inputs=[
                sockets.Routing.Input("routing", tooltip="From Route or another Edit Routing."),
                io.Combo.Input(
                    "action",
                    options=ACTIONS,
                    default="force",
                    tooltip="force: run just these experts. blend: mix experts by weight. ban: choose again without these. "
                    "freeze frame: one frame's choice for all. average batch: the choice that the whole batch prefers.",
                ),
                io.String.Input(
                    "experts",
                    default="3",
                    tooltip='Expert numbers, 0 the cheapest. "2", or with weights "0:0.7, 3:0.3". Not used by freeze and average.',
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    tooltip='Which decoder blocks: "all", "0-3" (deepest first), "8,9". Not used by freeze and average.',
                ),
                advanced(
                    io.Int.Input(
                        "frame", default=0, min=0, max=1_000_000, tooltip="For freeze frame: whose choice to hold."
                    )
                ),
            ],
            outputs=[sockets.Routing.Output("edited", display_name="routing", tooltip="The changed routing.")],
        )

    @classmethod
    def execute(cls, routing, action="force", experts="3", blocks="all", frame=0) -> io.NodeOutput:
        return io.NodeOutput(moce_routing.edit(held("routing", routing), action, experts, blocks, frame))


class RoutingReport(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRoutingReport",
            display_name="Routing Report",
            category="Mend/routing",
            description="A routing as a picture (decoder blocks by experts) and as text.",
            inputs=[
                sockets.Routing.Input("routing", tooltip="From Route or Edit Routing."),
            ],
            outputs=[
                io.Image.Output(
                    "map", display_name="map", tooltip="One heat map per picture; taken experts are framed."
                ),
                io.String.Output("text", display_name="text", tooltip="The same as a table."),
            ],
        )

    @classmethod
    def execute(cls, routing) -> io.NodeOutput:
        held("routing", routing)
        maps = torch.cat([report.routing_map(routing, i) for i in range(len(routing))])
        return io.NodeOutput(as_image(maps), moce_routing.describe(routing))


class ExpertSweep(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendExpertSweep",
            display_name="Expert Sweep",
            category="Mend/routing",
            description="Restores one picture once per expert, each forced in all decoder blocks, to see what they do.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A MoCE-IR network."),
                io.Image.Input("image", tooltip="The first picture of the batch is used."),
            ],
            outputs=[
                io.Image.Output(
                    "sweep", display_name="images", tooltip="The network's own choice first, then expert 0, 1, ..."
                )
            ],
        )

    @classmethod
    def execute(cls, restorer, image) -> io.NodeOutput:
        return io.NodeOutput(as_image(routes.sweep(restorer, channels_first(image[:1]))))


NODES = [Route, EditRouting, RoutingReport, ExpertSweep]
