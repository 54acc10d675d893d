"""VLU-Net's degradation vectors from pictures, regions and texts, and what the network makes of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from einops import reduce

from ..errors import InputError
from ..models.clip import CONTEXT
from ..models.degradation import Degradation
from ..models.degradation_encoder import TEXTS, DegradationEncoder, tokenize
from ..models.vlu_net import VLUNet, VLUNetPipeline, vector
from . import host, tiling
from .loaded import LoadedRestorer
from .pictures import bars, from_pil, heat_map
from .report import match_size
from .values import check_image

VIEWS = ("centre", "whole", "close-ups")
CLOSE_UP = 256
"""Side of a close-up in pixels: between the 128 of training and what a region usually offers."""
MOST_A_SIDE = {"whole": 16, "close-ups": 3}
"""Squares along one side of the picture at most."""
_MEMORY = 500_000_000


def _pipeline(loaded: LoadedRestorer) -> VLUNetPipeline:
    if not isinstance(loaded.restorer.module, VLUNetPipeline):
        raise InputError(
            f"restorer: {loaded.restorer.architecture.title} holds no CLIP degradation encoder; load a VLU-Net "
            "Lightning file (.ckpt), which has network and CLIP in one"
        )
    return loaded.restorer.module


def encode(
    loaded: LoadedRestorer,
    image: torch.Tensor,
    mask: torch.Tensor | None = None,
    view: str = "centre",
    average: bool = False,
) -> Degradation:
    """The degradation of every picture of [B, C, H, W], in float32.

    mask [B or 1, h, w]: look only at the rectangle around its white part; an all-black one is no restriction. view:
    "centre" the central square, as published; "whole" squares that cover everything, averaged; "close-ups" up to nine
    squares at true resolution, averaged: fine noise that shrinking would hide is seen. average: one degradation for the
    whole batch, the mean of all. Raises InputError.
    """
    _pipeline(loaded)
    check_image(image)
    if view not in VIEWS:
        raise InputError(f"view: {view!r} is not one of {', '.join(VIEWS)}")
    if mask is not None and len(mask) not in (1, len(image)):
        raise InputError(f"mask: {len(mask)} masks for {len(image)} pictures; use one, or one per picture")
    colour, found = tiling.as_rgb(image), []
    progress = host.progress(len(image))
    with loaded.managed.on_device(_MEMORY) as (module, device):
        encoder: DegradationEncoder = module.model_degradation
        for index in range(len(image)):
            region = colour[index : index + 1]
            if mask is not None:
                region = _region(region, mask[index % len(mask)])
            squares = [encoder.encode_image(s.to(device)) for s in _squares(region, view)]
            found.append(torch.cat(squares).mean(dim=0, keepdim=True))
            progress.update()
        vectors = torch.cat(found)
        if average:
            vectors = vectors.mean(dim=0, keepdim=True)
        return encoder.classify(vectors).to(host.intermediate_device())


def _region(picture: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rectangle of [1, C, H, W] around the white part of a mask [h, w]."""
    white = match_size(mask[None, None].float(), picture)[0, 0] > 0.5
    if not white.any():
        return picture
    rows, columns = (torch.nonzero(white.any(dim=d)).flatten().tolist() for d in (1, 0))
    return picture[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _squares(picture: torch.Tensor, view: str) -> list[torch.Tensor]:
    height, width = picture.shape[-2:]
    if view == "centre":
        return [picture]
    side = min(height, width)
    if view == "close-ups":
        side = min(side, CLOSE_UP)
    tops, lefts = (_spread(length, side, MOST_A_SIDE[view]) for length in (height, width))
    return [picture[..., t : t + side, u : u + side] for t in tops for u in lefts]


def _spread(length: int, side: int, most: int) -> list[int]:
    count = min(-(-length // side), most)
    if count == 1:
        return [(length - side) // 2]
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def from_text(loaded: LoadedRestorer, text: str, clip: Any = None) -> Degradation:
    """The degradation that a text describes. clip: a ComfyUI CLIP whose tokenizer takes any words."""
    _pipeline(loaded)
    tokens = _tokens(text, clip)
    with loaded.managed.on_device(_MEMORY) as (module, device):
        encoder: DegradationEncoder = module.model_degradation
        return encoder.classify(encoder.encode_text(tokens.to(device))).to(host.intermediate_device())


def _tokens(text: str, clip: Any) -> torch.Tensor:
    if not text.strip():
        raise InputError("text: empty; describe the picture, for example: image with rain")
    if clip is not None:
        rows = next((v for k, v in clip.tokenize(text).items() if k == "l"), None)
        if rows is None:
            raise InputError("clip: this text encoder does not use CLIP's vocabulary; connect one of SD 1.5 or SDXL")
        return torch.tensor([[int(token[0]) for token in rows[0]][:CONTEXT]])
    try:
        return tokenize([text])
    except InputError as error:
        if importlib.util.find_spec("open_clip") is not None:
            import open_clip

            return open_clip.tokenize([text])
        words = " ".join(dict.fromkeys(word for t in TEXTS for word in t.split()))
        raise InputError(f"{error}; use only: {words}. For other words connect a CLIP (SD 1.5 or SDXL)") from None


def network(loaded: LoadedRestorer) -> VLUNet:
    """The restoring part of a VLU-Net, with or without CLIP beside it. Raises InputError for other networks."""
    module = loaded.restorer.module
    module = module.net if isinstance(module, VLUNetPipeline) else module
    if not isinstance(module, VLUNet):
        raise InputError(f"restorer: {loaded.restorer.architecture.title} has no prompts; load a VLU-Net")
    return module


def prompt_weights(loaded: LoadedRestorer, degradation: Degradation) -> dict[str, torch.Tensor]:
    """How much of each prompt every stage takes: name -> [B, prompts], on the CPU."""
    network(loaded)
    with loaded.managed.on_device(0):
        net = network(loaded)
        d = vector(degradation, net.encoder_level1.gradient_descent.linear.weight)
        return {name: weights.float().cpu() for name, weights in net.prompt_weights(d).items()}


def prompt_picture(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stages x prompts as a heat map a picture, the strongest prompt of each stage framed; [B, 3, h, w]."""
    table = torch.stack(list(weights.values()), dim=1)
    columns = [f"prompt {i}" for i in range(table.shape[2])]
    pictures = []
    for index, one in enumerate(table):
        strongest = one == one.max(dim=1, keepdim=True).values
        title = f"Prompt weights, picture {index}"
        pictures.append(from_pil(heat_map(one.numpy(), list(weights), columns, title, strongest.numpy())))
    return torch.stack(pictures)


def prompt_text(weights: dict[str, torch.Tensor]) -> str:
    """The same as a table, a line a stage, averaged over the batch."""
    lines = []
    for name, rows in weights.items():
        mean = reduce(rows, "b k -> k", "mean").tolist()
        lines.append(f"{name}: " + ", ".join(f"{value:.3f}" for value in mean))
    return "\n".join(lines)


def degradation_picture(degradation: Degradation) -> torch.Tensor:
    """Probabilities as bars, a sheet a picture [B, 3, h, w]; the embedding's numbers where there are none."""
    sheets = []
    for index in range(len(degradation)):
        if degradation.probabilities is not None:
            values, labels = degradation.probabilities[index].tolist(), degradation.labels
        else:
            values, labels = [1.0], [f"embedding of {degradation.embedding.shape[1]}"]
        sheets.append(from_pil(bars(values, labels, f"Degradation, picture {index}")))
    return torch.stack(sheets)
