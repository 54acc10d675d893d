"""`mend bench reference`: published files run as they are, without the packages they import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from comfyui_mend.bench import reference
from comfyui_mend.bench.compare import Measured, measure

PUBLISHED = """
import torch
from torch import nn
from timm.models.layers import to_2tuple
from basicsr.utils.registry import ARCH_REGISTRY
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn


@ARCH_REGISTRY.register()
class Network(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.scale = nn.Parameter(torch.full((), float(width)).cuda())

    def forward(self, x):
        assert to_2tuple(3) == (3, 3) and callable(selective_scan_fn)
        return x * self.scale
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "archs"
    package.mkdir()
    (package / "__init__.py").write_text("import a_package_that_nobody_has\n")
    (package / "net.py").write_text(PUBLISHED)
    return tmp_path


def test_published_files_are_imported_without_their_packages_and_leave_no_module_behind(checkout: Path) -> None:
    before = set(sys.modules)
    with reference.steady():
        network = reference.accepted(reference.published(checkout, "archs.net").Network, {"width": 3, "heads": 4})
    assert torch.equal(network(torch.ones(2)), torch.full((2,), 3.0))
    assert {name.split(".")[0] for name in set(sys.modules) - before} & {
        "archs",
        "timm",
        "basicsr",
        "mamba_ssm",
    } == set()


def test_a_row_gives_medians_peaks_and_the_relative_difference() -> None:
    ours = Measured(torch.tensor([1.0, 3.0]), 2_000_000, processor=[0.5, 0.1, 0.2])
    theirs = Measured(torch.tensor([1.0, 4.0]), 3_000_000, processor=[0.4, 0.4, 9.0])
    cells = [cell.strip() for cell in reference.row("net", 64, ours, theirs, "").strip("|").split("|")]
    assert cells == ["net", "64", "200", "400", "0.50", "2", "3", "2e-01", "nothing"]


def test_measuring_runs_the_implementations_in_turns() -> None:
    order = []

    def call(name: str) -> torch.Tensor:
        order.append(name)
        return torch.ones(1)

    measured = measure({"a": lambda: call("a"), "b": lambda: call("b")}, 2)
    assert order == ["a", "b"] * 3 and len(measured["b"].processor) == 2


def test_every_reference_names_a_network_and_settings_of_ours() -> None:
    from comfyui_mend.models import registry

    for name, entry in reference.REFERENCES.items():
        variants = registry.get(name.removesuffix("-light")).variants
        assert set(entry.variants) <= set(variants), name
