"""Usual mistakes on the command line end with status 1 and words that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from comfyui_mend.__main__ import main
from comfyui_mend.engine import host
from comfyui_mend.errors import InputError

CODEC = "mend-aio-codec-starter.safetensors"
WIRING = "wiring-nafnet.safetensors"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    Image.new("RGB", (24, 16), (90, 120, 30)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain.safetensors").write_bytes(b"no tensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("restore a.png --device abacus", "device: 'abacus' cannot be used"),
        ("restore a.png --model nope", "MEND_MODELS"),
        ("restore empty", "this is a folder"),
        (f"restore a.png --model {WIRING} --output a.png", "cannot be written"),
        ("run restore_photo --input nowhere", "--input: there is no folder nowhere"),
        ("run restore_photo --output a.png", "a.png is a file"),
        ("batch mix --inputs empty --outputs a.png", "the results need a folder"),
        ("encode a.png", "mend-aio-codec-starter.safetensors"),
        (f"encode a.png --model {CODEC} --tile 7", "multiple of 16"),
        ("models info nope.pth", "there is no such file in"),
        ("models list --system nope", "one of moce-ir"),
        ("models list --released --system nope", "one of moce-ir"),
        ("models table --write nope.md", "there is no such file"),
        ("train export empty x.safetensors", "not the folder of a run"),
        ("train average nope nope x.safetensors", "there is no such file"),
        ("train average plain.safetensors plain.safetensors x.safetensors", "not a safetensors file"),
        ("train average a b x.safetensors --share 5", "share: 5.0 is outside 0..1"),
        (f"train finetune --model {WIRING} --dataset manifest:empty --out r", "there is no file empty/manifest.jsonl"),
        ("bench restorer --only nope", "is no network's id; one of moce-ir"),
        ("bench large --released nope", "is no network's id; one of moce-ir"),
        ("bench reference moce-ir empty", "name a checkout of https://github.com/eduardzamfir/MoCE-IR"),
    ],
    ids=lambda value: value if " " in value else None,
)
def test_a_mistake_is_answered_in_words(arguments, words, capsys) -> None:
    assert main(arguments.split()) == 1
    assert words in capsys.readouterr().err.replace("\\", "/")


def test_a_device_without_values_is_none_to_compute_on() -> None:
    assert host.named_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="cpu"):
        host.named_device("meta")
