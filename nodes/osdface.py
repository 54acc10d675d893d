"""OSDFace, one step of Stable Diffusion 2.1 for faces: in one node and in its parts."""

from __future__ import annotations

from ..engine import journal, model_folder, osdface
from ..guidance.latent_diffusion import OSDFACE_TIMESTEP
from . import sockets
from .api import Node, advanced, io
from .faces import COLOURS
from .images import as_image, channels_first
from .inputs import accepted, chosen, fingerprint, first_problem, one_of, seed_input, within

CATEGORY = "Mend/faces/OSDFace"
IN_TOKENIZER = "in the tokenizer's file"
LATENTS = ["deterministic", "drawn"]


def _timestep() -> io.Input:
    return advanced(
        io.Int.Input(
            "timestep",
            default=OSDFACE_TIMESTEP,
            min=0,
            max=999,
            tooltip="The time of the noise schedule that the one step is taken for. OSDFace's weights are made for 399.",
        )
    )


def _latent_mode() -> list[io.Input]:
    return [
        io.Combo.Input(
            "latent",
            options=LATENTS,
            default="deterministic",
            tooltip="deterministic: the mean of the VAE's distribution, the same every time. drawn: a sample of it, as "
            "published; differs a little from seed to seed.",
        ),
        seed_input("For drawn latents: the same seed gives the same picture.", most=(1 << 63) - 1),
    ]


class LoadFaceEmbedder(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = model_folder.model_files()
        return io.Schema(
            node_id="MendLoadFaceEmbedder",
            display_name="Load Face Embedder",
            category=CATEGORY,
            description="Loads OSDFace's visual representation embedder, which turns a face into a prompt for Stable "
            "Diffusion 2.1. The released files go to models/restoration as they are.",
            inputs=[
                io.Combo.Input(
                    "tokenizer",
                    options=files,
                    tooltip="associate_2.ckpt: the visual tokenizer and its dictionary. Read without running anything in it.",
                ),
                io.Combo.Input(
                    "projection",
                    options=[IN_TOKENIZER, *files],
                    default=IN_TOKENIZER,
                    tooltip="embedding_change_weights.pth: from tokens to prompts.",
                ),
            ],
            outputs=[
                sockets.FaceEmbedder.Output(
                    "embedder", display_name="embedder", tooltip="For Face Visual Prompt and Restore Faces."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, tokenizer: str | None, projection: str | None) -> bool | str:
        own_file = None if projection == IN_TOKENIZER else projection
        return first_problem(accepted(model_folder.model_path, tokenizer), accepted(model_folder.model_path, own_file))

    @classmethod
    def fingerprint_inputs(cls, tokenizer: str | None = None, projection: str | None = None) -> str:
        files = [name for name in (tokenizer, projection) if name not in (None, IN_TOKENIZER)]
        return fingerprint(lambda: ":".join(journal.identity(model_folder.model_path(name)) for name in files))

    @classmethod
    def execute(cls, tokenizer: str, projection: str = IN_TOKENIZER) -> io.NodeOutput:
        second = None if projection == IN_TOKENIZER else model_folder.model_path(projection)
        return io.NodeOutput(osdface.load_embedder(model_folder.model_path(tokenizer), second))


class FaceVisualPrompt(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFaceVisualPrompt",
            display_name="Face Visual Prompt",
            category=CATEGORY,
            description="Describes degraded faces to OSDFace's model: 77 visual tokens from a learned dictionary, in place of "
            "a text prompt. One face or a batch, any size.",
            inputs=[
                sockets.FaceEmbedder.Input("embedder", tooltip="From Load Face Embedder."),
                io.Image.Input("image", tooltip="Aligned faces, as they are to be restored."),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="The prompt, one row per face."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="How many tokens each face filled; few mean that it is unlike a face.",
                ),
            ],
        )

    @classmethod
    def execute(cls, embedder, image) -> io.NodeOutput:
        prompt, distinct = osdface.prompts(embedder, channels_first(image))
        return io.NodeOutput([[prompt, {}]], osdface.describe_tokens(distinct, prompt.shape[1]))


class FaceLora(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFaceLora",
            display_name="Face LoRA",
            category=CATEGORY,
            description="Puts OSDFace's LoRA on a Stable Diffusion 2.1 base model, every layer of it. ComfyUI's own LoRA loader "
            "does not know the file's names for attention layers and would leave them out. Needs ComfyUI.",
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 2.1 base, from Load Checkpoint."),
                io.Combo.Input(
                    "lora_name",
                    options=model_folder.lora_files(),
                    tooltip="pytorch_lora_weights.safetensors, from models/loras or models/restoration.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="1 as published; less restores less.",
                ),
                advanced(
                    io.Boolean.Input(
                        "strict",
                        default=True,
                        tooltip="Stop if any layer of the file has no place in the model. Off: use those that have one.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(
                    "patched", display_name="model", tooltip="The model with the LoRA; the input is unchanged."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="How many layers of the file found their place in the model.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        return accepted(model_folder.lora_path, lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others) -> str:
        return fingerprint(lambda: journal.identity(model_folder.lora_path(lora_name)), lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength=1.0, strict=True) -> io.NodeOutput:
        return io.NodeOutput(*osdface.apply_lora(model, model_folder.lora_path(lora_name), strength, strict))


class OneStepSigmas(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOneStepSigmas",
            display_name="One-Step Sigmas",
            category=CATEGORY,
            description="The schedule of a one-step model for ComfyUI's samplers: the noise level of one time, then 0. "
            "Use it with sampler euler, Disable Noise, Basic Guider and One-Step Latent.",
            inputs=[_timestep()],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="1.1606 and 0 for OSDFace.")],
        )

    @classmethod
    def execute(cls, timestep=OSDFACE_TIMESTEP) -> io.NodeOutput:
        within(0, 999, timestep=timestep)
        return io.NodeOutput(osdface.sigmas(timestep))


class OneStepLatent(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOneStepLatent",
            display_name="One-Step Latent",
            category=CATEGORY,
            description="Scales a latent so that a one-step model sees it unchanged: ComfyUI's samplers divide what they "
            "give the model by the square root of 1 + sigma squared.",
            inputs=[
                io.Latent.Input("latent", tooltip="The degraded face's latent, from Encode Face or VAE Encode."),
                _timestep(),
            ],
            outputs=[io.Latent.Output("scaled", display_name="latent", tooltip="For the sampler's latent image.")],
        )

    @classmethod
    def execute(cls, latent, timestep=OSDFACE_TIMESTEP) -> io.NodeOutput:
        within(0, 999, timestep=timestep)
        return io.NodeOutput({**latent, "samples": osdface.prescaled(latent["samples"], timestep)})


class EncodeFace(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendEncodeFace",
            display_name="Encode Face",
            category=CATEGORY,
            description="Encodes faces with the VAE as OSDFace does: drawn from its distribution if wanted, and padded where "
            "VAE Encode would cut off the border. Needs ComfyUI.",
            inputs=[
                io.Vae.Input("vae", tooltip="From the Stable Diffusion 2.1 base checkpoint."),
                io.Image.Input("image", tooltip="Aligned faces."),
                *_latent_mode(),
            ],
            outputs=[io.Latent.Output("encoded", display_name="latent", tooltip="For One-Step Latent.")],
        )

    @classmethod
    def validate_inputs(cls, latent: str | None) -> bool | str:
        return one_of("latent", latent, LATENTS)

    @classmethod
    def execute(cls, vae, image, latent="deterministic", seed=0) -> io.NodeOutput:
        drawn = chosen("latent", latent, LATENTS) == "drawn"
        samples = osdface.encode(vae, channels_first(image), seed if drawn else None)
        return io.NodeOutput({"samples": samples})


class RestoreFaces(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendRestoreFaces",
            display_name="Restore Faces",
            category="Mend/faces",
            description="Restores aligned faces with OSDFace: one step of Stable Diffusion 2.1 base with Face LoRA, guided by "
            "visual tokens of the faces themselves. Needs ComfyUI.",
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 2.1 base with OSDFace's LoRA, from Face LoRA."),
                io.Vae.Input("vae", tooltip="From the same checkpoint."),
                sockets.FaceEmbedder.Input("embedder", tooltip="From Load Face Embedder."),
                io.Image.Input("image", tooltip="Faces, best aligned by Align Faces: 512 x 512, one or a batch."),
                *_latent_mode(),
                io.Combo.Input(
                    "colour_fix",
                    options=COLOURS,
                    default="none",
                    tooltip="Gives the result the colours of the input. none, as published, or a method of Colour Fix.",
                ),
                advanced(
                    io.Int.Input(
                        "square_size",
                        default=512,
                        min=0,
                        max=2048,
                        step=64,
                        tooltip="Square faces are scaled to this side first, as published. 0: keep their size. Other shapes "
                        "always keep theirs.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "faces_at_once",
                        default=8,
                        min=1,
                        max=256,
                        tooltip="How many faces go through the model together; fewer need less memory.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output("restored", display_name="image", tooltip="The restored faces."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="How many tokens each face filled; few mean that it is unlike a face.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, latent: str | None, colour_fix: str | None) -> bool | str:
        return first_problem(one_of("latent", latent, LATENTS), one_of("colour_fix", colour_fix, COLOURS))

    @classmethod
    def execute(
        cls,
        model,
        vae,
        embedder,
        image,
        latent="deterministic",
        seed=0,
        colour_fix="none",
        square_size=512,
        faces_at_once=8,
    ) -> io.NodeOutput:
        drawn, colour = chosen("latent", latent, LATENTS) == "drawn", chosen("colour_fix", colour_fix, COLOURS)
        restored, distinct = osdface.restore(
            model,
            vae,
            embedder,
            channels_first(image),
            seed=seed if drawn else None,
            square=square_size,
            colour=None if colour == "none" else colour,
            at_once=faces_at_once,
        )
        return io.NodeOutput(as_image(restored), osdface.describe_tokens(distinct, embedder.prompter.tokens))


NODES = [
    RestoreFaces,
    LoadFaceEmbedder,
    FaceVisualPrompt,
    FaceLora,
    EncodeFace,
    OneStepLatent,
    OneStepSigmas,
]
