"""RDMD in single steps, its noise levels, and its slider between faithful and generative as a strip of pictures.

`guidance` lists these nodes among its own, so that those of one kind stand together in the menu.
"""

from __future__ import annotations

import torch

from ..engine import host, zero_shot
from ..engine.pictures import from_pil, labelled, to_pil
from ..errors import InputError
from ..guidance import rdmd, schedules
from .api import Node, advanced, io
from .images import as_image
from .inputs import above, seed_input, within
from .zero_shot_inputs import (
    CATEGORY,
    STEPS,
    as_latent,
    as_sigmas,
    check_same_shape,
    flow_input,
    index_input,
    measurement_input,
    picture_output,
    prior_input,
    state_input,
    state_of,
    state_output,
    states_and_picture,
)

_STATES = "RDMD Start or the step before"


def rdmd_weights() -> list[io.Input]:
    return [
        io.Float.Input(
            "tau", default=0.5, min=0.0, max=1.0, step=0.05, tooltip="0 stays faithful and smooth, 1 invents detail."
        ),
        advanced(
            io.Float.Input(
                "weight", default=20.0, min=0.0, max=1000.0, step=1.0, tooltip="Of the prior against the measurement."
            )
        ),
    ]


def renewal_input() -> io.Input:
    return advanced(
        io.Float.Input(
            "renewal",
            default=-1.0,
            min=-1.0,
            max=1.0,
            step=0.05,
            tooltip="Share of fresh noise. -1: as published, 0 for super-resolution, 0.3 elsewhere.",
        )
    )


class RdmdSigmas(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRDMDSigmas",
            display_name="RDMD Sigmas",
            category=CATEGORY,
            description="RDMD's noise levels: big steps at high noise, small ones at low; and a final 0.",
            inputs=[
                io.Int.Input("steps", default=100, min=2, max=1000, tooltip="How many iterations; 100 as published."),
                flow_input(),
            ],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Noise levels and a final 0.")],
        )

    @classmethod
    def execute(cls, steps=100, flow=False) -> io.NodeOutput:
        return io.NodeOutput(as_sigmas(schedules.rdmd_schedule(steps).sigmas, flow))


class RdmdStart(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRDMDStart",
            display_name="RDMD Start",
            category=STEPS,
            description="RDMD's first estimate (the picture as it was measured, enlarged if need be) and first noisy state.",
            inputs=[prior_input(), measurement_input(), seed_input("Chooses the noise.")],
            outputs=[
                state_output("u", "The running estimate."),
                state_output("x", "The noisy state of the diffusion chain."),
            ],
        )

    @classmethod
    def execute(cls, prior, measurement, seed=0) -> io.NodeOutput:
        sigma = float(schedules.rdmd_schedule().sigmas[0])
        size = zero_shot.picture_size(measurement)
        u, x = prior.run(size, lambda session: zero_shot.rdmd_start(session, measurement, sigma, seed))
        return io.NodeOutput(as_latent(u), as_latent(x))


class RdmdStep(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRDMDStep",
            display_name="RDMD Step",
            category=STEPS,
            description="One iteration of RDMD: regularise the estimate, denoise the state, move both towards the measurement.",
            inputs=[
                prior_input(),
                measurement_input(),
                state_input("u", "The running estimate."),
                state_input("x", "The noisy state."),
                index_input(),
                seed_input("Chooses the fresh noise: the same one for all steps."),
                io.Int.Input(
                    "iterations", default=100, min=2, max=1000, tooltip="Of the whole chain; the same in all its steps."
                ),
                *rdmd_weights(),
                renewal_input(),
            ],
            outputs=[
                state_output("u_next", "The estimate after this step."),
                state_output("x_next", "The state after this step."),
                state_output("denoised", "What the prior saw in the state."),
                picture_output("The estimate as a picture."),
            ],
        )

    @classmethod
    def execute(
        cls, prior, measurement, u, x, index=0, seed=0, iterations=100, tau=0.5, weight=20.0, renewal=-1.0
    ) -> io.NodeOutput:
        within(-1, 1, renewal=renewal)
        settings = zero_shot.Rdmd(iterations, tau, weight, None if renewal < 0 else renewal)
        if index >= iterations:
            raise InputError(f"index: {index}, but there are {iterations} iterations (0..{iterations - 1})")
        estimate = state_of("u", u, prior, _STATES, measurement)
        noisy = state_of("x", x, prior, _STATES, measurement)
        check_same_shape(_STATES, u=estimate, x=noisy)

        def step(session):
            y = measurement.to(session.device)
            done = rdmd.iterate(
                session.prior,
                session.operator(y.operator),
                y.y,
                estimate.to(session.device),
                noisy.to(session.device),
                settings.schedule(y),
                index,
                zero_shot.rdmd_draw(estimate.shape, seed, session.device),
                zeta=settings.fresh(y),
            )
            return (done.u, done.x_next, done.u if done.denoised is None else done.denoised), done.u

        return states_and_picture(prior, zero_shot.picture_size(measurement), step)


class Regularise(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRegularise",
            display_name="Regularise",
            category=STEPS,
            description="RDMD's deterministic half: the prior cleans an estimate as if it had a little noise.",
            inputs=[
                prior_input(),
                state_input("u", "The estimate."),
                io.Float.Input(
                    "level",
                    default=0.05,
                    min=0.001,
                    max=1.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="How much noise the prior is to take away, 0..1 scale.",
                ),
                advanced(
                    io.Boolean.Input(
                        "consistent",
                        default=False,
                        tooltip="Scale the prior's input as theory has it; the published code does not.",
                    )
                ),
            ],
            outputs=[
                state_output("regularised", "The cleaned estimate."),
                picture_output(),
            ],
        )

    @classmethod
    def execute(cls, prior, u, level=0.05, consistent=False) -> io.NodeOutput:
        estimate = state_of("u", u, prior, _STATES)

        def regularise(session):
            regularised = rdmd.regularise(session.prior, estimate.to(session.device), level, consistent)
            return (regularised,), regularised

        return states_and_picture(prior, estimate.shape, regularise)


class RdmdStrip(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRDMDStrip",
            display_name="RDMD Slider Strip",
            category=CATEGORY,
            description="RDMD's slider between faithful and generative, drawn: one restoration per value of tau, side by side.",
            inputs=[
                prior_input(),
                measurement_input(),
                seed_input("Chooses all noise."),
                io.Int.Input("count", default=3, min=2, max=9, tooltip="How many values of tau, from 0 to 1."),
                io.Int.Input(
                    "iterations", default=100, min=2, max=1000, tooltip="Iterations of each; 100 as published."
                ),
            ],
            outputs=[
                io.Image.Output("strip", display_name="strip", tooltip="The first picture at every tau, labelled."),
                io.Image.Output("restored", display_name="image", tooltip="All results, a batch in the order of tau."),
            ],
        )

    @classmethod
    def execute(cls, prior, measurement, seed=0, count=3, iterations=100) -> io.NodeOutput:
        above(1, count=count)
        results, taus = [], [k / (count - 1) for k in range(count)]
        for k, tau in enumerate(taus):
            with host.part_of_progress(k, count):
                settings = zero_shot.Rdmd(iterations, tau)
                results.append(zero_shot.restore_rdmd(prior, measurement, seed, settings))
        strip = labelled([to_pil(r[0]) for r in results], [f"tau {tau:.2f}" for tau in taus])
        return io.NodeOutput(as_image(from_pil(strip)[None]), as_image(torch.cat(results)))
