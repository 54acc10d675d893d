"""CM4IR in single steps, and its noise levels.

`guidance` lists these nodes among its own, so that those of one kind stand together in the menu.
"""

from __future__ import annotations

from ..engine import zero_shot
from ..errors import InputError
from ..guidance import cm4ir, schedules
from .api import Node, advanced, io
from .inputs import check_choices, seed_input, within
from .zero_shot_inputs import (
    CATEGORY,
    STEPS,
    as_latent,
    as_sigmas,
    check_same_shape,
    delta_inputs,
    eta_input,
    flow_input,
    gamma_input,
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
    state_of,
    state_output,
    states_and_picture,
    zeta_input,
)

_NOISY = "Start From Measurement or the step before"


class Cm4irSigmas(Node):
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
                gamma_input("How fast the noise falls."),
                flow_input(),
            ],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Noise levels and a final 0.")],
        )

    @classmethod
    def execute(cls, steps=4, start=250, gamma=0.2, flow=False) -> io.NodeOutput:
        return io.NodeOutput(as_sigmas(schedules.cm4ir_sigmas(steps, start, gamma), flow))


class StartFromMeasurement(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendStartFromMeasurement",
            display_name="Start From Measurement",
            category=STEPS,
            description="CM4IR's first state: what the measurement says (pseudo-inverse, holes filled) and noise.",
            inputs=[
                prior_input(),
                measurement_input(),
                sigmas_input(),
                seed_input("Chooses the noise."),
                zeta_input(),
                io.Combo.Input(
                    "fill",
                    options=list(cm4ir.FILLS),
                    default="medians",
                    optional=True,
                    tooltip="Holes before the first step. medians: as published. smooth: the surface of least bending, better "
                    "with priors that predict means, such as Mend's.",
                ),
            ],
            outputs=[
                state_output("x", "The noisy state, in the prior's own space."),
                state_output("clean", "The same without noise, to start a SAMPLER from."),
                picture_output("The start without noise, to look at."),
            ],
        )

    @classmethod
    def execute(cls, prior, measurement, sigmas, seed=0, zeta=0.0, fill="medians") -> io.NodeOutput:
        check_choices(cls, fill=fill)
        sigma = float(zero_shot.levels(sigmas)[0])

        def start(session):
            clean, noisy = (
                zero_shot.cm4ir_start(session, measurement, level, seed, zeta, fill) for level in (0.0, sigma)
            )
            return (noisy, session.as_latent(clean)), clean

        return states_and_picture(prior, zero_shot.picture_size(measurement), start)


class PredictClean(Node):
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
        state = state_of("x", x, prior, _NOISY)

        def predict(session):
            x0 = cm4ir.predict(session.prior, state.to(session.device), sigma, delta, delta_in_scalings)
            return (x0,), x0

        return states_and_picture(prior, state.shape, predict)


class BackProject(Node):
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
        clean = state_of("x0", x0, prior, "Predict Clean", measurement)

        def back_project(session):
            y, state = measurement.to(session.device), clean.to(session.device)
            guided = cm4ir.back_project(session.operator(y.operator), state, y.y, zeta, y.noise, mu)
            return (guided,), guided

        return states_and_picture(prior, zero_shot.picture_size(measurement), back_project)


class MixNoise(Node):
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
        within(0, 1, eta=eta)
        check_choices(cls, noise_sign=noise_sign)
        sigma, following = levels_at(sigmas, index)
        if following is None:
            raise InputError(f"index: {index} is the last noise level; its result is the picture, add no noise")
        corrected, state, clean = (latent["samples"] for latent in (guided, x, x0))
        check_same_shape(
            f"one step: guided from Back-Project, x from {_NOISY}, x0 from Predict Clean",
            guided=corrected,
            x=state,
            x0=clean,
        )
        noise = zero_shot.draw(state.shape, seed, index + 1, state.device)
        mixed = cm4ir.mix_noise(corrected, state, clean, sigma, following, noise, eta, sign_of(noise_sign))
        return io.NodeOutput(as_latent(mixed))


class Cm4irStep(Node):
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
        within(0, 1, eta=eta)
        check_choices(cls, noise_sign=noise_sign)
        sigma, following = levels_at(sigmas, index)
        noisy = state_of("x", x, prior, _NOISY, measurement)

        def step(session):
            y, state = measurement.to(session.device), noisy.to(session.device)
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
