"""OSDFace on ComfyUI's own objects: a face's prompt as CONDITIONING, its LoRA on a MODEL, one step from latent to latent.

Wang et al., "OSDFace: One-Step Diffusion Model for Face Restoration", CVPR 2025, arXiv 2411.17163. What needs ComfyUI
imports it when it is used; the embedder works without.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import models
from ..errors import CheckpointError, InputError, OutOfMemoryError
from ..guidance import latent_diffusion
from ..models import checkpoint, lora_sd
from ..models.colour import rgb
from ..models.osdface_vre import FacePrompter, PromptProjection
from . import colours, host
from .comfy_sampling import need_comfyui
from .values import check_image

logger = logging.getLogger(__name__)

STRIDE = 8
"""Pixels per latent pixel."""
CONTEXT = 1024
"""Width of the prompts that Stable Diffusion 2.1 reads."""
BASE = "OSDFace needs Stable Diffusion 2.1 base (the 512 model, noise prediction)"


@dataclass(frozen=True, eq=False)
class FaceEmbedder:
    """What travels on the MEND_FACE_EMBEDDER wire: the network that turns faces into prompts, and its place in memory."""

    prompter: FacePrompter
    managed: host.Managed

    @property
    def size(self) -> int:
        return self.managed.size


def load_embedder(tokenizer: str | Path, projection: str | Path | None = None) -> FaceEmbedder:
    """The embedder from associate_2.ckpt and embedding_change_weights.pth, or from one file that holds both.

    Loading the same files twice gives the same object. Raises CheckpointError for files of anything else.
    """
    paths = [Path(tokenizer), *([Path(projection)] if projection is not None else [])]
    key = ("face-embedder", *((str(p.resolve()), p.stat().st_mtime_ns, p.stat().st_size) for p in paths))
    return host.networks.get(key, lambda: _load(*paths), lambda embedder: embedder.size)


def _load(tokenizer: Path, projection: Path | None = None) -> FaceEmbedder:
    with torch.inference_mode(False):
        prompter = models.load(tokenizer).module
        if not isinstance(prompter, FacePrompter):
            raise CheckpointError(f"{tokenizer.name} is no face embedder; OSDFace's is called associate_2.ckpt")
        if projection is not None:
            layers = models.load(projection).module
            if not isinstance(layers, PromptProjection):
                raise CheckpointError(
                    f"{projection.name} is no prompt projection; OSDFace's is called embedding_change_weights.pth"
                )
            prompter.with_projection(layers)
        prompter.eval().requires_grad_(False)
        return FaceEmbedder(prompter, host.Managed(prompter))


@torch.no_grad()
def prompts(embedder: FaceEmbedder, faces: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Prompts [B, 77, 1024] for faces [B, C, H, W] in 0..1, and how many different codes each face hit.

    Every face is embedded by itself: a batch gives exactly what its faces give alone.
    """
    made, distinct, progress = [], [], host.progress(len(faces))
    with embedder.managed.on_device() as (prompter, device):
        for face in rgb(faces).split(1):
            selection = prompter.select(face.to(device, torch.float32))
            made.append(prompter.project(selection.tokens).to(host.intermediate_device(), torch.float32))
            distinct += selection.distinct.tolist()
            progress.update()
    return torch.cat(made), distinct


def describe_tokens(distinct: list[int], wanted: int) -> str:
    """One line per face on how many of the wanted tokens it filled."""
    lines = []
    for number, count in enumerate(distinct, start=1):
        verdict = "" if count >= wanted / 2 else ": few, so this may be no face, or no frontal close one"
        lines.append(f"face {number}: {min(count, wanted)} of {wanted} tokens{verdict}")
    return "\n".join(lines)


# The model ------------------------------------------------------------------------------------------------------------


def check_model(model: Any) -> None:
    """Raises InputError unless a MODEL is a Stable Diffusion 2 that predicts noise from four latent channels."""
    need_comfyui("OSDFace")
    import comfy.model_sampling

    settings = getattr(model.model.model_config, "unet_config", {})
    if settings.get("context_dim") != CONTEXT or settings.get("in_channels") != 4:
        found = (
            f"its prompts have width {settings.get('context_dim')}, its latents {settings.get('in_channels')} channels"
        )
        raise InputError(f"model: {BASE}; {found}")
    if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION):
        raise InputError(f"model: {BASE}; this one predicts v, like the 768 model")


def apply_lora(model: Any, file: str | Path, strength: float = 1.0, strict: bool = True) -> tuple[Any, str]:
    """A clone of a MODEL with every low-rank pair of the file on its weight, and a line on how many found one.

    ComfyUI's own loader knows other names and would leave out 128 of the 282 layers that a PEFT file may hold, among
    them every attention projection. Raises CheckpointError where a shape differs, where no pair has a place, and
    unless `strict` is off, where any has none.
    """
    need_comfyui("Face LoRA")
    import comfy.lora

    pairs = lora_sd.read_lora(checkpoint.read(file).state)
    match = lora_sd.match_lora(pairs, model.model_state_dict("diffusion_model."))
    text = f"{Path(file).name}: {match.describe()}"
    if not match.patches or (strict and match.unmatched):
        raise CheckpointError(f"LoRA: {text}: the file is for another model")
    state, places = {}, {}
    for place, pair in match.patches.items():
        module = place.removesuffix(".weight")
        places[module] = place
        state[f"{module}.lora_down.weight"], state[f"{module}.lora_up.weight"] = pair.down, pair.up
        state[f"{module}.alpha"] = torch.tensor(pair.scale * pair.rank)
    patched = model.clone()
    applied = patched.add_patches(comfy.lora.load_lora(state, places, log_missing=False), strength)
    if len(applied) != len(places):
        raise CheckpointError(f"LoRA: the model took {len(applied)} of {len(places)} patches")
    ranks = sorted({pair.rank for pair in match.patches.values()})
    text += f"; rank {', '.join(map(str, ranks))}, strength {strength:g}"
    (logger.warning if match.unmatched else logger.info)("Face LoRA: %s", text)
    return patched, text


# Latents --------------------------------------------------------------------------------------------------------------


def working_size(faces: torch.Tensor, square: int = 512) -> torch.Tensor:
    """Faces as the published inference sizes them: square ones scaled to `square` (0: left alone), others as they are."""
    if not square or faces.shape[-1] != faces.shape[-2] or faces.shape[-1] == square:
        return faces
    return F.interpolate(faces, (square, square), mode="bilinear", align_corners=True)


def padded(faces: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] with its right and lower border repeated up to whole latent pixels."""
    height, width = faces.shape[-2:]
    return F.pad(faces, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


@torch.no_grad()
def encode(vae: Any, faces: torch.Tensor, seed: int | None = None) -> torch.Tensor:
    """Latents [B, 4, H / 8, W / 8] of faces [B, C, H, W] in 0..1, not scaled, as ComfyUI's latents are.

    seed: the latent is drawn from the autoencoder's distribution, as published; None: its mean, which is what VAE Encode
    gives. Every face of a batch has its own noise, which does not depend on the others. Raises InputError for an
    autoencoder of another kind.
    """
    pictures = padded(rgb(faces)).movedim(1, -1)
    if seed is None:
        return vae.encode(pictures)
    stage = vae.first_stage_model
    if not hasattr(stage, "quant_conv"):
        raise InputError("vae: drawing a latent needs Stable Diffusion's own VAE; choose deterministic with this one")
    import comfy.model_management

    memory = vae.memory_used_encode((1, 3, *pictures.shape[1:3]), vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
    latents, progress = [], host.progress(len(pictures))
    for number, picture in enumerate(pictures.movedim(-1, 1).split(1)):
        x = vae.process_input(picture).to(vae.device, vae.vae_dtype)
        mean, log_variance = stage.quant_conv(stage.encoder(x)).float().to(vae.output_device).chunk(2, dim=1)
        generator = torch.Generator().manual_seed((seed + number) % (1 << 63))
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        latents.append(latent_diffusion.posterior_sample(mean, log_variance, noise))
        progress.update()
    return torch.cat(latents).contiguous()


def sigmas(timestep: int = latent_diffusion.OSDFACE_TIMESTEP) -> torch.Tensor:
    """The schedule of a single step, float32 [2]: the noise level of `timestep`, then none."""
    return torch.tensor([latent_diffusion.one_step_sigma(timestep), 0.0])


def prescaled(latents: torch.Tensor, timestep: int = latent_diffusion.OSDFACE_TIMESTEP) -> torch.Tensor:
    """Latents such that a stock sampler at `sigmas(timestep)` shows the network the ones given."""
    return latents * latent_diffusion.one_step_prescale(timestep)


def sample(model: Any, conditioning: Any, latents: torch.Tensor, timestep: int) -> torch.Tensor:
    """One Euler step without guidance from prescaled latents, as SamplerCustomAdvanced with Basic Guider takes it."""
    import comfy.sample
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    latents = comfy.sample.fix_empty_latent_channels(model, latents)
    nothing = torch.zeros(latents.shape)  # laid out as Disable Noise does it: the layout decides how sums are rounded
    end = guider.sample(nothing, latents, comfy.samplers.sampler_object("euler"), sigmas(timestep), disable_pbar=True)
    return end.to(host.intermediate_device())


def _does_not_fit(faces: torch.Tensor) -> OutOfMemoryError:
    height, width = faces.shape[-2:]
    return OutOfMemoryError(
        f"image: not even one face of {width} x {height} pixels fits into memory; close other programs, unload other "
        "models, or make the faces smaller (size of Align Faces, square_size here)"
    )


@torch.no_grad()
def restore(
    model: Any,
    vae: Any,
    embedder: FaceEmbedder,
    faces: torch.Tensor,
    *,
    seed: int | None = None,
    square: int = 512,
    colour: str | None = None,
    at_once: int = 8,
    timestep: int = latent_diffusion.OSDFACE_TIMESTEP,
) -> tuple[torch.Tensor, list[int]]:
    """Faces [B, C, H, W] in 0..1 restored in one step to [B, 3, H', W'], and the number of codes that each hit.

    model: with OSDFace's LoRA; seed: see `encode`; square: see `working_size`; colour: a method of `colours`, or None;
    at_once: how many faces go through the network together, half as many after running out of memory. Equal to the chain
    of single nodes. Raises OutOfMemoryError if not even one face fits.
    """
    check_model(model)
    check_image(faces)
    faces = working_size(rgb(faces), square)
    try:
        conditions, distinct = host.attempt(lambda: prompts(embedder, faces))
    except host.DidNotFitError:
        raise _does_not_fit(faces) from None
    if conditions.shape[-1] != CONTEXT:
        raise InputError(f"embedder: its prompts have width {conditions.shape[-1]}, the model reads {CONTEXT}")

    def restored_at(some: slice) -> torch.Tensor:
        latents = encode(vae, faces[some], None if seed is None else seed + some.start)
        clean = sample(model, [[conditions[some], {}]], prescaled(latents, timestep), timestep)
        return vae.decode(clean).movedim(-1, 1)[..., : faces.shape[-2], : faces.shape[-1]]

    restored, done = [], 0
    while done < len(faces):
        host.check_interrupt()
        some = slice(done, done + at_once)
        try:
            restored.append(host.attempt(lambda some=some: restored_at(some)))
        except host.DidNotFitError:
            together = len(faces[some])
            if together == 1:
                raise _does_not_fit(faces) from None
            at_once = together // 2
            logger.warning("out of memory: going on with %d faces at a time", at_once)
            continue
        done += at_once
    result = torch.cat(restored).float()
    return (result if colour is None else colours.fix_colours(result, faces, colour)), distinct
