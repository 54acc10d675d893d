"""The objectives that can be chosen and combined: how each is set, and how it is put to work on a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError, InputError
from ...models.da_rcot import Potential
from ...models.dcpt_classifier import DegradationClassifier
from ...models.layers.padding import crop, pad_to_multiple
from ...models.layers.uncertainty import UncertaintyHead
from .. import distributed
from .base import Batch, Method, Network, Objective, Parts, Pass, Weighted, capture, last_convolution
from .dcpt import MODES, focal_loss
from .denoising import DenoisingObjective
from .rate_distortion import RateDistortion
from .rcot import critic_loss, gradient_penalty, map_loss
from .restoration import charbonnier, fft_loss, log_error
from .tur import TaskUncertaintyLoss

PIXEL_LOSSES = {
    "Charbonnier": charbonnier,
    "L1": lambda restored, clean: (restored.float() - clean.float()).abs().mean(),
    "squared": lambda restored, clean: (restored.float() - clean.float()).square().mean(),
    "log error": log_error,
}


def _example(network: Network, size: int) -> torch.Tensor:
    """A picture to find out with what a network does."""
    parameter = next(network.module.parameters())
    return torch.full((1, 3, size, size), 0.5, device=parameter.device, dtype=parameter.dtype)


# Restoration ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelObjective(Objective):
    """The difference to the clean picture, and that of the spectra times `fft` (0.1 in MoCE-IR)."""

    kind: ClassVar[str] = "pixel"
    loss: str = "Charbonnier"
    fft: float = 0.1

    def __post_init__(self) -> None:
        if self.loss not in PIXEL_LOSSES:
            raise ConfigError(f"objective: loss {self.loss!r} is unknown; one of {', '.join(PIXEL_LOSSES)}")

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        return _Pixel(self)


class _Pixel(Method):
    def __init__(self, settings: PixelObjective) -> None:
        super().__init__()
        self.settings = settings

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        pixel = PIXEL_LOSSES[self.settings.loss](run.restored, run.batch.clean)
        if not self.settings.fft:
            return pixel, {"pixel": pixel}
        spectrum = fft_loss(run.restored, run.batch.clean)
        return pixel + self.settings.fft * spectrum, {"pixel": pixel, "fft": spectrum}


@dataclass(frozen=True)
class RoutingObjective(Objective):
    """MoCE-IR's balance loss (section 3.3): all experts are to be used; with `complexity`, cheap ones more."""

    kind: ClassVar[str] = "routing"
    complexity: bool = True

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        if not hasattr(network.module, "balance_loss"):
            raise ConfigError(f"routing objective: {network.architecture.title} has no routed experts; use MoCE-IR")
        network.module.with_complexity = self.complexity
        return _RoutingMethod()


class _RoutingMethod(Method):
    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        balance = run.network.module.balance_loss(run.outputs.routing)
        return balance, {"balance": balance}


# TUR ------------------------------------------------------------------------------------------------------------------

_ALIASES = {
    "low-light": "dark",
    "lowlight": "dark",
    "motion-blur": "blur",
    "motionblur": "blur",
    "defocus": "blur",
    "downsample": "sr",
}


@dataclass(frozen=True)
class UncertaintyObjective(Objective):
    """Task Uncertainty Regularization (Wu et al., AAAI 2025): hard kinds of damage pull less.

    setting: "data set" takes its labels as tasks; "3task", "5task", "7task" are the published lists. accumulate: as the
    published 3- and 5-task code computes it; None: as the setting was published (the paper's formula for own tasks).
    Networks without an uncertainty head get one, on what their last convolution reads; it is not part of the result.
    """

    kind: ClassVar[str] = "tur"
    setting: str = "data set"
    accumulate: bool | None = None

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        if self.setting == "data set":
            loss = TaskUncertaintyLoss(tuple(labels), accumulate=bool(self.accumulate))
        else:
            loss = TaskUncertaintyLoss.released(self.setting, accumulate=self.accumulate)
        tasks = {label: self._task(label, loss.tasks) for label in labels}
        return _Uncertainty(loss, tasks, self._head(network, size))

    @staticmethod
    def _task(label: str, tasks: Sequence[str]) -> str:
        plain = label.replace(" ", "").lower()
        for name in (label, plain, _ALIASES.get(plain, plain), f"{plain}25"):
            if name in tasks:
                return name
        raise InputError(f"TUR: the data set's {label!r} is none of the tasks {', '.join(tasks)}")

    @staticmethod
    def _head(network: Network, size: int) -> nn.Module | None:
        """None if the network has one."""
        image, generator = _example(network, size), torch.Generator()
        if network.architecture.restore_with_uncertainty is not None:
            try:
                with torch.no_grad():
                    network.architecture.restore_with_uncertainty(network.module, image)
                network.own_uncertainty = True
                return None
            except ConfigError:
                pass
        network.last = last_convolution(network.module, lambda: network(image, generator))
        return UncertaintyHead(network.module.get_submodule(network.last).in_channels)


class _Uncertainty(Method):
    def __init__(self, loss: TaskUncertaintyLoss, tasks: Mapping[str, str], head: nn.Module | None) -> None:
        super().__init__()
        self.criterion, self.tasks, self.head = loss, tasks, head

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        outputs = run.outputs
        uncertainty = outputs.uncertainty if self.head is None else self.head(outputs.features.float())
        if uncertainty.shape != outputs.restored.shape:  # the last convolution of some works before enlarging
            uncertainty = F.interpolate(uncertainty, outputs.restored.shape[-2:], mode="nearest")
        tasks = [self.tasks[label] for label in run.batch.labels]
        report = self.criterion(outputs.restored, run.batch.clean, uncertainty, tasks)
        present = report.mean_uncertainty > 0
        return report.total, {
            "tur": report.total,
            "L1": report.plain_l1[present].mean(),
            "uncertainty": report.mean_uncertainty[present].mean(),
        }

    def groups(self) -> list[dict[str, Any]]:
        return [] if self.head is None else [{"params": list(self.head.parameters())}]


# DCPT -----------------------------------------------------------------------------------------------------------------


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
        example = _example(network, size)
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
        classifier = DegradationClassifier(
            feature_dims=[m.shape[2 if tokens else 1] for m in maps],
            num_res_blocks=self.blocks,
            num_classes=len(labels),
            downsample=tokens or alike,
        )
        return _Classification(self, tuple(labels), names, classifier)


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
        self, settings: ClassificationObjective, labels: tuple[str, ...], names: list[str], net_dc: nn.Module
    ) -> None:
        super().__init__()
        self.settings, self.labels, self.names, self.net_dc = settings, labels, names, net_dc

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


# DA-RCOT --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransportObjective(Objective):
    """DA-RCOT's game (Tang et al., TPAMI 2025): a potential learns to score clean pictures above restored ones, the
    network to please it at the least transport cost, measured on what it removes and on its spectrum.

    paired: also the L1 and contrastive terms; without, the potential sees clean pictures that have nothing to do with the
    damaged ones. cost, pair: the paper's sigma and Sigma. corrected: the contrastive term with dot products, as meant.
    width: channels of the potential's first layer (published: 64). critic_rate: its learning rate (RMSprop).
    """

    kind: ClassVar[str] = "da-rcot"
    paired: bool = True
    cost: float = 1.0
    pair: float = 10000.0
    contrastive: float = 0.1
    corrected: bool = False
    penalty: float = 10.0
    width: int = 64
    critic_rate: float = 1e-4

    @property
    def optimizer(self) -> str:
        return "rmsprop"

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        patch = size * network.scale
        if patch % 32:
            raise ConfigError(f"DA-RCOT: the potential needs crops that are multiples of 32 pixels, not {patch}")
        if network.scale != 1:
            raise ConfigError("DA-RCOT: the transport cost needs a network that leaves the size as it is")
        return _Transport(self, degradation_ids(labels), Potential(patch_size=patch, width=self.width))


def degradation_ids(labels: Sequence[str]) -> dict[str, int]:
    """DA-RCOT's numbers: 0 to 2 for noise, whose spectrum is dense, 3 and up for all else, each its own."""
    noisy = [label for label in labels if "noise" in label or label == "poisson"]
    rest = [label for label in labels if label not in noisy]
    return {**{n: min(i, 2) for i, n in enumerate(noisy)}, **{n: 3 + i for i, n in enumerate(rest)}}


class _CriticLoss(nn.Module):
    """The potential's two losses as a forward pass, so that processes can share its gradients."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(
        self, restored: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor | None, weight: float
    ) -> torch.Tensor:
        if alpha is None:
            return critic_loss(self.critic, restored, target)
        return gradient_penalty(self.critic, restored, target, alpha, weight)


class _Transport(Method):
    def __init__(self, settings: TransportObjective, ids: Mapping[str, int], critic: Potential) -> None:
        super().__init__()
        # Frozen but in its own step: it is no part of what is trained with the network.
        self.settings, self.ids, self.critic = settings, ids, critic.requires_grad_(False)
        self.wants_other = not settings.paired
        self._optimizer: torch.optim.Optimizer | None = None
        self._loss: list[nn.Module] = []  # a list: not a submodule of its own
        self._state: dict[str, Any] = {}

    def _critic_optimizer(self) -> torch.optim.Optimizer:
        """Made at the first step, when the critic lies on its device."""
        if self._optimizer is None:
            self._optimizer = torch.optim.RMSprop(self.critic.parameters(), lr=self.settings.critic_rate)
            if self._state:
                self._optimizer.load_state_dict(self._state)
            self._loss = [distributed.wrap(_CriticLoss(self.critic))]
        return self._optimizer

    def prepare(self, run: Pass) -> Parts:
        self.critic.requires_grad_(True)
        batch, optimizer = run.batch, self._critic_optimizer()
        target = batch.clean if batch.other is None else batch.other
        restored = run.restored.detach().float()
        alpha = torch.rand(len(restored), 1, 1, 1, generator=run.generator).to(restored)
        values = []
        for mix in (None, alpha):  # two backward passes and two steps, as published
            loss = self._loss[0](restored, target, mix, self.settings.penalty)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        self.critic.requires_grad_(False)
        return {"critic": values[0], "penalty": values[1]}

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        s, batch = self.settings, run.batch
        ids = torch.tensor([self.ids[label] for label in batch.labels], device=batch.damaged.device)
        found = map_loss(
            self.critic,
            batch.damaged,
            run.restored.float(),
            ids,
            batch.clean if s.paired else None,
            run.outputs.embedding if s.paired else None,
            cost_weight=s.cost,
            pair_weight=s.pair,
            contrastive_weight=s.contrastive,
            corrected_contrastive=s.corrected,
        )
        parts = {"adversarial": found.adversarial, "residual": found.residual_rms, "fourier": found.fourier}
        if found.l1 is not None:
            parts["L1"] = found.l1
        if found.contrastive is not None:
            parts["contrastive"] = found.contrastive
        return found.total, parts

    def get_extra_state(self) -> dict[str, Any]:
        return self._optimizer.state_dict() if self._optimizer is not None else self._state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._state = state


# Codecs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RateDistortionObjective(Objective):
    """What a codec's bits cost against how far its pictures are from clean ones (see rate_distortion.py)."""

    kind: ClassVar[str] = "rate-distortion"
    anchors: int = 2
    clean: float = 0.2
    shown: int = 40
    """The quality that validation looks at."""

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        if network.architecture.kind != "codec":
            raise ConfigError(f"rate-distortion: {network.architecture.title} is no codec")
        return _RateDistortionMethod(RateDistortion(anchors=self.anchors, clean=self.clean), self.shown)


class _RateDistortionMethod(Method):
    def __init__(self, objective: RateDistortion, shown: int) -> None:
        super().__init__()
        self.objective, self.shown = objective, shown

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        return self.objective(run.network.module, run.batch.damaged, run.batch.clean, run.generator)

    def restore(self, network: Network, image: torch.Tensor) -> torch.Tensor:
        padded, size = pad_to_multiple(image, network.architecture.multiple_of(network.config))
        quality = torch.full((len(image),), self.shown, device=image.device)
        y, z = network.module.analyse(padded, quality)
        return crop(network.module.synthesise(network.module.quantise(y, z).y_hat, quality), size)


OBJECTIVES: dict[str, type[Objective]] = {
    made.kind: made
    for made in (
        PixelObjective,
        RoutingObjective,
        UncertaintyObjective,
        ClassificationObjective,
        TransportObjective,
        RateDistortionObjective,
        DenoisingObjective,
    )
}
"""Every objective by the name that the command line and a file's provenance know it by."""

__all__ = ["OBJECTIVES", "Batch", "Weighted", *(made.__name__ for made in OBJECTIVES.values())]


def default_objective(network_module: nn.Module, kind: str = "restorer") -> Objective:
    """What a network is fine-tuned with if nothing else is said: its paper's loss as far as that is a plain one."""
    if kind == "codec":
        return RateDistortionObjective()
    if kind == "prior":
        return DenoisingObjective()
    if hasattr(network_module, "balance_loss"):
        return Weighted(((PixelObjective(), 1.0), (RoutingObjective(complexity=False), 0.01)))
    return PixelObjective()
