"""The feature maps inside an encoder-decoder network, as a value: to look at, to change, to decode again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from .layers.padding import crop, pad_to_multiple
from .restorer import Restorer


@runtime_checkable
class EncoderDecoder(Protocol):
    """What a network offers whose features can be taken out and put back in; forward is the one after the other."""

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[B, C, H, W] -> feature maps [B, C_i, H_i, W_i], shallow to deep."""
        ...

    def reconstruct(self, features: list[torch.Tensor], x: torch.Tensor, **context: Any) -> torch.Tensor:
        """From those maps and the image they were made from to the restored image."""
        ...


@dataclass(frozen=True, eq=False)
class Features:
    """The maps of a batch, shallow to deep, with what is needed to decode them.

    image [B, C, H, W] is the padded picture they were made from, `size` its (height, width) before padding.
    """

    maps: tuple[torch.Tensor, ...]
    image: torch.Tensor
    size: tuple[int, int]
    network: str
    """Id of the architecture that made them."""
    context: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[torch.Size, ...] = ()
    """Of the network's weights, which differ between files of one architecture."""

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.image)

    def to(self, *args: Any, **kwargs: Any) -> Features:
        """As Tensor.to, for every tensor of it."""

        def moved(value: Any) -> Any:
            return value.to(*args, **kwargs) if hasattr(value, "to") else value

        context = {name: moved(value) for name, value in self.context.items()}
        return replace(self, maps=tuple(map(moved, self.maps)), image=moved(self.image), context=context)

    def scaled(self, gains: Sequence[float]) -> Features:
        """Each map multiplied by its gain, shallow to deep. Raises InputError if the counts differ."""
        if len(gains) != len(self.maps):
            raise InputError(f"gains: {len(gains)} numbers for {len(self.maps)} feature maps, shallow to deep")
        return replace(self, maps=tuple(m if g == 1 else m * g for m, g in zip(self.maps, gains, strict=True)))

    def blend(self, other: Features, amounts: Sequence[float]) -> Features:
        """Each map interpolated towards the other's by its amount; picture, size and context stay this one's.

        Raises InputError unless both come from the same network and pictures of the same size.
        """
        if self.network != other.network or [m.shape[1:] for m in self.maps] != [m.shape[1:] for m in other.maps]:
            raise InputError("features: to blend, both must come from the same network and pictures of the same size")
        if len(other) not in (1, len(self)):
            raise InputError(f"features: {len(self)} pictures do not blend with {len(other)}")
        if len(amounts) != len(self.maps):
            raise InputError(f"amounts: {len(amounts)} numbers for {len(self.maps)} feature maps, shallow to deep")
        pairs = zip(self.maps, other.maps, amounts, strict=True)
        return replace(self, maps=tuple(a if t == 0 else torch.lerp(a, b.to(a).expand_as(a), t) for a, b, t in pairs))


def encodable(module: nn.Module) -> bool:
    """Whether a network offers its features."""
    return isinstance(module, EncoderDecoder)


def encode(restorer: Restorer, image: torch.Tensor, options: Mapping[str, Any] | None = None) -> Features:
    """The feature maps of [B, C, H, W] in 0..1, any size. Raises InputError for a network that does not offer them.

    options: keyword arguments of the network (NAFNet's local pooling), for decoding too.
    """
    _require(restorer)
    padded, size = pad_to_multiple(image, restorer.multiple_of, restorer.minimum_size)
    options = dict(options or {})
    maps, name = tuple(restorer.module.encode(padded, **options)), restorer.architecture.id
    return Features(maps, padded, size, name, options, _shapes(restorer.module))


def decode(restorer: Restorer, features: Features) -> torch.Tensor:
    """The restored image [B, C, scale * H, scale * W]. Raises InputError if the features are another network's."""
    _require(restorer)
    if features.network != restorer.architecture.id:
        raise InputError(f"features: made by {features.network}, they do not fit {restorer.architecture.id}")
    if features.shapes != _shapes(restorer.module):
        raise InputError(
            f"features: made by a {restorer.architecture.title} of another size; decode them with the network that made them"
        )
    image = restorer.module.reconstruct(list(features.maps), features.image, **features.context)
    return crop(image, features.size, restorer.scale)


def _shapes(module: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(parameter.shape for parameter in module.parameters())


def _require(restorer: Restorer) -> None:
    if not encodable(restorer.module):
        raise InputError(
            f"restorer: {restorer.architecture.title} does not offer its features; encoder-decoder networks such as "
            "MoCE-IR, NAFNet, Restormer or PromptIR do"
        )


def principal_components(maps: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """The three strongest principal components of [B, C, H, W] as colours [B, 3, H, W] in 0..1.

    One basis for the whole batch, so that pictures compare; each component is stretched between its 1 % and 99 %
    quantiles, its sign such that the largest loading is positive. `size` resizes the result (nearest neighbour).
    """
    batch, channels, height, width = maps.shape
    pixels = maps.detach().float().movedim(1, -1).reshape(-1, channels).cpu()
    pixels = pixels - pixels.mean(dim=0)
    vectors = torch.linalg.eigh((pixels.T @ pixels).double()).eigenvectors.flip(1)[:, :3].float()
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    values = F.pad(pixels @ vectors, (0, 3 - vectors.shape[1]))
    sample = values[:: max(1, len(values) // 100_000)]  # torch.quantile takes 16 million values at most
    low, high = torch.quantile(sample, torch.tensor([0.01, 0.99]), dim=0)
    colours = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours = colours.reshape(batch, height, width, 3).movedim(-1, 1)
    return colours if size is None else F.interpolate(colours, size=size, mode="nearest")
