"""The same networks, faster to train on a CPU with one PyTorch thread: layers that work on channels-last memory.

`accelerate` exchanges the classes of some layers in place. Weights, keys and results stay the same (up to rounding);
only the order of the work changes:

- PyTorch computes a dense 1x1 convolution by its slow reference path when it has one thread; here it is a matrix
  product over the channels, which channels-last memory needs no copy for.
- Layer norm over channels is PyTorch's fused one.
- Channel attention multiplies whole feature maps and keeps the diagonal blocks of the heads: more multiplications,
  but none of the copies that dominate at 16 to 128 channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..models.layers.attention import GatedFeedForward, TransposedAttention
from ..models.layers.norm import ChannelLayerNorm
from ..models.moce_ir import CrossChannelAttention, TransformerBlock


class _PointwiseConv2d(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class _FusedLayerNorm(ChannelLayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """`layers.attention.transposed_attention` for channels-last feature maps."""
    batch, channels, height, width = query.shape
    heads, dim = temperature.shape[0], channels // temperature.shape[0]
    query, key, value = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (query, key, value))  # [B, pixels, C]
    scores = query.transpose(1, 2) @ key
    norms = (torch.linalg.vector_norm(t, dim=1).clamp_min(1e-12) for t in (query, key))
    query_norm, key_norm = norms
    scores = scores / (query_norm[:, :, None] * key_norm[:, None, :])
    if heads > 1:
        blocks = scores.reshape(batch, heads, dim, heads, dim)
        blocks = torch.diagonal(blocks, dim1=1, dim2=3)  # [B, dim, dim, heads]
        weights = (blocks.permute(0, 3, 1, 2) * temperature).softmax(dim=-1)
        attention = torch.diag_embed(weights.permute(0, 2, 3, 1), dim1=1, dim2=3).reshape(batch, channels, channels)
    else:
        attention = (scores * temperature).softmax(dim=-1)
    mixed = value @ attention.transpose(1, 2)
    return mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class _TransposedAttention(TransposedAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        return self.project_out(_attention(query, key, value, self.temperature))


class _CrossChannelAttention(CrossChannelAttention):
    def forward(self, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        query = self.q_dwconv(self.q(x))
        key, value = self.kv_dwconv(self.kv(shared)).chunk(2, dim=1)
        return self.project_out(_attention(query, key, value, self.temperature))


_FASTER = {
    ChannelLayerNorm: _FusedLayerNorm,
    TransposedAttention: _TransposedAttention,
    CrossChannelAttention: _CrossChannelAttention,
}


def accelerate(module: nn.Module) -> nn.Module:
    """Exchanges the layers of `module` in place for faster ones of equal result, and returns it, channels-last."""
    module = module.to(memory_format=torch.channels_last)
    for layer in module.modules():
        faster = _FASTER.get(type(layer))
        if type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1 and layer.stride == (1, 1):
            faster = _PointwiseConv2d
        if type(layer) is ChannelLayerNorm and layer.bias is None:
            faster = None  # the bias-free form keeps the mean: not what the fused one computes
        if faster is not None:
            layer.__class__ = faster
    return module


_COMPILED = (TransformerBlock, TransposedAttention, CrossChannelAttention, GatedFeedForward)


def compile_blocks(module: nn.Module) -> nn.Module:
    """Lets torch.compile fuse what happens within the blocks of `module`, in place, and returns it.

    It takes half a minute to one and a half for every new size of crop, and, on CPUs, a C++ compiler. Raises InputError if the network has
    no block of a kind for which this is known to pay.
    """
    blocks = list(_outermost(module))
    if not blocks:
        raise InputError(f"--compile: nothing in {type(module).__name__} is made faster by it; leave it out")
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # widths x crops and batches
    for block in blocks:
        block.compile(dynamic=False)
    return module


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The layers to compile, none of which lies in another."""
    for child in module.children():
        if isinstance(child, _COMPILED):
            yield child
        else:
            yield from _outermost(child)
