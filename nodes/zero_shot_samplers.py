"""Zero-shot restoration with ComfyUI's own models and samplers: priors from and to MODEL, a SAMPLER, a GUIDER."""

from __future__ import annotations

from ..engine import comfy_sampling, zero_shot
from ..errors import InputError
from . import sockets
from .api import Node, advanced, io
from .inputs import accepted, check_choices, within
from .rdmd import rdmd_weights, renewal_input
from .zero_shot_inputs import (
    eta_input,
    measurement_input,
    mu_input,
    noise_sign_input,
    sign_of,
    zeta_input,
)

CATEGORY = "Mend/zero-shot/ComfyUI models"


def _conditions() -> list[io.Input]:
    return [
        _vae(),
        io.Conditioning.Input("positive", optional=True, tooltip="What the picture shows, if the model reads prompts."),
        io.Conditioning.Input("negative", optional=True, tooltip="What it does not show."),
    ]


def _vae() -> io.Input:
    return io.Vae.Input("vae", optional=True, tooltip="For a model on latents. Leave open for a pixel model.")


def _share(name: str, default: float, tooltip: str) -> io.Input:
    return advanced(io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, optional=True, tooltip=tooltip))


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers in a line, separated by commas or blanks. Raises InputError."""
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise InputError(f"deltas: {text!r} is not a list of numbers; write one per step: 0, 0.3, 0.05, 0.1") from None


def _cfg() -> io.Input:
    return io.Float.Input(
        "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Strength of the prompt; 1 evaluates the model once."
    )


class PriorFromModel(Node):
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


class PriorToModel(Node):
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


class SamplerCm4ir(Node):
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
                _vae(),
                advanced(
                    io.String.Input(
                        "deltas",
                        default="",
                        optional=True,
                        tooltip="By which share the model is told more noise than there is, one number per step: "
                        "0, 0.3, 0.05, 0.1. Empty: not at all.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "delta_in_scalings",
                        default=False,
                        optional=True,
                        tooltip="Use that level for the model's input and output scalings too, as for inpainting; flow models "
                        "always do.",
                    )
                ),
            ],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, deltas: str | None = "") -> bool | str:
        return accepted(_numbers, deltas)

    @classmethod
    def execute(
        cls,
        measurement,
        zeta=0.0,
        eta=0.1,
        mu=1.0,
        noise_sign="turned round",
        vae=None,
        deltas="",
        delta_in_scalings=False,
    ) -> io.NodeOutput:
        within(0, 1, eta=eta)
        check_choices(cls, noise_sign=noise_sign)
        comfy_sampling.need_comfyui("CM4IR Sampler")
        settings = zero_shot.Cm4ir(zeta, eta, mu, sign_of(noise_sign), _numbers(deltas), delta_in_scalings)
        return io.NodeOutput(comfy_sampling.sampler(measurement, settings, vae))


class SamplerRdmd(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSamplerRDMD",
            display_name="RDMD Sampler",
            category=CATEGORY,
            description="RDMD as a sampler for SamplerCustomAdvanced: give it RDMD Sigmas and a latent of the right size; it "
            "starts from the measurement by itself. Two evaluations per step. Needs ComfyUI.",
            inputs=[
                measurement_input(),
                *rdmd_weights(),
                renewal_input(),
                advanced(
                    io.Combo.Input(
                        "result",
                        options=list(zero_shot.OUTPUTS),
                        default=zero_shot.AUTOMATIC,
                        tooltip="The running estimate or the last denoised picture. automatic: as published.",
                    )
                ),
                _vae(),
            ],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, measurement, tau=0.5, weight=20.0, renewal=-1.0, result=zero_shot.AUTOMATIC, vae=None
    ) -> io.NodeOutput:
        within(-1, 1, renewal=renewal)
        check_choices(cls, result=result)
        comfy_sampling.need_comfyui("RDMD Sampler")
        settings = zero_shot.Rdmd(tau=tau, weight=weight, renewal=None if renewal < 0 else renewal, output=result)
        return io.NodeOutput(comfy_sampling.rdmd_sampler(measurement, settings, vae))


class MeasurementGuider(Node):
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
                _share("start_percent", 0.0, "From which share of the sampling on; 0: from the beginning."),
                _share(
                    "end_percent", 1.0, "Up to which share of the sampling; less than 1 leaves the end to the model."
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        measurement,
        zeta=0.0,
        mu=1.0,
        cfg=1.0,
        vae=None,
        positive=None,
        negative=None,
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        comfy_sampling.need_comfyui("Measurement Guider")
        between = (start_percent, end_percent)
        guider = comfy_sampling.guider(model, measurement, positive, negative, cfg, zeta, mu, vae, between)
        return io.NodeOutput(guider)


NODES = [PriorFromModel, PriorToModel, SamplerCm4ir, MeasurementGuider, SamplerRdmd]
