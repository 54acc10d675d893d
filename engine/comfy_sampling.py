"""Priors and ComfyUI's samplers meet here: a prior as MODEL, a MODEL as prior, CM4IR as SAMPLER, a guided GUIDER.

Needs ComfyUI; everything is imported when it is used. Noisy states are variance-exploding, x = x0 + sigma n, except for
flow models, whose own x and sigma are converted on the way in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InputError, MissingDependency
from ..guidance import cm4ir, parametrisation, rdmd
from ..guidance.measurement import Measurement
from ..guidance.priors import Prior
from . import host, zero_shot

PIXEL_CHANNELS = 3


def need_comfyui(what: str) -> None:
    """Raises MissingDependency outside ComfyUI."""
    if not host.inside_comfyui():
        raise MissingDependency(f"{what} needs ComfyUI: run the workflow there, or with --engine comfyui")


def _is_flow(base: Any) -> bool:
    """True for rectified-flow models, whose states are (1 - s) x0 + s n."""
    import comfy.model_sampling

    return isinstance(base.model_sampling, comfy.model_sampling.CONST)


def denoiser(model: Callable[..., torch.Tensor], base: Any, extra: dict[str, Any], clamp: bool) -> Prior:
    """ComfyUI's `model(x, sigma)` as a prior in the variance-exploding view; `base` is the BaseModel behind it.

    A told noise level other than the true one reaches the network's time alone: the estimate is an affine map of what the
    network put out, which is undone for the told level and done again for the true one. Of a flow model state and time
    cannot be told apart; it is given the state that belongs to the told level's time.
    """
    flow = _is_flow(base)

    def affine(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input scaling, c_skip and c_out at sigma [B], each [B, 1, 1, 1]."""
        one = sigma.new_ones(len(sigma), 1, 1, 1)
        sampling = base.model_sampling
        skip, out = sampling.calculate_denoised(sigma, 0 * one, one), sampling.calculate_denoised(sigma, one, 0 * one)
        return sampling.calculate_input(sigma, one), skip, out

    def network(x: torch.Tensor, sigma: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        if flow:
            return model(x / (1 + sigma.to(x).reshape(-1, 1, 1, 1)), (told / (1 + told)).to(x), **extra)
        if torch.equal(sigma, told):
            return model(x, sigma.to(x), **extra)
        (scale, skip, out), (scale_told, skip_told, out_told) = affine(sigma.to(x)), affine(told.to(x))
        seen = x * scale / scale_told
        return skip * x + out * (model(seen, told.to(x), **extra) - skip_told * seen) / out_told

    return Prior(network, clamp=clamp, name="MODEL")


def _check_vae(latent_format: Any, vae: Any) -> None:
    """Raises InputError unless the model's states are latents of `vae`; without one, pictures."""
    needed = getattr(latent_format, "latent_channels", None)
    found = PIXEL_CHANNELS if vae is None else getattr(vae, "latent_channels", None)
    if needed is None or found is None or needed == found:
        return
    if vae is None:
        raise InputError(f"vae: this model works on latents of {needed} channels; connect the VAE that belongs to it")
    if needed == PIXEL_CHANNELS:
        raise InputError(f"vae: this model works on pixels, not on latents of {found} channels; leave vae open")
    raise InputError(
        f"vae: its latents have {found} channels, but the model's {needed}; connect the VAE that belongs to the model"
    )


def _missing(side: int, vae: Any) -> int:
    """How many pixels `side` lacks to a multiple of the VAE's factor, to which its `encode` would else crop."""
    return -side % int(vae.spacial_compression_encode())


def _encoded(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The VAE's latent of pixels [B, C, H, W] in -1..1, whose right and lower edges are drawn out to whole latents."""
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels[:, :PIXEL_CHANNELS], (0, _missing(width, vae), 0, _missing(height, vae)), mode="replicate")
    return vae.encode(pixels.movedim(1, -1) / 2 + 0.5)


def _cropped(vae: Any, pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What `_encoded` was given, `size` (height, width), of what was decoded. Raises InputError where it is no such."""
    whole = tuple(side + _missing(side, vae) for side in size)
    if tuple(pictures.shape[-2:]) != whole:
        (height, width), (found_height, found_width) = size, pictures.shape[-2:]
        raise InputError(
            f"latent: it decodes to a picture of {found_width} x {found_height}, but the measurement is of one of "
            f"{width} x {height}; take the latent from Start From Measurement"
        )
    return pictures[..., : size[0], : size[1]]


def _space(
    prior: Prior | None, vae: Any, device: torch.device, model: Any, size: tuple[int, int] | None
) -> zero_shot.Session:
    """A session in the space of a MODEL: pixels without a VAE, else its latents as the model sees them.

    size: height and width of the pictures, which need not fill whole latents; None shows all that a latent holds.
    """
    if vae is None:
        return zero_shot.Session(prior, device)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return model.process_latent_in(_encoded(vae, pixels).float()).to(device)

    def decode(state: torch.Tensor) -> torch.Tensor:
        pictures = vae.decode(model.process_latent_out(state)).movedim(-1, 1)
        pictures = pictures if size is None else _cropped(vae, pictures, size)
        return (pictures.float() * 2 - 1).to(device)

    return zero_shot.Session(prior, device, encode, decode, model.process_latent_out)


@dataclass(frozen=True, eq=False)
class ModelPrior:
    """Any ComfyUI MODEL as a prior; with a VAE if it works on latents. Raises InputError where one of them is missing."""

    model: Any
    vae: Any = None
    positive: Any = None
    negative: Any = None
    cfg: float = 1.0
    name: str = "MODEL"

    def __post_init__(self) -> None:
        # Here and not in `run`, so that the node which has the inputs is the one that complains.
        _check_vae(_latent_format(self.model), self.vae)
        _conditions(self.model, self.positive, self.negative, self.cfg)

    def run(self, size: tuple[int, ...], body: Callable[[zero_shot.Session], Any]) -> Any:
        """As `zero_shot.Prior`; with a VAE, `size` may also be that of the states [B, C, h, w], C other than 3."""
        import comfy.samplers

        results, on_states = [], size[1] != PIXEL_CHANNELS

        class Borrow(comfy.samplers.Sampler):
            """Runs `body` where ComfyUI has the model loaded and its conditions prepared."""

            def sample(self, wrap: Any, sigmas: Any, extra_args: dict, callback: Any, noise: torch.Tensor, *rest: Any):
                prior = denoiser(wrap, wrap.inner_model, extra_args, outer.vae is None)
                shown = None if on_states else size[-2:]
                results.append(body(_space(prior, outer.vae, noise.device, wrap.inner_model, shown)))
                return noise

        outer = self
        blank = torch.zeros(tuple(size))
        if self.vae is not None and not on_states:
            blank = torch.zeros_like(_encoded(self.vae, blank))
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(*_conditions(self.model, self.positive, self.negative, self.cfg))
        guider.set_cfg(self.cfg)
        guider.sample(blank, blank, Borrow(), torch.tensor([1.0, 0.0]), seed=0, disable_pbar=True)
        return results[0]


def unconditional() -> list[Any]:
    """A condition that says nothing, for models that know none."""
    return [[torch.zeros(1, 1, 1), {}]]


def _latent_format(model: Any) -> Any:
    """What a MODEL says of its latents."""
    return model.get_model_object("latent_format")


def _reads_prompts(model: Any) -> bool:
    """Whether a MODEL attends to a prompt, or has a text encoder of its own."""
    config = getattr(model.model, "model_config", None)
    if (getattr(config, "unet_config", None) or {}).get("context_dim") is not None:
        return True
    text_encoder = getattr(config, "clip_target", None)
    return text_encoder is not None and text_encoder() is not None


def _conditions(model: Any, positive: Any, negative: Any, cfg: float) -> tuple[Any, Any]:
    """Positive and negative as they are given, or ones that say nothing. Raises InputError where the model needs them."""
    if _reads_prompts(model):
        if not positive:
            raise InputError("positive: this model reads prompts; connect CLIP Text Encode")
        if not negative and cfg != 1:
            raise InputError(f"negative: cfg {cfg:g} compares with it; connect CLIP Text Encode, or set cfg to 1")
        # At cfg 1 nothing comes of the negative, but ComfyUI prepares it all the same.
        return positive, negative or positive
    return positive or unconditional(), negative or unconditional()


def as_model(prior: zero_shot.NetworkPrior) -> Any:
    """A network prior as a ComfyUI MODEL in pixel space: latents are pictures [B, 3, H, W] in -1..1."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_sampling
    import comfy.supported_models_base

    class Pixels(comfy.latent_formats.LatentFormat):
        latent_channels = 3
        # For ComfyUI's previews: a state's channels are red, green and blue already.
        latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

    class Config(comfy.supported_models_base.BASE):
        unet_config = {}
        unet_extra_config = {}
        latent_format = Pixels
        memory_usage_factor = 1.0
        sampling_settings = {
            "epsilon": {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 0.02},
        }.get(prior.kind, {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5})

    class PixelModel(comfy.model_base.BaseModel):
        """Evaluates the prior itself, so that scalings and time inputs are exactly those of the published code."""

        def apply_model(self, x: torch.Tensor, t: torch.Tensor, *rest: Any, **ignored: Any) -> torch.Tensor:
            return prior.prior(self.diffusion_model, x.device).unclamped()(x.float(), t.float()).to(x)

        def memory_required(self, input_shape: Any, *rest: Any, **ignored: Any) -> int:
            per_pixel = prior.loaded.restorer.architecture.bytes_per_pixel(prior.loaded.restorer.config)
            return int(input_shape[0] * input_shape[-2] * input_shape[-1] * per_pixel)

    config = Config({"disable_unet_model_creation": True})
    config.unet_config = {"disable_unet_model_creation": True}
    kind = comfy.model_base.ModelType.EPS if prior.kind == "epsilon" else comfy.model_base.ModelType.EDM
    model = PixelModel(config, kind)
    if prior.kind == "consistency":

        class Boundary(type(model.model_sampling)):
            """The scalings that hold x0(x, 0.002) = x."""

            def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
                return parametrisation.consistency_denoised(x, sigma, output)

        model.model_sampling = Boundary(config)
    model.diffusion_model = prior.loaded.restorer.module
    model.diffusion_model.dtype = torch.float32
    return host.whole_patcher(model)


@dataclass(frozen=True, eq=False)
class _Borrowed:
    """What a scheme needs of ComfyUI inside a SAMPLER, all in the variance-exploding view."""

    session: zero_shot.Session
    levels: torch.Tensor
    start: torch.Tensor
    """The clean state that the sampler was given."""
    noise: torch.Tensor
    seed: int
    flow: bool
    tell: Callable[[int, torch.Tensor, torch.Tensor], None]
    """Step, state and estimate: ComfyUI shows progress and preview, and stops here when cancelled."""


def _ksampler(scheme: Callable[[_Borrowed], torch.Tensor], vae: Any, size: tuple[int, int]) -> Any:
    """A SAMPLER that runs `scheme`. Its result is a clean state, whatever the last noise level.

    size: height and width of the picture to find.
    """
    import comfy.samplers

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        extra, base = extra_args or {}, model.inner_model.inner_model
        _check_vae(base.latent_format, vae)
        levels, flow = zero_shot.levels(sigmas), _is_flow(base)
        if flow:  # pure noise has no picture in it to start from
            levels = (levels / (1 - levels.clamp(max=0.999))).clamp(max=999.0)

        def tell(index: int, state: torch.Tensor, estimate: torch.Tensor) -> None:
            host.check_interrupt()
            if callback is not None:
                level = sigmas[index]
                callback({"x": state, "i": index, "sigma": level, "sigma_hat": level, "denoised": estimate})

        session = _space(denoiser(model, base, extra, vae is None), vae, x.device, base, size)
        # Built from the noise itself: ComfyUI's x differs at a model's highest level, and hides it for flow models.
        given = _Borrowed(session, levels, model.latent_image, model.noise, int(extra.get("seed") or 0), flow, tell)
        result = scheme(given)
        last = float(sigmas[-1])
        return result * (1 - last) if flow and last > 0 else result

    return comfy.samplers.KSAMPLER(sample)


def sampler(measurement: Measurement, settings: zero_shot.Cm4ir, vae: Any = None) -> Any:
    """CM4IR as a SAMPLER for SamplerCustomAdvanced: start it from the clean latent of Start From Measurement."""

    def scheme(given: _Borrowed) -> torch.Tensor:
        return zero_shot.run_cm4ir(
            given.session,
            measurement,
            given.levels,
            given.start + float(given.levels[0]) * given.noise,
            given.seed,
            replace(settings, delta_in_scalings=settings.delta_in_scalings or given.flow),
            lambda step: given.tell(step.index, step.x, step.x0),
        )

    return _ksampler(scheme, vae, measurement.size)


def rdmd_sampler(measurement: Measurement, settings: zero_shot.Rdmd, vae: Any = None) -> Any:
    """RDMD as a SAMPLER: its start is made from the measurement, of the latent it is given only the size counts."""

    def scheme(given: _Borrowed) -> torch.Tensor:
        u, x = zero_shot.rdmd_start(given.session, measurement, float(given.levels[0]), 0, given.noise)
        states = [x]

        def tell(step: rdmd.Step) -> None:
            given.tell(step.index, states.pop(), step.u)
            states.append(step.x_next)

        return zero_shot.run_rdmd(given.session, measurement, u, x, given.seed, settings, given.levels, tell)

    return _ksampler(scheme, vae, measurement.size)


def guider(
    model: Any,
    measurement: Measurement,
    positive: Any,
    negative: Any,
    cfg: float,
    zeta: float,
    mu: float,
    vae: Any,
    between: tuple[float, float] = (0.0, 1.0),
) -> Any:
    """A GUIDER that moves estimates onto the measurement, for any sampler.

    between: from which to which share of the sampling (0: the highest noise level, 1: none) it does so.
    """
    import comfy.samplers

    class MeasurementGuider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            x0 = super().predict_noise(x, timestep, model_options or {}, seed)
            highest, lowest = (self.inner_model.model_sampling.percent_to_sigma(share) for share in between)
            if not lowest <= float(timestep.max()) <= highest:
                return x0
            session = _space(None, vae, x0.device, self.inner_model, measurement.size)
            seen = measurement.to(x0.device)
            moved = cm4ir.back_project(session.operator(seen.operator), x0.float(), seen.y, zeta, seen.noise, mu)
            return moved.to(x0)

    _check_vae(_latent_format(model), vae)
    made = MeasurementGuider(model)
    made.set_conds(*_conditions(model, positive, negative, cfg))
    made.set_cfg(cfg)
    return made
