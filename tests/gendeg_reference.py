"""GenDeg's published sampling written out on ComfyUI's bare U-Net, beside Mend's guider: how far they are apart.

Runs in the Python that has ComfyUI's packages: python tests/gendeg_reference.py FOLDER RESULT.json
FOLDER holds what tests/make_gendeg_checkpoint.py writes.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path


def main(folder: str, result_file: str) -> None:
    from in_comfyui import Warnings, import_pack

    import_pack()
    import torch

    from comfyui_mend.engine import gendeg
    from comfyui_mend.engine.comfyui import ComfyUI
    from comfyui_mend.engine.degraders import synthesise
    from comfyui_mend.guidance import gendeg as published
    from comfyui_mend.guidance import latent_diffusion as ld
    from comfyui_mend.models.gendeg import averaged_name

    log, steps, seed = Warnings(), 4, 11
    logging.getLogger().addHandler(log)
    with ComfyUI.start(device="cpu"), torch.inference_mode():
        import comfy.model_management
        import comfy.sample
        from comfy.k_diffusion.sampling import default_noise_sampler

        path = Path(folder) / "gendeg.ckpt"
        model, clip, vae, conditioner = gendeg.load(path)
        degrader = gendeg.GenDegDegrader(model, clip, vae, conditioner, usual_steps=steps)
        clean = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
        painted = degrader.paint(clean, "haze", 0.15, 0.1, seed, "a street (at night)")

        comfy.model_management.load_models_gpu([model], force_full_load=True)
        unet = model.model.diffusion_model
        file = torch.load(path, weights_only=True)["state_dict"]
        name = "diffusion_model.out.2.weight"
        averaged = torch.equal(unet.out[2].weight.cpu().float(), file[averaged_name(name)].float())
        text = clip.encode_from_tokens(clip.tokenize("a street \\(at night\\), in hazy conditions"))
        module = conditioner.restorer.module
        full = module(text, module.bin_indices([0.15], [0.1]))
        null = module(clip.encode_from_tokens(clip.tokenize("")), module.null_bins())
        picture = vae.encode(clean.movedim(1, -1))
        denoise = published.guided_denoiser(lambda x, t, c: unet(x, t, context=c), full, null, picture)
        noise = comfy.sample.prepare_noise(torch.zeros_like(picture), seed)
        sigmas = ld.linear_time_sigmas(steps)
        drawn = default_noise_sampler(noise, seed=seed)
        z = ld.euler_ancestral(denoise, noise * sigmas[0], sigmas, lambda _: drawn(None, None))
        expected = vae.decode(z / ld.SCALE_FACTOR).movedim(-1, 1)
        odd = synthesise(degrader, clean[..., :37, :75], "rain", 0.1, 0.1, 3, steps=1)
        answer = {
            "averaged": averaged,
            "difference": float((painted - expected).abs().max()),
            "spread": float(expected.std()),
            "odd": list(odd.damaged.shape),
            "rounded": float((_rounded(model, gendeg) - 988.909).abs()),
            "log": log.lines,
        }
    Path(result_file).write_text(json.dumps(answer), encoding="utf-8")


def _rounded(model, gendeg):
    """The time that the patched model is told for a level between the entries of the table."""
    import torch

    from comfyui_mend.guidance import latent_diffusion as ld

    sampling = gendeg.published_sampling(model).get_model_object("model_sampling")
    return sampling.timestep(ld.sigma_at(torch.tensor([988.909])).float())[0]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main(*sys.argv[1:])
