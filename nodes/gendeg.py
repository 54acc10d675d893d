"""GenDeg, damage with a wanted intensity on Stable Diffusion: whole, in single steps, and the intensities it knows."""

from __future__ import annotations

from ..engine import gendeg, journal
from ..engine.comfy_sampling import need_comfyui
from ..engine.values import check_image
from ..errors import InputError
from ..guidance import gendeg as intensities
from . import sockets
from .api import Node, advanced, io
from .gendeg_inputs import CATEGORY, KINDS, KINDS_AND_MIXTURES, caption_input, kind_input, mu_input, sigma_input
from .images import as_image, channels_first
from .inputs import accepted, fingerprint, one_of, seed_input

GENDEG = f"{CATEGORY}/GenDeg"


def _scale(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=30.0, step=0.1, round=0.01, tooltip=tooltip)


def _scales() -> list[io.Input]:
    return [
        _scale("text_scale", gendeg.TEXT_SCALE, "Weight of degradation and intensity. 7.5 is published."),
        _scale("image_scale", gendeg.IMAGE_SCALE, "Weight of the clean picture. 1.5 is published."),
    ]


class LoadGenDeg(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadGenDeg",
            display_name="Load GenDeg",
            category=GENDEG,
            description="Loads GenDeg's generator (gendeg.ckpt) as ComfyUI's own model, text encoder and autoencoder, with the "
            "averaged weights that the published code samples with, and the layers for intensities. Needs ComfyUI.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=gendeg.checkpoint_files(),
                    tooltip="gendeg.ckpt in models/checkpoints or models/restoration.",
                ),
                advanced(
                    io.Boolean.Input(
                        "averaged",
                        default=True,
                        tooltip="On: the moving average of the weights, as published. Off: the raw ones of the last step.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="Stable Diffusion 1.5 with the clean picture."),
                io.Clip.Output("clip", display_name="clip", tooltip="Its text encoder, the usual one of 1.5."),
                io.Vae.Output("vae", display_name="vae", tooltip="Its autoencoder, the usual one of 1.5."),
                sockets.Conditioner.Output("conditioner", display_name="conditioner", tooltip="For intensities."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        return accepted(gendeg.checkpoint_path, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **others) -> str:
        return fingerprint(lambda: journal.identity(gendeg.checkpoint_path(model_name)), model_name)

    @classmethod
    def execute(cls, model_name: str, averaged: bool = True) -> io.NodeOutput:
        return io.NodeOutput(*gendeg.load(gendeg.checkpoint_path(model_name), averaged))


class DegradationIntensity(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDegradationIntensity",
            display_name="Degradation Intensity",
            category=GENDEG,
            description="Tells GenDeg what to do and how strongly: words and intensity in one conditioning, and beside it "
            "the one that says nothing, which its guidance compares with.",
            inputs=[
                sockets.Conditioner.Input("conditioner", tooltip="From Load GenDeg."),
                io.Clip.Input("clip", tooltip="The text encoder of Stable Diffusion 1.5."),
                kind_input(KINDS_AND_MIXTURES),
                mu_input(),
                sigma_input(),
                caption_input(),
                advanced(
                    io.Boolean.Input(
                        "whole_text",
                        default=False,
                        tooltip="Off: only the first 77 tokens count, as published. On: each further 77 get the intensity too.",
                    )
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Words of your own from a text encode node (end them as the text output does) instead of "
                    "degradation and caption.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("full", display_name="conditioning", tooltip="Words and intensity."),
                io.Conditioning.Output("null", display_name="null", tooltip="No words, no intensity."),
                io.String.Output("text", display_name="text", tooltip="The words, for your own text encode node."),
            ],
        )

    @classmethod
    def validate_inputs(cls, degradation: str) -> bool | str:
        return one_of("degradation", degradation, KINDS_AND_MIXTURES)

    @classmethod
    def execute(
        cls, conditioner, clip, degradation="haze", mu=0.15, sigma=0.1, caption="", whole_text=False, conditioning=None
    ) -> io.NodeOutput:
        text = intensities.caption(caption, degradation)
        words = conditioning if conditioning is not None else gendeg.encode_text(clip, text)
        full = gendeg.with_intensity(conditioner, words, mu, sigma, whole_text)
        null = gendeg.with_intensity(conditioner, gendeg.encode_text(clip, ""), None, None)
        return io.NodeOutput(full, null, text)


class GenDegGuider(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendGenDegGuider",
            display_name="Three-Way GenDeg Guider",
            category=GENDEG,
            description="Guidance by words and picture as published: three predictions (both, picture alone, neither). For "
            "SamplerCustomAdvanced with the sampler euler_ancestral. Needs ComfyUI.",
            inputs=[
                io.Model.Input("model", tooltip="From Load GenDeg, through Fractional Timesteps to be exact."),
                io.Conditioning.Input("conditioning", tooltip="From Degradation Intensity."),
                io.Conditioning.Input("null", tooltip="The null output of Degradation Intensity."),
                io.Vae.Input("vae", tooltip="From Load GenDeg."),
                io.Image.Input("image", tooltip="The clean pictures. Sides that are multiples of 64 are best."),
                *_scales(),
            ],
            outputs=[
                io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced."),
                io.Latent.Output("latent", display_name="latent", tooltip="Empty, of the right size, to start from."),
            ],
        )

    @classmethod
    def execute(cls, model, conditioning, null, vae, image, text_scale=7.5, image_scale=1.5) -> io.NodeOutput:
        need_comfyui("Three-Way GenDeg Guider")
        latent = gendeg.encode_picture(vae, channels_first(image)[:, :3])
        guider = gendeg.guider(model, conditioning, null, latent, text_scale, image_scale)
        return io.NodeOutput(guider, {"samples": latent * 0})


class FractionalTimesteps(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFractionalTimesteps",
            display_name="Fractional Timesteps",
            category=GENDEG,
            description="Tells a Stable Diffusion model the exact time of every noise level, as the published code does, where "
            "ComfyUI rounds to whole numbers, and starts from noise of exactly the first level. Needs ComfyUI.",
            inputs=[io.Model.Input("model", tooltip="A model with a table of 1,000 noise levels, such as GenDeg.")],
            outputs=[io.Model.Output("patched", display_name="model", tooltip="The same model, told exact times.")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(gendeg.published_sampling(model))


class IntensitySampler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendIntensitySampler",
            display_name="Intensity Sampler",
            category=CATEGORY,
            description="Draws an intensity as GenDeg's training pairs of a degradation have them: one of their data sets, then "
            "mean and deviation within its ranges. The same seed and number give the same intensity.",
            inputs=[
                kind_input(),
                seed_input("Chooses the sequence."),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Which one of the sequence: count up for many pictures with one seed.",
                ),
                advanced(
                    io.Int.Input(
                        "uniform_every",
                        default=20,
                        min=0,
                        max=1000,
                        tooltip="Every so many draws one is even over the whole range, so that rare intensities occur too. "
                        "20 is published; 0: never.",
                    )
                ),
            ],
            outputs=[
                io.Float.Output("mu", display_name="mu", tooltip="Mean of |clean - damaged|."),
                io.Float.Output("sigma", display_name="sigma", tooltip="Its standard deviation."),
                io.String.Output("text", display_name="text", tooltip="Both, and the data set they are drawn like."),
            ],
        )

    @classmethod
    def validate_inputs(cls, degradation: str) -> bool | str:
        return one_of("degradation", degradation, KINDS)

    @classmethod
    def execute(cls, degradation="haze", seed=0, index=0, uniform_every=20) -> io.NodeOutput:
        found = intensities.draw_intensity(degradation, seed, index, uniform_every or None)
        how = "evenly over the range of" if found.uniform else "as in"
        text = f"{degradation}: mean {found.mu:.4f}, standard deviation {found.sigma:.4f}, {how} {found.dataset}"
        if (wanted := found.ask_for(degradation)) != degradation:
            text += f", whose pictures are hazy too: choose {wanted} in Degradation Intensity"
        return io.NodeOutput(found.mu, found.sigma, text)


class MeasureIntensity(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMeasureIntensity",
            display_name="Measure Intensity",
            category=CATEGORY,
            description="How much damage there is in a picture whose clean version is known, in GenDeg's two numbers.",
            inputs=[
                io.Image.Input("clean", tooltip="The clean pictures."),
                io.Image.Input("damaged", tooltip="The damaged ones, of the same size."),
            ],
            outputs=[
                io.Float.Output("mu", display_name="mu", tooltip="Mean of |clean - damaged|, of the whole batch."),
                io.Float.Output("sigma", display_name="sigma", tooltip="Its standard deviation, of the whole batch."),
                io.String.Output("text", display_name="text", tooltip="Both for each picture."),
            ],
        )

    @classmethod
    def execute(cls, clean, damaged) -> io.NodeOutput:
        first, second = (channels_first(x)[:, :3] for x in (clean, damaged))
        check_image(first, "clean")
        check_image(second, "damaged")
        if first.shape[1:] != second.shape[1:] or len(first) not in (1, len(second)):
            raise InputError(
                f"clean and damaged: {tuple(clean.shape)} and {tuple(damaged.shape)}; sizes and numbers of pictures must "
                "be equal"
            )
        mu, sigma = intensities.measure_intensity(first.expand_as(second), second)
        pairs = zip(mu.tolist(), sigma.tolist(), strict=True)
        lines = [f"picture {i}: mean {m:.4f}, standard deviation {s:.4f}" for i, (m, s) in enumerate(pairs)]
        return io.NodeOutput(float(mu.mean()), float(sigma.mean()), "\n".join(lines))


class CorrectStructure(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendStructureCorrection",
            display_name="Structure Correction",
            category=GENDEG,
            description="Repairs what the autoencoder bent in GenDeg's pictures (faces, letters, edges) by comparing with the "
            "clean ones. Published for haze and motion blur.",
            inputs=[
                sockets.Restorer.Input("network", tooltip="GenDeg's nafnet_sd.ckpt, from Load Restorer."),
                io.Image.Input("clean", tooltip="The clean pictures."),
                io.Image.Input("generated", tooltip="What GenDeg made of them, of the same size."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How much of the correction to apply; 1 is published.",
                ),
            ],
            outputs=[io.Image.Output("corrected", display_name="image", tooltip="The corrected pictures, in 0..1.")],
        )

    @classmethod
    def execute(cls, network, clean, generated, strength=1.0) -> io.NodeOutput:
        pictures = (channels_first(x)[:, :3] for x in (clean, generated))
        return io.NodeOutput(as_image(gendeg.correct(network, *pictures, strength)))


class DegraderFromGenDeg(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDegraderFromGenDeg",
            display_name="Degrader From GenDeg",
            category=GENDEG,
            description="GenDeg with all its settings as one thing, for Synthesise Degradation and Make Dataset. Does what the "
            "chain of single nodes does, exact times included. Needs ComfyUI.",
            inputs=[
                io.Model.Input("model", tooltip="From Load GenDeg, with LoRAs or other patches if you like."),
                io.Clip.Input("clip", tooltip="From Load GenDeg."),
                io.Vae.Input("vae", tooltip="From Load GenDeg."),
                sockets.Conditioner.Input("conditioner", tooltip="From Load GenDeg."),
                io.Int.Input(
                    "steps", default=gendeg.STEPS, min=1, max=1000, tooltip="Steps of the sampler. 100 is published."
                ),
                *_scales(),
                io.Boolean.Input(
                    "correct_raindrops",
                    default=False,
                    tooltip="Also correct the structure of pictures with raindrops: the published help says so, the published "
                    "code does not do it. Haze and motion blur are always corrected if a network is connected.",
                ),
                sockets.Restorer.Input(
                    "correction",
                    optional=True,
                    tooltip="GenDeg's nafnet_sd.ckpt, from Load Restorer: Structure Correction.",
                ),
            ],
            outputs=[
                sockets.Degrader.Output("degrader", display_name="degrader", tooltip="For Synthesise Degradation.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        conditioner,
        steps=100,
        text_scale=7.5,
        image_scale=1.5,
        correct_raindrops=False,
        correction=None,
    ) -> io.NodeOutput:
        need_comfyui("Degrader From GenDeg")
        gendeg.conditioner_of(conditioner)
        return io.NodeOutput(
            gendeg.GenDegDegrader(
                model, clip, vae, conditioner, correction, text_scale, image_scale, steps, correct_raindrops
            )
        )


NODES = [
    LoadGenDeg,
    DegradationIntensity,
    GenDegGuider,
    FractionalTimesteps,
    IntensitySampler,
    MeasureIntensity,
    CorrectStructure,
    DegraderFromGenDeg,
]
