"""Videos in bounded memory: what goes in comes out, whatever interrupts it."""

from __future__ import annotations

import copy
import io
import json
import resource
from fractions import Fraction

import pytest
import torch
from PIL import Image

from comfyui_mend.engine import folders, host
from comfyui_mend.engine.restore_video import VideoSettings, restore_video
from comfyui_mend.engine.validation import validate_prompt
from comfyui_mend.engine.video import VideoFile, VideoReader, VideoWriter, join, suffix_for
from comfyui_mend.errors import Cancelled, InputError, MendError, MissingDependency, WorkflowError
from comfyui_mend.nodes.video import RestoreVideo

from .make_workflow import classes
from .support import cancel_after, local_restorer
from .video_clips import frames, two_shots, write_clip

av = pytest.importorskip("av", reason="PyAV is not installed")

EXACT = VideoSettings(codec="lossless")
pytestmark = pytest.mark.usefixtures("nobody_listens")


@pytest.fixture
def clip() -> torch.Tensor:
    return two_shots()


# Reading and writing --------------------------------------------------------------------------------------------------


def rewrite(source, folder, codec: str = "h264"):
    """A video read and written again in two parts."""
    with VideoReader(source) as reader:
        read, parts = list(reader), []
        for number, half in enumerate((read[: len(read) // 2], read[len(read) // 2 :])):
            parts.append(folder / f"{number}.nut")
            writer = VideoWriter(parts[-1], reader.info, tuple(half[0].image().shape[1:]), codec, crf=4)
            for frame in half:
                writer.write(frame.image(), frame.pts)
            writer.close()
        output = folder / f"again{suffix_for(reader.info, codec)}"
        assert join(parts, source, output) == len(read)
        return output, reader.info, [frame.pts * reader.info.time_base for frame in read]


@pytest.mark.parametrize("codec", ["h264", "h265", "lossless"])
def test_frames_times_and_sound_come_out_as_they_went_in(clip, tmp_path, codec):
    source = write_clip(tmp_path / "a.mp4", clip, sound=True, rate=Fraction(30000, 1001))
    output, info, times = rewrite(source, tmp_path, codec)
    assert (frames(output) - frames(source)).abs().mean() < (0.02 if codec != "lossless" else 1e-6)
    with VideoReader(output) as reader:
        now = [frame.pts * reader.info.time_base for frame in reader]
        assert reader.info.rate == info.rate and reader.info.sound == ("aac",)
    assert all(abs((a - now[0]) - (b - times[0])) < 0.001 for a, b in zip(now, times, strict=True))
    with av.open(str(source)) as one, av.open(str(output)) as other:
        packets = [[bytes(p) for p in c.demux(c.streams.audio[0]) if p.size] for c in (one, other)]
    assert packets[0] == packets[1]  # copied, not encoded again


def test_uneven_times_stay_uneven(clip, tmp_path):
    uneven = [0, 1001, 3003, 3500, 9000, 9001, 12000, 20000, 20100, 30000]
    output, _, times = rewrite(write_clip(tmp_path / "a.mp4", clip, times=uneven), tmp_path)
    with VideoReader(output) as reader:
        assert [frame.pts * reader.info.time_base for frame in reader] == times


def test_a_turned_video_comes_out_upright(clip, tmp_path):
    source = write_clip(tmp_path / "a.mp4", clip, rotation=90, aspect=Fraction(4, 3))
    with VideoReader(source) as reader:
        assert (reader.info.width, reader.info.height, reader.info.aspect) == (48, 64, Fraction(3, 4))
        assert reader.info.rotation == 1
    upright = frames(source)
    assert (upright - torch.rot90(clip, 1, (2, 3))).abs().mean() < 0.03
    output, *_ = rewrite(source, tmp_path)
    with VideoReader(output) as reader:
        assert (reader.info.rotation, reader.info.aspect) == (0, Fraction(3, 4))
    assert (frames(output) - upright).abs().mean() < 0.02


@pytest.mark.parametrize("matrix", [1, 5])
def test_colours_are_read_by_the_matrix_that_the_file_names(clip, tmp_path, matrix):
    flat = torch.tensor([0.8, 0.2, 0.3])[None, :, None, None].expand(3, 3, 16, 16)
    source = write_clip(tmp_path / "a.mp4", flat, colourspace=matrix)
    assert (frames(source) - flat).abs().max() < 0.02
    output, *_ = rewrite(source, tmp_path)
    assert (frames(output) - flat).abs().max() < 0.02


def test_odd_sizes_and_ten_bits_survive(clip, tmp_path):
    odd, _, _ = rewrite(write_clip(tmp_path / "odd.mkv", clip[..., :47, :63], pixels="yuv444p"), tmp_path)
    assert frames(odd).shape == (10, 3, 47, 63)
    deep, _, _ = rewrite(write_clip(tmp_path / "deep.mp4", clip, pixels="yuv420p10le"), tmp_path)
    with VideoReader(deep) as reader:
        assert reader.info.depth == 10


def test_what_is_no_video_is_refused_in_words(clip, tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", clip).read_bytes()
    bad = {"text": b"no video", "empty": b"", "page": b"<html></html>", "half": whole[: len(whole) // 2]}
    for name, content in bad.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with pytest.raises(MendError):
            frames(tmp_path / f"{name}.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    for missing in ("nowhere.mp4",):
        with pytest.raises(InputError, match="no such file"):
            VideoReader(tmp_path / missing)


def test_flipped_bytes_end_in_frames_or_in_a_reason(clip, tmp_path):
    whole = bytearray(write_clip(tmp_path / "whole.mp4", clip).read_bytes())
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        broken = bytearray(whole)
        for place in torch.randint(len(whole), (20,), generator=generator).tolist():
            broken[place] ^= 255
        try:
            with VideoReader(io.BytesIO(bytes(broken))) as reader:
                assert sum(1 for _ in reader) <= 64
        except MendError as error:
            assert str(error)


def test_without_pyav_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingDependency, match="pip install av"):
        VideoReader(tmp_path / "a.mp4")


# Restore Video --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2])
def test_every_frame_of_a_video_is_restored(clip, tmp_path, scale):
    source, network = write_clip(tmp_path / "a.mp4", clip, sound=True), local_restorer(scale)
    made = restore_video(network, source, tmp_path / "out", "a", EXACT)
    assert (made.frames, made.shots, made.skipped) == (10, 2, False)
    read = frames(source)
    with torch.inference_mode():
        expected = network.restorer(read).clamp(0, 1)
    assert (frames(made.path) - expected).abs().max() <= 0.5 / 255 + 1e-4
    assert not (tmp_path / "out" / "a.parts").exists()


@pytest.mark.parametrize("stabilise", [0.0, 0.8])
def test_a_run_that_was_cancelled_goes_on_to_the_same_result(clip, tmp_path, stabilise):
    source, settings = write_clip(tmp_path / "a.mp4", clip), VideoSettings(codec="lossless", stabilise=stabilise)
    network = local_restorer()
    whole = restore_video(network, source, tmp_path / "whole", "a", settings, part=3)
    cancel_after(12)
    with pytest.raises(Cancelled):
        restore_video(network, source, tmp_path / "out", "a", settings, part=3)
    host.set_hooks()
    kept = sorted(p.name for p in (tmp_path / "out" / "a.parts").glob("*.nut"))
    assert kept and not (tmp_path / "out" / "a.mkv").exists()
    before = len(network.restorer.module.calls)
    resumed = restore_video(network, source, tmp_path / "out", "a", settings, part=3)
    again = sum(shape[0] for shape in network.restorer.module.calls[before:])
    assert again < 10, "finished parts are not restored again"
    assert torch.equal(frames(whole.path), frames(resumed.path))
    assert (resumed.frames, resumed.shots) == (10, 2)


def test_a_video_can_be_steadied_and_weakened_in_several_parts(clip, tmp_path):
    source, settings = write_clip(tmp_path / "a.mp4", clip), VideoSettings(stabilise=0.8, strength=0.5)
    assert restore_video(local_restorer(), source, tmp_path / "out", "a", settings, part=3).frames == 10


def test_a_crash_costs_only_the_part_that_was_being_written(clip, tmp_path):
    source, network = write_clip(tmp_path / "a.mp4", clip), local_restorer()
    network.restorer.module.fail_with = RuntimeError("the driver fell over")
    calls, forward = [], network.restorer.module.forward

    def failing(image):
        calls.append(len(image))
        if len(calls) > 1:
            raise network.restorer.module.fail_with
        return forward(image)

    network.restorer.module.forward = failing
    with pytest.raises(RuntimeError, match="driver"):
        restore_video(network, source, tmp_path / "out", "a", EXACT, part=2)
    network.restorer.module.forward = forward
    assert restore_video(network, source, tmp_path / "out", "a", EXACT, part=2).frames == 10
    assert sum(s[0] for s in network.restorer.module.calls) == 10


def test_a_finished_video_is_skipped_until_something_changes(clip, tmp_path):
    source, network = write_clip(tmp_path / "a.mp4", clip), local_restorer()

    def skipped(**more):
        return restore_video(network, source, tmp_path / "out", "a", more.pop("settings", EXACT), **more).skipped

    assert [skipped(), skipped(), skipped(again=True), skipped()] == [False, True, False, True]
    assert not skipped(settings=VideoSettings(codec="lossless", strength=0.5))
    write_clip(source, clip[:7])
    assert not skipped() and skipped()
    (tmp_path / "out" / "a.mkv").unlink()
    assert not skipped()


def test_what_was_made_from_something_else_keeps_its_name_and_its_place(clip, tmp_path):
    network, out, deep = local_restorer(), tmp_path / "out", VideoSettings(codec="lossless", strength=0.5)
    mp4, mov = write_clip(tmp_path / "a.mp4", clip[:3]), write_clip(tmp_path / "a.mov", clip[:5])

    def made(source, settings=EXACT, **more):
        result = restore_video(network, source, out, "a", settings, apart=True, **more)
        return result.path.name, result.frames, result.skipped

    assert made(mp4) == ("a.mkv", 3, False) and made(mp4, deep) == ("a_2.mkv", 3, False)
    assert made(mov) == ("a_3.mkv", 5, False)
    first = frames(out / "a.mkv")
    assert made(mp4, deep) == ("a_2.mkv", 3, True) and made(mov) == ("a_3.mkv", 5, True)
    assert made(mov, again=True) == ("a_3.mkv", 5, False) and made(mp4) == ("a.mkv", 3, True)
    (out / "a.mkv").unlink()  # a name that is free again is taken again
    assert made(mp4) == ("a.mkv", 3, False) and torch.equal(frames(out / "a.mkv"), first)
    (out / "b.mkv").write_bytes(b"somebody's own")
    assert restore_video(network, mp4, out, "b", EXACT, apart=True).path.name == "b_2.mkv"
    assert (out / "b.mkv").read_bytes() == b"somebody's own"


def test_an_unfinished_video_is_gone_on_with_whatever_was_made_beside_it(clip, tmp_path):
    source, network, out = write_clip(tmp_path / "a [1].mp4", clip), local_restorer(), tmp_path / "out"

    def made(settings):
        return restore_video(network, source, out, "a [1]", settings, apart=True, part=3)

    cancel_after(12)
    with pytest.raises(Cancelled):
        made(EXACT)
    host.set_hooks()
    kept = list((out / "a [1].parts").glob("*.nut"))
    assert kept and made(VideoSettings(codec="lossless", strength=0.5)).path.name == "a [1]_2.mkv"
    assert all(part.is_file() for part in kept)
    before = len(network.restorer.module.calls)
    assert made(EXACT).path.name == "a [1].mkv"
    assert sum(shape[0] for shape in network.restorer.module.calls[before:]) < 10
    assert list(out.glob("*.parts")) == []


def test_a_route_is_decided_once_per_shot(clip, tmp_path, moce, monkeypatch):
    decided = []
    monkeypatch.setattr(
        "comfyui_mend.engine.shots.decide", lambda loaded, frame, given: decided.append(frame) or {"routing": None}
    )
    source = write_clip(tmp_path / "a.mp4", clip)
    restore_video(moce, source, tmp_path / "out", "a", EXACT)
    assert len(decided) == 2
    restore_video(moce, source, tmp_path / "out", "b", VideoSettings(codec="lossless", hold=False))
    assert len(decided) == 2


def test_damage_in_the_middle_is_told_and_what_came_before_is_kept(clip, tmp_path, monkeypatch):
    source = write_clip(tmp_path / "a.mp4", clip)
    read = VideoReader.__iter__

    def damaged(self):
        for index, frame in enumerate(read(self)):
            if index == 9:
                raise InputError("a.mp4: damaged after frame 9")
            yield frame

    monkeypatch.setattr(VideoReader, "__iter__", damaged)
    with pytest.raises(InputError, match="frame 9"):
        restore_video(local_restorer(), source, tmp_path / "out", "a", EXACT, part=3)
    assert len(list((tmp_path / "out" / "a.parts").glob("*.nut"))) >= 2


def test_one_routing_serves_a_video_and_two_do_not(clip, tmp_path):
    with pytest.raises(InputError, match="2 pictures"):
        restore_video(local_restorer(), write_clip(tmp_path / "a.mp4", clip), tmp_path, "b", context={"x": [1, 2]})


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_frames(tmp_path):
    clip = torch.rand(20, 3, 64, 96)
    source = write_clip(tmp_path / "a.mp4", clip.repeat(50, 1, 1, 1))
    restore_video(local_restorer(), write_clip(tmp_path / "b.mp4", clip.repeat(5, 1, 1, 1)), tmp_path, "warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert restore_video(local_restorer(), source, tmp_path, "out", VideoSettings(stabilise=0.8)).frames == 1000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 60, f"{grown:.0f} MiB more"


# Nodes ----------------------------------------------------------------------------------------------------------------


def test_the_video_node_takes_a_file_or_a_connected_video(clip, tmp_path):
    folders.set_folders(inputs=[tmp_path], output=tmp_path / "out")
    write_clip(tmp_path / "a.mp4", clip[:3], sound=True)
    output = RestoreVideo.execute(local_restorer(), "a.mp4")
    video, path, text = output.args
    assert video.get_stream_source() == path and text == "a.mp4: 3 frames, 1 shot"
    assert output.ui["images"][0] == {"filename": "a.mp4", "subfolder": "mend/video", "type": "output"}
    again = RestoreVideo.execute(local_restorer(), "none", clip=VideoFile(tmp_path / "a.mp4"), folder="other")
    assert again.args[1].endswith("a.mp4") and video.get_components().images.shape == (3, 48, 64, 3)
    with pytest.raises(WorkflowError, match="output folder"):
        RestoreVideo.execute(local_restorer(), "a.mp4", folder="../elsewhere")


def test_two_video_nodes_on_one_video_give_two_files(clip, tmp_path):
    folders.set_folders(inputs=[tmp_path], output=tmp_path / "out")
    write_clip(tmp_path / "a.mp4", clip[:3])
    network = local_restorer()
    for _ in range(2):
        results = [RestoreVideo.execute(network, "a.mp4", strength=strength) for strength in (1.0, 0.5)]
        assert [made.ui["images"][0]["filename"] for made in results] == ["a.mp4", "a_2.mp4"]
    assert [made.args[2].endswith("(was there already)") for made in results] == [True, True]


def test_the_file_has_to_be_there_only_where_no_video_is_connected(clip, tmp_path):
    folders.set_folders(inputs=[tmp_path], output=tmp_path / "out")
    write_clip(tmp_path / "a.mp4", clip[:3])
    shipped = json.loads((host.PACK / "workflows" / "api" / "restore_video.json").read_text(encoding="utf-8"))
    known = classes()

    def refused(**inputs) -> set[str]:
        prompt = copy.deepcopy(shipped) | {"9": {"class_type": "LoadVideo", "inputs": {"file": "a.mp4"}}}
        prompt["2"]["inputs"].update(inputs)
        errors = validate_prompt(prompt, known)[3]
        return {error["details"].split(" - ")[-1] for entry in errors.values() for error in entry["errors"]}

    assert refused(video="a.mp4") == refused(video="none") == set()
    assert refused(video="nowhere.mp4") == {"video: there is no file 'nowhere.mp4' in the input folder"}
    assert refused(video="nowhere.mp4", clip=["9", 0]) == set()
    assert refused(video="nowhere.mp4", clip=["9", 0], codec="x") != set()
