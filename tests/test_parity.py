"""The recorded cases that travel with the project: every network computes the published function."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import parity

HERE = Path(__file__).resolve().parent
CASES = sorted(p.parent for p in (HERE / "data" / "parity").glob("*/case.json"))


check = parity.load(HERE / "data" / "check.py")


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
