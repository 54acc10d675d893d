"""MoCE-IR: evaluation runs with given routing noise, and one training step's losses and gradients."""

from __future__ import annotations

from support import tapped
from torch import nn

from comfyui_mend.training.objectives.restoration import fft_loss


def _stage(module: nn.Module, name: str) -> nn.Module:
    if name.startswith("enc"):
        return module.enc[int(name[3:])][0]
    if name.startswith("dec"):
        return module.dec[int(name[3:])][2]
    return getattr(module, name)


def run(case):
    module, inputs = case.module(), case.inputs
    if case.config.get("mode") == "train":
        return _train(case, module)
    outputs = {}
    for name in (n for n in inputs if n.startswith("routing_noise")):
        suffix = name.removeprefix("routing_noise")
        out, routing = module.forward_with_routing(inputs["x"], inputs[name])
        outputs |= {f"out{suffix}": out, f"gates{suffix}": routing.gates, f"logits{suffix}": routing.logits}
    taps = {f"act_{n}": _stage(module, n) for n in case.json.get("intermediates", [])}
    taps["freq_emb"] = module.freq_embed
    return outputs | tapped(taps, lambda: module(inputs["x"], inputs.get("routing_noise")))[1]


def _train(case, module):
    module.train().requires_grad_(True)
    x, target = case.inputs["x"], case.inputs["target"]
    out, routing = module.forward_with_routing(x, case.inputs["routing_noise"])
    l1, fft, balance = (out - target).abs().mean(), fft_loss(out, target) * 0.1, module.balance_loss(routing)
    (l1 + fft + 0.01 * balance).backward()
    parameters = dict(module.named_parameters())
    outputs = {
        "out": out,
        "logits": routing.logits,
        "gates": routing.gates,
        "total_loss": balance,
        "loss_l1": l1,
        "loss_fft": fft,
    }
    return outputs | {f"grad_{k}": parameters[k].grad for k in case.json.get("gradkeys", [])}
