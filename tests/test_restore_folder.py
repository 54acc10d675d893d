"""Restoring folders: everything is done once, whatever interrupts it, and no bad file stops the rest."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from comfyui_mend.engine import folders, host, journal
from comfyui_mend.engine.photos import read_photo
from comfyui_mend.engine.restore_folder import FolderSettings, restore_folder
from comfyui_mend.errors import Cancelled, InputError
from comfyui_mend.nodes.video import RestoreFolder

from .support import cancel_after, local_restorer
from .video_clips import frames, two_shots, write_clip

pytest.importorskip("av", reason="PyAV is not installed")
pytestmark = pytest.mark.usefixtures("nobody_listens")


@pytest.fixture
def place(tmp_path):
    """Pictures of three kinds, one below another folder, one with transparency, a video, and two broken files."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, mode in (("a.png", "RGB"), ("a.jpg", "RGB"), ("deep/b.png", "RGBA"), ("grey.tif", "L")):
        Image.new(mode, (20, 12), "gray").save(tmp_path / "in" / name)
    write_clip(tmp_path / "in" / "deep" / "clip.mp4", two_shots()[:3])
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
    return tmp_path


def test_a_folder_is_restored_whole_and_bad_files_are_reported(place):
    report = restore_folder(local_restorer(2), place / "in", place / "out")
    assert (report.count("done"), report.count("failed")) == (5, 2)
    out = place / "out"
    assert read_photo(out / "deep" / "b.png").shape == (1, 4, 24, 40)
    assert read_photo(out / "a.png.png").shape == read_photo(out / "a.jpg.jpg").shape == (1, 3, 24, 40)
    assert read_photo(out / "grey.tif").shape[1] == 1
    assert frames(out / "deep" / "clip.mp4").shape == (3, 3, 96, 128)
    saved = json.loads((out / "mend-report.json").read_text())
    assert {e["source"] for e in saved["files"] if e["status"] == "failed"} == {"broken.png", "broken.mp4"}
    assert "failed: broken.png" in (out / "mend-report.txt").read_text()
    assert [p for p in out.rglob("*.part*")] == []


def test_a_folder_done_before_is_skipped_and_new_files_are_done(place):
    network = local_restorer()
    restore_folder(network, place / "in", place / "out")
    calls = len(network.restorer.module.calls)
    Image.new("RGB", (9, 9)).save(place / "in" / "new.png")
    report = restore_folder(network, place / "in", place / "out")
    assert (report.count("skipped"), report.count("done")) == (5, 1)
    assert len(network.restorer.module.calls) == calls + 1
    assert restore_folder(network, place / "in", place / "out", FolderSettings(strength=0.5)).count("skipped") <= 1


def test_a_cancelled_folder_keeps_what_is_done(place):
    cancel_after(6)
    with pytest.raises(Cancelled):
        restore_folder(local_restorer(), place / "in", place / "out", videos=False)
    host.set_hooks()
    saved = json.loads((place / "out" / "mend-report.json").read_text())
    assert saved["stopped"] and any(e["status"] == "done" for e in saved["files"])
    report = restore_folder(local_restorer(), place / "in", place / "out", videos=False)
    assert report.count("done") + report.count("skipped") == 4


def test_results_never_go_into_the_folder_that_is_read(place):
    for target in (place / "in", place / "in" / "out"):
        with pytest.raises(InputError, match="name another"):
            restore_folder(local_restorer(), place / "in", target)
    with pytest.raises(InputError, match="no such folder"):
        restore_folder(local_restorer(), place / "nowhere", place / "out")


def test_the_folder_node_reports(place):
    folders.set_folders(inputs=[place], output=place / "results")
    text, folder, failed = RestoreFolder.execute(local_restorer(), "in", videos=False).args
    assert failed == 1 and "4 done" in text and folder == str((place / "results" / "mend" / "folder").resolve())
    assert journal.REPORT + ".txt" in {p.name for p in (place / "results" / "mend" / "folder").iterdir()}
    assert RestoreFolder.validate_inputs("nowhere", "png", "h264", "auto") is not True
