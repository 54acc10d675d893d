"""The targets of the fuzzer (tests/fuzz_files.py) work: they read their first inputs, and refuse changed ones in words."""

from __future__ import annotations

import random

import pytest

from . import fuzz_files


@pytest.mark.parametrize("target", fuzz_files.TARGETS)
def test_a_target_reads_its_first_inputs_and_refuses_changed_ones_in_words(target):
    if target == "bitstream":
        pytest.importorskip("constriction", reason="bitstreams are coded by the package constriction")
    draw, refused = random.Random(0), 0
    for name, data in fuzz_files.TARGETS[target][1]().items():
        assert fuzz_files.attempt(target, data), name
        assert not fuzz_files.attempt(target, data[: len(data) // 2]), name
        for _ in range(30):
            changed = bytearray(data)
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            refused += not fuzz_files.attempt(target, bytes(changed))
    assert refused > 10
