"""DCPT: the four backbones, the classifier, and one pre-training iteration."""

from __future__ import annotations

import re

import torch
from einops import rearrange

from comfyui_mend import models
from comfyui_mend.models.layers.padding import crop, pad_to_multiple
from comfyui_mend.training.objectives.dcpt import dcpt_step, focal_loss


def check_layout(case):
    _choose_by_keys(case)
    return case.check_layout()


def run(case):
    _choose_by_keys(case)
    if "net_g" in case.config:
        return _train(case)
    if "feature_dims" in case.config:
        return _classify(case)
    return _restore(case)


def _choose_by_keys(case):
    """Restormer and PromptIR name their settings alike; the manifest tells them apart."""
    keys = {key: torch.empty(shape, device="meta") for key, shape, _ in case.json["state_dict"]}
    found = models.registry.detect(keys)
    if found is not None:
        case.system = found.id


def _restore(case):
    module, inputs, taps, hooks = case.module(), case.inputs, {}, []
    for name in (n for n in case.outputs if n.startswith("tap.")):
        stage = module.get_submodule(name.removeprefix("tap."))
        hooks.append(stage.register_forward_hook(lambda _m, _i, out, name=name: taps.__setitem__(name, out)))
    outputs = {"y": module(inputs["x"])} | taps
    for hook in hooks:
        hook.remove()
    if "x_pad" in inputs:
        padded, size = pad_to_multiple(inputs["x_pad"], case.json["pad_multiple"])
        outputs["y_pad"] = crop(module(padded), size)
    return outputs


def _classify(case):
    module, inputs = case.module().requires_grad_(True), case.inputs
    features = [inputs[n].requires_grad_(True) for n in sorted(n for n in inputs if re.fullmatch(r"feature\d+", n))]
    logits = module(features, inputs.get("lq"))
    gammas = {n: float(n.removeprefix("focal_loss_gamma")) for n in case.outputs if n.startswith("focal_loss_gamma")}
    losses = {n: focal_loss(logits, inputs["label"], gamma) for n, gamma in gammas.items()}
    if gammas:
        losses[max(gammas, key=gammas.get)].backward()
    named = dict(module.named_parameters()) | {f"feature{i}": f for i, f in enumerate(features)}
    grads = {n: named[n.removeprefix("grad.")].grad for n in case.outputs if n.startswith("grad.")}
    return {"logits": logits} | losses | grads


def _train(case):
    module, inputs, config = case.module(), case.inputs, case.config
    module.train().requires_grad_(True)
    step = dcpt_step(
        module.net_g,
        module.net_dc,
        inputs["lq"],
        inputs["gt"],
        inputs["label"],
        gamma=config["focal_gamma"],
        mode=config["mode"],
    )
    step.total.backward()
    outputs = {} if step.restored is None else {"pix": step.restored}
    outputs |= {"logits": step.logits, "l_pix": step.pixel, "l_classify": step.classification, "l_total": step.total}
    for index, feature in enumerate(step.features):
        tokens = len(case.outputs.get(f"feature{index}", {}).get("shape", ())) == 3
        outputs[f"feature{index}"] = rearrange(feature, "b c h w -> b (h w) c") if tokens else feature
    parameters = dict(module.named_parameters())
    for name in case.outputs:
        if name.startswith("grad."):
            outputs[name] = parameters[name.removeprefix("grad.")].grad
        elif name.startswith("grad_norm_"):
            part = module.get_submodule(name.removeprefix("grad_norm_"))
            norms = [p.grad.norm() for p in part.parameters() if p.grad is not None]
            outputs[name] = torch.stack(norms).norm()
    return outputs
