"""MambaIR: whole networks; `arch` names the generation of the code."""

from __future__ import annotations


def run(case):
    return {"y": case.module(arch=case.json["arch"])(case.inputs["x"])}
