"""Stable Diffusion checkpoints in the layouts that are released, with made-up weights: a few megabytes in place of gigabytes.

ComfyUI recognises a checkpoint by its keys and by the widths 320 (U-Net), 768 or 1024 (text) and 128 (autoencoder), which
are therefore kept; the U-Net has two levels of one block each where the released ones have four of two. All large
tensors are windows into one small table of random numbers, which `torch.save` stores once: so the files are small even
where the shapes are the released ones. Nothing that these networks compute means anything, but it is finite.

    python tests/make_sd_checkpoints.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

Shapes = dict[str, tuple[int, ...]]
WIDTH = 320
"""Channels of the U-Net's first level: what ComfyUI knows Stable Diffusion 1 and 2 by."""
TOKENIZER = {"ch": 32, "ch_mult": (1, 1, 2), "blocks": 1, "z": 32, "entries": 128, "dim": 32}
"""OSDFace's embedder, small: it sees faces at 64 x 64."""


class Table:
    """A store of random numbers from which tensors of any shape are cut."""

    def __init__(self, seed: int = 0, size: int = 3 << 20, std: float = 0.02) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.numbers = torch.randn(size, generator=self.generator) * std

    def cut(self, shape: Sequence[int]) -> torch.Tensor:
        """A window of this shape; one larger than the table has overlapping rows."""
        inner = 1
        for size in shape[1:]:
            inner *= size
        step = min(inner, (len(self.numbers) - inner) // shape[0])
        spare = len(self.numbers) - step * (shape[0] - 1) - inner
        start = int(torch.randint(spare + 1, (), generator=self.generator))
        inside = torch.empty(tuple(shape), device="meta").stride()[1:]
        return self.numbers.as_strided(tuple(shape), (step, *inside), start)

    def fill(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Weights by name: windows, but ones where a normalisation scales, whole numbers where positions are listed."""
        state = {}
        for name, shape in shapes.items():
            if name.endswith("position_ids"):
                state[name] = torch.arange(shape[-1]).expand(tuple(shape))
            elif len(shape) == 1 and name.endswith(".weight"):
                state[name] = torch.ones(shape[0])
            else:
                state[name] = self.cut(shape)
        return state


def _layer(name: str, *shape: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _residual(name: str, channels: int, out: int, embedding: int) -> Shapes:
    shapes = dict(_layer(f"{name}.in_layers.0", channels))
    shapes |= _layer(f"{name}.in_layers.2", out, channels, 3, 3)
    shapes |= _layer(f"{name}.emb_layers.1", out, embedding)
    shapes |= _layer(f"{name}.out_layers.0", out)
    shapes |= _layer(f"{name}.out_layers.3", out, out, 3, 3)
    return shapes | dict(_layer(f"{name}.skip_connection", out, channels, 1, 1) if channels != out else ())


def _attention(name: str, channels: int, context: int, linear: bool) -> Shapes:
    projection = (channels, channels) if linear else (channels, channels, 1, 1)
    shapes, block = dict(_layer(f"{name}.norm", channels)), f"{name}.transformer_blocks.0"
    shapes |= _layer(f"{name}.proj_in", *projection)
    for attention, width in (("attn1", channels), ("attn2", context)):
        shapes |= _layer(f"{block}.{attention}.to_q", channels, channels, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_k", channels, width, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_v", channels, width, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_out.0", channels, channels)
    shapes |= _layer(f"{block}.ff.net.0.proj", 8 * channels, channels)
    shapes |= _layer(f"{block}.ff.net.2", channels, 4 * channels)
    for number in (1, 2, 3):
        shapes |= _layer(f"{block}.norm{number}", channels)
    return shapes | dict(_layer(f"{name}.proj_out", *projection))


def unet_shapes(
    context: int, linear: bool, in_channels: int = 4, mults: Sequence[int] = (1, 1), blocks: int = 1
) -> Shapes:
    """Stable Diffusion's U-Net under its original names; attention everywhere but on the last level.

    context: width of the prompt (768 for 1.x, 1024 for 2.x); linear: attention is entered through linear layers (2.x)
    and not 1x1 convolutions (1.x). The released networks have mults (1, 2, 4, 4) and 2 blocks.
    """
    embedding, last = 4 * WIDTH, len(mults) - 1
    shapes = dict(_layer("time_embed.0", embedding, WIDTH)) | dict(_layer("time_embed.2", embedding, embedding))
    shapes |= _layer("input_blocks.0.0", WIDTH, in_channels, 3, 3)
    channels, skips, number = WIDTH, [WIDTH], 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            shapes |= _residual(f"input_blocks.{number}.0", channels, WIDTH * mult, embedding)
            channels = WIDTH * mult
            if level < last:
                shapes |= _attention(f"input_blocks.{number}.1", channels, context, linear)
            skips.append(channels)
            number += 1
        if level < last:
            shapes |= _layer(f"input_blocks.{number}.0.op", channels, channels, 3, 3)
            skips.append(channels)
            number += 1
    shapes |= _residual("middle_block.0", channels, channels, embedding)
    shapes |= _attention("middle_block.1", channels, context, linear)
    shapes |= _residual("middle_block.2", channels, channels, embedding)
    number = 0
    for level, mult in reversed(list(enumerate(mults))):
        for block in range(blocks + 1):
            name = f"output_blocks.{number}"
            shapes |= _residual(f"{name}.0", channels + skips.pop(), WIDTH * mult, embedding)
            channels = WIDTH * mult
            if level < last:
                shapes |= _attention(f"{name}.1", channels, context, linear)
            if level and block == blocks:
                shapes |= _layer(f"{name}.{1 if level == last else 2}.conv", channels, channels, 3, 3)
            number += 1
    return shapes | dict(_layer("out.0", WIDTH)) | dict(_layer("out.2", 4, WIDTH, 3, 3))


def _coder_block(name: str, channels: int, out: int) -> Shapes:
    shapes = dict(_layer(f"{name}.norm1", channels)) | dict(_layer(f"{name}.conv1", out, channels, 3, 3))
    shapes |= dict(_layer(f"{name}.norm2", out)) | dict(_layer(f"{name}.conv2", out, out, 3, 3))
    return shapes | dict(_layer(f"{name}.nin_shortcut", out, channels, 1, 1) if channels != out else ())


def _coder_middle(name: str, channels: int, norms: Sequence[str] = ("norm",)) -> Shapes:
    return (
        _coder_block(f"{name}.block_1", channels, channels)
        | _pixel_attention(f"{name}.attn_1", channels, norms)
        | _coder_block(f"{name}.block_2", channels, channels)
    )


def _pixel_attention(name: str, channels: int, norms: Sequence[str]) -> Shapes:
    shapes = {key: shape for norm in norms for key, shape in _layer(f"{name}.{norm}", channels)}
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= _layer(f"{name}.{layer}", channels, channels, 1, 1)
    return shapes


def _encoder(name: str, widths: Sequence[int], blocks: int, out: int, attended: bool, norms: Sequence[str]) -> Shapes:
    """attended: the last level has attention after each of its blocks."""
    shapes, channels, last = dict(_layer(f"{name}.conv_in", widths[0], 3, 3, 3)), widths[0], len(widths) - 1
    for level, width in enumerate(widths):
        for block in range(blocks):
            shapes |= _coder_block(f"{name}.down.{level}.block.{block}", channels, width)
            if attended and level == last:
                shapes |= _pixel_attention(f"{name}.down.{level}.attn.{block}", width, norms)
            channels = width
        if level < last:
            shapes |= _layer(f"{name}.down.{level}.downsample.conv", channels, channels, 3, 3)
    shapes |= _coder_middle(f"{name}.mid", channels, norms)
    return shapes | dict(_layer(f"{name}.norm_out", channels)) | dict(_layer(f"{name}.conv_out", out, channels, 3, 3))


def vae_shapes() -> Shapes:
    """Stable Diffusion's autoencoder in full: ComfyUI builds no other."""
    widths, latent = (128, 256, 512, 512), 4
    shapes = _encoder("encoder", widths, 2, 2 * latent, attended=False, norms=("norm",))
    channels = widths[-1]
    shapes |= _layer("decoder.conv_in", channels, latent, 3, 3)
    shapes |= _coder_middle("decoder.mid", channels)
    for level, width in reversed(list(enumerate(widths))):
        for block in range(3):
            shapes |= _coder_block(f"decoder.up.{level}.block.{block}", channels, width)
            channels = width
        if level:
            shapes |= _layer(f"decoder.up.{level}.upsample.conv", channels, channels, 3, 3)
    shapes |= dict(_layer("decoder.norm_out", channels)) | dict(_layer("decoder.conv_out", 3, channels, 3, 3))
    shapes |= _layer("quant_conv", 2 * latent, 2 * latent, 1, 1)
    return shapes | dict(_layer("post_quant_conv", latent, latent, 1, 1))


def clip_shapes(layers: int = 12, width: int = 768) -> Shapes:
    """Stable Diffusion 1's text encoder under the names of its checkpoints (below `cond_stage_model.transformer.`)."""
    shapes: Shapes = {"embeddings.position_ids": (1, 77)}
    shapes["embeddings.token_embedding.weight"] = (49408, width)
    shapes["embeddings.position_embedding.weight"] = (77, width)
    for number in range(layers):
        name = f"encoder.layers.{number}"
        for layer in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _layer(f"{name}.self_attn.{layer}", width, width)
        shapes |= dict(_layer(f"{name}.layer_norm1", width)) | dict(_layer(f"{name}.mlp.fc1", 4 * width, width))
        shapes |= dict(_layer(f"{name}.mlp.fc2", width, 4 * width)) | dict(_layer(f"{name}.layer_norm2", width))
    shapes |= _layer("final_layer_norm", width)
    return {f"text_model.{name}": shape for name, shape in shapes.items()}


def gendeg_projection_shapes() -> Shapes:
    """GenDeg's two layers that add intensities to the prompt."""
    return dict(_layer("stats_proj", 77, 129)) | dict(_layer("cc_projection", 768, 770))


def prefixed(prefix: str, shapes: Mapping[str, Sequence[int]]) -> Shapes:
    """The same shapes with a prefix before each name."""
    return {f"{prefix}{name}": tuple(shape) for name, shape in shapes.items()}


def sd21_shapes(mults: Sequence[int] = (1, 1), blocks: int = 1) -> Shapes:
    """Stable Diffusion 2.1 base without its text encoder, which OSDFace has no use for."""
    unet = unet_shapes(context=1024, linear=True, mults=mults, blocks=blocks)
    return prefixed("model.diffusion_model.", unet) | prefixed("first_stage_model.", vae_shapes())


def sd15_shapes(in_channels: int = 4, mults: Sequence[int] = (1, 1), blocks: int = 1) -> Shapes:
    """Stable Diffusion 1.5 with its text encoder; 8 input channels make it InstructPix2Pix."""
    unet = unet_shapes(context=768, linear=False, in_channels=in_channels, mults=mults, blocks=blocks)
    shapes = prefixed("model.diffusion_model.", unet) | prefixed("first_stage_model.", vae_shapes())
    return shapes | prefixed("cond_stage_model.transformer.", clip_shapes())


def _saved(content: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def write_sd21(folder: str | Path, name: str = "tiny_sd21_base.ckpt") -> Path:
    """A Stable Diffusion 2.1 base checkpoint in one file, as ComfyUI's Load Checkpoint takes it. Returns its path."""
    return _saved({"state_dict": Table(21).fill(sd21_shapes())}, Path(folder) / name)


def write_sd15(
    folder: str | Path,
    name: str = "tiny_sd15.ckpt",
    *,
    in_channels: int = 4,
    gendeg: bool = False,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A Stable Diffusion 1.5 checkpoint in one file. Returns its path.

    gendeg: with GenDeg's projections of intensities, and 8 input channels; extra: further tensors of the file.
    """
    shapes = sd15_shapes(8 if gendeg else in_channels) | (gendeg_projection_shapes() if gendeg else {})
    return _saved({"state_dict": Table(15).fill(shapes) | dict(extra or {})}, Path(folder) / name)


def tokenizer_shapes(
    *, ch: int = 64, ch_mult: Sequence[int] = (1, 2, 2, 2, 4, 8), blocks: int = 2, z: int = 512, entries: int = 1024,
    dim: int = 512,
) -> Shapes:  # fmt: skip
    """OSDFace's visual tokenizer with its dictionary; the defaults are the released sizes."""
    shapes = _encoder("encoder", [ch * mult for mult in ch_mult], blocks, z, attended=True, norms=("norm1", "norm2"))
    return shapes | {"quantize.embedding.weight": (entries, dim)} | dict(_layer("quant_conv", dim, z, 1, 1))


def lora_shapes(unet: Mapping[str, Sequence[int]], rank: int = 4) -> Shapes:
    """Low-rank pairs, under PEFT's names, for every layer of a U-Net given by names without `diffusion_model.`."""
    from comfyui_mend.models.lora_sd import diffusers_names

    shapes: Shapes = {}
    for name, key in diffusers_names(unet).items():
        shape = tuple(unet[key])
        if len(shape) > 1:
            module = f"unet.{name.removesuffix('.weight')}"
            shapes[f"{module}.lora_A.weight"] = (rank, *shape[1:])
            shapes[f"{module}.lora_B.weight"] = (shape[0], rank, *(1 for _ in shape[2:]))
    return shapes


def write_osdface(folder: str | Path) -> dict[str, Path]:
    """OSDFace's three files under their released names: {"tokenizer", "projection", "lora"}: path.

    The tokenizer is small; the projection leads to 1024 numbers and the LoRA fits `write_sd21`.
    """
    from safetensors.torch import save_file

    folder, table = Path(folder), Table(3, size=1 << 18, std=0.05)
    shapes, dim = tokenizer_shapes(**TOKENIZER), TOKENIZER["dim"]
    tokenizer = table.fill(shapes)
    # Codes as far apart as the features are, so that a face hits several of them.
    tokenizer["quantize.embedding.weight"] = tokenizer["quantize.embedding.weight"] * 20
    state = {f"vqvae_LQ.{name}": tensor for name, tensor in tokenizer.items()}
    state |= {f"vqvae_HQ.{name}": table.cut(shape) for name, shape in shapes.items()}
    state |= {"vqvae_LQ.decoder.conv_in.weight": table.cut((32, 32, 3, 3)), "loss.logvar": torch.zeros(1)}
    state |= table.fill(dict(_layer("vqvae_LQ.post_quant_conv", TOKENIZER["z"], dim, 1, 1)))
    projection = table.fill(dict(_layer("conv1", dim // 2, dim, 1)) | dict(_layer("conv2", 1024, dim // 2, 1)))
    lora = table.fill(lora_shapes(unet_shapes(context=1024, linear=True)))
    path = folder / "pytorch_lora_weights.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in lora.items()}, path)
    return {
        "tokenizer": _saved({"state_dict": state, "global_step": 1}, folder / "associate_2.ckpt"),
        "projection": _saved(projection, folder / "embedding_change_weights.pth"),
        "lora": path,
    }


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0])
    paths = [write_sd21(folder), write_sd15(folder), *write_osdface(folder).values()]
    sys.stdout.writelines(f"{path} {path.stat().st_size / 1e6:.1f} MB\n" for path in paths)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
