"""All experiments, one after the other: python -m comfyui_mend.bench.experiments --photos DIR [options of a single one]."""

from __future__ import annotations

from . import da_rcot, dcpt, moce_ir, tur

for experiment in (tur, moce_ir, dcpt, da_rcot):
    experiment.main()
