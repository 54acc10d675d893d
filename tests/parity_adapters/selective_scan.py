"""The selective scan: outputs and all gradients, on the backend that MEND_SCAN_BACKEND names or the automatic one."""

from __future__ import annotations

import torch

from comfyui_mend.kernels.selective_scan import selective_scan


def run(case):
    inputs = {name: t.clone().requires_grad_(name != "grad_out") for name, t in case.inputs.items()}
    grad_out = inputs.pop("grad_out", None)
    out, last_state = selective_scan(
        **inputs, delta_softplus=bool(case.config.get("delta_softplus", False)), return_last_state=True
    )
    outputs = {"out": out, "last_state": last_state}
    if grad_out is not None:
        gradients = torch.autograd.grad(out, list(inputs.values()), grad_out)
        outputs |= {f"grad_{name}": g for name, g in zip(inputs, gradients, strict=True)}
    return outputs
