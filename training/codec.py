"""Mend's starter codec: a small all-in-one codec, started as a transform codec and trained on photographs.

    python -m comfyui_mend.training.codec --photos DIR --out RUN_FOLDER

It begins as a block transform of principal components with an entropy model that adapts to the picture, which compresses
like a plain transform codec at once; training then has to improve on that instead of finding it. The run can be stopped
and started again at any moment.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import models
from ..codec.rates import pillow_curve
from ..errors import Cancelled
from ..models.aio_codec import LATENT_STRIDE, QUALITIES, AllInOneCodec
from ..models.aio_codec_layers import HybridBlock, UpsampleBlock
from .accelerate import accelerate
from .data import VALIDATION, PairStream, PhotoCrops, Task, central_crop, load_photos
from .degradations import Degradation
from .objectives.rate_distortion import LogRateDistortion
from .stopping import stop_request
from .trainer import OWN_LICENCE, Progress, Settings, Stage, Trainer, export, psnr, validation_set

logger = logging.getLogger(__name__)

NAME = "mend-aio-codec-starter.safetensors"
RESTORES = ("compress", "denoise", "derain", "dehaze", "low-light", "jpeg")
CONFIG: dict[str, Any] = {
    "dim": 10,
    "N_ch": 144,
    "z_ch": 40,
    "num_blocks": (0, 0, 0, 2),
    "heads": (1, 1, 1, 4),
    "ffn_expansion_factor": 2.0,
    "prior_widths": (128, 128, 128),
    "prior_expansion": 0.5,
}
WEIGHTS = (6.0, 480.0)
"""lambda of the lowest and the highest quality: about 0.1 to 1 bit per pixel on photographs."""
STAGES = (Stage(0.0, 128, 4), Stage(0.85, 192, 2))
TASKS = (
    Task("clean", 1.0, ((),)),
    Task("noise", 0.3, ((Degradation("noise"),),)),
    Task("rain", 0.22, ((Degradation("rain"),),)),
    Task("haze", 0.22, ((Degradation("haze"),),)),
    Task("jpeg", 0.1, ((Degradation("jpeg"),),)),
    Task("low-light", 0.16, ((Degradation("low-light"),),)),
)
VALIDATED = ("clean", "noise 25", "rain", "haze")
VALIDATED_QUALITIES = (0, 32, 63)

INSIDE = (
    *(".qkv", ".project_in", ".attn_s.a", ".attn_s.v", ".dwconv", ".norm", "temperature"),
    *(".conv1.", ".depth_conv.", ".conv.", "subpel", "bit_estimator"),
)
"""Parts of names of the parameters inside the branches; what else there is writes values."""
WRITING_SHARE = 0.2
HYPER_RESOLUTION = 4.0
"""Steps of the hyper-latent per unit of a value's mean size."""
FIRST_COMPONENT, FIRST_SPREAD = 0.25, 0.3
"""The same for the first component, brightness, whose values are large and positive; how much of its mean it deviates."""


# Starting as a transform codec ------------------------------------------------------------------------------------------


@torch.no_grad()
def start_as_transform(
    codec: AllInOneCodec, pictures: Sequence[torch.Tensor], weights: Sequence[float] = WEIGHTS
) -> None:
    """Sets a codec to a plain transform codec, from pictures [1, 3, H, W] with sides that are multiples of 16.

    Every stage keeps the strongest principal components of the pictures and the decoder transposes them. The last layers
    of all residual branches are zero, so that they start by adding nothing. The hyper-latent carries the mean size of the
    values around, from which come their scales. weights: lambda at the lowest and the highest quality.
    """
    # What stays random is inside the branches, whose sizes and step lengths were tuned to PyTorch's smaller start.
    for module in codec.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    for name, parameter in codec.named_parameters():
        if name.endswith("bias") or name.endswith((".project_out.weight", ".attn_s.proj.weight", ".conv2.weight")):
            parameter.zero_()
        elif name.endswith(".conv_out.weight"):
            parameter.zero_()
    # A step of size s costs s^2 / 12, which is worth its rate at s^2 = 6 / (ln 2 lambda) (high-rate theory).
    steps = [math.sqrt(6 / math.log(2) / w) for w in weights]
    codec.q_scale_enc.copy_(0.5 / torch.tensor(steps).view(2, 1, 1, 1))  # the quantiser's own step starts at 0.5
    codec.q_scale_dec.copy_(1 / codec.q_scale_enc)
    first = codec.enc.patch_embed.proj
    _centre(first, torch.eye(first.out_channels, 3))
    features = [first(p) for p in pictures]
    encoder = (codec.enc.encoder_x2, codec.enc.encoder_x4, codec.enc.encoder_x8, codec.enc.encoder_x16)
    decoder = (codec.dec.decoder_x1, codec.dec.decoder_x2, codec.dec.decoder_x4, codec.dec.decoder_x8)
    for down, up in zip(encoder, decoder, strict=True):
        for block in [*down.blocks, *up.blocks]:
            if isinstance(block, HybridBlock):
                _even_out(block, features)
        analysis, synthesis = down.blocks[-1].body[0], up.blocks[0].body[0]
        kept = _components(features, analysis.out_channels)
        _centre(analysis, kept)
        # Rows of the synthesis are (channel, place in the 2 x 2 block), its columns (component, place).
        _centre(synthesis, torch.kron(kept.T.contiguous(), torch.eye(4)))
        features = [down.blocks[-1](f) for f in features]
    kept = _components(features, codec.N_dim_compress.out_channels)
    kept[0] *= torch.sign(sum(kept[0] @ f[0].flatten(1).sum(dim=1) for f in features))
    _centre(codec.N_dim_compress, kept)
    _centre(codec.N_dim_decompress, kept.T)
    _centre(codec.refine, torch.eye(3, codec.refine.in_channels))
    _start_entropy_model(codec, [codec.N_dim_compress(f) for f in features])
    _even_out_entropy_model(codec, pictures)


def _components(features: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The strongest directions [count, C] of features [1, C, H, W], not centred: brightness is one of them."""
    covariance = sum(f[0].flatten(1).double() @ f[0].flatten(1).double().T for f in features)
    return torch.linalg.eigh(covariance)[1].flip(1)[:, :count].T.float()


def _centre(convolution: nn.Conv2d, matrix: torch.Tensor) -> None:
    """Makes a convolution a matrix at every pixel."""
    convolution.weight.zero_()
    rows, columns = convolution.kernel_size
    convolution.weight[: len(matrix), :, rows // 2, columns // 2] = matrix


def _even_out(block: HybridBlock, features: Sequence[torch.Tensor]) -> None:
    """Lets the block's norms bring every channel to the same size: brightness is far larger than detail."""
    normed = [f / (f.var(dim=1, keepdim=True, unbiased=False) + 1e-5).sqrt() for f in features]
    size = torch.stack([n.square().mean(dim=(0, 2, 3)) for n in normed]).mean(dim=0).sqrt()
    for norm in (block.norm1, block.norm2, block.norm3):
        norm.body.weight.copy_(1 / size.clamp_min(0.02))


def _start_entropy_model(codec: AllInOneCodec, latents: Sequence[torch.Tensor]) -> None:
    n, z = codec.N_dim_compress.out_channels, codec.bit_estimator_z.f1.h.shape[1]
    resolution = torch.full((z,), HYPER_RESOLUTION)
    resolution[0] = FIRST_COMPONENT
    # The size |x| from the block's two leaky rectifiers: x + alpha (f(x) + g(-x)) + beta (f(x) + g(x)).
    size = codec.hyper_enc.blocks[0].block
    _pass_on(codec.hyper_enc.blocks[0], torch.eye(z, n))
    alpha, beta = 2.0954, -1.0373
    _centre(size[1].conv, torch.cat([torch.eye(z), torch.eye(z), -torch.eye(z), torch.eye(z)]))
    _centre(size[1].conv_out, torch.cat([alpha * torch.eye(z), beta * torch.eye(z)], dim=1))
    for convolution, gain in ((codec.hyper_enc.blocks[1], resolution), (codec.hyper_enc.blocks[3], torch.ones(z))):
        convolution.weight.copy_((torch.diag(gain) / 9)[:, :, None, None].expand_as(convolution.weight))
    for layer in codec.hyper_dec.blocks:
        if isinstance(layer, UpsampleBlock):
            layer.conv.weight.zero_()
            _centre(layer.upsample[0], torch.eye(z).repeat_interleave(4, dim=0))
    _pass_on(codec.hyper_dec.blocks[2], torch.eye(n, z))
    fusion, spatial, half = codec.y_prior_fusion, codec.y_spatial_prior, n // 2
    width = fusion[0].block[0].conv2.out_channels
    _pass_on(fusion[0], torch.eye(width, n))
    # Steps stay at their bound; scales from mean sizes (1.25 of it for a Gaussian, more for what pictures have), those
    # without a hyper-latent of their own from the last; the mean of the first component from its size.
    spread = torch.stack([y.abs().mean(dim=(0, 2, 3)) for y in latents]).mean(dim=0)
    scales = torch.zeros(n, z)
    scales[:z] = torch.diag(2 * 0.7 / resolution)
    scales[0, 0] = FIRST_SPREAD / resolution[0]
    scales[z:, z - 1] = scales[z - 1, z - 1] * spread[z:] / spread[z - 1]
    parameters = torch.zeros(3 * n, width)
    parameters[n : 2 * n, :z] = scales
    parameters[2 * n, 0] = 1 / resolution[0]
    _pass_on(fusion[1], parameters)
    fusion[1].block[0].adaptor.bias[n : 2 * n] = 0.2
    # The second step takes the same ones: (scales of half 0, means, scales of half 1, means), from the first z scales.
    width = spatial[0].block[0].conv2.out_channels
    selected = torch.zeros(width, 4 * n)
    selected[:z, 2 * n : 2 * n + z] = torch.eye(z)
    selected[z, 3 * n] = 1
    _pass_on(spatial[0], selected)
    _pass_on(spatial[1], torch.eye(spatial[1].block[0].conv2.out_channels, width))
    relative = torch.zeros(n, z)
    relative[:z] = torch.eye(z)
    relative[z:, z - 1] = spread[z:] / spread[z - 1]
    last = torch.zeros(2 * n, spatial[2].block[0].conv1[0].in_channels)
    last[:half, :z], last[n : n + half, :z] = relative[:half], relative[half:]
    last[half, z] = 1
    _pass_on(spatial[2], last)
    spatial[2].block[0].adaptor.bias[:half] = spatial[2].block[0].adaptor.bias[n : n + half] = 0.05
    estimator = codec.bit_estimator_z
    for layer in (estimator.f1, estimator.f2, estimator.f3, estimator.f4):
        layer.h.fill_(0.5413)  # softplus: 1
    estimator.f1.h.fill_(-1.05)  # 0.3: a logistic distribution around 2
    estimator.f1.b.fill_(-0.6)


def _even_out_entropy_model(codec: AllInOneCodec, pictures: Sequence[torch.Tensor]) -> None:
    """Divides the first weights of its random branches by the size of their inputs, of which brightness is far the largest."""
    sizes = input_sizes(codec, pictures[:8])
    parts = ("hyper_dec.", "y_prior_fusion.", "y_spatial_prior.", "hyper_enc.blocks.0.block.0.")
    for name, parameter in codec.named_parameters():
        if name.startswith(parts) and name.endswith((".conv1.0.weight", "block.1.conv.weight", "subpel_conv.0.weight")):
            parameter /= sizes[name].clamp_min(0.05)[None, :, None, None]


def _pass_on(block: nn.Module, matrix: torch.Tensor) -> None:
    """Makes a block whose branches add nothing a matrix at every pixel; without an adaptor it is the identity as it is."""
    if block.block[0].adaptor is not None:
        _centre(block.block[0].adaptor, matrix)


def input_sizes(codec: AllInOneCodec, pictures: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Root mean square of every input channel of each convolution, by the name of its weight."""
    names = {module: f"{name}.weight" for name, module in codec.named_modules() if isinstance(module, nn.Conv2d)}
    squares: dict[str, list[torch.Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares.setdefault(names[module], []).append(inputs[0].square().mean(dim=(0, 2, 3)))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    with torch.no_grad():
        for picture in pictures:
            codec(picture, QUALITIES // 2)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(found).mean(dim=0).sqrt() for name, found in squares.items()}


def _share(name: str, parameter: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which share of its step a parameter takes; a tensor that broadcasts against it."""
    share = torch.tensor(1.0 if any(part in name for part in INSIDE) else WRITING_SHARE)
    if name in inputs:
        share = share / inputs[name].clamp_min(1.0)
        share = share.view(-1, 1, 1, 1) if parameter.shape[1] == 1 else share.view(1, -1, 1, 1)
    return share


# Training ---------------------------------------------------------------------------------------------------------------


class CodecTrainer(Trainer):
    """`Trainer` with step sizes that fit a codec; validates rates and fidelities, beside JPEG's at the same rates.

    Values here differ by a factor of a thousand, from brightness to fine detail, and a small error of the largest ones
    costs more than all detail is worth. So a weight moves the less the larger its input is, and what writes values
    learns slower than the inside of the branches.

    inputs: of every convolution, the size of each input channel (`input_sizes`).
    """

    def __init__(self, *arguments: Any, inputs: Mapping[str, torch.Tensor], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.shares = [_share(name, p, inputs) for name, p in self.module.named_parameters()]
        self.optimizer.register_step_pre_hook(lambda *_: self._remember())
        self.optimizer.register_step_post_hook(lambda *_: self._shorten())

    @torch.no_grad()
    def _remember(self) -> None:
        self._before = [p.detach().clone() for p in self.module.parameters()]

    @torch.no_grad()
    def _shorten(self) -> None:
        for parameter, before, share in zip(self.module.parameters(), self._before, self.shares, strict=True):
            parameter.copy_(torch.lerp(before, parameter, share.expand_as(parameter)))

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Per case and quality: estimated bits per pixel and PSNR to the clean picture; the mean lead over JPEG."""
        scores: dict[str, float] = {}
        for name, (damaged, clean) in self.validation.items():
            for quality in VALIDATED_QUALITIES if name == "clean" else VALIDATED_QUALITIES[1:2]:
                rates, values, leads = [], [], []
                for index, (image, target) in enumerate(zip(damaged.split(1), clean.split(1), strict=True)):
                    restored, latent = self.average(image, quality)
                    bits = sum(float(b.sum()) for b in self.average.estimate_bits(latent))
                    rates.append(bits / image[0, 0].numel())
                    values.append(float(psnr(restored.clamp(0, 1), target)))
                    leads.append(values[-1] - self._jpeg(name, index, image, target, rates[-1]))
                scores[f"{name} q{quality} bpp"] = float(np.mean(rates))
                scores[f"{name} q{quality} dB"] = float(np.mean(values))
                scores[f"{name} q{quality} over JPEG"] = float(np.mean(leads))
        return scores

    def _jpeg(self, case: str, index: int, image: torch.Tensor, target: torch.Tensor, rate: float) -> float:
        """PSNR that JPEG reaches at a rate, between its files logarithmically; its lowest where it has no such file."""
        if not hasattr(self, "_curves"):
            self._curves: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
        if (case, index) not in self._curves:
            points = pillow_curve(image[0], target[0], "JPEG")
            pixels = image[0, 0].numel()
            self._curves[case, index] = [math.log(8 * p.size / pixels) for p in points], [p.psnr for p in points]
        return float(np.interp(math.log(rate), *self._curves[case, index]))


def sample_pictures(photos: Sequence[torch.Tensor], side: int = 512) -> list[torch.Tensor]:
    """Central crops [1, 3, H, W] in 0..1 of photographs, uint8 [3, H, W], with sides that are multiples of 16."""
    return [central_crop(photo, side, LATENT_STRIDE)[None].float() / 255 for photo in photos]


def save_weights(codec: nn.Module, path: Path, config: Mapping[str, Any], progress: Progress) -> None:
    """Writes the weights as `Load Codec` reads them."""
    training = {
        **progress.spent(),
        "lambda": WEIGHTS,
        "scores": {name: round(value, 3) for name, value in progress.scores.items()},
    }
    export(codec, path, "aio-codec", json.loads(json.dumps(dict(config))), RESTORES, training, licence=OWN_LICENCE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run: log, checkpoint, weights")
    parser.add_argument("--minutes", type=float, default=70.0, help="training time (70); the schedule follows it")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    photos = load_photos(options.photos / "train")
    settings = Settings(
        minutes=options.minutes,
        learning_rate=options.learning_rate,
        weight_decay=0.0,
        stages=STAGES,
        validate_every=1500.0,
        validation_size=192,
        seed=options.seed,
    )
    codec = models.create("aio-codec", CONFIG)
    pictures = sample_pictures(photos[::6])
    start_as_transform(codec, pictures)
    cases = {name: VALIDATION[name] for name in VALIDATED}
    trainer = CodecTrainer(
        accelerate(codec),
        PairStream(PhotoCrops(photos), TASKS, torch.Generator().manual_seed(options.seed)),
        settings,
        options.out,
        LogRateDistortion(WEIGHTS),
        validation_set(load_photos(options.photos / "validation"), settings.validation_size, cases),
        inputs=input_sizes(codec, pictures[:8]),
    )
    trainer.resume()
    try:
        with stop_request() as should_stop:
            trainer.run(should_stop, bar=False)
    except Cancelled as error:
        logger.info("%s", error)
        return 1
    save_weights(trainer.average, options.out / NAME, CONFIG, trainer.progress)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
