"""Runs in the Python that has ComfyUI's packages: python tests/with_spandrel.py COMFYUI_DIR FOLDER

Takes our files through ComfyUI's own upscaling nodes and spandrel's files through our loader; prints a line of JSON
with the largest differences to running each network directly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from in_comfyui import import_pack

NETWORKS = {
    "airnet": ("tur", {"n_groups": 1, "n_blocks": 1, "n_feats": 8, "if_uncertainty": True, "contrastive": False}),
    "uformer": ("tur", {"embed_dim": 32, "win_size": 2, "mlp_ratio": 1.0, "depths": [1] * 9, "modulator": True}),
    "acl": ("acl", {"channels": 8, "blocks": [1, 1, 1], "head_dim": 8}),
    "mair": (
        "mair",
        {"embed_dim": 16, "depths": [2], "d_state": 1, "upsampler": "pixelshuffledirect", "upscale": 2, "scan_len": 8},
    ),
}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.clamp(0, 1) - b.clamp(0, 1)).abs().max()) if a.shape == b.shape else float("inf")


def main(comfyui: str, folder: str) -> None:
    import_pack()
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    import folder_paths
    import spandrel
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.Uformer import Uformer

    from comfyui_mend import models
    from comfyui_mend.models import interop

    own = len(spandrel.MAIN_REGISTRY)
    answer = {
        "first": interop.register_with_spandrel(),
        "second": interop.register_with_spandrel(),
        "restorers": [a.id for a in models.registry.architectures() if a.kind == "restorer"],
        "ours": {},
        "theirs": {},
    }
    answer["all"] = len(spandrel.MAIN_REGISTRY) - own

    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader

    folder_paths.add_model_folder_path("upscale_models", folder, is_default=True)
    image = torch.rand(1, 3, 37, 50)
    for name, (system, config) in NETWORKS.items():
        torch.manual_seed(0)
        state = models.create(system, config).state_dict()
        torch.save({"params": state}, Path(folder) / f"{name}.pth")
        want = models.load(state)(image)
        (model,) = UpscaleModelLoader.execute(f"{name}.pth").args
        (result,) = ImageUpscaleWithModel.execute(model, image.movedim(1, -1)).args
        answer["ours"][name] = [model.architecture.id, model.scale, difference(result.movedim(-1, 1), want)]

    plain = Uformer(embed_dim=16, depths=[1] * 9, num_heads=[1, 1, 2, 4, 4, 4, 2, 1, 1], win_size=8, modulator=False)
    compact = Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=2)
    for name, network, picture in (("Compact", compact, image), ("Uformer", plain, torch.rand(1, 3, 128, 128))):
        file = Path(folder) / f"their-{name}.pth"
        torch.save({"params": network.state_dict()}, file)
        descriptor = spandrel.ModelLoader().load_from_file(file)
        restorer = models.load(file)
        answer["theirs"][name] = [
            descriptor.architecture.id,
            restorer.architecture.id,
            restorer.scale,
            difference(restorer(picture), descriptor(picture)),
            restorer.notes,
        ]
    torch.save({"model": {"unknown.weight": torch.zeros(3)}}, Path(folder) / "unknown.pth")
    try:
        models.load(Path(folder) / "unknown.pth")
    except models.checkpoint.CheckpointError as error:
        answer["unknown"] = str(error)
    print("ANSWER" + json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
