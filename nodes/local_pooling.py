"""NAFNet's channel attention on large pictures: over the whole of it or over windows."""

from __future__ import annotations

from ..errors import InputError
from ..models.nafnet import NAFNet
from . import sockets
from .api import Node, io


class LocalPooling(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLocalPooling",
            display_name="NAFNet Local Pooling",
            category="Mend/restore",
            description="Makes a NAFNet look at large pictures as it did at its training crops: the means in its channel "
            "attention are taken over windows of 1.5 times the crop. Right for DCPT's mixed-degradation file "
            "(nafnet_dcpt_cdd), whose test uses it; DCPT's five-degradation file is tested without.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A NAFNet."),
                io.Int.Input(
                    "train_size",
                    default=128,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="Side of the crops it was trained on (DCPT: 128). 0: means over the whole picture or tile.",
                ),
            ],
            outputs=[
                sockets.Restorer.Output(
                    "changed", display_name="restorer", tooltip="The same network with this setting."
                )
            ],
        )

    @classmethod
    def execute(cls, restorer, train_size=128) -> io.NodeOutput:
        if not isinstance(restorer.restorer.module, NAFNet):
            raise InputError(f"restorer: {restorer.restorer.architecture.title} is no NAFNet; it has no such switch")
        return io.NodeOutput(restorer.with_options(local_pooling=train_size))


NODES = [LocalPooling]
