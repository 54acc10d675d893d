"""MoCE-IR: evaluation runs with given routing noise, and one training step's losses and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from comfyui_mend.training.objectives.restoration import fft_loss


def _tapped(module: nn.Module, taps: dict[str, nn.Module], call: Callable) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    hooks = [m.register_forward_hook(lambda _m, _i, out, n=n: kept.__setitem__(n, out)) for n, m in taps.items()]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return kept


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
    return outputs | _tapped(module, taps, lambda: module(inputs["x"], inputs["routing_noise"]))


def _train(case, module):
    module.train().requires_grad_(True)
    x, target = case.inputs["x"], case.inputs["target"]
    out, routing = module.forward_with_routing(x, case.inputs["routing_noise"])
    l1, fft, balance = (out - target).abs().mean(), fft_loss(out, target) * 0.1, module.balance_loss(routing)
    (l1 + fft + 0.01 * balance).backward()
    parameters = dict(module.named_parameters())
    outputs = {"out": out, "gates": routing.gates, "total_loss": balance, "loss_l1": l1, "loss_fft": fft}
    return outputs | {f"grad_{k}": parameters[k].grad for k in case.json["gradkeys"]}
