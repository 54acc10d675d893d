"""Weights for a tiny codec, computed and not trained: a block transform with an entropy model that adapts to the picture.

Every stage keeps the strongest principal components of example pictures and the decoder transposes them. Attention and
feed-forward parts give zero. The hyper-latent carries the mean size of the values around, from which come their scales.
So it compresses like a plain transform codec, at every one of the 64 qualities, and restores nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

HYPER_RESOLUTION = 4.0
"""Steps of the hyper-latent per unit of a value's mean size."""
FIRST_COMPONENT, FIRST_SPREAD = 0.25, 0.3
"""The same for the first component, brightness, whose values are large and positive; how much of its mean it deviates."""


def set_codec(network: nn.Module, pictures: Sequence[torch.Tensor]) -> None:
    """Sets every weight of an all-in-one codec from pictures [1, 3, H, W] with sides that are multiples of 16."""
    for parameter in network.parameters():
        parameter.zero_()
    for name, parameter in network.named_parameters():
        if "norm" in name or "temperature" in name or name.startswith("q_basic"):
            parameter.fill_(1)
    network.q_scale_enc.copy_(torch.tensor([0.25, 4.0]).view(2, 1, 1, 1))
    network.q_scale_dec.copy_(1 / network.q_scale_enc)
    first = network.enc.patch_embed.proj
    _centre(first, torch.eye(first.out_channels, 3))
    features = [first(p) for p in pictures]
    encoder = (network.enc.encoder_x2, network.enc.encoder_x4, network.enc.encoder_x8, network.enc.encoder_x16)
    decoder = (network.dec.decoder_x1, network.dec.decoder_x2, network.dec.decoder_x4, network.dec.decoder_x8)
    for down, up in zip(encoder, decoder, strict=True):
        analysis, synthesis = down.blocks[-1].body[0], up.blocks[0].body[0]
        kept = _components(features, analysis.out_channels)
        _centre(analysis, kept)
        # Rows of the synthesis are (channel, place in the 2 x 2 block), its columns (component, place).
        _centre(synthesis, torch.kron(kept.T.contiguous(), torch.eye(4)))
        features = [down.blocks[-1](f) for f in features]
    kept = _components(features, network.N_dim_compress.out_channels)
    kept[0] *= torch.sign(sum(kept[0] @ f[0].flatten(1).sum(dim=1) for f in features))
    _centre(network.N_dim_compress, kept)
    _centre(network.N_dim_decompress, kept.T)
    _centre(network.refine, torch.eye(3, network.refine.in_channels))
    _set_entropy_model(network, [network.N_dim_compress(f) for f in features])


def _components(features: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The strongest directions [count, C] of features [1, C, H, W], not centred: brightness is one of them."""
    values = torch.cat([f[0].flatten(1) for f in features], dim=1).double()
    return torch.linalg.eigh(values @ values.T)[1].flip(1)[:, :count].T.float()


def _centre(convolution: nn.Conv2d, matrix: torch.Tensor) -> None:
    """Makes a convolution a matrix at every pixel."""
    convolution.weight[:, :, convolution.kernel_size[0] // 2, convolution.kernel_size[1] // 2] = matrix


def _set_entropy_model(network: nn.Module, latents: Sequence[torch.Tensor]) -> None:
    n, z = network.N_dim_compress.out_channels, network.bit_estimator_z.f1.h.shape[1]
    inputs = torch.eye(z, n)
    resolution = torch.full((z,), HYPER_RESOLUTION)
    resolution[0] = FIRST_COMPONENT
    # The size |x| from the block's two leaky rectifiers: x + alpha (f(x) + g(-x)) + beta (f(x) + g(x)).
    size = network.hyper_enc.blocks[0].block
    _centre(size[0].adaptor, inputs)
    alpha, beta = 2.0954, -1.0373
    _centre(size[1].conv, torch.cat([torch.eye(z), torch.eye(z), -torch.eye(z), torch.eye(z)]))
    _centre(size[1].conv_out, torch.cat([alpha * torch.eye(z), beta * torch.eye(z)], dim=1))
    for convolution, gain in ((network.hyper_enc.blocks[1], resolution), (network.hyper_enc.blocks[3], torch.ones(z))):
        convolution.weight.copy_((torch.diag(gain) / 9)[:, :, None, None].expand_as(convolution.weight))
    for layer in (network.hyper_dec.blocks[0], network.hyper_dec.blocks[1]):
        _centre(layer.upsample[0], torch.eye(z).repeat_interleave(4, dim=0))
    # From mean size to standard deviation (1.25 for a Gaussian, more for what pictures have), in steps of 1/2.
    spread = torch.stack([y.abs().mean(dim=(0, 2, 3)) for y in latents]).mean(dim=0)
    scales = torch.diag(2 * 1.4 / resolution)
    scales[0, 0] = 2 * FIRST_SPREAD / resolution[0]
    rest = scales[-1] * (spread[z:] / spread[z - 1])[:, None]
    _centre(network.hyper_dec.blocks[2].block[0].adaptor, torch.cat([scales, rest])[:n])
    network.hyper_dec.blocks[2].block[0].adaptor.bias.fill_(0.25)
    common = network.y_prior_fusion
    _centre(common[0].block[0].adaptor, torch.eye(2 * n, n))
    parameters = _copy(3 * n, 2 * n, range(n, 2 * n), range(n))
    parameters[2 * n, 0] = 1 / FIRST_SPREAD
    _centre(common[1].block[0].adaptor, parameters)
    # The second step takes the same ones: (scales of half 0, means, scales of half 1, means).
    prior, half = network.y_spatial_prior, n // 2
    _centre(prior[0].block[0].adaptor, _copy(3 * n, 4 * n, range(n + 1), range(2 * n, 3 * n + 1)))
    places = [*range(half), *range(n, n + half), half]
    _centre(prior[1].block[0].adaptor, _copy(2 * n, 3 * n, places, range(n + 1)))
    estimator = network.bit_estimator_z
    for layer in (estimator.f1, estimator.f2, estimator.f3, estimator.f4):
        layer.h.fill_(0.5413)  # softplus: 1
    estimator.f1.h.fill_(-1.05)  # 0.3: a logistic distribution around 2
    estimator.f1.b.fill_(-0.6)


def _copy(rows: int, columns: int, to: Sequence[int], come_from: Sequence[int]) -> torch.Tensor:
    """A matrix that copies entries `come_from` to rows `to`."""
    matrix = torch.zeros(rows, columns)
    matrix[list(to), list(come_from)] = 1
    return matrix
