"""Videos that come over a wire: what the wire carries is restored, whatever ComfyUI's version keeps it as."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from comfyui_mend.engine import folders
from comfyui_mend.engine.video import VideoReader
from comfyui_mend.engine.video_wire import readable
from comfyui_mend.errors import InputError
from comfyui_mend.nodes.video import RestoreVideo

from .support import local_restorer
from .video_clips import pan, write_clip

av = pytest.importorskip("av", reason="PyAV is not installed")


class Components:
    def __init__(self, images: torch.Tensor, audio: dict | None = None) -> None:
        self.images, self.audio, self.frame_rate = images, audio, Fraction(29.97)


class VideoFromComponents:
    """As in ComfyUI 0.3.64."""

    def __init__(self, images: torch.Tensor, audio: dict | None = None) -> None:
        self.components = Components(images, audio)

    def get_components(self) -> Components:
        return self.components

    def get_stream_source(self) -> None:
        raise ValueError("Could not determine output format")

    def save_to(self, path: str) -> None:
        raise AssertionError("with loss, and not for odd sizes")


class VideoFromFile:
    """As in the first version of ComfyUI that trims: the stream is still the whole file."""

    def __init__(self, file: Path, first: int = 0) -> None:
        self.file, self.__start_time = file, first

    def get_stream_source(self) -> str:
        return str(self.file)

    def save_to(self, path: str, crf: float | None = None) -> None:
        write_clip(Path(path), frames(self.file)[self.__start_time :])


class Edited(VideoFromFile):
    """As in later ones, which tell."""

    def __init__(self, file: Path, pending: bool = False, trim: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__(file)
        self.pending, self.trim = pending, trim

    def has_pending_frame_edits(self) -> bool:
        return self.pending

    def get_active_trim_window(self) -> tuple[float, float]:
        return self.trim

    def save_to(self, path: str) -> None:
        write_clip(Path(path), frames(self.file)[2:, :, :32])


class Stubborn(Edited):
    """One that cannot be saved."""

    def save_to(self, path: str) -> None:
        raise ValueError("H264 output requires even dimensions")

    def get_components(self) -> Components:
        return Components(frames(self.file)[3:].movedim(1, -1)[:, :31, :33])


@pytest.fixture
def clip() -> torch.Tensor:
    return pan("red_panda.jpg", 6, (48, 64), (0.4, 1.3), (100, 200))


@pytest.fixture
def temp(tmp_path) -> Path:
    folders.set_folders(inputs=[tmp_path], output=tmp_path / "out", temp=tmp_path / "temp")
    return tmp_path / "temp"


def frames(path: str | Path) -> torch.Tensor:
    with VideoReader(path) as reader:
        return torch.stack([frame.image() for frame in reader])


def test_frames_from_the_graph_are_read_as_they_are(clip, temp):
    odd = clip[:, :, :47, :63]
    with readable(VideoFromComponents(odd.movedim(1, -1)), temp) as source, VideoReader(source.file) as reader:
        read = torch.stack([frame.image() for frame in reader])
        assert abs(reader.info.rate - Fraction(2997, 100)) < 0.001 and reader.info.depth == 8
        first = source
    assert (read - odd).abs().max() <= 0.5 / 255 + 1e-6
    with readable(VideoFromComponents(odd.movedim(1, -1)), temp) as source:
        assert (source.name, source.origin) == (first.name, first.origin)
    with readable(VideoFromComponents(odd.movedim(1, -1).flip(0)), temp) as source:
        assert source.origin != first.origin
    assert list(temp.iterdir()) == []
    with pytest.raises(InputError, match="no frames"), readable(VideoFromComponents(torch.zeros(0, 8, 8, 3)), temp):
        pass


@pytest.mark.parametrize(("channels", "rate"), [(1, 44100), (2, 48000), (3, 5000)])
def test_the_sound_of_frames_from_the_graph_starts_where_it_did(clip, temp, channels, rate):
    waveform = torch.zeros(1, channels, rate)
    waveform[..., rate // 10 : rate // 10 + rate // 50] = 0.8 * torch.sin(torch.arange(rate // 50) * 0.3)
    node = VideoFromComponents(clip.movedim(1, -1), {"waveform": waveform, "sample_rate": rate})
    made = RestoreVideo.execute(local_restorer(), "none", clip=node).args
    assert made[1].endswith(".mp4") and made[2].endswith("6 frames, 1 shot")
    with av.open(made[1]) as container:
        start = next(container.decode(video=0)).time
        container.seek(0)
        heard = [
            frame.time - start + index / frame.sample_rate
            for frame in container.decode(audio=0)
            for index in torch.from_numpy(frame.to_ndarray())[0].abs().gt(0.3).nonzero()[:1, 0].tolist()
        ]
    assert abs(heard[0] - 0.1) < 0.005
    assert list(temp.iterdir()) == []


def test_a_restored_clip_of_frames_is_found_again(clip, temp):
    network = local_restorer()
    made = [RestoreVideo.execute(network, "none", clip=VideoFromComponents(clip.movedim(1, -1))) for _ in range(2)]
    assert made[0].args[1] == made[1].args[1] and made[1].args[2].endswith("(was there already)")


def test_colours_of_frames_from_the_graph_survive(temp):
    flat = torch.tensor([0.8, 0.2, 0.3]).expand(3, 48, 64, 3)
    path = RestoreVideo.execute(local_restorer(), "none", clip=VideoFromComponents(flat), strength=0.0).args[1]
    assert (frames(path).movedim(1, -1) - flat).abs().max() < 0.03


def test_a_file_that_nobody_edited_is_read_where_it_lies(clip, temp, tmp_path):
    file = write_clip(tmp_path / "film.mp4", clip)
    for given in (VideoFromFile(file), Edited(file)):
        with readable(given, temp) as source:
            assert (source.file, source.name, source.origin) == (str(file), "film", None)
    assert not temp.exists()


def test_of_a_trimmed_or_cropped_file_what_is_left_is_restored(clip, temp, tmp_path):
    file, network = write_clip(tmp_path / "film.mp4", clip), local_restorer()

    def made(video):
        path, text = RestoreVideo.execute(network, "none", clip=video, codec="lossless").args[1:]
        return Path(path).name, tuple(frames(path).shape), "already" in text

    assert made(VideoFromFile(file)) == ("film.mkv", (6, 3, 48, 64), False)
    assert made(VideoFromFile(file, first=2)) == ("film_2.mkv", (4, 3, 48, 64), False)
    assert made(Edited(file, pending=True)) == ("film_3.mkv", (4, 3, 32, 64), False)
    assert made(Edited(file, trim=(0.1, 0.0))) == ("film_3.mkv", (4, 3, 32, 64), True)
    assert made(Stubborn(file, pending=True)) == ("film_4.mkv", (3, 3, 31, 33), False)
    assert made(VideoFromFile(file))[::2] == ("film.mkv", True)
    assert list(temp.iterdir()) == []
