"""DA-RCOT: the transport map with what happens inside it, the potential, and the training losses of one batch."""

from __future__ import annotations

from comfyui_mend.training.objectives import rcot


def run(case):
    if "losses" in case.config:
        return _losses(case)
    module = case.module()
    if case.config["kind"] == "potential":
        features = module.features(case.inputs["image"])
        outputs = {"score": module(case.inputs["image"]), "features": features}
        return {name: value[:, : _width(case, name)] if value.ndim > 1 else value for name, value in outputs.items()}
    return _map(case, module)


def _width(case, name):
    return case.outputs.get(name, {}).get("shape", [0, None])[1]


def _map(case, module):
    seen = {}

    def keep(name):
        return lambda _module, inputs: seen.setdefault(name, []).append(inputs[0])

    stages = {"latent": module.noise_level3, "level3": module.noise_level2, "level2": module.noise_level1}
    hooks = [stage.register_forward_pre_hook(keep(name)) for name, stage in stages.items()]
    image = case.inputs["image"]
    first = module.first_pass(image)
    restored, residual = module.restore(image)
    for hook in hooks:
        hook.remove()
    outputs = {
        "restored": restored,
        "residual_embedding": residual.embeddings[0],
        "first_pass": first,
        "residual": residual.image,
        "inter.level3_residual": residual.embeddings[1],
        "inter.level2_residual": residual.embeddings[2],
    }
    for name, values in seen.items():
        outputs |= {f"inter.{name}_first": values[0], f"inter.{name}_conditioned": values[-1]}
    return {
        name: value[:1, : _width(case, name)] if name.startswith("inter.") else value
        for name, value in outputs.items()
        if name in case.outputs
    }


def _losses(case):
    potential, inputs = case.module(), case.inputs
    weights = case.config["losses"]
    degraded, restored, target = inputs["degraded"], inputs["restored"], inputs["target"]
    ids = inputs["de_id"]
    keep = {"cost_weight": weights["sigma"], "pair_weight": weights["Sigma"]}
    paired = rcot.map_loss(potential, degraded, restored, ids, target, inputs["residual_embedding"], **keep)
    unpaired = rcot.map_loss(potential, degraded, restored, ids, **keep)
    return {
        "critic_loss": rcot.critic_loss(potential, restored, target),
        "gradient_penalty": rcot.gradient_penalty(potential, restored, target, inputs["alpha"]),
        "residual_rms": paired.residual_rms,
        "fourier": paired.fourier,
        "contrastive": paired.contrastive,
        "adversarial": paired.adversarial,
        "l1": paired.l1,
        "map_loss_paired": paired.total,
        "map_loss_unpaired": unpaired.total,
    }
