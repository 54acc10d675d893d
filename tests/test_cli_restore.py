"""`mend restore`: the main job without a graph."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui_mend.__main__ import main
from comfyui_mend.engine.photos import read_photo, write_photo


@pytest.fixture
def model(tmp_path, moce) -> str:
    path = tmp_path / "net.safetensors"
    save_file({k: v.contiguous() for k, v in moce.restorer.module.state_dict().items()}, str(path))
    return str(path)


def test_photos_of_every_kind_are_restored_beside_themselves(tmp_path, model, capsys) -> None:
    kinds = {"grey.png": "L", "colour.jpg": "RGB", "alpha.png": "RGBA", "palette.gif": "P"}
    for name, mode in kinds.items():
        Image.new("RGB", (21, 13), (90, 120, 30)).convert(mode).save(tmp_path / name)
    assert main(["restore", *(str(tmp_path / n) for n in kinds), "--model", model]) == 0
    written = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [Image.open(p).size for p in written] == [(21, 13)] * 4
    assert Image.open(tmp_path / "grey-restored.png").mode == "L"
    assert Image.open(tmp_path / "alpha-restored.png").mode == "RGBA"


def test_one_bad_file_does_not_stop_the_others_and_nothing_is_overwritten(tmp_path, model, capsys) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    out = str(tmp_path / "out")
    photos = [str(tmp_path / n) for n in ("bad.png", "good.png", "missing.png")]
    assert main(["restore", *photos, "--model", model, "--output", out]) == 1
    shown = capsys.readouterr()
    assert "good-restored.png" in shown.out
    assert "not a picture that can be read" in shown.err and "there is no such file" in shown.err
    assert main(["restore", photos[1], "--model", model, "--output", out]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["restore", photos[1], "--model", model, "--output", out, "--force"]) == 0


def test_sixteen_bits_and_orientation_are_read(tmp_path) -> None:
    Image.new("I;16", (6, 4), 32768).save(tmp_path / "deep.png")
    deep = read_photo(tmp_path / "deep.png")
    assert deep.shape == (1, 1, 4, 6) and deep.mean() == pytest.approx(0.5, abs=1e-4)
    rotated = Image.new("RGB", (6, 4))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").shape == (1, 3, 6, 4)


def test_written_photos_come_back_as_they_were(tmp_path) -> None:
    image = torch.randint(0, 256, (4, 9, 7)) / 255
    write_photo(image, tmp_path / "sub" / "a.png")
    assert torch.allclose(read_photo(tmp_path / "sub" / "a.png")[0], image, atol=1e-6)


def test_strength_counts_for_networks_that_enlarge_too(tmp_path) -> None:
    Image.new("RGB", (24, 16), (90, 120, 30)).save(tmp_path / "a.png")
    command = ["restore", str(tmp_path / "a.png"), "--model", "mend-mair-x2-starter.safetensors", "--strength"]
    for strength in ("0", "1"):
        assert main([*command, strength, "--output", str(tmp_path / strength)]) == 0
    none, full = (read_photo(tmp_path / strength / "a-restored.png") for strength in ("0", "1"))
    assert none.shape == full.shape == (1, 3, 32, 48) and not torch.equal(none, full)
    assert torch.allclose(none, read_photo(tmp_path / "a.png")[..., :1, :1].expand_as(none), atol=0.005)
