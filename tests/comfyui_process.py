"""Scripts of this folder in the Python that has ComfyUI's packages, for the tests that need a real ComfyUI."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from comfyui_mend.engine.comfyui import find_comfyui

from .comfyui_page import find_python

TESTS = Path(__file__).resolve().parent
PACKAGES = "torch, torchvision, torchaudio, aiohttp, transformers, yaml, av"


@cache
def comfyui_python(packages: str = PACKAGES) -> tuple[Path, str]:
    """ComfyUI's folder and its Python; skips the test where there is none, or one that lacks the packages."""
    root = find_comfyui()
    if root is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH or install one at ~/comfy/ComfyUI")
    python = find_python(root)
    if subprocess.run([python, "-c", f"import {packages}"], capture_output=True).returncode:
        pytest.skip(f"{python} cannot import {packages}: set MEND_COMFYUI_PYTHON")
    return root, python


def run_script(
    name: str, *arguments: object, place: Path, packages: str = PACKAGES, timeout: float = 1800, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder in `place`; skips as `comfyui_python`, fails the test if the script fails.

    environment: variables besides those of this process.
    """
    root, python = comfyui_python(packages)
    variables = {**os.environ, "COMFYUI_PATH": str(root), **environment}
    variables.pop("PYTHONPATH", None)
    command = [python, str(TESTS / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done
