"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.engine import folders, host, loaded

SMALL = {
    "dim": 8,
    "num_blocks": (1, 1, 1, 1),
    "num_dec_blocks": (1, 1, 1),
    "heads": (1, 2, 4, 8),
    "num_refinement_blocks": 1,
}


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_folders() -> Iterator[None]:
    """Folders that a test sets are forgotten after it."""
    before = {name: getattr(folders._Folders, name) for name in ("inputs", "output", "temp")}
    yield
    for name, folder in before.items():
        setattr(folders._Folders, name, folder)


@pytest.fixture
def nobody_listens() -> Iterator[None]:
    """What a test sets to be told progress, or to cancel, is forgotten after it."""
    yield
    host.set_hooks()


@pytest.fixture
def moce() -> loaded.LoadedRestorer:
    """A tiny MoCE-IR with random weights, every part of which has an effect."""
    module = models.create("moce-ir", SMALL).eval().requires_grad_(False)
    architecture = models.registry.get("moce-ir")
    return loaded.wrap(models.Restorer(architecture, {**SMALL, "num_experts": 4, "inp_channels": 3}, module))
