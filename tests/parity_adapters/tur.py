"""TUR: AirNet, Uformer and TransWeather with their uncertainty heads, one training step, and the loss alone."""

from __future__ import annotations

import re

import torch
from support import tapped

from comfyui_mend.training.objectives.tur import TaskUncertaintyLoss


def run(case):
    if "loss" in case.config:
        return _loss(case)
    module = case.module()
    if "gt" in case.inputs:
        return _train_step(case, module)
    outputs = {}
    for name, x in case.inputs.items():
        suffix = name.removeprefix("x")
        wanted = {} if suffix else _taps(case, module)
        outputs |= _recorded(wanted, lambda x=x, suffix=suffix: _both(module, x, suffix))
    return outputs


def _both(module, x, suffix):
    if _head(module) is None:
        return {f"y{suffix}": module(x)}
    y, uncertainty = module.forward_with_uncertainty(x)
    return {f"y{suffix}": y, f"uncertainty{suffix}": uncertainty}


def _head(module):
    return getattr(getattr(module, "R", module), "var_conv", None)


def _taps(case, module):
    modules = dict(module.named_modules())
    names = (n.removeprefix("tap.") for n in case.outputs if n.startswith("tap."))
    return {name: modules[name] for name in names}


def _recorded(taps, call):
    """The outputs of `call`, and what the named modules returned, as the reference keeps it: maps as tokens."""
    outputs, kept = tapped(taps, call)
    return outputs | {f"tap.{n}": _as_recorded(n, v) for n, v in kept.items()}


def _as_recorded(name, value):
    if name == "input_proj":
        return value.flatten(2).transpose(1, 2)
    if re.search(r"^(Tenc|Tdec|dowsample|upsample|conv$|encoderlayer|decoderlayer)", name) and value.ndim == 4:
        return value.flatten(1, 2)  # feature maps are [B, H, W, C] in these networks, tokens in the reference
    return value


def _train_step(case, module):
    module.train().requires_grad_(True)
    if hasattr(module, "E"):  # AirNet's encoder does not learn
        module.E.requires_grad_(False)
    x, target, task = case.inputs["x"], case.inputs["gt"], case.inputs["task"]
    y, uncertainty = module.forward_with_uncertainty(x)
    report = _report(_setting(case, module, task), y, target, uncertainty, task)
    report.total.backward()
    parameters, state = dict(module.named_parameters()), module.state_dict()
    outputs = {"y": y, "uncertainty": uncertainty, "total": report.total[None]}
    for name in case.outputs:
        if name.startswith("grad."):
            outputs[name] = parameters[name.removeprefix("grad.")].grad
        elif name.startswith("new."):
            outputs[name] = state[name.removeprefix("new.")]
    return outputs


def _report(kind, prediction, target, uncertainty, task):
    """The published loss; the 7-task one leaves samples of an unknown type out."""
    loss = TaskUncertaintyLoss.released(kind)
    if kind != "7task":
        return loss(prediction, target, uncertainty, task)
    tasks = task.tolist() if isinstance(task, torch.Tensor) else task
    known = loss.known(tasks)
    return loss(prediction[known], target[known], uncertainty[known], [tasks[i] for i in known])


def _setting(case, module, task):
    """The loss a network was published with; ids above 4 are of the list of five tasks."""
    if "tasks" in case.config:
        return f"{case.config['tasks']}".removesuffix("task") + "task"
    if isinstance(task, list) or hasattr(module, "encoderlayer_0"):
        return "7task"
    return "5task" if int(task.max()) > 4 else "3task"


def _loss(case):
    prediction, uncertainty = (case.inputs[k].clone().requires_grad_(True) for k in ("pred", "uncertainty"))
    kind = case.config["loss"]
    report = _report(kind, prediction, case.inputs["target"], uncertainty, case.inputs["task"])
    report.total.backward()
    # The published 7-task code reports 2 mean(U) under the name of the log term.
    log_term = report.mean_uncertainty * 2 if kind == "7task" else report.log_term
    return {
        "total": report.total[None],
        "per_class": report.per_task,
        "plain_l1": report.plain_l1,
        "weighted_l1": report.weighted_l1,
        "log_term": log_term,
        "grad.pred": prediction.grad,
        "grad.uncertainty": uncertainty.grad,
    }
