"""What is wrong with a picture, as a value that networks make and take: class probabilities, an embedding, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InputError


@dataclass(frozen=True)
class Degradation:
    """The degradation of each picture of a batch.

    probabilities [B, K] in 0..1, one column a label of `labels`; embedding [B, D] as the method in `source` defines
    it ("dcpt", "vlu-net"). At least one of the two is there. Embeddings of different sources do not mix.
    """

    labels: tuple[str, ...] = ()
    probabilities: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.probabilities is None and self.embedding is None:
            raise InputError("degradation: neither probabilities nor an embedding")
        for name, tensor in (("probabilities", self.probabilities), ("embedding", self.embedding)):
            if tensor is not None and tensor.ndim != 2:
                raise InputError(f"degradation: {name} must be [B, N], got {tuple(tensor.shape)}")
        if self.probabilities is not None and self.probabilities.shape[1] != len(self.labels):
            raise InputError(f"degradation: {self.probabilities.shape[1]} probabilities for {len(self.labels)} labels")
        if self.probabilities is not None and self.embedding is not None:
            if len(self.probabilities) != len(self.embedding):
                raise InputError(
                    f"degradation: probabilities of {len(self.probabilities)} pictures, embeddings of {len(self.embedding)}"
                )

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.embedding if self.probabilities is None else self.probabilities)

    def __getitem__(self, images: int | slice | Sequence[int] | torch.Tensor) -> Degradation:
        """That of some pictures of the batch; always a batch, also for a single index."""
        if isinstance(images, int):
            images = [images]
        return self._map(lambda t: t[images])

    def to(self, *args: Any, **kwargs: Any) -> Degradation:
        """As Tensor.to, for both tensors."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def expand(self, batch: int) -> Degradation:
        """For `batch` pictures: one degradation is used for all of them. Raises InputError if the counts differ."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise InputError(f"degradation: made for {len(self)} pictures, the batch has {batch}")
        return self._map(lambda t: t.expand(batch, -1))

    def label(self, image: int = 0) -> str:
        """The most probable label of one picture; "" without probabilities."""
        if self.probabilities is None:
            return ""
        return self.labels[int(self.probabilities[image].argmax())]

    def probability(self, label: str) -> torch.Tensor:
        """[B]: probability of `label`. Raises InputError naming the known labels."""
        if self.probabilities is None or label not in self.labels:
            raise InputError(
                f"degradation: no probability of {label!r}; known labels: {', '.join(self.labels) or 'none'}"
            )
        return self.probabilities[:, self.labels.index(label)]

    def mix(self, other: Degradation, amount: float) -> Degradation:
        """(1 - amount) self + amount other, for whatever both have; a batch of one goes with any batch.

        Raises InputError if they come from different methods or name different labels.
        """
        if self.source != other.source:
            raise InputError(f"degradation: {self.source!r} and {other.source!r} do not mix")
        batch = max(len(self), len(other))
        first, second = self.expand(batch), other.expand(batch)
        probabilities = embedding = None
        if first.probabilities is not None and second.probabilities is not None:
            if self.labels != other.labels:
                raise InputError("degradation: the two name different labels")
            probabilities = torch.lerp(first.probabilities, second.probabilities.to(first.probabilities), amount)
        if first.embedding is not None and second.embedding is not None:
            if first.embedding.shape[1] != second.embedding.shape[1]:
                raise InputError(
                    f"degradation: embeddings of {first.embedding.shape[1]} and {second.embedding.shape[1]} numbers"
                )
            embedding = torch.lerp(first.embedding, second.embedding.to(first.embedding), amount)
        labels = self.labels if probabilities is not None else ()
        return Degradation(labels, probabilities, embedding, self.source)

    def report(self) -> str:
        """A line a picture: labels with their probabilities, most probable first."""
        if self.probabilities is None:
            return "\n".join(
                f"picture {i}: an embedding of {self.embedding.shape[1]} numbers" for i in range(len(self))
            )
        lines = []
        for i, row in enumerate(self.probabilities.float().cpu()):
            order = row.argsort(descending=True).tolist()
            lines.append(f"picture {i}: " + ", ".join(f"{self.labels[k]} {100 * row[k]:.1f} %" for k in order))
        return "\n".join(lines)

    def _map(self, function: Any) -> Degradation:
        probabilities = None if self.probabilities is None else function(self.probabilities)
        embedding = None if self.embedding is None else function(self.embedding)
        return replace(self, probabilities=probabilities, embedding=embedding)
