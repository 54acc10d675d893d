"""Look at results: side by side, difference, figures, and what a network is."""

from __future__ import annotations

from ..engine import describe, folders, host, html_report, quality, report
from . import sockets
from .api import Node, advanced, io, ui
from .images import as_image, channels_first
from .inputs import above


class CompareImages(Node):
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
                    "labels", default="before, after, truth", tooltip="Labels from left to right, separated by commas."
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


class ImageMetrics(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendImageMetrics",
            display_name="Image Metrics",
            category="Mend/inspect",
            description="How close pictures are to a reference: PSNR (dB, higher is better), SSIM (1 is equal) and, if the "
            "package lpips is installed, the perceptual distance LPIPS (0 is equal). Also their noise and blur alone.",
            inputs=[
                io.Image.Input("image", tooltip="Pictures to measure; scaled to the reference if sizes differ."),
                io.Image.Input("reference", tooltip="The clean originals: one, or one per picture."),
                advanced(
                    io.Boolean.Input(
                        "lpips", default=False, tooltip="Also LPIPS; needs the package lpips and its weights."
                    )
                ),
                advanced(
                    io.String.Input(
                        "measures",
                        default="",
                        optional=True,
                        tooltip="Learned measures without a reference from the package pyiqa, separated by commas: niqe, musiq, "
                        "clipiqa. Needs the package and its weights; nothing is downloaded.",
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
                io.Float.Output(
                    "noise",
                    display_name="noise",
                    tooltip="Estimated noise of the pictures themselves, in steps of 0..255; fine texture counts too.",
                ),
                io.Float.Output(
                    "blur", display_name="blur", tooltip="Blur of the pictures themselves: 0 sharp, 1 blurred."
                ),
            ],
        )

    @classmethod
    def execute(cls, image, reference, lpips=False, measures="") -> io.NodeOutput:
        pictures = channels_first(image)
        with host.part_of_progress(0, 2):
            text, means = report.metrics_table(pictures, channels_first(reference), lpips)
        with host.part_of_progress(1, 2):
            alone, own = quality.table(pictures, [name.strip() for name in measures.split(",") if name.strip()])
        text = f"{text}\nwithout the reference:\n{alone}"
        return io.NodeOutput(text, means["PSNR dB"], means.get("SSIM", 0.0), own["noise"], own["blur"])


class RestorerInfo(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRestorerInfo",
            display_name="Restorer Info",
            category="Mend/inspect",
            description="What a loaded network is: method, paper, licence, settings read from the file, size, what it needs, "
            "and how exactly it meets numbers recorded from reference implementations.",
            inputs=[sockets.Restorer.Input("restorer", tooltip="From Load Restorer.")],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="Connect to Preview Any to read it."),
                io.Int.Output("scale", display_name="scale", tooltip="Output size divided by input size."),
            ],
        )

    @classmethod
    def execute(cls, restorer) -> io.NodeOutput:
        return io.NodeOutput(describe.restorer_text(restorer), restorer.restorer.scale)


class ReportPage(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendReportPage",
            display_name="Report Page",
            category="Mend/inspect",
            description="Writes one HTML page into the output folder: before and after under a slider, figures, notes and maps. "
            "Everything is in the one file; it opens in any browser and loads nothing.",
            inputs=[
                io.Image.Input("before", tooltip="The damaged pictures; scaled to the restored ones if sizes differ."),
                io.Image.Input("after", tooltip="The restored pictures."),
                io.String.Input("title", default="Restoration", tooltip="Heading of the page."),
                io.String.Input(
                    "filename_prefix",
                    default="mend/report",
                    tooltip="Name of the file, with a folder before it if you like; a number is added.",
                ),
                advanced(io.Int.Input("quality", default=90, min=30, max=100, tooltip="JPEG quality of the pictures.")),
                advanced(
                    io.Int.Input(
                        "largest",
                        default=1600,
                        min=64,
                        max=16384,
                        tooltip="Pictures with a longer side are made smaller for the page.",
                    )
                ),
                io.Image.Input("reference", optional=True, tooltip="The clean originals: adds PSNR and SSIM."),
                io.Image.Input("maps", optional=True, tooltip="Pictures to show below: routing maps, charts, regions."),
                io.Image.Input("more_maps", optional=True, tooltip="More of them, of another size."),
                sockets.Restorer.Input("restorer", optional=True, tooltip="Adds what Restorer Info says."),
                io.String.Input(
                    "text", optional=True, force_input=True, tooltip="Adds this text, such as a node's text output."
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the page was saved.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        before,
        after,
        title="Restoration",
        filename_prefix="mend/report",
        quality=90,
        largest=1600,
        reference=None,
        maps=None,
        more_maps=None,
        restorer=None,
        text=None,
    ) -> io.NodeOutput:
        above(0, largest=largest)
        first, second = channels_first(before), channels_first(after)
        clean = None if reference is None else channels_first(reference)
        with host.part_of_progress(0, 2):
            figures = html_report.figures(first, second, clean)
        with host.part_of_progress(1, 2):
            page = html_report.page(
                first,
                second,
                title=title,
                text=[
                    ("Figures", figures),
                    ("Notes", text or ""),
                    ("Network", "" if restorer is None else describe.restorer_text(restorer)),
                ],
                extras=[channels_first(m) for m in (maps, more_maps) if m is not None],
                jpeg_quality=quality,
                largest=largest,
            )
        saved = html_report.save(page, filename_prefix, folders.output_directory())
        return io.NodeOutput(str(saved), ui=ui.PreviewText(f"{saved.name}: {saved.stat().st_size / 1e3:,.0f} kB"))


NODES = [CompareImages, ImageMetrics, RestorerInfo, ReportPage]
