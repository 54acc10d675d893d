"""Video files frame by frame: timing, sound, rotation, pixel aspect and colour tags survive. Needs PyAV (`av`).

Nothing here holds more than a frame; a file is written in parts that are joined at the end without encoding again.
"""

from __future__ import annotations

import heapq
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, MissingDependency

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp"}
)
CODECS = {"h264": "libx264", "h265": "libx265", "lossless": "ffv1"}
"""What videos are written with: plays everywhere; half the size, plays on newer devices; exact and large."""
_MP4_SOUND = frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus"})
_BT601, _BT709, _UNSPECIFIED = 6, 1, 2


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingDependency("videos need the package av (PyAV): pip install av") from None
    av.logging.set_level(None)  # decoders report on standard error what is raised anyway
    return av


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about its first video stream, as shown: turned upright."""

    width: int
    height: int
    rate: Fraction
    """Average frames per second."""
    time_base: Fraction
    """Seconds per unit of a frame's time stamp."""
    frames: int
    """An estimate for progress bars; 0 if the file does not tell."""
    rotation: int
    """Quarter turns counterclockwise that turn the stored frames upright."""
    aspect: Fraction
    """Width of a pixel through its height."""
    depth: int
    """Bits per channel."""
    colour: tuple[int, int, int]
    """Primaries, transfer and matrix as ITU-T H.273 numbers them; 2: not said."""
    sound: tuple[str, ...]
    """Codecs of the audio streams."""


@dataclass(frozen=True)
class Frame:
    """One frame, converted when asked for."""

    pts: int
    raw: Any
    info: VideoInfo

    def image(self) -> torch.Tensor:
        """[3, H, W] in 0..1, upright."""
        deep = self.info.depth > 8
        matrix = _matrix(self.info)
        pixels = self.raw.to_ndarray(format="rgb48le" if deep else "rgb24", src_colorspace=matrix)
        image = torch.from_numpy(pixels.astype(np.float32) / (65535 if deep else 255)).permute(2, 0, 1)
        return torch.rot90(image, self.info.rotation, (1, 2)).contiguous()


def _matrix(info: VideoInfo) -> int:
    """The YCbCr matrix as swscale numbers it. What a file does not say is guessed by size, as players do."""
    matrix = info.colour[2]
    if matrix == _UNSPECIFIED:
        matrix = _BT709 if min(info.width, info.height) >= 720 else _BT601
    return {6: 5}.get(matrix, matrix) if matrix in (1, 4, 5, 6, 7, 9) else _BT709


class VideoReader:
    """`with VideoReader(path) as reader: for frame in reader: ...`. Raises InputError for what is not a video."""

    def __init__(self, source: str | Path | io.BytesIO) -> None:
        self.name = Path(source).name if isinstance(source, (str, Path)) else "video"
        self._av = _av()
        if isinstance(source, io.BytesIO):
            source.seek(0)
        elif not Path(source).is_file():
            raise InputError(f"{source}: there is no such file")
        try:
            self._container = self._av.open(source if isinstance(source, io.BytesIO) else str(source))
        except (self._av.FFmpegError, ValueError, OSError) as error:
            raise InputError(f"{self.name}: not a video that can be read ({_reason(error)})") from None
        try:
            self.info = self._describe()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    def _describe(self) -> VideoInfo:
        streams = [
            s for s in self._container.streams.video if not s.disposition & self._av.stream.Disposition.attached_pic
        ]
        if not streams:
            raise InputError(f"{self.name}: there is no video in this file")
        self._stream = streams[0]
        self._stream.thread_type = "AUTO"
        context = self._stream.codec_context
        try:
            first = next(self._container.decode(self._stream), None)
            self._container.seek(0)
        except (self._av.FFmpegError, ValueError) as error:
            raise InputError(f"{self.name}: its frames cannot be decoded ({_reason(error)})") from None
        if first is None:
            raise InputError(f"{self.name}: the video has no frames; the file is cut off or empty")
        rotation = round((first.rotation or 0) / 90) % 4
        aspect = Fraction(self._stream.sample_aspect_ratio or 1) or Fraction(1)
        size = (first.height, first.width) if rotation % 2 else (first.width, first.height)
        rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        duration = self._stream.duration
        seconds = duration * self._stream.time_base if duration else Fraction(self._container.duration or 0, 1_000_000)
        return VideoInfo(
            *size,
            rate,
            Fraction(self._stream.time_base),
            self._stream.frames or int(seconds * rate),
            rotation,
            1 / aspect if rotation % 2 else aspect,
            max((c.bits for c in first.format.components), default=8),
            (int(context.color_primaries), int(context.color_trc), int(context.colorspace)),
            tuple(s.codec_context.name for s in self._container.streams.audio),
        )

    def __iter__(self) -> Iterator[Frame]:
        """Every frame in the order of display. Raises InputError where the file is damaged."""
        last, step, index = None, max(1, int(1 / (self.info.rate * self.info.time_base))), 0
        try:
            for raw in self._container.decode(self._stream):
                pts = raw.pts if raw.pts is not None else (0 if last is None else last + step)
                pts = pts if last is None else max(pts, last + 1)
                yield Frame(pts, raw, self.info)
                last, index = pts, index + 1
        except (self._av.FFmpegError, ValueError) as error:
            raise InputError(
                f"{self.name}: damaged after frame {index} ({_reason(error)}); repair it, for example by converting it"
            ) from None


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def suffix_for(info: VideoInfo, codec: str) -> str:
    """The container that can hold the video and the sound as it is: .mp4, else .mkv."""
    return ".mp4" if codec != "lossless" and set(info.sound) <= _MP4_SOUND else ".mkv"


class VideoWriter:
    """Encodes frames of one size into a file without sound, to be finished with `close`."""

    def __init__(self, path: Path, info: VideoInfo, size: tuple[int, int], codec: str = "h264", crf: int = 16) -> None:
        """size: (height, width) of the frames to come, which may be larger than the source's. crf: 0 best, 51 worst."""
        av = _av()
        if codec not in CODECS:
            raise InputError(f"codec: {codec!r} is unknown; one of {', '.join(CODECS)}")
        height, width = size
        self._deep = info.depth > 8
        self._container = av.open(str(path), "w", format="nut")
        self._frame, self._size, self._matrix = av.VideoFrame, size, _matrix(info)
        stream = self._container.add_stream(CODECS[codec], rate=info.rate)
        context = stream.codec_context
        stream.width, stream.height, stream.pix_fmt = width, height, _pixel_format(size, codec, self._deep)
        stream.time_base = context.time_base = info.time_base
        context.sample_aspect_ratio = info.aspect
        context.color_primaries, context.color_trc, context.colorspace = *info.colour[:2], _tag(info, self._matrix)
        context.color_range = 1  # limited
        # Without frames out of order, time stamps of one part can follow those of another.
        context.max_b_frames = 0
        context.options = {} if codec == "lossless" else {"crf": str(crf), "preset": "medium", **_quiet(codec)}
        self._stream = stream

    def close(self) -> None:
        """Writes what the encoder still holds and finishes the file."""
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def write(self, image: torch.Tensor, pts: int) -> None:
        """[3, H, W] in 0..1 at a time stamp in units of the source's time base."""
        if tuple(image.shape) != (3, *self._size):
            raise InputError(f"video: frames of {self._size} expected, got {tuple(image.shape)}")
        top = 65535 if self._deep else 255
        pixels = (image.detach().float().clamp(0, 1) * top).round().permute(1, 2, 0).cpu().numpy()
        pixels = np.ascontiguousarray(pixels.astype(np.uint16 if self._deep else np.uint8))
        frame = self._frame.from_ndarray(pixels, format="rgb48le" if self._deep else "rgb24")
        frame = frame.reformat(format=self._stream.pix_fmt, dst_colorspace=self._matrix)
        frame.pts, frame.time_base = pts, self._stream.codec_context.time_base
        self._container.mux(self._stream.encode(frame))


def _tag(info: VideoInfo, matrix: int) -> int:
    return info.colour[2] if info.colour[2] != _UNSPECIFIED else {5: _BT601}.get(matrix, matrix)


def _quiet(codec: str) -> dict[str, str]:
    return {"x265-params": "log-level=error"} if codec == "h265" else {}


def _pixel_format(size: tuple[int, int], codec: str, deep: bool) -> str:
    """Colour at half resolution as players want it; at full resolution for odd sizes, which it could not express."""
    if codec == "lossless":
        return "yuv444p16le" if deep else "bgr0"
    return f"yuv4{'44' if size[0] % 2 or size[1] % 2 else '20'}p" + ("10le" if deep else "")


def join(parts: Sequence[Path], source: str | Path | io.BytesIO, output: Path) -> int:
    """Joins parts into `output`, with the sound and the metadata of `source`; returns the number of frames.

    Nothing is encoded again. `output` is written under another name first and appears only when it is complete.
    Raises InputError if the sound does not fit into the container.
    """
    av = _av()
    if isinstance(source, io.BytesIO):
        source.seek(0)
    unfinished = output.with_name(f"{output.stem}.part{output.suffix}")
    count = 0
    try:
        with (
            av.open(source if isinstance(source, io.BytesIO) else str(source)) as original,
            av.open(str(parts[0])) as first,
            av.open(str(unfinished), "w") as joined,
        ):
            for key, value in original.metadata.items():
                joined.metadata[key] = value
            template = first.streams.video[0]
            video = joined.add_stream_from_template(template)
            if template.codec_context.name == "hevc" and output.suffix == ".mp4":
                video.codec_context.codec_tag = "hvc1"  # Apple's players want it
            sound = {s.index: joined.add_stream_from_template(s) for s in original.streams.audio}
            packets = [_part_packets(av, parts, video)]
            if sound:
                packets.append(_sound_packets(original, sound))
            for _, packet in heapq.merge(*packets, key=lambda entry: entry[0]):
                count += packet.stream is video
                joined.mux(packet)
    except (av.FFmpegError, ValueError) as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{output.name}: cannot be put together ({_reason(error)})") from None
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(output)
    return count


def write_sound(path: Path, waveform: torch.Tensor, rate: int) -> None:
    """Writes samples [channels, samples] in -1..1 as AAC, which every player takes, into a file without pictures."""
    av, layouts = _av(), {1: "mono", 2: "stereo", 6: "5.1"}
    waveform = (waveform if len(waveform) in layouts else waveform[:2]).detach().float().cpu()
    layout = layouts[len(waveform)]
    with av.open(str(path), "w") as container:
        known = av.Codec("aac", "w").audio_rates or (rate,)
        stream = container.add_stream("aac", rate=rate if rate in known else 48000, layout=layout)
        stream.bit_rate = 256_000
        for start in range(0, waveform.shape[1], 65536):
            samples = np.ascontiguousarray(waveform[:, start : start + 65536].numpy())
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _part_packets(av: Any, parts: Sequence[Path], video: Any) -> Iterator[tuple[float, Any]]:
    for part in parts:
        with av.open(str(part)) as container:
            for packet in container.demux(container.streams.video[0]):
                if packet.dts is not None:
                    time = float(packet.dts * packet.time_base)
                    packet.stream = video
                    yield time, packet


def _sound_packets(original: Any, sound: dict[int, Any]) -> Iterator[tuple[float, Any]]:
    for packet in original.demux(*original.streams.audio):
        if packet.dts is not None:
            time = float(packet.dts * packet.time_base)
            packet.stream = sound[packet.stream.index]
            yield time, packet


# The VIDEO wire outside ComfyUI ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoComponents:
    """All of a video at once: frames [B, H, W, 3] in 0..1, no sound, frames per second."""

    images: torch.Tensor
    frame_rate: Fraction
    audio: None = None


class VideoFile:
    """The twin of ComfyUI's VideoFromFile: a file that is read when somebody asks."""

    def __init__(self, file: str | Path) -> None:
        self._file = str(file)

    def get_stream_source(self) -> str:
        return self._file

    def get_components(self) -> VideoComponents:
        with VideoReader(self._file) as reader:
            images = torch.stack([frame.image() for frame in reader])
            return VideoComponents(images.movedim(1, -1).contiguous(), reader.info.rate)
