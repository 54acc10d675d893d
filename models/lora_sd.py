"""Low-rank patches for Stable Diffusion's U-Net under diffusers' names, and where each of them goes.

ComfyUI keeps the U-Net under its original names (`input_blocks.4.1...`); PEFT files name modules as diffusers does
(`down_blocks.1.attentions.0...`). The map is read off the U-Net's own keys, so that every size of it is covered.
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_DOWN_NAMES = ("lora_A.weight", "lora.down.weight", "lora_down.weight")
_UP_NAMES = ("lora_B.weight", "lora.up.weight", "lora_up.weight")


def _blocks(keys: Iterable[str]) -> dict[str, str]:
    """Original name of every block's layer -> diffusers' name."""
    layers: dict[str, set[str]] = {}
    for key in keys:
        match = re.match(r"((?:in|out)put_blocks\.\d+\.\d+)\.([a-z_]+)", key)
        if match:
            layers.setdefault(match[1], set()).add(match[2])
    names = dict(_ENDS)
    for side, blocks in (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks")):
        level = index = 0
        numbers = sorted({int(name.split(".")[1]) for name in layers if name.startswith(side)})
        for number in numbers:
            ended, has_resnet = False, False
            for position in range(3):
                name = f"{side}.{number}.{position}"
                parts = layers.get(name, set())
                if "in_layers" in parts:
                    names[name], has_resnet = f"{blocks}.{level}.resnets.{index}", True
                elif "transformer_blocks" in parts:
                    names[name] = f"{blocks}.{level}.attentions.{index}"
                elif "op" in parts:
                    names[name + ".op"], ended = f"{blocks}.{level}.downsamplers.0.conv", True
                elif "conv" in parts:
                    names[name + ".conv"], ended = f"{blocks}.{level}.upsamplers.0.conv", True
            index += has_resnet
            if ended:
                level, index = level + 1, 0
    return names


def diffusers_names(keys: Iterable[str], prefix: str = "diffusion_model.") -> dict[str, str]:
    """For each U-Net key in ComfyUI's naming, with or without `prefix`: {diffusers' name: the key as given}.

    Keys of anything else are left out.
    """
    given = {key.removeprefix(prefix): key for key in keys}
    blocks, found = _blocks(given), {}
    for key, original in given.items():
        head = next((h for h in _heads(key) if h in blocks), None)
        if head is None:
            continue
        rest = key[len(head) + 1 :]
        if ".resnets." in blocks[head]:
            inner = next((name for name in _RESNET if rest.startswith(name + ".")), None)
            if inner is None:
                continue
            rest = _RESNET[inner] + rest[len(inner) :]
        found[f"{blocks[head]}.{rest}"] = original
    return found


def _heads(key: str) -> Iterable[str]:
    """Every leading part of a dotted name, longest first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


@dataclass(frozen=True)
class LowRank:
    """One module's patch: down [r, in, ...], up [out, r, ...]; scale is alpha / rank."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """What is added to the weight: [out, in] or [out, in, kh, kw]."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return self.scale * product.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class LoraMatch:
    """A LoRA file against one U-Net: patches by the U-Net's own weight names, and what found no place."""

    patches: dict[str, LowRank]
    unmatched: list[str]
    """Modules of the file without a weight in this U-Net."""

    def describe(self) -> str:
        """One line for people."""
        text = f"{len(self.patches)} of {len(self.patches) + len(self.unmatched)} modules matched"
        return f"{text}; without a place: {', '.join(self.unmatched[:5])}" if self.unmatched else text


def read_lora(state: Mapping[str, torch.Tensor], alpha: float | None = None) -> dict[str, LowRank]:
    """Every module's pair of factors by diffusers' name, from PEFT or older diffusers keys with or without `unet.`.

    alpha: numerator of the scale; None: the file's `.alpha` entry, else the rank (scale 1). Raises CheckpointError for
    half a pair, factors that do not fit each other, files without any pair, and tensors that are no part of a pair: a
    model without them would be wrong, and nobody would see it.
    """
    factors: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        for kind, endings in (("down", _DOWN_NAMES), ("up", _UP_NAMES), ("alpha", ("alpha",))):
            ending = next((e for e in endings if key.endswith("." + e)), None)
            if ending is not None:
                parts = factors.setdefault(_module(key[: -len(ending) - 1]), {})
                if kind in parts:
                    raise CheckpointError(f"LoRA: the file holds the {kind} entry of {key!r} under two names")
                parts[kind] = tensor
                break
        else:
            unknown.append(key)
    if not factors:
        raise CheckpointError("LoRA: the file holds no low-rank pairs (`....lora_A.weight`, `....lora_B.weight`)")
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(
            f"LoRA: these keys are no part of a low-rank pair: {', '.join(unknown[:5])}{more}; pairs end in "
            f"{' or '.join(_DOWN_NAMES)} and the same for up. The file is of another kind: choose a plain LoRA, or convert it"
        )
    pairs = {}
    for module, parts in factors.items():
        if "down" not in parts or "up" not in parts:
            raise CheckpointError(f"LoRA: {module} has only {' and '.join(parts)}; the file is incomplete")
        down, up = parts["down"], parts["up"]
        if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.flatten(1).shape[1] != down.shape[0]:
            raise CheckpointError(f"LoRA: {module} multiplies {tuple(up.shape)} by {tuple(down.shape)}")
        if not down.numel() or not up.numel():
            raise CheckpointError(
                f"LoRA: {module} has empty factors, {tuple(up.shape)} and {tuple(down.shape)}: the file is damaged"
            )
        pairs[module] = LowRank(down, up, _numerator(module, parts, alpha) / down.shape[0])
    return pairs


def _numerator(module: str, parts: Mapping[str, torch.Tensor], alpha: float | None) -> float:
    """Of a pair's scale: `alpha`, else the file's, else the rank. Raises CheckpointError for one that is no number."""
    if alpha is not None:
        return alpha
    if "alpha" not in parts:
        return float(parts["down"].shape[0])
    stored = parts["alpha"]
    if stored.numel() != 1 or not math.isfinite(float(stored)):
        raise CheckpointError(
            f"LoRA: {module}.alpha must be one finite number, it is a tensor of shape {tuple(stored.shape)}: the file is "
            "damaged"
        )
    return float(stored)


def _module(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("unet.")


def match_lora(pairs: Mapping[str, LowRank], unet: Mapping[str, torch.Tensor]) -> LoraMatch:
    """Finds each pair's weight among the U-Net's (`unet`: names and anything with a shape).

    Raises CheckpointError where a pair's shape differs from its weight's: the file is for another U-Net.
    """
    names, patches, unmatched = diffusers_names(unet), {}, []
    for module, pair in pairs.items():
        target = names.get(f"{module}.weight")
        if target is None:
            unmatched.append(module)
            continue
        shape, wanted = (pair.up.shape[0], *pair.down.shape[1:]), tuple(unet[target].shape)
        # A 1x1 convolution and a linear layer hold the same numbers; which one it is depends on the release.
        if tuple(s for s in shape if s != 1) != tuple(s for s in wanted if s != 1):
            raise CheckpointError(
                f"LoRA: {module} changes a weight of shape {shape}, this U-Net's is {wanted}: it was made for another "
                "base model (OSDFace needs Stable Diffusion 2.1 base)"
            )
        patches[target] = pair
    return LoraMatch(patches, unmatched)


def merged(state: Mapping[str, torch.Tensor], match: LoraMatch, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The U-Net's weights with the patches added; tensors without a patch are shared."""
    result = dict(state)
    for key, pair in match.patches.items():
        weight = state[key]
        result[key] = weight + (strength * pair.delta()).reshape(weight.shape).to(weight)
    return result
