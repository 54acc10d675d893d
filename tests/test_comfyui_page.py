"""Every shipped workflow opens in ComfyUI's real page: known nodes, no alerts, no overlaps, sends what its twin says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from comfyui_mend.engine.comfyui import find_comfyui

from .comfyui_page import find_python

TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.browser
def test_every_workflow_opens_in_the_page_without_complaint(tmp_path):
    root = find_comfyui()
    if root is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH or install one at ~/comfy/ComfyUI")
    if not Path(os.environ.get("CHROMIUM_PATH", "/usr/bin/chromium")).exists():
        pytest.skip("no Chromium: set CHROMIUM_PATH")
    python = find_python(root)
    if subprocess.run([python, "-c", "import playwright, aiohttp, comfyui_mend"], capture_output=True).returncode:
        pytest.skip(f"{python} lacks playwright, ComfyUI's packages or this pack")
    command = [python, str(TESTS / "comfyui_page.py"), "--no-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
