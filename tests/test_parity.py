"""The recorded cases that travel with the project: every network computes the published function."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
CASES = sorted(p.parent for p in (HERE / "data" / "parity").glob("*/case.json"))


def _module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


parity = _module("mend_parity", HERE / "parity.py")
check = _module("mend_parity_check", HERE / "data" / "check.py")


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_the_recorded_numbers_of_the_reference_are_met(folder: Path, tmp_path: Path) -> None:
    save_file(parity.run_case(folder), str(tmp_path / f"{folder.name}.safetensors"))
    ok, text = check.compare(folder, tmp_path)
    assert ok, text


def test_a_wrong_number_would_be_noticed(tmp_path: Path) -> None:
    folder = next(f for f in CASES if f.name == "moce-ir-small-train")
    recorded = load_file(folder / "expected.safetensors")
    name = next(n for n in check.json.loads((folder / "case.json").read_text())["outputs"] if recorded[n].size > 1)
    recorded[name] = recorded[name] + 0.1 * (1 + abs(recorded[name]))
    save_file(recorded, str(tmp_path / f"{folder.name}.safetensors"))
    assert not check.compare(folder, tmp_path)[0]
