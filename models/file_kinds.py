"""Says what a file is that cannot be a checkpoint: most failed loads are failed downloads."""

from __future__ import annotations

_STARTS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer: the file itself was not downloaded. Run `git lfs "
     "pull`, or download it from the web page"),
    (b"GGUF", "a GGUF file, the format of language-model programs"),
    (b"\x89HDF", "an HDF5 (Keras) file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"MZ", "a Windows program. Do not run it"),
    (b"\x7fELF", "a Linux program. Do not run it"),
    (b"MATLAB", "a MATLAB file"),
)  # fmt: skip


def describe(head: bytes) -> str | None:
    """What a file that starts with `head` (a few hundred bytes) is, if not a checkpoint; None if it may be one."""
    if not head.strip():
        return "empty" if not head else "blank"
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first (or, if torch wrote it before 2017, save it again with a newer torch)"
    if head[:1] == b"\x08" and any(name in head for name in (b"pytorch", b"onnx", b"tf2onnx", b"paddle")):
        return "an ONNX network, which has its own loaders; the PyTorch weights are needed"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<script", b"<?xml")) or b"<html" in text:
        return "an HTML page: the download failed (the site answered with a page). Download it again in a browser"
    if text.startswith((b"{", b"[")):
        return "JSON text, not weights: a configuration, a workflow or an error message of a download site"
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    if printable == len(head):
        return f"text, not weights; it begins with {head[:60].decode('ascii', 'replace')!r}"
    if not any(head):
        return "nothing but zeros: the download was interrupted"
    return None


_OTHER_MODELS = (
    ("a Stable Diffusion checkpoint; use ComfyUI's Load Checkpoint", ("model.diffusion_model.input_blocks.0.0.weight",)),
    ("a diffusion model in ComfyUI's format; use Load Diffusion Model", ("model.diffusion_model.",)),
    ("a diffusers U-Net", ("down_blocks.0.", "unet.down_blocks.0.")),
    ("a LoRA; use a LoRA loader", ("lora_unet_", "lora_te_", "lora_A", "lora_down", "lora.up", "lora_B")),
    ("a VAE; use Load VAE", ("decoder.up.0.block.0.", "decoder.up_blocks.0.")),
    ("a CLIP model", ("visual.transformer.resblocks.0.", "text_model.encoder.layers.0.", "vision_model.encoder.")),
    ("a ControlNet", ("control_model.", "zero_convs.0.", "controlnet_cond_embedding.")),
    ("an ESRGAN-like upscaler; use ComfyUI's Load Upscale Model", ("body.0.rdb1.", "RRDB_trunk.", "model.1.sub.")),
    ("a GFPGAN or CodeFormer face restorer", ("stylegan_decoder.", "quantize.embedding.weight")),
    ("a diffusion transformer", ("double_blocks.0.", "joint_blocks.0.", "transformer_blocks.0.")),
    ("a ResNet-like classifier", ("layer4.0.conv1.weight",)),
    ("a VGG-like classifier", ("features.0.weight",)),
    ("VLU-Net's CLIP adapters alone; its network files (such as 3task_vlunet.ckpt) hold them too", ("ad_imageEncoder.adapter.",)),
)  # fmt: skip


def describe_weights(keys: list[str]) -> str | None:
    """What well-known model of another kind the keys of a state dict belong to, if any."""
    for kind, signs in _OTHER_MODELS:
        if any(sign in key for key in keys for sign in signs):
            return kind
    return None
