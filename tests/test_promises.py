"""Every promise of docs/promises.md names tests that exist; and the tests of those that had none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
BROUGHT_BY_COMFYUI = {"torch", "numpy", "safetensors", "einops", "kornia", "pillow", "tqdm", "tomli"}


def test_there_are_fifteen_promises_in_order():
    assert [int(row.split("|")[1]) for row in ROWS] == list(range(1, 16))


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip() for row in ROWS])
def test_a_promise_names_tests_that_exist(row):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
    assert named
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)), (file, name)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_installing_changes_no_installed_package():
    """Requirements without any bound are met by whatever version ComfyUI installed."""
    for requirement in project()["project"]["dependencies"]:
        name, _, marker = requirement.partition(";")
        assert name.strip().lower() in BROUGHT_BY_COMFYUI, f"{requirement}: brings a package or sets a bound"
        assert not marker or "python_version < '3.11'" in marker


def test_installing_compiles_nothing():
    build = project()["build-system"]
    assert not [r for r in build["requires"] if not r.startswith("setuptools")], (
        "a build that needs more than setuptools"
    )
    assert not (ROOT / "setup.py").exists() and "ext-modules" not in project()["tool"]["setuptools"]
    assert not (ROOT / "install.py").exists() and not (ROOT / "prestartup_script.py").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
def test_a_web_page_is_called_a_web_page(suffix, tmp_path):
    file = tmp_path / f"model{suffix}"
    file.write_text("<!DOCTYPE html><html><head><title>Quota exceeded</title></head><body>...</body></html>" * 20)
    with pytest.raises(CheckpointError, match="HTML page: the download failed"):
        models.load(file)
