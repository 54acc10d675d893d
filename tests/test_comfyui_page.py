"""Every shipped workflow opens in ComfyUI's real page: known nodes, no alerts, no overlaps, sends what its twin says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .comfyui_process import run_script


@pytest.mark.slow
@pytest.mark.browser
def test_every_workflow_opens_in_the_page_without_complaint(tmp_path):
    if not Path(os.environ.get("CHROMIUM_PATH", "/usr/bin/chromium")).exists():
        pytest.skip("no Chromium: set CHROMIUM_PATH")
    packages = "playwright, aiohttp, comfyui_mend"
    run_script("comfyui_page.py", "--no-run", "--out", tmp_path, place=tmp_path, packages=packages, timeout=1200)
