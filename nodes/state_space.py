"""What MaIR, MambaIR and MambaIRv2 let one set and see: reading paths, classes of pixels, the published tiling."""

from __future__ import annotations

from .. import kernels
from ..engine import official_tiling, state_space
from ..errors import InputError
from ..models.mambairv2 import ROUTE_MODES
from . import sockets
from .api import Node, advanced, io
from .images import as_image, channels_first
from .inputs import Precision, above, chosen, one_of, precision_input, seed_input

MODES = list(ROUTE_MODES)
BACKENDS = ["auto", *kernels.NAMES]


class ScanPath(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendScanPath",
            display_name="Scan Path (MaIR)",
            category="Mend/state space",
            description="The width of the stripes along which MaIR reads a picture. Files do not tell it; Mend takes the "
            "published width of the network with these sizes. Set it for a network that was trained with another.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A MaIR network."),
                io.Int.Input(
                    "scan_len",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Stripe width in pixels, 4 or 8 in the published networks. 0: the network's own. A wrong "
                    "width gives no error, only a slightly worse picture.",
                ),
            ],
            outputs=[
                sockets.Restorer.Output(
                    "changed", display_name="restorer", tooltip="The same network with this width; weights are shared."
                )
            ],
        )

    @classmethod
    def execute(cls, restorer, scan_len=0) -> io.NodeOutput:
        return io.NodeOutput(state_space.with_scan_len(restorer, scan_len))


class RouteMode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRouteMode",
            display_name="Route Mode (MambaIRv2)",
            category="Mend/state space",
            description="How MambaIRv2 sorts pixels into its learned classes. The published code draws the classes at "
            "random at every run; without this node Mend takes the most probable ones.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A MambaIRv2 network."),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default="argmax",
                    tooltip="argmax: the most probable class, always the same picture. sample: drawn as in the published "
                    "code, but repeatable. mean: the average over several draws, slower by their number.",
                ),
                seed_input(
                    "Seed of the draws; all pictures of a batch or video share them. Does nothing for argmax.",
                    most=0xFFFFFFFFFFFF,
                ),
                advanced(
                    io.Int.Input("samples", default=4, min=1, max=64, tooltip="For mean: how many draws to average.")
                ),
            ],
            outputs=[
                sockets.Restorer.Output(
                    "changed", display_name="restorer", tooltip="The same network with this mode; weights are shared."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, mode: str) -> bool | str:
        return one_of("mode", mode, MODES)

    @classmethod
    def execute(cls, restorer, mode="argmax", seed=0, samples=4) -> io.NodeOutput:
        return io.NodeOutput(state_space.with_route_mode(restorer, mode, seed, samples))


class RouteMap(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRouteMap",
            display_name="Route Map (MambaIRv2)",
            category="Mend/state space",
            description="Which learned class MambaIRv2 gives every pixel, in colours. Pixels of one colour are read one "
            "after another, wherever they lie.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A MambaIRv2 network, with a route mode or without."),
                io.Image.Input("image", tooltip="Pictures to look at; large ones are reduced."),
                io.Int.Input(
                    "layer",
                    default=0,
                    min=0,
                    max=999,
                    tooltip="Which layer, counted from 0 in order of execution (light: 0-19, base: 0-35).",
                ),
                advanced(
                    io.Float.Input(
                        "opacity",
                        default=0.7,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        tooltip="1: colours only, 0: the grey picture only.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output("map", display_name="map", tooltip="The classes of that layer over the picture."),
                io.String.Output("text", display_name="text", tooltip="Per layer: classes used, share of the largest."),
            ],
        )

    @classmethod
    def execute(cls, restorer, image, layer=0, opacity=0.7) -> io.NodeOutput:
        pictures = channels_first(image)
        routes = state_space.routes(restorer, pictures)
        if layer >= len(routes):
            raise InputError(f"layer: {layer} is too large, this network has layers 0 to {len(routes) - 1}")
        text = state_space.describe_routes(routes, restorer.restorer.config["num_tokens"])
        return io.NodeOutput(as_image(state_space.class_map(routes[layer], pictures, opacity)), text)


class ScanBackend(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendScanBackend",
            display_name="Scan Backend",
            category="Mend/state space",
            description="Which of its implementations computes the scans of MaIR, MambaIR and MambaIRv2, and which there "
            "are on this machine. Without this node the fastest is taken: it is for comparing, and for working around a "
            "driver that makes trouble.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A MaIR, MambaIR or MambaIRv2 network."),
                io.Combo.Input(
                    "backend",
                    options=BACKENDS,
                    default="auto",
                    tooltip="auto: the fastest there is. cuda: compiled for your NVIDIA GPU at first use. jit: compiled for "
                    "the CPU by Numba. torch: plain PyTorch, on every device. reference: a plain loop, very slow. All "
                    "give the same picture up to rounding.",
                ),
            ],
            outputs=[
                sockets.Restorer.Output(
                    "changed", display_name="restorer", tooltip="The same network with this choice; weights are shared."
                ),
                io.String.Output("text", display_name="text", tooltip="The backends, and why some are not available."),
            ],
        )

    @classmethod
    def validate_inputs(cls, backend: str) -> bool | str:
        return one_of("backend", backend, BACKENDS)

    @classmethod
    def execute(cls, restorer, backend="auto") -> io.NodeOutput:
        return io.NodeOutput(*state_space.with_scan_backend(restorer, chosen("backend", backend, BACKENDS)))


class OfficialTiling(Precision, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOfficialTiling",
            display_name="Restore (official tiling)",
            category="Mend/state space",
            description="Cuts and pastes as the published testers of MambaIR, MambaIRv2 and MaIR do, to repeat published "
            "figures: tiles of about 200 pixels, a tenth of overlap, no blending. Seams can show; for pictures to look "
            "at use Restore Image.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A MambaIR, MambaIRv2 or MaIR network; others work too."),
                io.Image.Input("image", tooltip="Pictures to restore."),
                advanced(
                    io.Int.Input(
                        "threshold",
                        default=official_tiling.THRESHOLD,
                        min=32,
                        max=8192,
                        tooltip="A side of n pixels becomes n // threshold + 1 tiles. Published: 200.",
                    )
                ),
                precision_input("fp32", "Published figures are 32 bit ones."),
            ],
            outputs=[
                io.Image.Output(
                    "restored", display_name="image", tooltip="Restored pictures in 0..1, brighter where the input was."
                )
            ],
        )

    @classmethod
    def execute(cls, restorer, image, threshold=official_tiling.THRESHOLD, precision="fp32") -> io.NodeOutput:
        above(0, threshold=threshold)
        restored = official_tiling.restore(restorer, channels_first(image), precision=precision, threshold=threshold)
        return io.NodeOutput(as_image(restored))


NODES = [ScanPath, RouteMode, RouteMap, ScanBackend, OfficialTiling]
