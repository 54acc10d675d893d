"""DCPT's degradation classifier, alone and together with the network whose features it reads.

Hu et al., "Universal Image Restoration Pre-training via Degradation Classification", ICLR 2025, arXiv 2501.15510
(MILab-PKU/dcpt). In pre-training a restoration network must reproduce clean pictures while this small network tells,
from the maps of its decoder, what is wrong with a degraded one. State-dict keys are the released files'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from . import registry
from .degradation import Degradation
from .layers.norm import ChannelLayerNorm
from .layers.padding import pad_to_multiple
from .layers.state_dict import count_indices
from .registry import Architecture, State, construct

LABELS: Mapping[int, tuple[str, ...]] = {
    5: ("rain", "noise", "haze", "low light", "motion blur"),
    10: (
        *("noise", "motion blur", "defocus blur", "jpeg", "haze"),
        *("rain", "snow", "mosaic", "low light", "inpainting"),
    ),
}
"""Class names by number of classes, in the order of the published training sets."""


class NormConv(nn.Conv2d):
    """Convolution without bias, then layer norm over channels, its parameters under the convolution's own key."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelLayerNorm(out, eps=1e-6)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, twice as wide inside, residual. [B, C, H, W] -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = NormConv(channels, channels * 2, 1)
        self.conv2 = NormConv(channels * 2, channels * 2, 3)
        self.conv3 = NormConv(channels * 2, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.conv2(self.conv1(x).relu()).relu()
        return (x + self.conv3(inner)).relu()


class DegradationClassifier(nn.Module):
    """Names the degradation from a restoration network's decoder maps, highest resolution first.

    Map i is [B, feature_dims[i], H / 2^i, W / 2^i]. With `downsample` all maps are full size (SwinIR) and are shrunk
    here. `image_stem`: the degraded picture, at twice the first map's size, is read as well.
    """

    def __init__(
        self,
        *,
        feature_dims: Sequence[int],
        num_res_blocks: int = 2,
        num_classes: int = 5,
        downsample: bool = False,
        image_stem: bool = False,
    ) -> None:
        super().__init__()
        if not feature_dims or num_classes < 1:
            raise ConfigError("classifier: feature_dims and num_classes need at least one entry")
        self.downsample = downsample
        self.mixing_weights = nn.Parameter(torch.ones(len(feature_dims)))
        if image_stem:
            self.conv_embed = nn.Sequential(
                nn.Conv2d(3, feature_dims[0], 7, stride=2, padding=3), ChannelLayerNorm(feature_dims[0], eps=1e-6)
            )

        def stage(channels: int) -> nn.Sequential:
            return nn.Sequential(*(BottleneckBlock(channels) for _ in range(num_res_blocks)))

        self.bottleneck_layers = nn.ModuleList(stage(channels) for channels in feature_dims)
        # Lists of one: the published layers have a pooling and a ReLU, without parameters, after the convolution.
        self.downsample_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, out, 1, bias=False))
            for channels, out in zip(feature_dims, [*feature_dims[1:], feature_dims[-1]], strict=True)
        )
        self.last_stage = stage(feature_dims[-1])
        self.fc = nn.Linear(feature_dims[-1], num_classes)

    def embed(self, features: Sequence[torch.Tensor], image: torch.Tensor | None = None) -> torch.Tensor:
        """The vector [B, D] that the last linear layer reads.

        A map may also be tokens [B, H * W, C] of a square picture. Raises InputError if the maps do not fit.
        """
        if len(features) != len(self.bottleneck_layers):
            raise InputError(f"classifier: made for {len(self.bottleneck_layers)} feature maps, got {len(features)}")
        x: torch.Tensor | None = self.conv_embed(image) if hasattr(self, "conv_embed") else None
        weights = self.mixing_weights.softmax(dim=0)
        for index, (blocks, reduce, weight) in enumerate(
            zip(self.bottleneck_layers, self.downsample_layers, weights, strict=True)
        ):
            weighted = self._map(features[index], index) * weight
            expected = (len(weighted), reduce[0].in_channels, *(weighted if x is None else x).shape[2:])
            if weighted.shape != expected:
                raise InputError(
                    f"classifier: feature map {index} is {tuple(weighted.shape)}, expected {expected}; does this "
                    "classifier belong to another network?"
                )
            x = blocks(weighted if x is None else x + weighted)
            x = F.max_pool2d(reduce(x), 2).relu()
        return self.last_stage(x).mean(dim=(2, 3))

    def _map(self, feature: torch.Tensor, index: int) -> torch.Tensor:
        if feature.ndim == 3:
            side = round(feature.shape[1] ** 0.5)
            if side * side != feature.shape[1]:
                raise InputError(f"classifier: {feature.shape[1]} tokens are no square picture; pass maps [B, C, H, W]")
            feature = rearrange(feature, "b (h w) c -> b c h w", h=side)
        if self.downsample and index > 0:
            feature = F.interpolate(feature, scale_factor=1 / 2**index, mode="nearest")
        return feature

    def forward(self, features: Sequence[torch.Tensor], image: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, classes]."""
        return self.fc(self.embed(features, image))


class ClassifiedNetwork(nn.Module):
    """A restoration network (`net_g`) and the classifier of its features (`net_dc`), as pre-training has them.

    `multiple_of`: height and width of pictures must be multiples of it.
    """

    def __init__(self, net_g: nn.Module, net_dc: DegradationClassifier, multiple_of: int) -> None:
        super().__init__()
        self.net_g, self.net_dc, self.multiple_of = net_g, net_dc, multiple_of

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in 0..1 -> logits [B, classes]."""
        return self.net_dc(self.net_g.decoder_features(image), image)


def classify(
    image: torch.Tensor,
    network: nn.Module,
    classifier: DegradationClassifier,
    labels: Sequence[str] = (),
    *,
    multiple_of: int = 1,
    window: int = 512,
    grid: int = 3,
) -> Degradation:
    """What is wrong with each picture of `image` [B, 3, H, W] in 0..1.

    A picture larger than `window` pixels is looked at through at most `grid` x `grid` evenly spaced windows, whose
    probabilities and embeddings are averaged: at full resolution, because shrinking hides noise and JPEG blocks.
    Raises InputError if the classifier was made for other features.
    """
    if not hasattr(network, "decoder_features"):
        raise InputError(f"classifier: {type(network).__name__} shows no decoder features to a classifier")
    classes = classifier.fc.out_features
    labels = tuple(labels) or LABELS.get(classes) or tuple(f"class {k}" for k in range(classes))
    multiple = multiple_of * 2 ** len(classifier.bottleneck_layers) if classifier.downsample else multiple_of
    probabilities, embeddings = [], []
    for part in windows(image, window, grid):
        padded, _ = pad_to_multiple(part, multiple, 2 ** (len(classifier.bottleneck_layers) + 1))
        embedding = classifier.embed(network.decoder_features(padded), padded)
        embeddings.append(embedding)
        probabilities.append(classifier.fc(embedding).float().softmax(dim=-1))
    return Degradation(labels, torch.stack(probabilities).mean(dim=0), torch.stack(embeddings).mean(dim=0), "dcpt")


def windows(image: torch.Tensor, size: int, grid: int) -> list[torch.Tensor]:
    """At most `grid` x `grid` views of `size` pixels, evenly spaced over [B, C, H, W]; smaller pictures as they are."""

    def starts(side: int) -> list[int]:
        count = min(grid, -(-side // size))
        if count == 1:
            return [max(0, (side - size) // 2)]
        return [round(i * (side - size) / (count - 1)) for i in range(count)]

    height, width = image.shape[2:]
    return [image[..., y : y + size, x : x + size] for y in starts(height) for x in starts(width)]


_SIGNATURE = ("mixing_weights", "bottleneck_layers.0.0.conv1.norm.weight", "last_stage.0.conv1.weight")
_PAIR_ONLY = {"mode", "hook_prefix", "focal_gamma", "pixel_loss", "grads", "backbone", "labels", "window"}


def _build(config: Mapping[str, Any]) -> DegradationClassifier:
    kind = config.get("kind", "noimg")
    if kind not in ("noimg", "img"):
        raise ConfigError(f"classifier: kind {kind!r} is unknown; one of noimg, img")
    return construct(
        DegradationClassifier,
        "classifier",
        {"image_stem": kind == "img", **config},
        without=("kind", "labels", "stages"),
    )


def _config_from_state_dict(state: State, prefix: str = "") -> dict[str, Any]:
    count = count_indices(state, f"{prefix}bottleneck_layers.")
    dims = tuple(state[f"{prefix}bottleneck_layers.{i}.0.conv1.weight"].shape[1] for i in range(count))
    classes = state[f"{prefix}fc.weight"].shape[0]
    if not (1 <= count <= 16 and max(dims) <= 4096 and 1 <= classes <= 10000):
        raise CheckpointError(f"classifier: absurd sizes: {count} maps of {dims} channels, {classes} classes")
    return {
        "kind": "img" if f"{prefix}conv_embed.0.weight" in state else "noimg",
        "feature_dims": dims,
        "num_res_blocks": count_indices(state, f"{prefix}bottleneck_layers.0."),
        "num_classes": classes,
        # Maps of one width belong to SwinIR, whose stages all work at full size.
        "downsample": count > 1 and len(set(dims)) == 1,
        "labels": LABELS.get(classes, ()),
    }


def _build_pair(config: Mapping[str, Any]) -> ClassifiedNetwork:
    unknown = set(config) - _PAIR_ONLY - {"net_g", "net_dc"}
    if unknown:
        raise ConfigError(f"classified network: unknown settings {', '.join(sorted(unknown))}")
    backbone = _backbone(config)
    try:
        network = backbone.build(config["net_g"])
    except KeyError as error:
        raise ConfigError(f"classified network: {error} is missing") from None
    return ClassifiedNetwork(network, _build(config["net_dc"]), backbone.multiple_of(config["net_g"]))


def _backbone(config: Mapping[str, Any]) -> Architecture:
    name = config.get("backbone")
    known = {
        a.id.removeprefix("dcpt-"): a for a in registry.architectures() if a.system == "dcpt" and a.kind == "restorer"
    }
    if name in known:
        return known[name]
    if name is not None:
        return registry.get(name)
    return registry.find("dcpt", config["net_g"])


def _part(state: State, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _pair_from_state_dict(state: State) -> dict[str, Any]:
    network = _part(state, "net_g.")
    backbone = registry.detect(network)
    if backbone is None:
        raise CheckpointError("classified network: the entries under net_g. are no network that Mend knows")
    net_dc = _config_from_state_dict(state, "net_dc.")
    labels = net_dc.pop("labels")
    return {
        "backbone": backbone.id,
        "net_g": backbone.config_from_state_dict(network),
        "net_dc": net_dc,
        "labels": labels,
    }


_PAPER = (
    "Hu et al., Universal Image Restoration Pre-training via Degradation Classification, ICLR 2025, arXiv 2501.15510"
)

ARCHITECTURES = [
    Architecture(
        id="dcpt-classified-network",
        system="dcpt",
        title="Network with degradation classifier (DCPT)",
        paper=_PAPER,
        licence="as the network inside; Mend's own: Apache-2.0",
        detect=lambda state: f"net_dc.{_SIGNATURE[0]}" in state and f"net_dc.{_SIGNATURE[1]}" in state,
        config_from_state_dict=_pair_from_state_dict,
        build=_build_pair,
        matches_config=lambda config: "net_g" in config,
        kind="classifier",
        signature=tuple(f"net_dc.{key}" for key in _SIGNATURE),
        metadata_keys=("net_g", "net_dc", "labels", "window"),
        restore=lambda module, image, **context: module.net_g(image, **context),
        multiple_of=lambda config: _backbone(config).multiple_of(config["net_g"]),
    ),
    Architecture(
        id="dcpt-classifier",
        system="dcpt",
        title="Degradation classifier (DCPT)",
        paper=_PAPER,
        licence="DCPT code and weights: none stated, ask the authors",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "feature_dims" in config,
        kind="classifier",
        variants={
            name: {"kind": "noimg", "feature_dims": dims, "num_res_blocks": 2, "num_classes": classes, "downsample": d}
            for name, dims, classes, d in (
                ("nafnet-5d", (64, 128, 256, 512), 5, False),
                ("nafnet-10d", (64, 128, 256, 512), 10, False),
                ("restormer-5d", (96, 96, 192), 5, False),
                ("promptir-5d", (96, 192, 192), 5, False),
                ("swinir-5d", (180, 180, 180), 5, True),
            )
        },
        signature=_SIGNATURE,
        metadata_keys=("downsample", "labels", "stages"),
    ),
]
