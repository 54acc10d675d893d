"""Zero-shot restoration: a prior fills in what a measurement left open. Whole, and in single steps."""

from __future__ import annotations

from ..engine import host, loaded, zero_shot
from ..errors import InputError
from ..guidance import cm4ir, schedules
from . import sockets
from .api import advanced, io
from .images import as_image
from .inputs import ModelFile, model_input, precision_input, seed_input
from .rdmd import RdmdSigmas, RdmdStart, RdmdStep, RdmdStrip, Regularise
from .zero_shot_inputs import (
    CATEGORY,
    STEPS,
    as_latent,
    as_sigmas,
    delta_inputs,
    eta_input,
    flow_input,
    index_input,
    levels_at,
    measurement_input,
    mu_input,
    noise_sign_input,
    picture_output,
    prior_input,
    sigmas_input,
    sign_of,
    state_input,
    state_output,
    states_and_picture,
    zeta_input,
)

SCHEMES = ["CM4IR", "RDMD"]
STARTER = "mend-prior-starter.safetensors"


class LoadPrior(ModelFile, io.ComfyNode):
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
                        tooltip="What its output means. automatic: EDM for Mend's own, epsilon for ADM, consistency for the "
                        "others unless the file name says edm.",
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
        label = None if class_index < 0 else class_index
        network = loaded.load(host.model_path(model_name))
        return io.NodeOutput(zero_shot.network_prior(network, kind, label, precision))


class PriorFromRestorer(io.ComfyNode):
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


class ZeroShotRestore(io.ComfyNode):
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
                    tooltip="CM4IR's published settings per task, for the nearest noise level. automatic: by the operator. "
                    "by hand: the start, gamma and zeta below.",
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
                advanced(
                    io.Float.Input(
                        "gamma",
                        default=0.2,
                        min=0.0,
                        max=10.0,
                        step=0.01,
                        tooltip="CM4IR by hand: how fast the noise falls.",
                    )
                ),
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


class Cm4irSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCM4IRSigmas",
            display_name="CM4IR Sigmas",
            category=CATEGORY,
            description="CM4IR's noise levels, and a final 0 as ComfyUI's samplers want it.",
            inputs=[
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip="How many evaluations of the prior."),
                io.Int.Input(
                    "start",
                    default=250,
                    min=0,
                    max=998,
                    tooltip="0 starts with hardly any noise, 998 with nothing else.",
                ),
                io.Float.Input("gamma", default=0.2, min=0.0, max=10.0, step=0.01, tooltip="How fast the noise falls."),
                flow_input(),
            ],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Noise levels and a final 0.")],
        )

    @classmethod
    def execute(cls, steps=4, start=250, gamma=0.2, flow=False) -> io.NodeOutput:
        return io.NodeOutput(as_sigmas(schedules.cm4ir_sigmas(steps, start, gamma), flow))


class StartFromMeasurement(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendStartFromMeasurement",
            display_name="Start From Measurement",
            category=STEPS,
            description="CM4IR's first state: what the measurement says (pseudo-inverse, holes filled by medians) and noise.",
            inputs=[prior_input(), measurement_input(), sigmas_input(), seed_input("Chooses the noise."), zeta_input()],
            outputs=[
                state_output("x", "The noisy state, in the prior's own space."),
                state_output("clean", "The same without noise, to start a SAMPLER from."),
                picture_output("The start without noise, to look at."),
            ],
        )

    @classmethod
    def execute(cls, prior, measurement, sigmas, seed=0, zeta=0.0) -> io.NodeOutput:
        sigma = float(zero_shot.levels(sigmas)[0])

        def start(session):
            clean = zero_shot.cm4ir_start(session, measurement, 0.0, seed, zeta)
            noisy = zero_shot.cm4ir_start(session, measurement, sigma, seed, zeta)
            return (noisy, session.as_latent(clean)), clean

        return states_and_picture(prior, zero_shot.picture_size(measurement), start)


class PredictClean(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPredictClean",
            display_name="Predict Clean",
            category=STEPS,
            description="One evaluation of the prior: the clean picture that it sees in a noisy state.",
            inputs=[
                prior_input(),
                state_input("x", "The noisy state."),
                sigmas_input(),
                index_input(),
                *delta_inputs(),
            ],
            outputs=[
                state_output("x0", "The clean state."),
                picture_output(),
            ],
        )

    @classmethod
    def execute(cls, prior, x, sigmas, index=0, delta=0.0, delta_in_scalings=False) -> io.NodeOutput:
        sigma, _ = levels_at(sigmas, index)

        def predict(session):
            x0 = cm4ir.predict(session.prior, x["samples"].to(session.device), sigma, delta, delta_in_scalings)
            return (x0,), x0

        return states_and_picture(prior, x["samples"].shape, predict)


class BackProject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendBackProject",
            display_name="Back-Project",
            category=STEPS,
            description="Moves a clean state onto the measurement, leaving alone what the measurement does not say.",
            inputs=[
                prior_input(),
                measurement_input(),
                state_input("x0", "The clean state."),
                zeta_input(),
                mu_input(),
            ],
            outputs=[
                state_output("guided", "The corrected state."),
                picture_output(),
            ],
        )

    @classmethod
    def execute(cls, prior, measurement, x0, zeta=0.0, mu=1.0) -> io.NodeOutput:
        def back_project(session):
            y = measurement.to(session.device)
            state = x0["samples"].to(session.device)
            guided = cm4ir.back_project(session.operator(y.operator), state, y.y, zeta, y.noise, mu)
            return (guided,), guided

        return states_and_picture(prior, zero_shot.picture_size(measurement), back_project)


class MixNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMixNoise",
            display_name="Mix Noise",
            category=STEPS,
            description="The next noisy state: the corrected picture with a share of fresh noise and the predicted noise, "
            "turned round as in CM4IR.",
            inputs=[
                state_input("guided", "The corrected clean state."),
                state_input("x", "The noisy state that this step began with."),
                state_input("x0", "What the prior saw in it."),
                sigmas_input(),
                index_input(),
                seed_input("Chooses the fresh noise: the same one for all steps."),
                eta_input(),
                noise_sign_input(),
            ],
            outputs=[state_output("x_next", "The noisy state of the next step.")],
        )

    @classmethod
    def execute(cls, guided, x, x0, sigmas, index=0, seed=0, eta=0.1, noise_sign="turned round") -> io.NodeOutput:
        sigma, following = levels_at(sigmas, index)
        if following is None:
            raise InputError(f"index: {index} is the last noise level; its result is the picture, add no noise")
        state = x["samples"]
        noise = zero_shot.draw(state.shape, seed, index + 1, state.device)
        mixed = cm4ir.mix_noise(
            guided["samples"], state, x0["samples"], sigma, following, noise, eta, sign_of(noise_sign)
        )
        return io.NodeOutput(as_latent(mixed))


class Cm4irStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCM4IRStep",
            display_name="CM4IR Step",
            category=STEPS,
            description="One whole step of CM4IR: predict, back-project, mix noise. As many of them as there are noise levels "
            "give exactly what Zero-Shot Restore gives.",
            inputs=[
                prior_input(),
                measurement_input(),
                state_input("x", "The noisy state."),
                sigmas_input(),
                index_input(),
                seed_input("Chooses the fresh noise: the same one for all steps."),
                advanced(zeta_input()),
                advanced(eta_input()),
                advanced(mu_input()),
                *delta_inputs(),
                advanced(noise_sign_input()),
            ],
            outputs=[
                state_output("x_next", "The next state; the result after the last step."),
                state_output("x0", "What the prior saw."),
                state_output("guided", "The same, moved onto the measurement."),
                picture_output("The guided state as a picture."),
            ],
        )

    @classmethod
    def execute(
        cls,
        prior,
        measurement,
        x,
        sigmas,
        index=0,
        seed=0,
        zeta=0.0,
        eta=0.1,
        mu=1.0,
        delta=0.0,
        delta_in_scalings=False,
        noise_sign="turned round",
    ) -> io.NodeOutput:
        sigma, following = levels_at(sigmas, index)

        def step(session):
            y = measurement.to(session.device)
            state = x["samples"].to(session.device)
            settings = zero_shot.Cm4ir(zeta, eta, mu, sign_of(noise_sign), (), delta_in_scalings)
            done = cm4ir.step(
                session.prior,
                session.operator(y.operator),
                y.y,
                state,
                sigma,
                following,
                zero_shot.draw(state.shape, seed, index + 1, state.device),
                index=index,
                delta=delta,
                mu=mu,
                **settings.options(y),
            )
            onward = done.guided if done.x_next is None else done.x_next
            return (onward, done.x0, done.guided), done.guided

        return states_and_picture(prior, zero_shot.picture_size(measurement), step)


class StateToImage(io.ComfyNode):
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
        samples = state["samples"]
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
