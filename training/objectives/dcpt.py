"""DCPT: pre-training a restoration network by degradation classification.

Hu et al., "Universal Image Restoration Pre-training via Degradation Classification", ICLR 2025, arXiv 2501.15510. The
network must reproduce clean pictures, and its decoder's features must tell what is wrong with a degraded one; then it is
fine-tuned as usual. The network is any that has `decoder_features` (NAFNet, SwinIR, Restormer, PromptIR).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError
from ...models.dcpt_classifier import DegradationClassifier

MODES = ("dcpt", "direct", "classifier")


def focal_loss(
    logits: torch.Tensor, target: torch.Tensor, gamma: float = 2.0, ignore_index: int = -100
) -> torch.Tensor:
    """Mean over the batch of -(1 - p)^gamma log p, p the probability of the true class (Lin et al., ICCV 2017).

    logits [B, K], target [B] of class indices; entries equal to `ignore_index` do not count, if none is left it is 0.
    """
    kept = target != ignore_index
    if not bool(kept.any()):
        return logits.sum() * 0.0
    log_p = logits[kept].float().log_softmax(dim=-1).gather(1, target[kept, None]).squeeze(1)
    return -((1.0 - log_p.exp()) ** gamma * log_p).mean()


@dataclass(frozen=True)
class Step:
    """One iteration before the optimisers step: call `total.backward()` once, then step both."""

    restored: torch.Tensor | None
    """[B, 3, H, W], what the pixel loss was computed on; None where only the classifier learns."""
    features: list[torch.Tensor]
    logits: torch.Tensor
    pixel: torch.Tensor
    classification: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.pixel + self.classification


def dcpt_step(
    network: nn.Module,
    classifier: DegradationClassifier,
    degraded: torch.Tensor,
    clean: torch.Tensor,
    label: torch.Tensor,
    *,
    gamma: float = 2.0,
    mode: str = "dcpt",
) -> Step:
    """Losses of one batch: degraded, clean [B, 3, H, W] in 0..1, label [B].

    mode "dcpt": the network reproduces `clean` from `clean` (section 3.2). "direct": it restores `degraded` (the
    ablation of table 12). "classifier": the network is left alone, only the classifier learns. Raises ConfigError.
    """
    if mode not in MODES:
        raise ConfigError(f"DCPT: mode {mode!r} is unknown; one of {', '.join(MODES)}")
    if mode == "classifier":
        with torch.no_grad():
            features = network.decoder_features(degraded)
        logits = classifier(features, degraded)
        return Step(None, features, logits, logits.new_zeros(()), focal_loss(logits, label, gamma))
    restored = network(clean if mode == "dcpt" else degraded)
    features = network.decoder_features(degraded)
    logits = classifier(features, degraded)
    return Step(restored, features, logits, F.l1_loss(restored, clean), focal_loss(logits, label, gamma))
