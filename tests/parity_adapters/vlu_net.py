"""VLU-Net: the network alone, the pipeline with its CLIP, and the manifest of the Lightning files."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from comfyui_mend import models
from comfyui_mend.models import clip, degradation_encoder


def run(case):
    return _pipeline(case) if case.config["kind"] == "pipeline" else _net(case)


def _net(case):
    module, seen = case.module(), {}

    def keep(name):
        return lambda _module, _inputs, output: seen.__setitem__(f"inter.{name}", output)

    for name, stage in module.stages.items():
        stage.register_forward_hook(keep(name))
        stage.gradient_descent.register_forward_hook(keep(f"gdm_{name}"))
    restored = module(case.inputs["image"], case.inputs["degradation"])
    kept = {k: v[:1, : case.outputs[k]["shape"][1]] for k, v in seen.items() if k in case.outputs}
    return {"restored": restored, **kept}


def _pipeline(case):
    module = models.create(case.system, case.config)
    case.check_manifest(module)
    state = {}
    for key, shape, _ in case.json["state_dict"]:
        name = key
        for pattern, replacement in case.json.get("aliases", []):
            name = re.sub(pattern, replacement, name)
        state[key] = case.fill(name, tuple(shape))
    module.load_state_dict(state)
    module.eval().requires_grad_(False)
    encoder, inputs = module.model_degradation, case.inputs
    visual = encoder.ad_imageEncoder.clip_model.visual
    seen = clip.preprocess(inputs["image"], visual.image_size)
    features = visual(seen)
    degradation = encoder.encode_image(inputs["image"])
    tokens = inputs["tokens"] if "tokens" in inputs else degradation_encoder.tokenize(case.config["prompts"])
    texts = encoder.encode_text(tokens)
    logits = degradation @ texts.T
    return {
        "restored": module(inputs["image"], degradation),
        "degradation": degradation,
        "text_features": texts,
        "clip_image_features": features,
        "logits_per_image": logits,
        "cross_entropy": F.cross_entropy(logits, inputs["labels"]),
        "clip_input_patch": seen[:, :, :32, :32],
        "clip_input_big_patch": clip.preprocess(inputs["image_big"], visual.image_size)[:, :, 100:132, 60:92],
        "clip_input_mean_std": torch.stack([seen.mean(dim=(2, 3)), seen.std(dim=(2, 3))]),
    }
