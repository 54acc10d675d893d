"""Zero-shot nodes that need ComfyUI say so outside it."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend.errors import MissingDependency
from comfyui_mend.guidance.measurement import measure
from comfyui_mend.guidance.operators import Denoising
from comfyui_mend.nodes import zero_shot_samplers


def test_outside_comfyui_the_sampler_nodes_say_what_is_missing() -> None:
    found = measure(Denoising(), torch.rand(1, 3, 8, 8))
    for attempt in (
        lambda: zero_shot_samplers.SamplerCm4ir.execute(found),
        lambda: zero_shot_samplers.PriorToModel.execute(None),
        lambda: zero_shot_samplers.MeasurementGuider.execute(None, found),
    ):
        with pytest.raises(MissingDependency, match="ComfyUI"):
            attempt()
