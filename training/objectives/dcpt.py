"""DCPT: pre-training a restoration network by degradation classification.

Hu et al., "Universal Image Restoration Pre-training via Degradation Classification", ICLR 2025, arXiv 2501.15510. The
network must reproduce clean pictures, and its decoder's features must tell what is wrong with a degraded one; then it is
fine-tuned as usual. The network is any that has `decoder_features` (NAFNet, SwinIR, Restormer, PromptIR).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError, InputError
from ...models import Restorer, checkpoint, registry
from ...models.dcpt_classifier import LABELS, ClassifiedNetwork, DegradationClassifier
from .base import Method, Network, Objective, Parts, Pass, capture, own_copy

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


# The objective --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassificationObjective(Objective):
    """DCPT's pre-training (Hu et al., ICLR 2025): reproduce clean pictures, and let a classifier tell from the decoder's
    features what is wrong with damaged ones. Afterwards the network is fine-tuned as usual.

    stages: names of the submodules whose maps are read, with commas and *; empty: those the network was published with.
    mode: "dcpt", "direct" (restores instead of reproducing, table 12) or "classifier" (only the classifier learns).
    """

    kind: ClassVar[str] = "dcpt"
    mode: str = "dcpt"
    gamma: float = 2.0
    stages: str = ""
    blocks: int = 2

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"DCPT: mode {self.mode!r} is unknown; one of {', '.join(MODES)}")

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        if len(labels) < 2:
            raise InputError("DCPT: the data set has one kind of damage; a classifier needs at least two")
        if network.scale != 1:
            raise ConfigError("DCPT: the network must leave the size of pictures as it is")
        names = stage_names(network, self.stages)
        example = network.example(size)
        with torch.no_grad():
            maps = decoder_features(network, names, example, torch.Generator())
        tokens = maps[0].ndim == 3
        heights = [0 if tokens else m.shape[2] for m in maps]
        alike = len(heights) > 1 and len(set(heights)) == 1  # SwinIR: all stages work at full size
        if not alike and any(b * 2 != a for a, b in zip(heights, heights[1:], strict=False)):
            raise ConfigError(
                f"DCPT: the stages {', '.join(names)} give maps {heights} pixels high; each must be half the one "
                "before, or all of one height"
            )
        config = {
            "kind": "noimg",
            "feature_dims": tuple(m.shape[2 if tokens else 1] for m in maps),
            "num_res_blocks": self.blocks,
            "num_classes": len(labels),
            "downsample": tokens or alike,
        }
        return _Classification(self, tuple(labels), names, config, size)


STAGES = ("dec.*.2", "decoder_level*", "reduce_noise_level*", "decoderlayer_*", "dec_layers.*")
"""Names of decoder stages, by which networks other than DCPT's are looked into."""


def stage_names(network: Network, patterns: str = "") -> list[str]:
    """The submodules that `patterns` name, in their order; [] for networks that show their decoder's maps themselves.

    Raises ConfigError if there are none.
    """
    wanted = [p.strip() for p in patterns.split(",") if p.strip()]
    if not wanted and hasattr(network.module, "decoder_features"):
        return []
    known = [name for name, _ in network.module.named_modules()]
    for group in [wanted] if wanted else [[pattern] for pattern in STAGES]:
        found = [n for n in known if any(fnmatch(n, p) and n.count(".") == p.count(".") for p in group)]
        if found:
            return found
    top = sorted({n.split(".")[0] for n in known if n})
    raise ConfigError(
        f"DCPT: {network.architecture.title} has no submodules called {patterns or ', '.join(STAGES)}; name its decoder "
        f"stages in stages (it has {', '.join(top[:12])})"
    )


def decoder_features(
    network: Network, names: Sequence[str], image: torch.Tensor, generator: torch.Generator
) -> list[torch.Tensor]:
    """The decoder's maps for `image`, highest resolution first."""
    if not names:
        return network.module.decoder_features(image)
    with capture(network.module, names) as seen:
        network(image, generator)
    last = {name: index for index, (name, _) in enumerate(seen)}  # DA-RCOT's decoder runs more than once
    return [seen[index][1] for index in sorted(last.values(), reverse=True)]


class _Classification(Method):
    def __init__(
        self,
        settings: ClassificationObjective,
        labels: tuple[str, ...],
        names: list[str],
        config: Mapping[str, Any],
        size: int,
    ) -> None:
        super().__init__()
        self.settings, self.labels, self.names, self.config, self.size = settings, labels, names, config, size
        self.net_dc = registry.get("dcpt-classifier").build(config)

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        batch, mode = run.batch, self.settings.mode
        target = torch.tensor([self.labels.index(label) for label in batch.labels], device=batch.damaged.device)
        with torch.set_grad_enabled(mode != "classifier"):
            features = decoder_features(run.network, self.names, batch.damaged, run.generator)
        logits = self.net_dc([f.float() for f in features], batch.damaged)
        classification = focal_loss(logits, target, self.settings.gamma)
        right = (logits.argmax(dim=1) == target).float().mean()
        parts = {"classification": classification, "right": right}
        if mode == "classifier":
            return classification, parts
        reproduced = run.restored if mode == "direct" else run.network(batch.clean, run.generator).restored
        pixel = F.l1_loss(reproduced.float(), batch.clean)
        return pixel + classification, {"pixel": pixel, **parts}

    def groups(self) -> list[dict[str, Any]]:
        # Published: a third of the network's learning rate (NAFNet), and weight decay.
        return [{"params": list(self.net_dc.parameters()), "factor": 1 / 3, "weight_decay": 1e-4}]

    def companions(self, network: Network) -> dict[str, Restorer]:
        """The classifier: with the network that it reads, where that shows its decoder's maps by itself."""
        if self.names:
            config = {**self.config, "labels": self.labels, "stages": ", ".join(self.names)}
            return {"classifier": Restorer(registry.get("dcpt-classifier"), config, self.net_dc)}
        pair = {
            "backbone": network.architecture.id,
            "net_g": dict(network.config),
            "net_dc": dict(self.config),
            "labels": self.labels,
            "window": self.size,
        }
        both = ClassifiedNetwork(network.module, self.net_dc, network.architecture.multiple_of(network.config))
        return {"classifier": Restorer(registry.get("dcpt-classified-network"), pair, both)}


@dataclass(frozen=True)
class ClassifierGuidanceObjective(Objective):
    """DCPT's transfer to one kind of damage: a trained classifier, which stays as it is, must find `target` in what the
    network's decoder shows of any picture, while the network restores.

    classifier: a file, or loaded; with a network inside, only its classifier is used. target: one of its labels, or a
    number. pixel, weight: of the L1 difference to the clean picture and of the cross entropy (published: 1 and 1).
    stages: as in ClassificationObjective; empty: those that the classifier was trained with. Raises CheckpointError for
    a file that cannot be read.
    """

    kind: ClassVar[str] = "dcpt-guidance"
    classifier: Restorer | str = ""
    target: str = ""
    pixel: float = 1.0
    weight: float = 1.0
    stages: str = ""

    def __post_init__(self) -> None:
        if self.classifier and isinstance(self.classifier, str):
            object.__setattr__(self, "classifier", checkpoint.load(self.classifier))

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        head, target = self.head_and_target()
        parameter = next(network.module.parameters())
        net_dc = own_copy(head).to(parameter.device).eval().requires_grad_(False)
        names = stage_names(network, self.stages or self.classifier.config.get("stages", ""))
        example = network.example(size)
        with torch.no_grad():  # raises InputError for a classifier of other maps
            net_dc([f.float() for f in decoder_features(network, names, example, torch.Generator())], example.float())
        return _ClassifierGuidance(self, names, net_dc, target)

    def head_and_target(self) -> tuple[DegradationClassifier, int]:
        """The classifier and the number of its class. Raises InputError if it is none, or has no such class."""
        if isinstance(self.classifier, str):
            raise InputError("classifier: none is given; name the file of one, or connect one")
        loaded = self.classifier
        head = getattr(loaded.module, "net_dc", loaded.module)
        if not isinstance(head, DegradationClassifier):
            raise InputError(
                f"classifier: {loaded.architecture.title} is no degradation classifier; take one that training with a "
                "Degradation Classification Objective gave"
            )
        classes = head.fc.out_features
        labels = tuple(loaded.config.get("labels") or LABELS.get(classes) or map(str, range(classes)))
        wanted, known = self.target.strip().casefold(), [label.casefold() for label in labels]
        if wanted in known:
            return head, known.index(wanted)
        if wanted.isdecimal() and int(wanted) < classes:
            return head, int(wanted)
        raise InputError(f"target: the classifier has no class {self.target!r}; it knows {', '.join(labels)}")

    def describe(self) -> dict[str, Any]:
        settings = {"target": self.target, "pixel": self.pixel, "weight": self.weight, "stages": self.stages}
        if isinstance(self.classifier, str):
            return {"kind": self.kind, **settings}
        known = {"classifier": self.classifier.source, "weights": self._digest, "class": self.head_and_target()[1]}
        return {"kind": self.kind, **known, **settings}

    @cached_property
    def _digest(self) -> str:
        """Tells classifiers of one name apart: every run calls its own the same."""
        found = hashlib.sha256()
        for tensor in self.head_and_target()[0].state_dict().values():
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]


class _ClassifierGuidance(Method):
    def __init__(
        self, settings: ClassifierGuidanceObjective, names: list[str], net_dc: DegradationClassifier, target: int
    ) -> None:
        super().__init__()
        self.settings, self.names, self.net_dc, self.target = settings, names, net_dc, target

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        batch, s = run.batch, self.settings
        features = decoder_features(run.network, self.names, batch.damaged, run.generator)
        logits = self.net_dc([f.float() for f in features], batch.damaged)
        target = torch.full((len(logits),), self.target, device=logits.device)
        guidance = F.cross_entropy(logits, target)
        parts = {"guidance": guidance, "found": (logits.argmax(dim=1) == target).float().mean()}
        if not s.pixel:
            return s.weight * guidance, parts
        pixel = F.l1_loss(run.restored.float(), batch.clean)
        return s.pixel * pixel + s.weight * guidance, {"pixel": pixel, **parts}
