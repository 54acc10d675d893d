"""Data sets to train on: pairs from folders, from pictures on the graph, from manifests, and mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..engine import train
from ..engine.values import check_image
from ..training import dataset_sources, datasets, task_text
from . import sockets
from .api import Node, advanced, io
from .images import as_image, channels_first
from .inputs import above, accepted, fingerprint, first_problem

CATEGORY = "Mend/training"
SLOTS = 4


def _folder_input(what: str) -> io.Input:
    return io.String.Input(
        "folder",
        default="",
        tooltip=f"{what} A full path, or a folder inside ComfyUI's input folder.",
    )


def _degradations_input(what: str) -> io.Input:
    return io.String.Input(
        "degradations",
        default="noise\nrain\nhaze\nlow-light\njpeg",
        multiline=True,
        tooltip=f"{what} A line for each kind of damage: 'noise', 'rain 0.7' (strength), 'jpeg: quality 10' (exact), "
        "'haze + noise' (one after the other), '@ 2' at the end for twice as often, 'clean' for none. 'everything' "
        "stands for all that the starter network learned.",
    )


def _held_out_input() -> io.Input:
    return advanced(
        io.Float.Input(
            "held_out",
            default=0.1,
            min=0.0,
            max=0.9,
            step=0.05,
            tooltip="Share of the pictures kept for validation. Which ones depends on their names only, so they stay the "
            "same from run to run.",
        )
    )


def _preview_inputs() -> list[io.Input]:
    return [
        advanced(
            io.Int.Input(
                "shown", default=8, min=1, max=64, tooltip="How many pairs the preview shows; changes nothing else."
            )
        ),
        advanced(
            io.Int.Input("crop", default=96, min=16, max=1024, step=8, tooltip="Side of the shown crops in pixels.")
        ),
    ]


def _dataset_outputs() -> list[io.Output]:
    return [
        sockets.Dataset.Output("dataset", display_name="dataset", tooltip="For Train Restorer or Mix Datasets."),
        io.Image.Output(
            "preview",
            display_name="preview",
            tooltip="Pairs as training will see them: damaged above clean, each under the name of its damage.",
        ),
        io.String.Output(
            "text", display_name="text", tooltip="How many pictures there are and what is wrong with them."
        ),
    ]


def _show(source: datasets.Source, shown: int, crop: int) -> io.NodeOutput:
    above(0, shown=shown, crop=crop)
    return io.NodeOutput(source, as_image(train.preview(source, crop, shown, seed=0)), datasets.describe(source))


def _newest(path: Path) -> str:
    """Changes when a file in a folder does."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return (
        f"{len(files)}:{max((p.stat().st_mtime_ns for p in files), default=0)}:{sum(p.stat().st_size for p in files)}"
    )


class _FolderNode:
    """Mixin: the folder exists; the node runs again when something in it changed."""

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        return accepted(train.input_folder, folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **others: Any) -> str:
        return fingerprint(lambda: _newest(train.input_folder(folder)), folder)


class PairedFolder(_FolderNode, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPairedFolder",
            display_name="Paired Folder",
            category=CATEGORY,
            description="Training pairs from a folder with two folders in it, damaged and clean, whose pictures have the "
            "same names.",
            inputs=[
                _folder_input("The folder that has the folders damaged and clean in it."),
                io.String.Input(
                    "label",
                    default="damaged",
                    tooltip="What is wrong with the damaged ones, for objectives that tell kinds apart. Folders inside "
                    "damaged, as damaged/rain/a.png for clean/a.png, are labels of their own.",
                ),
                _held_out_input(),
                *_preview_inputs(),
            ],
            outputs=_dataset_outputs(),
        )

    @classmethod
    def execute(cls, folder, label="damaged", held_out=0.1, shown=8, crop=96) -> io.NodeOutput:
        return _show(dataset_sources.paired_folder(train.input_folder(folder), label, held_out), shown, crop)


class CleanFolder(_FolderNode, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCleanFolder",
            display_name="Clean Folder + Degradations",
            category=CATEGORY,
            description="Training pairs from clean pictures alone: each crop is damaged anew, in one of the ways you list.",
            inputs=[
                _folder_input("A folder of clean, sharp pictures, subfolders included."),
                _degradations_input("How to damage them."),
                _held_out_input(),
                *_preview_inputs(),
            ],
            outputs=_dataset_outputs(),
        )

    @classmethod
    def validate_inputs(cls, folder: str | None, degradations: str | None) -> bool | str:
        tasks = accepted(task_text.tasks_from_text, degradations)
        return first_problem(super().validate_inputs(folder), tasks)

    @classmethod
    def execute(cls, folder, degradations="noise", held_out=0.1, shown=8, crop=96) -> io.NodeOutput:
        tasks = task_text.tasks_from_text(degradations)
        return _show(dataset_sources.clean_folder(train.input_folder(folder), tasks, held_out), shown, crop)


class DatasetFromImages(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDatasetFromImages",
            display_name="Dataset From Images",
            category=CATEGORY,
            description="Training pairs from pictures on the graph: clean ones damaged on the fly, or clean ones with their "
            "damaged twins. For a handful of own photos.",
            inputs=[
                io.Image.Input("clean", tooltip="Clean pictures."),
                _degradations_input("How to damage them, where no damaged pictures are connected."),
                io.String.Input(
                    "label",
                    default="damaged",
                    tooltip="What is wrong with the damaged pictures, if they are connected.",
                ),
                _held_out_input(),
                *_preview_inputs(),
                io.Image.Input(
                    "damaged",
                    optional=True,
                    tooltip="The damaged twin of each clean picture; one serves all. Without, clean ones are damaged.",
                ),
            ],
            outputs=_dataset_outputs(),
        )

    @classmethod
    def validate_inputs(cls, degradations: str | None) -> bool | str:
        return accepted(task_text.tasks_from_text, degradations)

    @classmethod
    def execute(
        cls, clean, degradations="noise", label="damaged", held_out=0.1, shown=8, crop=96, damaged=None
    ) -> io.NodeOutput:
        pictures, twins = channels_first(clean), None if damaged is None else channels_first(damaged)
        check_image(pictures, "clean")
        if twins is not None:
            check_image(twins, "damaged")
        tasks = task_text.tasks_from_text(degradations) if damaged is None else ()
        return _show(dataset_sources.images(pictures, twins, tasks, label, held_out), shown, crop)


def _manifest_folder(folder: str) -> Path:
    """The folder that is named, or the one of the manifest that is named, as Make Dataset does."""
    file = Path(folder.strip().strip('"')).expanduser()
    return file.parent if file.name == dataset_sources.MANIFEST and file.is_file() else train.input_folder(folder)


class DatasetManifest(_FolderNode, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDatasetManifest",
            display_name="Dataset Manifest",
            category=CATEGORY,
            description="Training pairs that a manifest.jsonl lists, as synthetic data sets come (GenDeg): a line for each "
            "pair with clean, damaged, degradation, intensity (mu, sigma) and seed.",
            inputs=[
                _folder_input("The folder with manifest.jsonl in it."),
                advanced(
                    io.Float.Input(
                        "mu_from",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Leaves out pairs that differ less than this on average (0..1): hardly damaged at all.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "mu_to",
                        default=1.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Leaves out pairs that differ more than this on average (0..1): damaged beyond repair.",
                    )
                ),
                _held_out_input(),
                *_preview_inputs(),
            ],
            outputs=_dataset_outputs(),
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        return accepted(_manifest_folder, folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **others: Any) -> str:
        return fingerprint(lambda: _newest(_manifest_folder(folder) / dataset_sources.MANIFEST), folder)

    @classmethod
    def execute(cls, folder, mu_from=0.0, mu_to=1.0, held_out=0.1, shown=8, crop=96) -> io.NodeOutput:
        return _show(dataset_sources.manifest(_manifest_folder(folder), held_out, (mu_from, mu_to)), shown, crop)


class MixDatasets(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        numbers = range(1, SLOTS + 1)
        return io.Schema(
            node_id="MendMixDatasets",
            display_name="Mix Datasets",
            category=CATEGORY,
            description="Several data sets as one: each pair is drawn from one of them, as often as its weight says.",
            inputs=[
                *(
                    io.Float.Input(
                        f"weight_{n}",
                        default=1.0,
                        min=0.0,
                        max=100.0,
                        step=0.1,
                        tooltip=f"How often dataset {n} is drawn, compared with the others.",
                    )
                    for n in numbers
                ),
                *_preview_inputs(),
                *(
                    sockets.Dataset.Input(
                        f"dataset_{n}", optional=True, tooltip="From a dataset node; may be left out."
                    )
                    for n in numbers
                ),
            ],
            outputs=_dataset_outputs(),
        )

    @classmethod
    def execute(cls, shown=8, crop=96, **given) -> io.NodeOutput:
        found = ((given.get(f"dataset_{n}"), given.get(f"weight_{n}", 1.0)) for n in range(1, SLOTS + 1))
        return _show(datasets.Mixture(tuple((d, w) for d, w in found if d is not None)), shown, crop)


NODES = [DatasetFromImages, CleanFolder, PairedFolder, DatasetManifest, MixDatasets]
