"""Whole videos and folders: files in, files out, in bounded memory, going on where an earlier run stopped."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..engine import folders, journal
from ..engine.restore_folder import FORMATS, FolderSettings, restore_folder
from ..engine.restore_video import VideoSettings, restore_video
from ..engine.stabiliser import TOLERANCE
from ..engine.video import CODECS, VIDEO_SUFFIXES
from ..engine.video_wire import Source, readable
from . import sockets
from .api import Node, VideoFile, advanced, io, ui
from .inputs import PRECISIONS, accepted, chosen, fingerprint, first_problem, one_of, tiling_inputs

NO_FILE = "none"


def _steadiness() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "hold",
            default=True,
            tooltip="Decide once per shot what the network decides per picture (a route, a degradation), so that it does "
            "not change from frame to frame. Cuts are found by themselves. Does nothing for networks that decide nothing.",
        ),
        io.Float.Input(
            "stabilise",
            default=0.0,
            min=0.0,
            max=0.95,
            step=0.05,
            tooltip="Average what frames have in common along the motion, against flicker. 0: off. 0.8: strong.",
        ),
    ]


def _encoding() -> list[io.Input]:
    return [
        advanced(
            io.Combo.Input(
                "codec",
                options=list(CODECS),
                default="h264",
                tooltip="h264 plays everywhere, h265 is half as large, lossless keeps every value (.mkv, very large).",
            )
        ),
        advanced(
            io.Int.Input(
                "crf",
                default=16,
                min=0,
                max=51,
                tooltip="Quality of h264 and h265: smaller is better and larger; 16 looks like the original, 23 is usual.",
            )
        ),
    ]


def _strength() -> io.Input:
    return io.Float.Input(
        "strength", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="0: the original, 1: the restoration."
    )


def _again() -> io.Input:
    return advanced(
        io.Boolean.Input(
            "again",
            default=False,
            tooltip="Do everything again, also what is there already, made from the same file with the same settings.",
        )
    )


def _conditions() -> list[io.Input]:
    return [
        sockets.Routing.Input(
            "routing", optional=True, tooltip="For MoCE-IR: take these experts for everything, one routing."
        ),
        sockets.Degradation.Input(
            "degradation", optional=True, tooltip="For VLU-Net: what is wrong with everything, one degradation."
        ),
    ]


def _connected(**given: object) -> dict[str, object]:
    return {name: value for name, value in given.items() if value is not None}


def _source(video: str, clip: Any) -> AbstractContextManager[Source]:
    if clip is not None:
        return readable(clip, folders.temp_directory())
    file = folders.require_input_path(video)
    return nullcontext(Source(file, file.stem))


class RestoreVideo(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRestoreVideo",
            display_name="Restore Video",
            category="Mend/video",
            description="Restores a video file into a video file, a few frames at a time, so that length does not matter. "
            "Sound, timing and pixel shape stay. Stopped or crashed? Queue it again: it goes on where it was.",
            inputs=[
                sockets.Restorer.Input(
                    "restorer", tooltip="From Load Restorer. One that enlarges makes a larger video."
                ),
                io.Combo.Input(
                    "video",
                    options=[*folders.input_files(VIDEO_SUFFIXES), NO_FILE],
                    upload=io.UploadType.video,
                    tooltip="A file in the input folder. Not used when a video is connected.",
                ),
                *_steadiness(),
                _strength(),
                io.String.Input(
                    "folder",
                    default="mend/video",
                    tooltip="Folder for the result in the output folder; the file keeps its name.",
                ),
                *_encoding(),
                *(i for i in tiling_inputs() if i.id != "overlap"),
                _again(),
                io.Video.Input("clip", optional=True, tooltip="A video from another node instead of the file."),
                *_conditions(),
            ],
            outputs=[
                io.Video.Output(
                    "restored", display_name="video", tooltip="The restored video, for Save Video or others."
                ),
                io.String.Output("path", display_name="path", tooltip="Where the file is."),
                io.String.Output("text", display_name="text", tooltip="How many frames and shots there were."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, video: str | None, codec: str | None, precision: str | None, clip: str | None = "open"
    ) -> bool | str:
        # A connected input arrives as None, an open one not at all. The file is not used where a video is connected.
        if clip is not None and video not in (None, NO_FILE) and folders.input_path(video) is None:
            return f"video: there is no file {video!r} in the input folder"
        return first_problem(one_of("codec", codec, CODECS), one_of("precision", precision, PRECISIONS))

    @classmethod
    def fingerprint_inputs(cls, video: str | None = None, **others: object) -> str:
        return fingerprint(lambda: journal.identity(folders.require_input_path(video)), video)

    @classmethod
    def execute(
        cls,
        restorer,
        video,
        hold=True,
        stabilise=0.0,
        strength=1.0,
        folder="mend/video",
        codec="h264",
        crf=16,
        tile=0,
        precision="auto",
        again=False,
        clip=None,
        routing=None,
        degradation=None,
    ) -> io.NodeOutput:
        settings = VideoSettings(hold, stabilise, TOLERANCE, strength, codec, crf, tile, precision)
        target = folders.require_output_directory(folder)
        context = _connected(routing=routing, degradation=degradation)
        with _source(video, clip) as source:
            made = restore_video(
                restorer,
                source.file,
                target,
                source.name,
                settings,
                context=context,
                again=again,
                apart=True,
                origin=source.origin,
            )
        text = f"{made.path.name}: {made.frames} frames, {made.shots} shot{'s' * (made.shots != 1)}"
        text += " (was there already)" if made.skipped else ""
        subfolder = made.path.parent.relative_to(folders.output_directory().resolve()).as_posix()
        shown = ui.SavedResult(made.path.name, "" if subfolder == "." else subfolder, io.FolderType.output)
        return io.NodeOutput(
            VideoFile(str(made.path)),
            str(made.path),
            text,
            ui={"images": [shown], "animated": (True,), "text": (text,)},
        )


class RestoreFolder(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRestoreFolder",
            display_name="Restore Folder",
            category="Mend/video",
            description="Restores every picture and video of a folder into another, one at a time. What is done already is "
            "skipped, a file that fails does not stop the others, and a report says what became of each.",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="From Load Restorer."),
                io.String.Input(
                    "source",
                    default="",
                    tooltip="The folder to read: a folder in the input folder, or a full path. Empty: the input folder.",
                ),
                io.String.Input(
                    "target", default="mend/folder", tooltip="Where results go: a folder in the output folder."
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="as source",
                    tooltip="File format of the pictures. JPEG and WebP lose a little.",
                ),
                _strength(),
                io.Boolean.Input("subfolders", default=True, tooltip="Also pictures in folders inside the folder."),
                io.Boolean.Input("videos", default=True, tooltip="Also videos, as Restore Video does them."),
                *_steadiness(),
                *_encoding(),
                *(i for i in tiling_inputs() if i.id != "overlap"),
                _again(),
                *_conditions(),
            ],
            outputs=[
                io.String.Output(
                    "text", display_name="report", tooltip="How many were done, skipped, failed, and why."
                ),
                io.String.Output("folder", display_name="folder", tooltip="Where the results are."),
                io.Int.Output("failed", display_name="failed", tooltip="How many files could not be restored."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, source: str | None, format: str | None, codec: str | None, precision: str | None
    ) -> bool | str:
        return first_problem(
            accepted(folders.require_input_directory, source),
            one_of("format", format, FORMATS),
            one_of("codec", codec, CODECS),
            one_of("precision", precision, PRECISIONS),
        )

    @classmethod
    def fingerprint_inputs(cls, source: str | None = None, **others: object) -> str:
        def of_folder() -> str:
            files = journal.find_files(folders.require_input_directory(source), folders.IMAGE_SUFFIXES | VIDEO_SUFFIXES)
            return journal.fingerprint([(str(file), journal.identity(file)) for file in files])

        return fingerprint(of_folder, source)

    @classmethod
    def execute(
        cls,
        restorer,
        source="",
        target="mend/folder",
        format="as source",
        strength=1.0,
        subfolders=True,
        videos=True,
        hold=True,
        stabilise=0.0,
        codec="h264",
        crf=16,
        tile=0,
        precision="auto",
        again=False,
        routing=None,
        degradation=None,
    ) -> io.NodeOutput:
        video = VideoSettings(hold, stabilise, TOLERANCE, strength, codec, crf, tile, precision)
        folder = folders.require_output_directory(target)
        report = restore_folder(
            restorer,
            folders.require_input_directory(source),
            folder,
            FolderSettings(chosen("format", format, FORMATS), strength, tile, precision, video),
            context=_connected(routing=routing, degradation=degradation),
            subfolders=subfolders,
            videos=videos,
            again=again,
        )
        text = report.text()
        return io.NodeOutput(text, str(folder), report.count("failed"), ui=ui.PreviewText(text))


NODES = [RestoreVideo, RestoreFolder]
