"""What long jobs remember: journals, fingerprints, files that appear whole, reports."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend.engine import loaded
from comfyui_mend.engine.journal import Journal, Report, fingerprint, written_whole
from comfyui_mend.engine.restore_video import VideoSettings
from comfyui_mend.errors import Cancelled


def test_a_journal_survives_a_torn_line(tmp_path):
    book = Journal(tmp_path / "j.jsonl")
    book.add("a", "1", frames=3)
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('{"key": "b", "made')
    book = Journal(tmp_path / "j.jsonl")
    assert book.find("a", "1")["frames"] == 3 and book.find("b", "1") is None and book.find("a", "2") is None
    book.add("b", "2")
    assert Journal(tmp_path / "j.jsonl").find("b", "2")


def test_equal_settings_have_equal_fingerprints_and_others_do_not(moce):
    same = [1, "a", {"x": torch.ones(2)}, VideoSettings()]
    assert fingerprint(same) == fingerprint([1, "a", {"x": torch.ones(2)}, VideoSettings()])
    others = [1, 1.0, "1", True, [1], (1, 1), {"1": 1}, torch.ones(1), torch.zeros(1), VideoSettings(crf=1), object()]
    prints = [fingerprint(value) for value in others]
    assert len(set(prints)) == len(prints) and fingerprint(object()) != fingerprint(object())
    other = loaded.wrap(moce.restorer).with_options(scan_len=2)
    assert fingerprint(moce) == fingerprint(moce) != fingerprint(other)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), written_whole(tmp_path / "x" / "a.txt") as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert list((tmp_path / "x").iterdir()) == []


def test_a_report_takes_anything_but_a_cancel(tmp_path):
    report = Report("Job")
    with report.file("a"):
        raise ValueError("odd")
    with pytest.raises(Cancelled), report.file("b"):
        raise Cancelled("cancelled")
    assert report.count("failed") == 1 and "ValueError: odd" in report.text()
