"""CLIP's image and text towers, reading open_clip's keys, and the preprocessing of float images.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.
Exact GELU, as in the LAION checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
START, END, CONTEXT = 49406, 49407, 77
"""Token ids that open and close a text, and the longest text in tokens."""


def preprocess(image: torch.Tensor, size: int = 224) -> torch.Tensor:
    """What CLIP sees of [B, 3, H, W] in 0..1: the central square, [B, 3, size, size], normalised.

    Antialiased bicubic on the float image, short side to `size`, long side truncated, no clamp.
    """
    height, width = image.shape[-2:]
    short = min(height, width)
    if short != size:
        target = (size * height // short, size * width // short)
        image = F.interpolate(image, target, mode="bicubic", align_corners=False, antialias=True)
        height, width = target
    top, left = round((height - size) / 2), round((width - size) / 2)
    image = image[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(v, dtype=image.dtype, device=image.device)[:, None, None] for v in (MEAN, STD))
    return (image - mean) / std


class Attention(nn.Module):
    """Multi-head self-attention [B, N, C] -> [B, N, C], keys as torch's MultiheadAttention."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(width * 3, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(width * 3))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out_proj(rearrange(x, "b h n d -> b n (h d)"))


class ResidualBlock(nn.Module):
    """Pre-norm transformer block [B, N, C] -> same."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, width * 4), gelu=nn.GELU(), c_proj=nn.Linear(width * 4, width))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A run of blocks, under the key `resblocks`."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualBlock(width, heads, causal) for _ in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resblocks(x)


class VisionTower(nn.Module):
    """[B, 3, size, size], normalised, -> image features [B, embed_dim], not L2-normalised."""

    def __init__(
        self, embed_dim: int, image_size: int, layers: int, width: int, patch_size: int, head_width: int = 64
    ) -> None:
        super().__init__()
        self.image_size = image_size
        tokens = (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, width // head_width, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = rearrange(self.conv1(image), "b c h w -> b (h w) c")
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Both towers; `text_cfg=None` leaves the text tower out."""

    def __init__(self, embed_dim: int, vision_cfg: dict, text_cfg: dict | None) -> None:
        super().__init__()
        self.visual = VisionTower(embed_dim, **vision_cfg)
        if text_cfg is None:
            return
        width = text_cfg["width"]
        self.transformer = Transformer(width, text_cfg["layers"], text_cfg["heads"], causal=True)
        self.token_embedding = nn.Embedding(text_cfg["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.randn(text_cfg["context_length"], width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Features [B, embed_dim] of pictures [B, 3, H, W] in 0..1, of any size (preprocessed here)."""
        return self.visual(preprocess(image, self.visual.image_size))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features [B, embed_dim] of token ids [B, N] that end with the largest id, zero-padded."""
        end = tokens.argmax(dim=-1)
        # The tower is causal: what follows the last end token cannot be seen from it.
        tokens = tokens[:, : int(end.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection
