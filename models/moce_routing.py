"""Editing and describing MoCE-IR routings: force, ban or blend experts, hold one frame's choice for a whole shot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import InputError
from .moce_ir import Routing


def select_blocks(text: str, blocks: int) -> list[int]:
    """Block numbers from text such as "all", "0-3", "8, 9"; numbers count decoder blocks in order of execution."""
    if text.strip().lower() in ("", "all"):
        return list(range(blocks))
    chosen: set[int] = set()
    for part in text.replace(";", ",").split(","):
        first, _, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last or first)
        except ValueError:
            raise InputError(
                f'blocks: {part.strip()!r} is not a number or a range; write "all", "0-3" or "8,9"'
            ) from None
        if not 0 <= low <= high < blocks:
            raise InputError(f"blocks: {part.strip()!r} is outside 0-{blocks - 1}, the decoder blocks of this routing")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def parse_weights(text: str, experts: int) -> torch.Tensor:
    """Expert weights [experts] from text: "2" or "0, 3" (equal weights), "0:0.7, 3:0.3" (given ones)."""
    weights = torch.zeros(experts)
    for part in (p.strip() for p in text.replace(";", ",").split(",") if p.strip()):
        index, _, weight = part.partition(":")
        try:
            expert, value = int(index), float(weight or 1)
        except ValueError:
            raise InputError(f'experts: cannot read {part!r}; write "2", "0, 3" or "0:0.7, 3:0.3"') from None
        if not 0 <= expert < experts:
            raise InputError(f"experts: there is no expert {expert}; they are numbered 0-{experts - 1}")
        weights[expert] = value
    if bool((weights < 0).any()) or float(weights.sum()) == 0 or not bool(weights.isfinite().all()):
        raise InputError(f"experts: {text!r} names no expert with a positive weight")
    return weights


def blend(routing: Routing, weights: torch.Tensor, blocks: Sequence[int]) -> Routing:
    """These blocks run the experts with these weights [experts] (one non-zero weight forces that expert)."""
    gates = routing.gates.clone()
    gates[list(blocks)] = (weights / weights.sum()).to(gates)
    return replace(routing, gates=gates)


def ban(routing: Routing, weights: torch.Tensor, blocks: Sequence[int]) -> Routing:
    """These blocks choose again, by their probabilities, among experts whose weight [experts] is zero."""
    allowed = weights == 0
    if not bool(allowed.any()):
        raise InputError("experts: all experts are banned; leave at least one")
    gates = routing.gates.clone()
    scores = routing.probabilities.masked_fill(~allowed.to(gates.device), -1.0)
    topk = min(int(routing.gates.count_nonzero(dim=-1).max()), int(allowed.sum()))
    values, experts = scores.topk(max(1, topk), dim=-1)
    chosen = torch.zeros_like(gates).scatter(-1, experts, values)
    gates[list(blocks)] = chosen[list(blocks)]
    return replace(routing, gates=gates)


def edit(routing: Routing, action: str, experts: str, blocks: str, frame: int = 0) -> Routing:
    """The edit named by `action`: "force", "blend", "ban", "freeze frame" or "average batch"."""
    if action == "freeze frame":
        return freeze(routing, frame)
    if action == "average batch":
        return average(routing)
    if action not in ("force", "blend", "ban"):
        raise InputError(f"action: {action!r} is unknown; force, blend, ban, freeze frame or average batch")
    count, total = routing.gates.shape[0], routing.gates.shape[-1]
    weights, chosen = parse_weights(experts, total), select_blocks(blocks, count)
    return ban(routing, weights, chosen) if action == "ban" else blend(routing, weights, chosen)


def join(parts: Sequence[Routing], names: tuple[str, ...] = ()) -> Routing:
    """Routings of single pictures as one of a batch."""
    noisy = [p.noisy_logits for p in parts]
    return Routing(
        torch.cat([p.logits for p in parts], dim=1),
        torch.cat([p.probabilities for p in parts], dim=1),
        torch.cat([p.gates for p in parts], dim=1),
        None if any(n is None for n in noisy) else torch.cat(noisy, dim=1),
        names,
    )


def freeze(routing: Routing, frame: int = 0) -> Routing:
    """One image's routing, to be used for any batch: no flicker from changing experts."""
    if not 0 <= frame < len(routing):
        raise InputError(f"frame: {frame} is outside 0-{len(routing) - 1}, the images of this routing")
    return routing[frame : frame + 1]


def average(routing: Routing) -> Routing:
    """The choice that the whole batch prefers on average: the strongest experts of the mean probabilities."""
    probabilities = routing.probabilities.mean(dim=1, keepdim=True)
    topk = int(routing.gates.count_nonzero(dim=-1).max())
    values, experts = probabilities.topk(topk, dim=-1)
    gates = torch.zeros_like(probabilities).scatter(-1, experts, values)
    return Routing(routing.logits.mean(dim=1, keepdim=True), probabilities, gates, names=routing.names)


def describe(routing: Routing) -> str:
    """A table in text: per image and block the experts taken and the probabilities."""
    blocks, images, experts = routing.gates.shape
    lines = [f"{blocks} decoder blocks, {experts} experts (0: cheapest, local; {experts - 1}: largest, widest patches)"]
    for image in range(images):
        lines.append(f"image {image}")
        for block in range(blocks):
            gates, odds = routing.gates[block, image], routing.probabilities[block, image]
            taken = gates.nonzero().flatten().tolist()
            share = gates / gates.sum().clamp_min(1e-12)
            chosen = " + ".join(f"{e}" if len(taken) == 1 else f"{e} ({share[e]:.0%})" for e in taken) or "none"
            name = f" {routing.names[block]}" if routing.names else ""
            lines.append(f"  block {block}{name}: expert {chosen}   p = " + " ".join(f"{p:.2f}" for p in odds.tolist()))
    return "\n".join(lines)
