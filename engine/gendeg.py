"""GenDeg on ComfyUI's own Stable Diffusion: its checkpoint as MODEL, CLIP and VAE, its conditions, guidance and sampling.

Needs ComfyUI; everything of it is imported when it is used. Numbers and steps are those of the published code
(Rajagopalan et al., CVPR 2025): three predictions, fractional times, ancestral Euler steps from sigma * noise.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import models
from ..errors import CheckpointError, InputError
from ..guidance import gendeg, latent_diffusion
from ..models import checkpoint, file_kinds
from ..models.gendeg import IntensityConditioner, StructureCorrection, with_averaged_weights
from . import host, loaded, model_folder, tiling
from .comfy_sampling import need_comfyui
from .loaded import LoadedRestorer

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""ComfyUI's folder of whole Stable Diffusion files."""
STEPS, TEXT_SCALE, IMAGE_SCALE = 100, 7.5, 1.5
SIDE = 64
"""Sides of pictures are padded to multiples of this: the autoencoder's 8 times the U-Net's 8."""
_UNET = "model.diffusion_model.input_blocks.0.0.weight"


def checkpoint_files() -> list[str]:
    """Names of files to choose from: ComfyUI's checkpoints, and where Mend's own models lie."""
    names: list[str] = []
    if host.inside_comfyui():
        import folder_paths

        names += folder_paths.get_filename_list(CHECKPOINTS)
    return list(dict.fromkeys([*names, *model_folder.model_files()]))


def checkpoint_path(name: str) -> Path:
    """The file behind a name of `checkpoint_files`. Raises InputError."""
    if host.inside_comfyui():
        import folder_paths

        found = folder_paths.get_full_path(CHECKPOINTS, name)
        if found:
            return Path(found)
    return model_folder.model_path(name)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a Stable Diffusion file, read as ComfyUI's Load Checkpoint does.

    What Lightning left in a file beside weights stops that reader; Mend's own then steps in.
    """
    import comfy.utils

    try:
        return dict(comfy.utils.load_torch_file(str(path), safe_load=True))
    except Exception as error:
        logger.info("%s: ComfyUI's reader says %s; trying Mend's", path.name, error)
        return checkpoint.read(path).state


def generator_weights(state: Mapping[str, torch.Tensor], averaged: bool = True) -> dict[str, torch.Tensor]:
    """GenDeg's state dict with the averaged U-Net in its place. Raises CheckpointError for other files."""
    first = state.get(_UNET)
    if first is None or first.shape[1] != 8 or "stats_proj.weight" not in state:
        what = file_kinds.describe_weights(list(state)) or "something else"
        raise CheckpointError(
            f"this is {what}, not GenDeg's generator (a Stable Diffusion 1.5 file with 8 input channels and the layers "
            "stats_proj and cc_projection)"
        )
    if not averaged:
        return {key: value for key, value in state.items() if not key.startswith("model_ema.")}
    state, moved = with_averaged_weights(state)
    if not moved:
        logger.warning("GenDeg: the file holds no averaged weights, so its raw ones are used")
    return state


def load(path: Path, averaged: bool = True) -> tuple[Any, Any, Any, LoadedRestorer]:
    """MODEL, CLIP, VAE and the intensity conditioner of a GenDeg file."""
    need_comfyui("Load GenDeg")
    import comfy.sd

    try:
        state = generator_weights(read_weights(path), averaged)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    with torch.inference_mode(False):
        # Taken out also because ComfyUI knows Stable Zero123 by the name of the second one.
        own = {key: state.pop(key).clone() for key in list(state) if key.startswith(("stats_proj.", "cc_projection."))}
        conditioner = loaded.wrap(models.load(own, system="gendeg-conditioner"))
    model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(state, output_vae=True, output_clip=True)
    return model, clip, vae, conditioner


def conditioner_of(network: LoadedRestorer) -> IntensityConditioner:
    """The network itself. Raises InputError if it is another one."""
    if not isinstance(network.restorer.module, IntensityConditioner):
        raise InputError(f"conditioner: {network.restorer.architecture.title}; connect the one of Load GenDeg")
    return network.restorer.module


def with_intensity(
    network: LoadedRestorer, conditioning: Sequence[Any], mu: float | None, sigma: float | None, whole: bool = False
) -> list[Any]:
    """CONDITIONING with an intensity; None for both means "not given", which the null condition says.

    whole: keep all of a long text, each chunk of 77 tokens with the same intensity; the published code cuts it off.
    """
    conditioner_of(network)
    result = []
    with network.managed.on_device() as (module, device), torch.inference_mode():
        bins = module.null_bins() if mu is None or sigma is None else module.bin_indices([mu], [sigma])
        tokens = module.stats_proj.out_features
        for text, options in conditioning:
            text = text if whole else text[:, :tokens]
            told = module(text.to(device, torch.float32), bins.expand(len(text), -1))
            result.append([told.to(text), dict(options)])
    return result


def encode_text(clip: Any, text: str) -> list[Any]:
    """A text as CONDITIONING, word by word: brackets are characters here, not weights."""
    literal = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    return clip.encode_from_tokens_scheduled(clip.tokenize(literal))


class _Published:
    """In front of a ComfyUI model sampling: times between the table's entries, and start noise of exactly sigma."""

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        table = self.log_sigmas.double()
        wanted = sigma.to(table).log()
        low = (torch.searchsorted(table, wanted.flatten()).reshape(wanted.shape) - 1).clamp(0, len(table) - 2)
        share = ((wanted - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)
        return (low + share).float().to(sigma.device)

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool = False
    ) -> torch.Tensor:
        return super().noise_scaling(sigma, noise, latent_image, False)


def published_sampling(model: Any) -> Any:
    """MODEL that is told fractional times and starts from sigma * noise: ComfyUI rounds times, and starts a little higher."""
    need_comfyui("Fractional Timesteps")
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, _Published):
        return model
    if not hasattr(sampling, "log_sigmas"):
        raise InputError("model: its noise levels are no table of times, so there is nothing between its entries")
    sampling = copy.copy(sampling)
    sampling.__class__ = type(f"Published{type(sampling).__name__}", (_Published, type(sampling)), {})
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    return model


def guider(
    model: Any,
    full: Sequence[Any],
    null: Sequence[Any],
    latent: torch.Tensor,
    text_scale: float = TEXT_SCALE,
    image_scale: float = IMAGE_SCALE,
) -> Any:
    """A GUIDER of three predictions: text and picture, picture alone, neither. latent: of the VAE, unscaled."""
    import comfy.samplers

    def told(conditioning: Sequence[Any], picture: bool) -> list[Any]:
        dropped = {k: v for c in conditioning for k, v in c[1].items() if k != "concat_latent_image"}
        return [[text, {**dropped, **({"concat_latent_image": latent} if picture else {})}] for text, _ in conditioning]

    class ThreeWayGuider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            options = model_options or {}
            conds = [self.conds[name] for name in ("neither", "picture", "both")]
            neither, picture, both = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
            guided = latent_diffusion.three_way_guidance(both, picture, neither, text_scale, image_scale)
            for hook in options.get("sampler_post_cfg_function", []):
                guided = hook(
                    {
                        "denoised": guided, "cond": conds[2], "uncond": conds[0], "model": self.inner_model,
                        "uncond_denoised": neither, "cond_denoised": both, "sigma": timestep,
                        "model_options": options, "input": x,
                    }
                )  # fmt: skip
            return guided

    made = ThreeWayGuider(model)
    made.inner_set_conds({"both": told(full, True), "picture": told(null, True), "neither": told(null, False)})
    return made


def encode_picture(vae: Any, image: torch.Tensor) -> torch.Tensor:
    """The latent of pictures [B, 3, H, W] in 0..1: the mean of the autoencoder's posterior, unscaled."""
    return vae.encode(image.movedim(1, -1).contiguous())


def correct(
    network: LoadedRestorer, clean: torch.Tensor, generated: torch.Tensor, strength: float = 1.0
) -> torch.Tensor:
    """Repairs the structure of generated pictures [B, 3, H, W] (0..1) after the clean ones, of the same size; 0..1.

    strength: 0 leaves them, 1 is published. Raises InputError for another network or unequal sizes.
    """
    if not isinstance(network.restorer.module, StructureCorrection):
        raise InputError(f"network: {network.restorer.architecture.title}; load GenDeg's nafnet_sd.ckpt")
    if clean.shape[-2:] != generated.shape[-2:]:
        raise InputError(
            f"clean and generated: {tuple(clean.shape[-2:])} and {tuple(generated.shape[-2:])} pixels; they must be equal"
        )
    progress, corrected = host.progress(len(generated)), []
    memory = tiling.activation_bytes(network, generated[:1], torch.float32)
    with network.managed.on_device(memory) as (module, device), torch.inference_mode():
        for number, picture in enumerate(generated.split(1)):
            original = clean[number % len(clean)][None]
            found = module(original.to(device) * 2 - 1, picture.to(device) * 2 - 1).to(picture) / 2 + 0.5
            corrected.append((picture + strength * (found - picture)).clamp(0, 1))
            progress.update()
    return torch.cat(corrected)


@dataclass(frozen=True, eq=False)
class GenDegDegrader:
    """GenDeg with everything it needs, as one step. correction: None leaves the autoencoder's flaws."""

    model: Any
    clip: Any
    vae: Any
    conditioner: LoadedRestorer
    correction: LoadedRestorer | None = None
    text_scale: float = TEXT_SCALE
    image_scale: float = IMAGE_SCALE
    usual_steps: int = STEPS
    correct_raindrops: bool = False
    name: str = "GenDeg"

    @property
    def kinds(self) -> Sequence[str]:
        return (*gendeg.PRESETS, *gendeg.MIXED)

    def paint(
        self, clean: torch.Tensor, kind: str, mu: float, sigma: float, seed: int, caption: str = "", steps: int = 0
    ) -> torch.Tensor:
        """As `engine.degraders.Degrader`; equal to the chain of nodes for pictures whose sides are multiples of 64."""
        import comfy.sample
        import comfy.samplers

        size = clean.shape[-2:]
        bottom, right = (-side % SIDE for side in size)
        mode = "reflect" if bottom < size[0] and right < size[1] else "replicate"
        padded = F.pad(clean, (0, right, 0, bottom), mode=mode)
        text = encode_text(self.clip, gendeg.caption(caption, kind))
        full = with_intensity(self.conditioner, text, mu, sigma)
        null = with_intensity(self.conditioner, encode_text(self.clip, ""), None, None)
        latent = encode_picture(self.vae, padded)
        model = published_sampling(self.model)
        steps = steps or self.usual_steps
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
        empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(latent))
        progress = host.progress(steps)

        def tell(*_: Any) -> None:
            progress.update()

        samples = guider(model, full, null, latent, self.text_scale, self.image_scale).sample(
            comfy.sample.prepare_noise(empty, seed),
            empty,
            comfy.samplers.sampler_object("euler_ancestral"),
            sigmas,
            callback=tell,
            disable_pbar=True,
            seed=seed,
        )
        painted = self.vae.decode(samples.to(host.intermediate_device()))[..., :3].movedim(-1, 1).clamp(0, 1)
        if self.correction is not None and self._is_corrected(kind):
            painted = correct(self.correction, padded, painted.to(padded))
        return painted[..., : size[0], : size[1]].to(clean)

    def _is_corrected(self, kind: str) -> bool:
        usual = kind in gendeg.PRESETS and gendeg.PRESETS[kind].corrected
        return usual or (kind == "raindrop" and self.correct_raindrops)
