"""VLU-Net's eye: CLIP with small adapters that put pictures and texts about damage into one space.

Zeng et al., "Vision-Language Gradient Descent-driven All-in-One Deep Unfolding Networks", CVPR 2025, arXiv 2503.16930,
section 3.2. State-dict keys are those of `model_degradation` in the released Lightning files.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError
from .clip import CLIP, CONTEXT, END, START
from .degradation import Degradation

SOURCE = "vlu-net"
LABELS = ("noise 15", "noise 25", "noise 50", "haze", "rain", "blur", "low light")
TEXTS = (
    "image with noise",
    "image with many noise",
    "image with large amount of noise",
    "image with haze",
    "image with rain",
    "image with blur",
    "image with low light",
)
"""The texts the adapters were tuned on, one a label."""
_TOKENS = {
    "image": 2867,
    "with": 593,
    "noise": 9307,
    "many": 1346,
    "large": 3638,
    "amount": 6403,
    "of": 539,
    "haze": 22785,
    "rain": 2443,
    "blur": 27976,
    "low": 1042,
    "light": 1395,
}
"""CLIP's ids of the words in TEXTS, so that these need no vocabulary file."""


class AdaptedTower(nn.Module):
    """A CLIP tower (shared between the two encoders) and the small network tuned on top of it."""

    def __init__(self, clip_model: CLIP, embed_dim: int) -> None:
        super().__init__()
        self.clip_model = clip_model
        layers: list[nn.Module] = []
        for index in range(3):
            layers += [nn.Linear(embed_dim, embed_dim), nn.LayerNorm(embed_dim)]
            layers += [nn.GELU()] if index < 2 else []
        self.adapter = nn.Sequential(*layers)


class DegradationEncoder(nn.Module):
    """Degradation vectors of pictures and of texts, in one space (section 3.2).

    The released keys list the one CLIP twice, under both encoders; without a text tower the second is not there.
    """

    def __init__(self, embed_dim: int, vision_cfg: dict, text_cfg: dict | None) -> None:
        super().__init__()
        clip_model = CLIP(embed_dim, vision_cfg, text_cfg)
        self.ad_imageEncoder = AdaptedTower(clip_model, embed_dim)
        if text_cfg is not None:
            self.ad_textEncoder = AdaptedTower(clip_model, embed_dim)

    @property
    def reads_text(self) -> bool:
        return hasattr(self, "ad_textEncoder")

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in 0..1, any size -> [B, 512]. CLIP sees the central square."""
        tower = self.ad_imageEncoder
        return tower.adapter(tower.clip_model.encode_image(image))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """CLIP token ids [B, N] -> [B, 512]. Raises InputError if the file had no text tower."""
        if not self.reads_text:
            raise InputError("model: this file holds no CLIP text tower; use the original Lightning file")
        tower = self.ad_textEncoder
        return tower.adapter(tower.clip_model.encode_text(tokens))

    def describe(self, image: torch.Tensor) -> Degradation:
        """The degradation of [B, 3, H, W]: its vector and, with a text tower, how likely each of LABELS is.

        Likelihood: softmax of the dot products with the texts' vectors, the classifier the adapters were tuned as.
        """
        return self.classify(self.encode_image(image))

    def classify(self, embedding: torch.Tensor) -> Degradation:
        """As `describe`, for vectors [B, 512]."""
        if not self.reads_text:
            return Degradation(embedding=embedding, source=SOURCE)
        texts = self.encode_text(tokenize(TEXTS).to(embedding.device))
        return Degradation(LABELS, (embedding @ texts.T).float().softmax(dim=-1), embedding, SOURCE)


def tokenize(texts: tuple[str, ...] | list[str]) -> torch.Tensor:
    """CLIP token ids [B, 77] of texts made of the words in TEXTS. Raises InputError naming a word it does not know."""
    rows = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        words = text.lower().split()
        unknown = [word for word in words if word not in _TOKENS]
        if unknown:
            raise InputError(f"text: {unknown[0]!r} is not among the words known without CLIP's vocabulary")
        if len(words) > CONTEXT - 2:
            raise InputError(f"text: {len(words)} words, at most {CONTEXT - 2} fit")
        ids = [START, *(_TOKENS[word] for word in words), END]
        row[: len(ids)] = torch.tensor(ids)
    return rows
