"""MambaIR: whole networks; `arch` names the generation of the code."""

from __future__ import annotations

from parity_adapters.mair import with_taps


def check_layout(case):
    return case.check_layout(**case.generation)


def run(case):
    module, x = case.module(**case.generation), case.inputs["x"]
    return with_taps(case, module, lambda: {"y": module(x)})
