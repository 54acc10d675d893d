"""Zero-shot restoration: a prior fills in what a measurement left open. The steps are in `cm4ir` and `rdmd`."""

from __future__ import annotations

from ..engine import loaded, model_folder, zero_shot
from ..guidance import cm4ir, schedules
from . import sockets
from .api import Node, advanced, io
from .cm4ir import BackProject, Cm4irSigmas, Cm4irStep, MixNoise, PredictClean, StartFromMeasurement
from .images import as_image
from .inputs import ModelFile, check_choices, model_input, precision_input, seed_input, within
from .rdmd import RdmdSigmas, RdmdStart, RdmdStep, RdmdStrip, Regularise
from .zero_shot_inputs import (
    CATEGORY,
    STEPS,
    eta_input,
    gamma_input,
    measurement_input,
    mu_input,
    noise_sign_input,
    picture_output,
    prior_input,
    sign_of,
    state_input,
    state_of,
    states_and_picture,
    zeta_input,
)

SCHEMES = ["CM4IR", "RDMD"]
STARTER = "mend-prior-starter.safetensors"


class LoadPrior(ModelFile, Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadPrior",
            display_name="Load Prior",
            category=CATEGORY,
            description="Loads a pixel-space diffusion or consistency model: OpenAI's ImageNet, LSUN and FFHQ checkpoints as "
            "released. Form and size are read from the file.",
            inputs=[
                model_input("A file from models/restoration, or one of Mend's own.", STARTER),
                advanced(
                    io.Combo.Input(
                        "kind",
                        options=list(zero_shot.KINDS),
                        default=zero_shot.AUTOMATIC,
                        tooltip="What its output means. automatic: epsilon for ADM; for Mend's own what the file says, EDM or "
                        "consistency; for the others consistency unless the file name says edm.",
                    )
                ),
                io.Int.Input(
                    "class_index",
                    default=-1,
                    min=-1,
                    max=9999,
                    tooltip="What the picture shows, for a prior that knows classes (ImageNet: 0..999). -1: none.",
                ),
                precision_input(),
            ],
            outputs=[
                sockets.Prior.Output("prior", display_name="prior", tooltip="A denoiser: what pictures look like.")
            ],
        )

    @classmethod
    def execute(cls, model_name, kind="automatic", class_index=-1, precision="auto") -> io.NodeOutput:
        check_choices(cls, kind=kind, precision=precision)
        label = None if class_index < 0 else class_index
        network = loaded.load(model_folder.model_path(model_name))
        return io.NodeOutput(zero_shot.network_prior(network, kind, label, precision))


class PriorFromRestorer(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPriorFromRestorer",
            display_name="Prior From Restorer",
            category=CATEGORY,
            description="Uses a restoration network as the prior: plug-and-play restoration. It is not told the noise level, "
            "so it works best at low noise (a start of 50 or less).",
            inputs=[
                sockets.Restorer.Input("restorer", tooltip="A denoiser or all-in-one network that does not enlarge.")
            ],
            outputs=[sockets.Prior.Output("prior", display_name="prior", tooltip="The network as a denoiser.")],
        )

    @classmethod
    def execute(cls, restorer) -> io.NodeOutput:
        return io.NodeOutput(zero_shot.RestorerPrior(restorer))


class ZeroShotRestore(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendZeroShotRestore",
            display_name="Zero-Shot Restore",
            category=CATEGORY,
            description="Finds the picture behind a measurement with a prior that was never trained for the task. CM4IR: four "
            "evaluations of a consistency model. RDMD: a diffusion model, between faithful and generative.",
            inputs=[
                prior_input(),
                measurement_input(),
                io.Combo.Input(
                    "scheme",
                    options=SCHEMES,
                    default="CM4IR",
                    tooltip="CM4IR: few steps, for consistency models. RDMD: many steps, for diffusion models.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(zero_shot.PRESETS),
                    default=zero_shot.AUTOMATIC,
                    tooltip="CM4IR's published settings per task, for the nearest noise level; (EDM): found here, for Mend's prior. "
                    "automatic: by the operator, and (EDM) for an EDM prior. by hand: the start, gamma and zeta below.",
                ),
                seed_input("Chooses all noise."),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Evaluations (CM4IR) or iterations (RDMD). 0: as published, 4 or 100.",
                ),
                io.Float.Input(
                    "tau",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="RDMD: 0 stays faithful and smooth, 1 invents detail.",
                ),
                advanced(
                    io.Int.Input(
                        "start",
                        default=250,
                        min=0,
                        max=998,
                        tooltip="CM4IR by hand: where to start, 0 hardly any noise, 998 nothing but noise.",
                    )
                ),
                advanced(gamma_input("CM4IR by hand: how fast the noise falls.")),
                advanced(zeta_input()),
                advanced(eta_input()),
                advanced(mu_input()),
                advanced(noise_sign_input()),
                advanced(
                    io.Float.Input(
                        "weight",
                        default=20.0,
                        min=0.0,
                        max=1000.0,
                        step=1.0,
                        tooltip="RDMD: weight of the prior against the measurement (lambda).",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "renewal",
                        default=-1.0,
                        min=-1.0,
                        max=1.0,
                        step=0.05,
                        tooltip="RDMD: share of fresh noise. -1: as published, 0 for super-resolution, 0.3 elsewhere.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "result",
                        options=list(zero_shot.OUTPUTS),
                        default=zero_shot.AUTOMATIC,
                        tooltip="RDMD: the running estimate or the last denoised picture. automatic: as published.",
                    )
                ),
            ],
            outputs=[io.Image.Output("restored", display_name="image", tooltip="Restored pictures in 0..1.")],
        )

    @classmethod
    def execute(
        cls,
        prior,
        measurement,
        scheme="CM4IR",
        preset=zero_shot.AUTOMATIC,
        seed=0,
        steps=0,
        tau=0.5,
        start=250,
        gamma=0.2,
        zeta=0.0,
        eta=0.1,
        mu=1.0,
        noise_sign="turned round",
        weight=20.0,
        renewal=-1.0,
        result=zero_shot.AUTOMATIC,
    ) -> io.NodeOutput:
        within(0, 1, eta=eta)
        within(-1, 1, renewal=renewal)
        check_choices(cls, scheme=scheme, preset=preset, noise_sign=noise_sign, result=result)
        if scheme == "RDMD":
            fresh = None if renewal < 0 else renewal
            settings = zero_shot.Rdmd(steps or 100, tau, weight, fresh, result)
            return io.NodeOutput(as_image(zero_shot.restore_rdmd(prior, measurement, seed, settings)))
        chosen = cm4ir.Preset(start, gamma, zeta)
        if preset != zero_shot.BY_HAND:
            chosen = zero_shot.cm4ir_preset(preset, measurement, prior)
        how = zero_shot.Cm4ir.of(chosen, eta, mu, sign_of(noise_sign))
        sigmas = schedules.cm4ir_sigmas(steps or 4, chosen.start, chosen.gamma)
        return io.NodeOutput(as_image(zero_shot.restore_cm4ir(prior, measurement, seed, sigmas, how)))


class StateToImage(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendStateToImage",
            display_name="State To Image",
            category=STEPS,
            description="Shows a state of a zero-shot chain, or the result of a SAMPLER on a pixel model, as a picture.",
            inputs=[prior_input(), state_input("state", "A clean or noisy state in the prior's own space.")],
            outputs=[picture_output("The picture, clamped to 0..1.")],
        )

    @classmethod
    def execute(cls, prior, state) -> io.NodeOutput:
        samples = state_of("state", state, prior, "a step, or a SAMPLER on the model from Prior To Model")
        return states_and_picture(prior, samples.shape, lambda session: ((), samples.to(session.device)))


NODES = [
    LoadPrior,
    PriorFromRestorer,
    ZeroShotRestore,
    RdmdStrip,
    Cm4irSigmas,
    RdmdSigmas,
    StartFromMeasurement,
    PredictClean,
    BackProject,
    MixNoise,
    Cm4irStep,
    RdmdStart,
    RdmdStep,
    Regularise,
    StateToImage,
]
