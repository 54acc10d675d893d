"""Priors and ComfyUI's samplers meet here: a prior as MODEL, a MODEL as prior, CM4IR as SAMPLER, a guided GUIDER.

Needs ComfyUI; everything is imported when it is used. Noisy states are variance-exploding, x = x0 + sigma n, except for
flow models, whose own x and sigma are converted on the way in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import MissingDependency
from ..guidance import cm4ir
from ..guidance.measurement import Measurement, draw
from ..guidance.priors import Prior
from . import host, zero_shot


def need_comfyui(what: str) -> None:
    """Raises MissingDependency outside ComfyUI."""
    if not host.inside_comfyui():
        raise MissingDependency(f"{what} needs ComfyUI: run the workflow there, or with --engine comfyui")


def denoiser(model: Callable[..., torch.Tensor], sampling: Any, extra: dict[str, Any], clamp: bool) -> Prior:
    """ComfyUI's `model(x, sigma)` as a prior in the variance-exploding view.

    A told noise level other than the true one is passed on to both scalings and time: what a MODEL can be told.
    """
    import comfy.model_sampling

    flow = isinstance(sampling, comfy.model_sampling.CONST)

    def network(x: torch.Tensor, sigma: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        if not flow:
            return model(x, told.to(x), **extra)
        level = sigma.to(x).reshape(-1, 1, 1, 1)
        return model(x / (1 + level), (told / (1 + told)).to(x), **extra)

    return Prior(network, clamp=clamp, name="MODEL")


def _space(prior: Prior, vae: Any, device: torch.device, model: Any) -> zero_shot.Session:
    """A session in the space of a MODEL: pixels without a VAE, else its latents as the model sees them."""
    if vae is None:
        return zero_shot.Session(prior, device)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        latent = vae.encode((pixels.movedim(1, -1) / 2 + 0.5)[..., :3])
        return model.process_latent_in(latent.float()).to(device)

    def decode(state: torch.Tensor) -> torch.Tensor:
        pictures = vae.decode(model.process_latent_out(state))
        return (pictures.movedim(-1, 1).float() * 2 - 1).to(device)

    return zero_shot.Session(prior, device, encode, decode)


@dataclass(frozen=True, eq=False)
class ModelPrior:
    """Any ComfyUI MODEL as a prior; with a VAE if it works on latents."""

    model: Any
    vae: Any = None
    positive: Any = None
    negative: Any = None
    cfg: float = 1.0
    name: str = "MODEL"

    def run(self, size: tuple[int, ...], body: Callable[[zero_shot.Session], Any]) -> Any:
        import comfy.samplers

        results = []

        class Borrow(comfy.samplers.Sampler):
            """Runs `body` where ComfyUI has the model loaded and its conditions prepared."""

            def sample(self, wrap: Any, sigmas: Any, extra_args: dict, callback: Any, noise: torch.Tensor, *rest: Any):
                prior = denoiser(wrap, wrap.inner_model.model_sampling, extra_args, outer.vae is None)
                results.append(body(_space(prior, outer.vae, noise.device, wrap.inner_model)))
                return noise

        outer = self
        blank = torch.zeros(size[0], 3, size[-2], size[-1])
        if self.vae is not None:
            blank = torch.zeros_like(self.vae.encode(blank.movedim(1, -1) + 0.5))
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.positive or unconditional(), self.negative or unconditional())
        guider.set_cfg(self.cfg)
        guider.sample(blank, blank, Borrow(), torch.tensor([1.0, 0.0]), seed=0, disable_pbar=True)
        return results[0]


def unconditional() -> list[Any]:
    """A condition that says nothing, for models that know none."""
    return [[torch.zeros(1, 1, 1), {}]]


def as_model(prior: zero_shot.NetworkPrior) -> Any:
    """A network prior as a ComfyUI MODEL in pixel space: latents are pictures [B, 3, H, W] in -1..1."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.model_sampling
    import comfy.supported_models_base

    class Pixels(comfy.latent_formats.LatentFormat):
        latent_channels = 3

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
            return prior.prior(self.diffusion_model, x.device)(x.float(), t.float()).to(x)

        def memory_required(self, input_shape: Any, *rest: Any, **ignored: Any) -> int:
            per_pixel = prior.loaded.restorer.architecture.bytes_per_pixel(prior.loaded.restorer.config)
            return int(input_shape[0] * input_shape[-2] * input_shape[-1] * per_pixel)

    config = Config({"disable_unet_model_creation": True})
    config.unet_config = {"disable_unet_model_creation": True}
    kind = comfy.model_base.ModelType.EPS if prior.kind == "epsilon" else comfy.model_base.ModelType.EDM
    model = PixelModel(config, kind)
    model.diffusion_model = prior.loaded.restorer.module
    model.diffusion_model.dtype = torch.float32
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def sampler(measurement: Measurement, settings: zero_shot.Cm4ir, vae: Any = None) -> Any:
    """CM4IR as a SAMPLER for SamplerCustomAdvanced: start it from the clean latent of Start From Measurement."""
    import comfy.samplers

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        base = model.inner_model.inner_model
        flow = isinstance(base.model_sampling, comfy.model_sampling.CONST)
        levels = zero_shot.levels(sigmas)
        if flow:
            x = x / (1 - float(levels[0]))
            levels = levels / (1 - levels)
        prior = denoiser(model, base.model_sampling, extra_args or {}, vae is None)
        session = _space(prior, vae, x.device, base)
        seen = measurement.to(x.device)
        seed = int((extra_args or {}).get("seed") or 0)

        def tell(step: cm4ir.Step) -> None:
            if callback is not None:
                level = sigmas[step.index]
                callback({"x": step.x, "i": step.index, "sigma": level, "sigma_hat": level, "denoised": step.x0})

        return cm4ir.sample(
            session.prior,
            session.operator(seen.operator),
            seen.y,
            x,
            levels,
            [draw(x.shape, seed, k, x.device) for k in range(1, len(levels))],
            deltas=settings.deltas if len(settings.deltas) == len(levels) else (),
            mu=settings.mu,
            callback=tell,
            **replace(settings, delta_in_scalings=True).options(seen),
        )

    return comfy.samplers.KSAMPLER(sample)


def guider(
    model: Any, measurement: Measurement, positive: Any, negative: Any, cfg: float, zeta: float, mu: float, vae: Any
) -> Any:
    """A GUIDER that moves every estimate onto the measurement, for any sampler."""
    import comfy.samplers

    class MeasurementGuider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            x0 = super().predict_noise(x, timestep, model_options or {}, seed)
            session = _space(None, vae, x0.device, self.inner_model)
            seen = measurement.to(x0.device)
            moved = cm4ir.back_project(session.operator(seen.operator), x0.float(), seen.y, zeta, seen.noise, mu)
            return moved.to(x0)

    made = MeasurementGuider(model)
    made.set_conds(positive or unconditional(), negative or unconditional())
    made.set_cfg(cfg)
    return made
