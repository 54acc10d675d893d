"""Look at results: side by side, difference, figures, and what a network is."""

from __future__ import annotations

from ..engine import describe, report
from . import sockets
from .api import advanced, io
from .images import as_image, channels_first


class CompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCompareImages",
            display_name="Compare Images",
            category="Mend/inspect",
            description="Two or three pictures side by side under labels, with a zoomed crop and a difference map if wanted.",
            inputs=[
                io.Image.Input("first", tooltip="Left picture, usually the damaged one."),
                io.Image.Input("second", tooltip="Next picture, usually the restored one."),
                io.String.Input(
                    "labels", default="before, after, truth", tooltip="Labels from left to right, with commas."
                ),
                io.Float.Input(
                    "zoom",
                    default=1.0,
                    min=1.0,
                    max=64.0,
                    step=0.5,
                    tooltip="1 shows the whole picture, 4 a quarter of its side.",
                ),
                advanced(
                    io.Float.Input(
                        "centre_x",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Centre of the crop, 0 left, 1 right.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "centre_y",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Centre of the crop, 0 top, 1 bottom.",
                    )
                ),
                io.Boolean.Input(
                    "difference",
                    default=False,
                    tooltip="Adds a row: each picture's difference to the last one, amplified, in false colour.",
                ),
                advanced(
                    io.Float.Input(
                        "gain", default=5.0, min=0.1, max=100.0, step=0.5, tooltip="Amplification of the difference."
                    )
                ),
                io.Image.Input("third", optional=True, tooltip="A third picture, usually the clean original."),
            ],
            outputs=[
                io.Image.Output("comparison", display_name="image", tooltip="One sheet per picture of the batch.")
            ],
        )

    @classmethod
    def execute(
        cls,
        first,
        second,
        labels="before, after, truth",
        zoom=1.0,
        centre_x=0.5,
        centre_y=0.5,
        difference=False,
        gain=5.0,
        third=None,
    ) -> io.NodeOutput:
        images = [channels_first(i) for i in (first, second, third) if i is not None]
        names = ([n.strip() for n in labels.split(",")] + ["first", "second", "third"][labels.count(",") + 1 :])[
            : len(images)
        ]
        sheet = report.compare(images, names, zoom=zoom, centre=(centre_x, centre_y), difference=difference, gain=gain)
        return io.NodeOutput(as_image(sheet))


class ImageMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendImageMetrics",
            display_name="Image Metrics",
            category="Mend/inspect",
            description="How close pictures are to a reference: PSNR (dB, higher is better), SSIM (1 is equal) and, if the "
            "package lpips is installed, the perceptual distance LPIPS (0 is equal).",
            inputs=[
                io.Image.Input("image", tooltip="Pictures to measure; scaled to the reference if sizes differ."),
                io.Image.Input("reference", tooltip="The clean originals: one, or one per picture."),
                advanced(
                    io.Boolean.Input(
                        "lpips", default=False, tooltip="Also LPIPS; needs the package lpips and its weights."
                    )
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="A line per picture."),
                io.Float.Output("psnr", display_name="PSNR", tooltip="Mean PSNR in dB, RGB, peak 1."),
                io.Float.Output(
                    "ssim",
                    display_name="SSIM",
                    tooltip="Mean SSIM; 0 for pictures under 11 pixels, where it is not defined.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image, reference, lpips=False) -> io.NodeOutput:
        text, means = report.metrics_table(channels_first(image), channels_first(reference), lpips)
        return io.NodeOutput(text, means["PSNR dB"], means.get("SSIM", 0.0))


class RestorerInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRestorerInfo",
            display_name="Restorer Info",
            category="Mend/inspect",
            description="What a loaded network is: method, paper, licence, settings read from the file, size, what it needs.",
            inputs=[sockets.Restorer.Input("restorer", tooltip="From Load Restorer.")],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="Connect to Preview Any to read it."),
                io.Int.Output("scale", display_name="scale", tooltip="Output size divided by input size."),
            ],
        )

    @classmethod
    def execute(cls, restorer) -> io.NodeOutput:
        return io.NodeOutput(describe.restorer_text(restorer), restorer.restorer.scale)


NODES = [CompareImages, ImageMetrics, RestorerInfo]
