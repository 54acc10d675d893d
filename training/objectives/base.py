"""What objectives have in common: the batch, one run of the network that they share, and what they carry along.

An `Objective` is a recipe: settings only, as it travels on the graph and into a file's provenance. `start` makes a
`Method` of it, for one network: with the modules and optimisers that it trains beside the network, so that a run can
be stopped and resumed exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import ConfigError
from ...models.moce_ir import Routing
from ...models.registry import Architecture
from ...models.restorer import Restorer

Parts = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """Damaged [B, 3, h, w] and clean [B, 3, scale h, scale w] crops in 0..1, and what is wrong with each.

    other: clean crops that have nothing to do with the damaged ones, for objectives that learn without pairs.
    """

    damaged: torch.Tensor
    clean: torch.Tensor
    labels: tuple[str, ...]
    other: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a network says about a batch; all but the restored picture only where it has such a thing."""

    restored: torch.Tensor
    routing: Routing | None = None
    embedding: torch.Tensor | None = None
    """DA-RCOT's embedding of the residual."""
    uncertainty: torch.Tensor | None = None
    features: torch.Tensor | None = None
    """What the network's last convolution reads."""


@dataclass(eq=False)
class Network:
    """The network being trained, and how its method wants it to be run."""

    architecture: Architecture
    config: Mapping[str, Any]
    module: nn.Module
    last: str | None = None
    """Name of the last convolution, if its input is wanted."""
    own_uncertainty: bool = False
    """Whether to ask the network for its own uncertainty map."""

    @property
    def scale(self) -> int:
        return self.architecture.scale(self.config)

    def require_restorer(self, objective: str) -> None:
        """Raises ConfigError for a codec or a prior, which an objective for restorers cannot run."""
        others = {"codec": "Rate-Distortion Objective", "prior": "Denoising Objective"}
        if self.architecture.kind in others:
            raise ConfigError(
                f"{objective}: {self.architecture.title} is a {self.architecture.kind}; use the "
                f"{others[self.architecture.kind]}"
            )

    def example(self, size: int) -> torch.Tensor:
        """A grey picture [1, 3, size, size], to find out with what the network does."""
        parameter = next(self.module.parameters())
        return torch.full((1, 3, size, size), 0.5, device=parameter.device, dtype=parameter.dtype)

    def __call__(self, image: torch.Tensor, generator: torch.Generator) -> Outputs:
        """Runs it as in training; `generator` (CPU) gives what it draws, routing noise for one."""
        if self.last is None:
            return self._run(image, generator)
        with capture(self.module, [self.last], inputs=True) as seen:
            outputs = self._run(image, generator)
        return replace(outputs, features=seen[-1][1])

    def _run(self, image: torch.Tensor, generator: torch.Generator) -> Outputs:
        module = self.module
        if hasattr(module, "forward_with_routing"):
            experts = next(m for n, m in module.named_modules() if n.endswith("routing.freq_gate")).out_features
            shape = (len(module.decoder_blocks), len(image), experts)
            restored, routing = module.forward_with_routing(image, torch.randn(shape, generator=generator).to(image))
            return Outputs(restored, routing=routing)
        if hasattr(module, "encode_residual"):
            restored, residual = module.restore(image)
            return Outputs(restored, embedding=residual.embeddings[0])
        if self.own_uncertainty:
            restored, uncertainty = self.architecture.restore_with_uncertainty(module, image)
            return Outputs(restored, uncertainty=uncertainty)
        return Outputs(self.restore(image))

    def restore(self, image: torch.Tensor) -> torch.Tensor:
        """As in use: no noise, only the picture."""
        decided = self.architecture.context(self.module, image) if self.architecture.context else {}
        return self.architecture.restore(self.module, image, **decided)


class Pass:
    """One batch on its way through the network, which is run when the first objective looks at what it says."""

    def __init__(self, network: Network, batch: Batch, generator: torch.Generator) -> None:
        self.network, self.batch, self.generator = network, batch, generator

    @cached_property
    def outputs(self) -> Outputs:
        return self.network(self.batch.damaged, self.generator)

    @property
    def restored(self) -> torch.Tensor:
        return self.outputs.restored


class Method(nn.Module):
    """An objective at work. Modules of its own are its submodules; what its optimisers know is in its extra state."""

    wants_other: bool = False
    """Whether batches need clean pictures that are independent of the damaged ones."""

    def prepare(self, run: Pass) -> Parts:
        """Updates what has an optimiser of its own, before the network's step; numbers for the log."""
        return {}

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        """What the network, and this method's modules in `groups`, minimise; with its parts for the log."""
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        """Parameters of its own that are trained with the network; "factor" is their share of the learning rate."""
        return []

    def restore(self, network: Network, image: torch.Tensor) -> torch.Tensor:
        """How validation runs the network on damaged pictures [B, 3, h, w]."""
        return network.restore(image)

    def companions(self, network: Network) -> dict[str, Restorer]:
        """What learned beside the network and is of use by itself, by the names of its files. Modules are shared."""
        return {}

    def good_for(self, given: tuple[str, ...]) -> tuple[str, ...]:
        """What the trained file says it is for; `given`: what the file that training began with says."""
        return given

    def get_extra_state(self) -> dict[str, Any]:
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Objective:
    """A way to train, as it travels: settings only."""

    kind: ClassVar[str] = ""

    @property
    def optimizer(self) -> str:
        """What steps the network: "adamw" or "rmsprop"."""
        return "adamw"

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        """The method for a network, the labels of a data set and damaged crops of `size` pixels.

        Raises ConfigError if the network is not made for it.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """For the provenance of what is trained with it."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Weighted(Objective):
    """A weighted sum of objectives, which share one run of the network."""

    kind: ClassVar[str] = "sum"
    parts: tuple[tuple[Objective, float], ...] = ()

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        if not self.parts:
            raise ConfigError("objectives: a sum of none")
        return _Sum([part.start(network, labels, size) for part, _ in self.parts], [w for _, w in self.parts])

    @property
    def optimizer(self) -> str:
        return next((p.optimizer for p, _ in self.parts if p.optimizer != "adamw"), "adamw")

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "parts": [{**part.describe(), "weight": weight} for part, weight in self.parts]}


class _Sum(Method):
    def __init__(self, methods: Sequence[Method], weights: Sequence[float]) -> None:
        super().__init__()
        self.methods, self.weights = nn.ModuleList(methods), list(weights)
        self.wants_other = any(method.wants_other for method in methods)

    def prepare(self, run: Pass) -> Parts:
        return {name: value for method in self.methods for name, value in method.prepare(run).items()}

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        total: torch.Tensor | float = 0.0
        parts: Parts = {}
        for method, weight in zip(self.methods, self.weights, strict=True):
            loss, found = method.loss(run)
            total = total + weight * loss
            parts.update(found)
        return total, parts

    def groups(self) -> list[dict[str, Any]]:
        return [group for method in self.methods for group in method.groups()]

    def companions(self, network: Network) -> dict[str, Restorer]:
        return {name: made for method in self.methods for name, made in method.companions(network).items()}

    def restore(self, network: Network, image: torch.Tensor) -> torch.Tensor:
        own = [m for m in self.methods if type(m).restore is not Method.restore]
        return (own[0] if own else super()).restore(network, image)


def own_copy(module: nn.Module) -> nn.Module:
    """The module with weights of its own, in float32 on the CPU, that can take part in training, wherever it was made."""
    with torch.inference_mode(False):
        copied = deepcopy(module).cpu().float()
        for tensor in [*copied.parameters(), *copied.buffers()]:
            if tensor.is_inference():
                tensor.data = tensor.data.clone()
        return copied


# Looking into networks ------------------------------------------------------------------------------------------------


@contextmanager
def capture(module: nn.Module, names: Sequence[str], inputs: bool = False) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Collects what submodules return (or read) while the body runs, in order of execution, under their names."""
    seen: list[tuple[str, torch.Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda _, given, returned: seen.append((name, given[0] if inputs else returned))

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def last_convolution(module: nn.Module, run: Callable[[], Any], channels: int = 3) -> str:
    """Name of the convolution to `channels` channels that is executed last when `run` runs the network.

    Raises ConfigError if there is none.
    """
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.append(name)

    handles = [
        layer.register_forward_hook(note(name))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.out_channels == channels
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise ConfigError(
            f"{type(module).__name__} has no convolution that makes a picture (networks that enlarge may have none), so "
            "that it cannot be given an uncertainty head"
        )
    return order[-1]
