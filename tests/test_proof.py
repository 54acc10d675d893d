"""What Mend says about results and about itself: figures without a reference, report pages, the parity certificate."""

from __future__ import annotations

import json
import re
import sys
import types
from html.parser import HTMLParser

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.engine import certificate, describe, folders, html_report, quality
from comfyui_mend.engine.mix import low_frequencies
from comfyui_mend.errors import InputError, MissingDependency, WorkflowError

from .support import local_restorer


def ramp() -> torch.Tensor:
    """A smooth picture [1, 3, 128, 128]."""
    x = torch.linspace(0.2, 0.8, 128)
    return (x[:, None] * 0.5 + x[None] * 0.5).expand(1, 3, -1, -1)


@pytest.mark.parametrize("sigma", [0, 5, 25])
def test_the_noise_figure_is_the_sigma_of_the_noise(sigma):
    noisy = ramp() + torch.randn(1, 3, 128, 128) * sigma / 255
    assert quality.noise_level(noisy)[0] == pytest.approx(sigma, abs=0.05 * sigma + 0.05)


def test_the_blur_figure_rises_with_blur_and_stays_within_its_range():
    sharp = torch.rand(2, 3, 64, 64)
    values = [quality.blur(sharp)] + [quality.blur(low_frequencies(sharp, s)) for s in (1.0, 3.0)]
    for picture in range(2):
        assert 0 < values[0][picture] < values[1][picture] < values[2][picture] <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_figures_without_a_reference_exist_for_every_size(size, channels):
    text, means = quality.table(torch.rand(2, channels, *size))
    assert text.count("\n") == 1 and set(means) == {"noise", "blur"}
    assert all(v >= 0 for v in means.values())
    assert quality.blur(torch.zeros(1, 1, *size)) == [0.0]


@pytest.fixture
def pyiqa(monkeypatch):
    """A stand-in for the package: one measure with its weights, one without, one with a reference."""
    package, tools = types.ModuleType("pyiqa"), types.ModuleType("pyiqa.utils.download_util")
    package.__spec__ = types.SimpleNamespace(name="pyiqa")
    tools.download_url_to_file = lambda *a, **k: pytest.fail("downloaded")
    package.list_models = lambda: ["niqe", "musiq", "psnr"]

    def create_metric(name, device):
        if name == "musiq":
            sys.modules["pyiqa.utils.download_util"].download_url_to_file("https://nowhere/musiq.pth", "musiq.pth")

        class Measure:
            metric_mode = "FR" if name == "psnr" else "NR"

            def __call__(self, picture):
                return picture.mean()

        return Measure()

    package.create_metric = create_metric
    monkeypatch.setitem(sys.modules, "pyiqa", package)
    monkeypatch.setitem(sys.modules, "pyiqa.utils.download_util", tools)
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: object())
    quality._measure.cache_clear()
    yield tools
    quality._measure.cache_clear()


def test_learned_measures_come_from_pyiqa_and_nothing_is_downloaded(pyiqa):
    assert quality.learned(torch.full((2, 1, 8, 8), 0.25), "niqe") == [0.25, 0.25]
    original = pyiqa.download_url_to_file
    with pytest.raises(MissingDependency, match="musiq: its weights are not on this computer .*nowhere/musiq.pth"):
        quality.learned(torch.rand(1, 3, 8, 8), "musiq")
    assert pyiqa.download_url_to_file is original  # put back
    with pytest.raises(InputError, match="psnr compares with a reference"):
        quality.learned(torch.rand(1, 3, 8, 8), "psnr")
    with pytest.raises(InputError, match="pyiqa has no 'magic'"):
        quality.learned(torch.rand(1, 3, 8, 8), "magic")


def test_without_pyiqa_a_learned_measure_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    quality._measure.cache_clear()
    with pytest.raises(MissingDependency, match="needs the package pyiqa"):
        quality.learned(torch.rand(1, 3, 8, 8), "niqe")


# Report pages ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(**options) -> str:
    return html_report.page(torch.rand(1, 3, 20, 30), torch.rand(2, 3, 40, 60), title="A & <b>", **options)


def test_a_report_holds_everything_itself_and_asks_for_nothing():
    page = report(text=[("Notes", "<script>alert(1)</script>"), ("Empty", "")], extras=[torch.rand(2, 3, 10, 12)])
    parsed = Page(page)
    assert parsed.open == []
    pictures = [a for tag, a in parsed.tags if tag == "img"]
    assert len(pictures) == 2 * 2 + 2
    assert all(a["src"].startswith("data:image/jpeg;base64,") and a["alt"] for a in pictures)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1 and "&lt;script&gt;alert(1)" in page
    assert sum(tag == "input" for tag, _ in parsed.tags) == 2
    assert not re.search(r"https?://|url\(|@import", page) and "default-src 'none'" in page
    assert "A &amp; &lt;b&gt;" in page and "<h2>Empty" not in page


def test_the_pictures_of_a_report_are_made_smaller_than_asked_and_may_be_grey_or_transparent():
    small = html_report.data_uri(torch.rand(3, 400, 300), largest=100)
    assert len(small) < len(html_report.data_uri(torch.rand(3, 400, 300)))
    for channels in (1, 2, 4):
        assert html_report.data_uri(torch.rand(channels, 9, 9)).startswith("data:image/jpeg")


def test_a_report_goes_into_the_output_folder_under_the_next_number(tmp_path):
    folders_before = folders._Folders.output
    first, second = (html_report.save("x", "sub/page", tmp_path) for _ in range(2))
    assert [p.name for p in (first, second)] == ["page_00001_.html", "page_00002_.html"]
    with pytest.raises(WorkflowError, match="leads out of the output folder"):
        html_report.save("x", "../page", tmp_path)
    assert folders._Folders.output is folders_before


def test_the_figures_of_a_report_compare_both_pictures_with_the_reference():
    text = html_report.figures(torch.rand(1, 3, 20, 20), torch.rand(1, 3, 20, 20), torch.rand(1, 3, 20, 20))
    assert text.count("PSNR") == 2 and text.count("noise ") >= 2
    assert "PSNR" not in html_report.figures(torch.rand(1, 3, 20, 20), torch.rand(1, 3, 20, 20))


# The certificate ------------------------------------------------------------------------------------------------------


def test_every_case_of_the_certificate_was_met_or_is_said_not_to_have_been_run():
    cases = certificate.certificate()["cases"]
    assert len(cases) > 5
    known = {a.id for a in models.registry.architectures()}
    for case in cases:
        assert case["result"] in ("ok", "not run"), case
        assert case["result"] == "ok" or case["note"]
        assert case.get("share", 0) <= 1 and (case["network"] in known or case["network"] == "")


def test_restorer_info_shows_the_certificate_of_the_network(moce, tmp_path, monkeypatch):
    assert re.search(r"parity: (\d+) of \1 recorded cases met, [\d,]+ numbers; largest", describe.restorer_text(moce))
    assert "parity: no comparison with a reference implementation on record" in describe.restorer_text(local_restorer())
    cases = [
        {"case": "a", "network": "x", "result": "ok", "values": 10, "share": 0.5, "error": 1e-5},
        {"case": "b", "network": "x", "result": "failed"},
        {"case": "c", "network": "y", "result": "not run"},
    ]
    (tmp_path / "certificate.json").write_text(json.dumps({"cases": cases, "date": "2026-01-01", "versions": ""}))
    monkeypatch.setattr(certificate, "FILE", tmp_path / "certificate.json")
    certificate.certificate.cache_clear()
    try:
        want = "1 of 2 recorded cases met, 10 numbers; largest deviation 1e-05 (a), 50 % of what its case allows (2026-01-01)"
        assert certificate.summary("x") == want
        assert certificate.summary("y").endswith("on record; 1 recorded cases were not run")
    finally:
        certificate.certificate.cache_clear()
