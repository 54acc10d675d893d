"""Damage with a wanted intensity by Mend's small model or any other degrader, and data sets made with it."""

from __future__ import annotations

from pathlib import Path

from ..engine import datasets, degraders, folders, journal, loaded, model_folder
from ..guidance import gendeg as intensities
from ..training import make_dataset
from . import sockets
from .api import Node, advanced, io, ui
from .gendeg_inputs import CATEGORY, KINDS, caption_input, kind_input, mu_input, sigma_input
from .images import as_image, channels_first, colours_first
from .inputs import ModelFile, chosen, fingerprint, one_of, seed_input

MODEL, SIMULATION = "degrader", "simulation"


class LoadDegradationModel(ModelFile, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadDegradationModel",
            display_name="Load Degradation Model",
            category=CATEGORY,
            description="Loads Mend's own small degradation model, or one that you trained like it. It knows the kinds of "
            "damage of GenDeg and runs without Stable Diffusion, on a CPU too.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_folder.model_files(),
                    default=degraders.STARTER if degraders.STARTER in model_folder.model_files() else None,
                    tooltip=f"{degraders.STARTER} comes with Mend.",
                )
            ],
            outputs=[
                sockets.Degrader.Output("degrader", display_name="degrader", tooltip="For Synthesise Degradation.")
            ],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(degraders.SmallDegrader(loaded.load(model_folder.model_path(model_name))))


def _degrader() -> io.Input:
    return sockets.Degrader.Input(
        "degrader",
        optional=True,
        tooltip="From Load Degradation Model or Degrader From GenDeg. Without one, the small model that comes with Mend.",
    )


def _starter() -> degraders.SmallDegrader:
    return degraders.SmallDegrader(loaded.load(model_folder.model_path(degraders.STARTER)))


def _place(name: str) -> Path:
    """The folder of the data set of this name."""
    return folders.output_directory() / "datasets" / name


class SynthesiseDegradation(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSynthesiseDegradation",
            display_name="Synthesise Degradation",
            category=CATEGORY,
            description="Paints haze, rain, snow, motion blur, darkness or raindrops into clean pictures with a learned model, "
            "as strongly as you ask, and measures what came out. Works right after installing.",
            inputs=[
                io.Image.Input("image", tooltip="Clean pictures of any size. Transparency is kept as it is."),
                kind_input(),
                mu_input(
                    0.0, "0 draws mean and deviation by the seed, as the training pairs of the degradation have them."
                ),
                sigma_input(),
                seed_input("Chooses the damage; each picture of a batch gets its own."),
                caption_input(),
                advanced(
                    io.Int.Input(
                        "steps",
                        default=0,
                        min=0,
                        max=1000,
                        tooltip="Steps of the sampler. 0: 12 for Mend's model, the degrader's own number for GenDeg.",
                    )
                ),
                _degrader(),
            ],
            outputs=[
                io.Image.Output("damaged", display_name="image", tooltip="The damaged pictures, in 0..1."),
                io.Float.Output("mu_found", display_name="mu", tooltip="Measured mean of |clean - damaged|."),
                io.Float.Output("sigma_found", display_name="sigma", tooltip="Measured standard deviation of it."),
                io.String.Output("text", display_name="text", tooltip="What was asked for and what came out."),
            ],
        )

    @classmethod
    def validate_inputs(cls, degradation: str) -> bool | str:
        return one_of("degradation", degradation, KINDS)

    @classmethod
    def execute(
        cls, image, degradation="haze", mu=0.0, sigma=0.1, seed=0, caption="", steps=0, degrader=None
    ) -> io.NodeOutput:
        degrader = degrader or _starter()
        if mu == 0:
            drawn = intensities.draw_intensity(degradation, seed)
            mu, sigma, degradation = drawn.mu, drawn.sigma, drawn.ask_for(degradation, degrader.kinds)
        found = degraders.synthesise(degrader, channels_first(image), degradation, mu, sigma, seed, caption, steps)
        text = found.text(degrader, degradation, mu, sigma)
        return io.NodeOutput(as_image(found.damaged), float(found.mu.mean()), float(found.sigma.mean()), text)


class MakeDataset(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMakeDataset",
            display_name="Make Dataset",
            category="Mend/training",
            description="Turns a folder of clean photographs into pairs of clean and damaged pictures with a manifest, for "
            "training. Queue it again after an interruption: pairs that are there are not made twice.",
            inputs=[
                io.String.Input(
                    "photos",
                    default="",
                    tooltip="Folder with clean photographs: a full path, or a folder in ComfyUI's input folder; with its "
                    "subfolders. Empty: the input folder itself.",
                ),
                io.String.Input(
                    "name", default="my_dataset", tooltip="The data set: a folder below output/datasets of this name."
                ),
                io.String.Input(
                    "degradations",
                    default="all",
                    tooltip=f"Names separated by commas: {', '.join(KINDS)}. all: these six. With the simulation also noise, "
                    "blur, jpeg and the others of Degrade Image.",
                ),
                io.Combo.Input(
                    "source",
                    options=[MODEL, SIMULATION],
                    default=MODEL,
                    tooltip=f"{MODEL}: what is connected below, or Mend's small model. {SIMULATION}: formulas, as in Degrade "
                    "Image; much faster.",
                ),
                io.Int.Input(
                    "per_photo", default=1, min=1, max=1000, tooltip="Pairs of every degradation for each photograph."
                ),
                io.Int.Input(
                    "largest_side",
                    default=512,
                    min=0,
                    max=8192,
                    tooltip="Larger photographs are shrunk to this longest side in pixels. 0: never.",
                ),
                seed_input("Chooses all intensities and damages."),
                _degrader(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Clean pictures from the graph, instead of the folder's photographs.",
                ),
            ],
            outputs=[
                io.String.Output("manifest", display_name="manifest", tooltip="Path of manifest.jsonl."),
                io.Int.Output("count", display_name="pairs", tooltip="How many pairs the data set has now."),
                io.String.Output("text", display_name="text", tooltip="What was made, found and not readable."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, source: str, name: str) -> bool | str:
        if name is not None and (not name.strip() or Path(name).name != name or name in (".", "..")):
            return f"name: {name!r} is no plain folder name"
        return one_of("source", source, [MODEL, SIMULATION])

    @classmethod
    def fingerprint_inputs(cls, photos: str | None = None, name: str | None = None, **others) -> str:
        """Changes when photographs did, and only then: what is trained on the pairs would be trained again."""
        if "image" in others:
            return ""

        def of_photos() -> str:
            files = journal.find_files(folders.require_input_directory(photos), folders.IMAGE_SUFFIXES)
            made = _place(name)  # may lie below the photographs
            return journal.fingerprint([(str(f), journal.identity(f)) for f in files if not f.is_relative_to(made)])

        return fingerprint(of_photos, photos, name)

    @classmethod
    def execute(
        cls,
        photos="",
        name="my_dataset",
        degradations="all",
        source=MODEL,
        per_photo=1,
        largest_side=512,
        seed=0,
        degrader=None,
        image=None,
    ) -> io.NodeOutput:
        out = _place(name)
        painter = None if chosen("source", source, [MODEL, SIMULATION]) == SIMULATION else degrader or _starter()
        if image is None:
            pictures = make_dataset.from_folder(folders.require_input_directory(photos), out)
        else:
            pictures = make_dataset.from_images(colours_first(image))
        report = datasets.make(
            pictures, out, painter, degradations, seed=seed, largest=largest_side, per_photo=per_photo
        )
        count = len(make_dataset.read_manifest(out))
        return io.NodeOutput(str(out / make_dataset.MANIFEST), count, report.text(), ui=ui.PreviewText(report.text()))


NODES = [LoadDegradationModel, SynthesiseDegradation, MakeDataset]
