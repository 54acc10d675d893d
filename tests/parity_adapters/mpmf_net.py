"""MPMF-Net: both returned images, outputs of named modules, and one training step's losses and gradients."""

from __future__ import annotations

from comfyui_mend.training.objectives.perceptual import VGG16Features, coarse_to_fine_loss


def run(case):
    module = case.module()
    if case.json.get("train"):
        return _train(case, module)
    seen = {}

    def keep(name):
        return lambda _module, _inputs, output: seen.__setitem__(f"act_{name}", output)

    for name in case.json.get("intermediates", []):
        module.get_submodule(name).register_forward_hook(keep(name))
    restored, coarse = module(case.inputs["x"])
    return {"out": restored, "x_inr": coarse, **seen}


def _train(case, module):
    module.train().requires_grad_(True)
    vgg = VGG16Features()
    case.check_manifest(vgg, case.json["loss_network_state_dict"])
    vgg.load_state_dict(case.state_dict(case.json["loss_network_state_dict"]))
    vgg.requires_grad_(False)
    restored, coarse = module(case.inputs["x"])
    loss = coarse_to_fine_loss(vgg, restored, coarse, case.inputs["target"])
    loss.total.backward()
    parameters = dict(module.named_parameters())
    return {
        "out": restored,
        "x_inr": coarse,
        "loss_l1": loss.l1,
        "loss_perc": loss.perceptual,
        "loss_inr": loss.coarse,
        "loss_total": loss.total,
        **{f"grad_{key}": parameters[key].grad for key in case.json["gradkeys"]},
    }
