"""Writes weights/wiring-prior.safetensors: a tiny prior so that the zero-shot workflows can be opened and run.

    python tests/wiring_prior.py

It has the form of OpenAI's consistency models. Its weights are random (seeded) but for the last layer, which is solved
on the example pictures as a denoiser at several noise levels: it shows the wiring and not the quality.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui_mend import models
from comfyui_mend.engine.pictures import from_pil
from comfyui_mend.guidance import parametrisation, priors

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "weights" / "wiring-prior.safetensors"
PICTURES = ("mountains", "palace", "red_panda", "night")
CONFIG = {
    "unet": {
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 1),
        "attention_resolutions": (),
        "num_head_channels": -1,
    },
    "wrapper": "karras",
}
SIGMAS = (0.03, 0.06, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
SOLVED = "none but the last layer, which was solved on the example pictures: this shows the wiring and not the quality"


def clean(name: str) -> torch.Tensor:
    """An example picture at a quarter of its size, [1, 3, H, W] in -1..1."""
    picture = from_pil(Image.open(ROOT / "workflows" / "inputs" / f"{name}.jpg").reduce(4))[None] * 2 - 1
    return picture[..., : picture.shape[-2] // 2 * 2, : picture.shape[-1] // 2 * 2]


@torch.no_grad()
def solve(module: torch.nn.Module) -> None:
    """Least squares of the clean pictures over all noise levels, for the last convolution."""
    output, seen = module.out[2], []
    gram, moment = torch.zeros(289, 289, dtype=torch.double), torch.zeros(289, 3, dtype=torch.double)
    hook = output.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    for name in PICTURES:
        x0 = clean(name)
        for sigma in SIGMAS:
            level = torch.tensor([sigma])
            x = x0 + sigma * torch.randn_like(x0)
            module(x * parametrisation.edm_c_in(level), parametrisation.edm_time(level))
            skip = parametrisation.consistency_denoised(x, level, torch.zeros_like(x))
            gain = parametrisation.consistency_denoised(torch.zeros_like(x), level, torch.ones_like(x)).flatten()[0]
            features = torch.nn.functional.unfold(seen.pop(), 3, padding=1)[0].T.double() * gain
            features = torch.cat([features, gain.expand(len(features), 1)], dim=1)
            gram += features.T @ features / len(features)
            moment += features.T @ (x0 - skip)[0].flatten(1).T.double() / len(features)
    hook.remove()
    solution = torch.linalg.solve(gram + 1e-3 * torch.eye(289, dtype=torch.double), moment).float()
    output.weight.copy_(solution[:-1].T.reshape(output.weight.shape))
    output.bias.copy_(solution[-1])


def main() -> None:
    torch.manual_seed(0)
    module = models.create("guided-diffusion-unet", CONFIG).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim > 2 and not bool(parameter.any()):  # layers that start without effect
            torch.nn.init.kaiming_normal_(parameter, a=2.0)
    # Lets the first features carry the picture itself.
    first = module.input_blocks[0][0]
    first.weight[:6] = 0
    for channel in range(3):
        first.weight[channel, channel, 1, 1], first.weight[channel + 3, channel, 1, 1] = 2, -2
    solve(module)
    state = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    metadata = {
        "mend.architecture": "guided-diffusion-unet",
        "mend.config": json.dumps(CONFIG),
        "mend.training": SOLVED,
        "mend.licence": "CC0",
    }
    save_file(state, str(FILE), metadata)
    prior = priors.consistency_prior(models.load(FILE).module)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")
    for sigma in SIGMAS:
        x0 = clean("palace")
        error = (prior(x0 + sigma * torch.randn_like(x0), sigma) - x0).square().mean().sqrt()
        print(f"sigma {sigma}: remaining error {float(error):.3f}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
