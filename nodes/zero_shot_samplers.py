"""Zero-shot restoration with ComfyUI's own models and samplers: priors from and to MODEL, a SAMPLER, a GUIDER."""

from __future__ import annotations

from ..engine import comfy_sampling, zero_shot
from ..errors import InputError
from . import sockets
from .api import advanced, io
from .zero_shot_inputs import eta_input, measurement_input, mu_input, noise_sign_input, sign_of, zeta_input

CATEGORY = "Mend/zero-shot/ComfyUI models"


def _conditions() -> list[io.Input]:
    return [
        io.Vae.Input("vae", optional=True, tooltip="For a model on latents. Leave open for a pixel model."),
        io.Conditioning.Input("positive", optional=True, tooltip="What the picture shows, if the model reads prompts."),
        io.Conditioning.Input("negative", optional=True, tooltip="What it does not show."),
    ]


def _cfg() -> io.Input:
    return io.Float.Input(
        "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Strength of the prompt; 1 evaluates the model once."
    )


class PriorFromModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPriorFromModel",
            display_name="Prior From Model",
            category=CATEGORY,
            description="Uses any model that ComfyUI can load as the prior of a zero-shot restoration: on pixels, or on latents "
            "with its VAE. Experimental: the published settings are for pixel models. Needs ComfyUI.",
            inputs=[io.Model.Input("model", tooltip="The model: epsilon, v, EDM or flow."), _cfg(), *_conditions()],
            outputs=[sockets.Prior.Output("prior", display_name="prior", tooltip="The model as a denoiser.")],
        )

    @classmethod
    def execute(cls, model, cfg=1.0, vae=None, positive=None, negative=None) -> io.NodeOutput:
        return io.NodeOutput(comfy_sampling.ModelPrior(model, vae, positive, negative, cfg))


class PriorToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPriorToModel",
            display_name="Prior To Model",
            category=CATEGORY,
            description="Hands a loaded prior to ComfyUI's samplers as a model whose latents are pictures. Show them with State "
            "To Image. Needs ComfyUI.",
            inputs=[sockets.Prior.Input("prior", tooltip="From Load Prior.")],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The prior as a MODEL in pixel space.")],
        )

    @classmethod
    def execute(cls, prior) -> io.NodeOutput:
        comfy_sampling.need_comfyui("Prior To Model")
        if not isinstance(prior, zero_shot.NetworkPrior):
            raise InputError("prior: only one from Load Prior can become a MODEL")
        return io.NodeOutput(comfy_sampling.as_model(prior))


class SamplerCm4ir(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSamplerCM4IR",
            display_name="CM4IR Sampler",
            category=CATEGORY,
            description="CM4IR as a sampler for SamplerCustomAdvanced. Give it the clean latent of Start From Measurement and "
            "CM4IR Sigmas. Needs ComfyUI.",
            inputs=[
                measurement_input(),
                zeta_input(),
                advanced(eta_input()),
                advanced(mu_input()),
                advanced(noise_sign_input()),
                io.Vae.Input("vae", optional=True, tooltip="For a model on latents. Leave open for a pixel model."),
            ],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, measurement, zeta=0.0, eta=0.1, mu=1.0, noise_sign="turned round", vae=None) -> io.NodeOutput:
        comfy_sampling.need_comfyui("CM4IR Sampler")
        settings = zero_shot.Cm4ir(zeta, eta, mu, sign_of(noise_sign))
        return io.NodeOutput(comfy_sampling.sampler(measurement, settings, vae))


class MeasurementGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMeasurementGuider",
            display_name="Measurement Guider",
            category=CATEGORY,
            description="Moves every estimate of a model onto the measurement, so that any sampler restores. Needs ComfyUI.",
            inputs=[
                io.Model.Input("model", tooltip="The model: epsilon, v, EDM or flow."),
                measurement_input(),
                zeta_input(),
                mu_input(),
                _cfg(),
                *_conditions(),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, model, measurement, zeta=0.0, mu=1.0, cfg=1.0, vae=None, positive=None, negative=None
    ) -> io.NodeOutput:
        comfy_sampling.need_comfyui("Measurement Guider")
        guider = comfy_sampling.guider(model, measurement, positive, negative, cfg, zeta, mu, vae)
        return io.NodeOutput(guider)


NODES = [PriorFromModel, PriorToModel, SamplerCm4ir, MeasurementGuider]
