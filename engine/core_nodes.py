"""Twins of the ComfyUI core nodes that our workflows use: same ids, inputs, outputs and results.

Each is a function; the decorator makes a node class of it. Inside ComfyUI its own nodes are used, never these.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

from ..errors import InputError
from . import folders, video
from . import node_io as io
from . import node_ui as ui

LARGEST = 16384
METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]

NODES: list[type[io.ComfyNode]] = []


def _node(
    node_id: str, title: str | None, category: str, inputs: Callable[[], list], outputs: list, **more: Any
) -> Callable[[Callable], type[io.ComfyNode]]:
    """Makes a node class of a function that returns one output, a tuple of them or a NodeOutput.

    `inputs` is called whenever the node is described. `more` may hold `validate_inputs`, `fingerprint_inputs`
    (functions of the inputs they name) and fields of the schema; a function that names `cls` gets it.
    """
    methods = {name: more.pop(name) for name in ("validate_inputs", "fingerprint_inputs") if name in more}

    def decorate(function: Callable) -> type[io.ComfyNode]:
        takes_cls = "cls" in inspect.signature(function).parameters

        def define_schema(cls: type[io.ComfyNode]) -> io.Schema:
            made = [kind.Output(display_name=name) for kind, name in outputs]
            return io.Schema(node_id, title, category, inputs(), made, description=function.__doc__ or "", **more)

        def execute(cls: type[io.ComfyNode], **values: Any) -> io.NodeOutput:
            if takes_cls:
                values["cls"] = cls
            returned = function(**values)
            if isinstance(returned, io.NodeOutput):
                return returned
            return io.NodeOutput(*(returned if isinstance(returned, tuple) else (returned,)))

        members = {"define_schema": define_schema, "execute": execute}
        members = {name: classmethod(method) for name, method in {**members, **methods}.items()}
        node_class = type(node_id, (io.ComfyNode,), {**members, "__doc__": function.__doc__})
        NODES.append(node_class)
        return node_class

    return decorate


def _size(name: str, default: int = 512, low: int = 1) -> io.Input:
    return io.Int.Input(name, default=default, min=low, max=LARGEST, step=1)


# Reading and writing --------------------------------------------------------------------------------------------------


def _tolerant(read: Callable[[Any], Any], source: Any) -> Any:
    """A cut-off file gives what there is of it, as in ComfyUI."""
    try:
        return read(source)
    except (OSError, UnidentifiedImageError, ValueError):
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            return read(source)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright(picture: Image.Image) -> Image.Image:
    picture = _tolerant(ImageOps.exif_transpose, picture)
    return picture.point(lambda value: value * (1 / 255)) if picture.mode == "I" else picture


def _channel(picture: Image.Image, name: str | None = None) -> torch.Tensor:
    picture = picture if name is None else picture.getchannel(name)
    return torch.from_numpy(np.array(picture).astype(np.float32) / 255.0)


def _no_mask() -> torch.Tensor:
    return torch.zeros(64, 64)


def read_picture(source: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """An image file as LoadImage reads it: ([B, H, W, 3], [B, H, W] = 1 - alpha, or zeros [1, 64, 64] without alpha).

    Turned upright by its EXIF entry. Frames of an animation form the batch, those of another size are left out.
    """
    opened = _tolerant(Image.open, source)
    images: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    for frame in ImageSequence.Iterator(opened):
        frame = _upright(frame)
        image = _channel(frame.convert("RGB"))
        if images and image.shape != images[0].shape:
            continue
        images.append(image)
        if "A" in frame.getbands():
            masks.append(1.0 - _channel(frame, "A"))
        elif frame.mode == "P" and "transparency" in frame.info:
            masks.append(1.0 - _channel(frame.convert("RGBA"), "A"))
        else:
            masks.append(_no_mask())
    if opened.format == "MPO":  # the further pictures of a camera's file are thumbnails and views
        images, masks = images[:1], masks[:1]
    return torch.stack(images), torch.stack(masks)


def _input_path(image: str) -> Any:
    path = folders.input_path(image)
    if path is None:
        raise InputError(f"Invalid image file: {image}")
    return path


def _image_exists(cls: type[io.ComfyNode], image: str) -> bool | str:
    return True if image is None or folders.input_path(image) is not None else f"Invalid image file: {image}"


def _digest(cls: type[io.ComfyNode], image: str, channel: str | None = None) -> str:
    return hashlib.sha256(_input_path(image).read_bytes()).hexdigest()


_IMAGE_FILE = {"validate_inputs": _image_exists, "fingerprint_inputs": _digest}


def _image_choice() -> io.Input:
    return io.Combo.Input("image", options=folders.input_files(), upload=io.UploadType.image)


@_node(
    "LoadImage", "Load Image", "image", lambda: [_image_choice()], [(io.Image, None), (io.Mask, None)], **_IMAGE_FILE
)
def load_image(image: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads a picture from the input folder."""
    return read_picture(_input_path(image))


@_node(
    "LoadImageMask",
    "Load Image (as Mask)",
    "mask",
    lambda: [_image_choice(), io.Combo.Input("channel", options=["alpha", "red", "green", "blue"])],
    [(io.Mask, None)],
    **_IMAGE_FILE,
)
def load_image_mask(image: str, channel: str) -> torch.Tensor:
    """Loads one channel of a picture as a mask."""
    picture = _upright(_tolerant(Image.open, _input_path(image)))
    if picture.getbands() != ("R", "G", "B", "A"):
        picture = picture.convert("RGBA")
    mask = _channel(picture, channel[0].upper())[None]
    return 1.0 - mask if channel == "alpha" else mask


def _save_inputs() -> list[io.Input]:
    tooltip = "The prefix for the file to save; it may hold a subfolder and %width%, %height%, %year% and the like."
    return [
        io.Image.Input("images", tooltip="The images to save."),
        io.String.Input("filename_prefix", default="ComfyUI", tooltip=tooltip),
    ]


@_node("SaveImage", "Save Image", "image", _save_inputs, [], is_output_node=True)
def save_image(images: torch.Tensor, filename_prefix: str, cls: Any = None) -> io.NodeOutput:
    """Saves the pictures to the output folder."""
    return io.NodeOutput(ui=ui.ImageSaveHelper.get_save_images_ui(images, filename_prefix, cls=cls))


@_node("PreviewImage", "Preview Image", "image", lambda: [io.Image.Input("images")], [], is_output_node=True)
def preview_image(images: torch.Tensor, cls: Any = None) -> io.NodeOutput:
    """Shows the pictures."""
    return io.NodeOutput(ui={"images": ui.PreviewImage(images, cls=cls).values})


@_node("MaskPreview", None, "mask", lambda: [io.Mask.Input("mask")], [], is_output_node=True)
def preview_mask(mask: torch.Tensor, cls: Any = None) -> io.NodeOutput:
    """Shows a mask."""
    return io.NodeOutput(ui={"images": ui.PreviewMask(mask, cls=cls).values})


@_node("PreviewAny", "Preview Any", "utils", lambda: [io.AnyType.Input("source")], [], is_output_node=True)
def preview_any(source: Any = None) -> io.NodeOutput:
    """Shows any value as text."""
    if source is None or isinstance(source, (str, int, float, bool)):
        text = str(source)
    else:
        try:
            text = json.dumps(source)
        except (TypeError, ValueError):
            text = str(source)
    return io.NodeOutput(ui={"text": (text,)})


# Sizes and batches ----------------------------------------------------------------------------------------------------


def resize(image: torch.Tensor, width: int, height: int, method: str, crop: str = "disabled") -> torch.Tensor:
    """[B, H, W, C] to height x width; crop "center" keeps the aspect by cutting the longer side."""
    samples = image.movedim(-1, 1)
    if crop == "center":
        old_height, old_width = samples.shape[-2:]
        old_aspect, new_aspect = old_width / old_height, width / height
        x = round((old_width - old_width * (new_aspect / old_aspect)) / 2) if old_aspect > new_aspect else 0
        y = round((old_height - old_height * (old_aspect / new_aspect)) / 2) if old_aspect < new_aspect else 0
        samples = samples[..., y : old_height - y, x : old_width - x]
    if method != "lanczos":
        return F.interpolate(samples, size=(height, width), mode=method).movedim(1, -1)
    resized = []
    for sample in samples.movedim(1, -1):
        picture = ui.ImageSaveHelper._convert_tensor_to_pil(sample)
        pixels = np.array(picture.resize((width, height), Image.Resampling.LANCZOS)).astype(np.float32) / 255.0
        resized.append(torch.from_numpy(pixels.reshape(height, width, -1)))
    return torch.stack(resized).to(image.device, image.dtype)


def _method() -> io.Input:
    return io.Combo.Input("upscale_method", options=METHODS)


@_node(
    "ImageScale",
    "Upscale Image",
    "image/upscaling",
    lambda: [
        io.Image.Input("image"),
        _method(),
        _size("width", low=0),
        _size("height", low=0),
        io.Combo.Input("crop", options=["disabled", "center"]),
    ],
    [(io.Image, None)],
)
def image_scale(image: torch.Tensor, upscale_method: str, width: int, height: int, crop: str) -> torch.Tensor:
    """Scales to a size; 0 keeps the aspect."""
    if width == 0 and height == 0:
        return image
    width = width or max(1, round(image.shape[2] * height / image.shape[1]))
    height = height or max(1, round(image.shape[1] * width / image.shape[2]))
    return resize(image, width, height, upscale_method, crop)


@_node(
    "ImageScaleBy",
    "Upscale Image By",
    "image/upscaling",
    lambda: [
        io.Image.Input("image"),
        _method(),
        io.Float.Input("scale_by", default=1.0, min=0.01, max=8.0, step=0.01),
    ],
    [(io.Image, None)],
)
def image_scale_by(image: torch.Tensor, upscale_method: str, scale_by: float) -> torch.Tensor:
    """Scales by a factor."""
    return resize(image, round(image.shape[2] * scale_by), round(image.shape[1] * scale_by), upscale_method)


@_node(
    "ImageBatch",
    "Batch Images",
    "image",
    lambda: [io.Image.Input("image1"), io.Image.Input("image2")],
    [(io.Image, None)],
)
def image_batch(image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
    """Joins two batches; the second is scaled to the size of the first."""
    if image1.shape[1:] != image2.shape[1:]:
        image2 = resize(image2, image1.shape[2], image1.shape[1], "bilinear", "center")
    return torch.cat([image1, image2])


@_node(
    "ImageFromBatch",
    "ImageFromBatch",
    "image/batch",
    lambda: [
        io.Image.Input("image"),
        io.Int.Input("batch_index", default=0, min=0, max=4095),
        io.Int.Input("length", default=1, min=1, max=4096),
    ],
    [(io.Image, None)],
)
def image_from_batch(image: torch.Tensor, batch_index: int, length: int) -> torch.Tensor:
    """Takes pictures out of a batch."""
    first = min(image.shape[0] - 1, batch_index)
    return image[first : first + min(image.shape[0] - first, length)].clone()


@_node(
    "RepeatImageBatch",
    "RepeatImageBatch",
    "image/batch",
    lambda: [io.Image.Input("image"), io.Int.Input("amount", default=1, min=1, max=4096)],
    [(io.Image, None)],
)
def repeat_image_batch(image: torch.Tensor, amount: int) -> torch.Tensor:
    """Repeats a batch."""
    return image.repeat(amount, 1, 1, 1)


@_node(
    "ImageCrop",
    "Image Crop",
    "image/transform",
    lambda: [io.Image.Input("image"), _size("width"), _size("height"), _size("x", 0, 0), _size("y", 0, 0)],
    [(io.Image, None)],
)
def image_crop(image: torch.Tensor, width: int, height: int, x: int, y: int) -> torch.Tensor:
    """Cuts a rectangle out."""
    x, y = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
    return image[:, y : y + height, x : x + width]


@_node("ImageInvert", "Invert Image", "image", lambda: [io.Image.Input("image")], [(io.Image, None)])
def image_invert(image: torch.Tensor) -> torch.Tensor:
    """1 - image."""
    return 1.0 - image


@_node(
    "EmptyImage",
    None,
    "image",
    lambda: [
        _size("width"),
        _size("height"),
        io.Int.Input("batch_size", default=1, min=1, max=4096),
        io.Int.Input("color", default=0, min=0, max=0xFFFFFF, step=1),
    ],
    [(io.Image, None)],
)
def empty_image(width: int, height: int, batch_size: int, color: int) -> torch.Tensor:
    """Pictures of one colour, given as 0xRRGGBB."""
    colour = torch.tensor([color >> 16 & 255, color >> 8 & 255, color & 255]) / 255
    return colour.expand(batch_size, height, width, 3).clone()


@_node(
    "ImageBlend",
    "Image Blend",
    "image/postprocessing",
    lambda: [
        io.Image.Input("image1"),
        io.Image.Input("image2"),
        io.Float.Input("blend_factor", default=0.5, min=0.0, max=1.0, step=0.01),
        io.Combo.Input("blend_mode", options=["normal", "multiply", "screen", "overlay", "soft_light", "difference"]),
    ],
    [(io.Image, None)],
)
def image_blend(image1: torch.Tensor, image2: torch.Tensor, blend_factor: float, blend_mode: str) -> torch.Tensor:
    """Lays the second picture over the first."""
    modes: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "normal": lambda a, b: b,
        "multiply": lambda a, b: a * b,
        "screen": lambda a, b: 1 - (1 - a) * (1 - b),
        "overlay": lambda a, b: torch.where(a <= 0.5, 2 * a * b, 1 - 2 * (1 - a) * (1 - b)),
        "difference": lambda a, b: a - b,
    }
    if blend_mode not in modes:
        raise InputError(f"blend_mode: {blend_mode!r} is not in the built-in runner; run this workflow in ComfyUI")
    if image1.shape != image2.shape:
        image2 = resize(image2, image1.shape[2], image1.shape[1], "bicubic", "center")
    blended = modes[blend_mode](image1, image2)
    return (image1 * (1 - blend_factor) + blended * blend_factor).clamp(0, 1)


# Masks ----------------------------------------------------------------------------------------------------------------


@_node(
    "SolidMask",
    None,
    "mask",
    lambda: [
        io.Float.Input("value", default=1.0, min=0.0, max=1.0, step=0.01),
        _size("width"),
        _size("height"),
    ],
    [(io.Mask, None)],
)
def solid_mask(value: float, width: int, height: int) -> torch.Tensor:
    """A mask of one value."""
    return torch.full((1, height, width), value)


@_node("InvertMask", None, "mask", lambda: [io.Mask.Input("mask")], [(io.Mask, None)])
def invert_mask(mask: torch.Tensor) -> torch.Tensor:
    """1 - mask."""
    return 1.0 - mask


@_node("MaskToImage", "Convert Mask to Image", "mask", lambda: [io.Mask.Input("mask")], [(io.Image, None)])
def mask_to_image(mask: torch.Tensor) -> torch.Tensor:
    """A mask as a grey picture."""
    return mask.reshape(-1, *mask.shape[-2:], 1).expand(-1, -1, -1, 3)


@_node(
    "ImageToMask",
    "Convert Image to Mask",
    "mask",
    lambda: [io.Image.Input("image"), io.Combo.Input("channel", options=["red", "green", "blue", "alpha"])],
    [(io.Mask, None)],
)
def image_to_mask(image: torch.Tensor, channel: str) -> torch.Tensor:
    """One channel of a picture as a mask."""
    return image[..., ["red", "green", "blue", "alpha"].index(channel)]


@_node(
    "ThresholdMask",
    None,
    "mask",
    lambda: [io.Mask.Input("mask"), io.Float.Input("value", default=0.5, min=0.0, max=1.0, step=0.01)],
    [(io.Mask, None)],
)
def threshold_mask(mask: torch.Tensor, value: float) -> torch.Tensor:
    """1 where the mask is above a value."""
    return (mask > value).float()


@_node(
    "GrowMask",
    None,
    "mask",
    lambda: [
        io.Mask.Input("mask"),
        io.Int.Input("expand", default=0, min=-LARGEST, max=LARGEST, step=1),
        io.Boolean.Input("tapered_corners", default=True),
    ],
    [(io.Mask, None)],
)
def grow_mask(mask: torch.Tensor, expand: int, tapered_corners: bool) -> torch.Tensor:
    """Widens a mask by pixels; shrinks it when negative."""
    sign = -1.0 if expand < 0 else 1.0
    grown = sign * mask.reshape(-1, 1, *mask.shape[-2:])
    for _ in range(abs(expand)):
        if tapered_corners:  # a cross: rows and columns apart
            grown = torch.maximum(F.max_pool2d(grown, (3, 1), 1, (1, 0)), F.max_pool2d(grown, (1, 3), 1, (0, 1)))
        else:
            grown = F.max_pool2d(grown, 3, 1, 1)
    return sign * grown[:, 0]


@_node(
    "JoinImageWithAlpha",
    "Join Image with Alpha",
    "mask/compositing",
    lambda: [io.Image.Input("image"), io.Mask.Input("alpha")],
    [(io.Image, None)],
)
def join_image_with_alpha(image: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Adds 1 - mask as the fourth channel."""
    count = min(len(image), len(alpha))
    size = image.shape[1:3]
    alpha = F.interpolate(alpha.reshape(-1, 1, *alpha.shape[-2:]), size=size, mode="bilinear")[:count, 0]
    return torch.cat([image[:count, ..., :3], 1.0 - alpha[..., None]], dim=-1)


@_node(
    "SplitImageWithAlpha",
    "Split Image with Alpha",
    "mask/compositing",
    lambda: [io.Image.Input("image")],
    [(io.Image, None), (io.Mask, None)],
)
def split_image_with_alpha(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the fourth channel off; the mask is 1 - alpha."""
    alpha = image[..., 3] if image.shape[-1] > 3 else torch.ones_like(image[..., 0])
    return image[..., :3], 1.0 - alpha


# Values ---------------------------------------------------------------------------------------------------------------


def _primitive(name: str, title: str, slot: Callable[[], io.Input], kind: type[io.ComfyType]) -> None:
    @_node(f"Primitive{name}", title, "utils/primitive", lambda: [slot()], [(kind, None)])
    def value_node(value: Any) -> Any:
        """A value to connect to several inputs."""
        return value


_WIDEST = 2**63 - 1
_primitive(
    "Int",
    "Int",
    lambda: io.Int.Input("value", min=-_WIDEST, max=_WIDEST, control_after_generate=True),
    io.Int,
)
_primitive("Float", "Float", lambda: io.Float.Input("value", min=-_WIDEST, max=_WIDEST), io.Float)
_primitive("String", "String", lambda: io.String.Input("value"), io.String)
_primitive("StringMultiline", "String (Multiline)", lambda: io.String.Input("value", multiline=True), io.String)
_primitive("Boolean", "Boolean", lambda: io.Boolean.Input("value"), io.Boolean)


# Video ----------------------------------------------------------------------------------------------------------------


def _video_exists(cls: type[io.ComfyNode], file: str) -> bool | str:
    return True if file is None or folders.input_path(file) is not None else f"Invalid video file: {file}"


def _time_of_change(cls: type[io.ComfyNode], file: str) -> float:
    return folders.require_input_path(file).stat().st_mtime


@_node(
    "LoadVideo",
    "Load Video",
    "image/video",
    lambda: [io.Combo.Input("file", options=folders.input_files(video.VIDEO_SUFFIXES), upload=io.UploadType.video)],
    [(io.Video, None)],
    validate_inputs=_video_exists,
    fingerprint_inputs=_time_of_change,
)
def load_video(file: str) -> video.VideoFile:
    """Loads a video from the input folder."""
    return video.VideoFile(folders.require_input_path(file))


@_node(
    "GetVideoComponents",
    "Get Video Components",
    "image/video",
    lambda: [io.Video.Input("video", tooltip="The video to extract components from.")],
    [(io.Image, "images"), (io.Audio, "audio"), (io.Float, "fps")],
)
def get_video_components(video: video.VideoFile) -> tuple[torch.Tensor, None, float]:
    """Extracts all components from a video: frames, audio, and framerate. Here the audio is left out."""
    components = video.get_components()
    return components.images, components.audio, float(components.frame_rate)
