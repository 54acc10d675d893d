"""The networks Mend knows: how to recognise one from a state dict, how to build it, how it wants to be run.

An architecture is one `Architecture` object, defined at the end of its network's file and listed in `_MODULES` here.
Nothing else in the program knows which keys belong to which network.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ConfigError

State = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]
Network = TypeVar("Network", bound=nn.Module)

# Order matters only where one network's keys are a subset of another's: the more specific one comes first.
_MODULES = (
    "moce_ir",
    "da_rcot",
    "airnet",
    "vlu_net",
    "mair",
    "mambair",
    "mambairv2",
    "transweather",
    "uformer",
    "acl",
    "dcpt_classifier",
    "osdface_vre",
    "gendeg",
    "degradation_model",
    "nafnet",
    "swinir",
    "restormer",
    "promptir",
    "mpmf_net",
    "guided_diffusion_unet",
    "noise_unet",
    "aio_codec",
)


# Methods that sample with a network of another system: which, and the settings that their configurations leave out.
_BORROWED: Mapping[str, tuple[str, Config]] = {
    "rdmd": ("guided-diffusion-unet", {}),
    "cm4ir": ("guided-diffusion-unet", {"wrapper": "karras"}),
}


def _one(config: Config) -> int:
    return 1


def _any_config(config: Config) -> bool:
    return True


def _call(module: nn.Module, image: torch.Tensor, **context: Any) -> torch.Tensor:
    return module(image, **context)


@dataclass(frozen=True)
class Architecture:
    """One network of one method.

    `detect` and `config_from_state_dict` look at names and shapes only, never at values that would need loading
    (tensors may live on the meta device), unless a hyper-parameter can be read nowhere else. Functions that take a
    `config` get the complete configuration, names as in the method's parity cases.
    """

    id: str
    """Unique name, lower case: "moce-ir"."""
    system: str
    """The method it belongs to, as in parity case.json; several architectures may share one ("tur", "dcpt")."""
    title: str
    """Name for people: "MoCE-IR"."""
    paper: str
    """Authors, title, venue, arXiv number."""
    licence: str
    """Licence of the official code and weights, in plain words."""
    detect: Callable[[State], bool]
    """True if a state dict (unwrapped, prefixes stripped) belongs to this architecture."""
    config_from_state_dict: Callable[[State], dict[str, Any]]
    """Every hyper-parameter, read from names and shapes. Raises CheckpointError if the shapes are absurd."""
    build: Callable[[Config], nn.Module]
    """A fresh module. Raises ConfigError for settings that cannot work."""
    matches_config: Callable[[Config], bool] = _any_config
    """Chooses among the architectures of one system in `create(system, config)`."""
    kind: str = "restorer"
    """"restorer" (image to image), "classifier", "embedder", "codec", "prior", "critic", "helper"."""
    tasks: tuple[str, ...] = ()
    """What it is for: "denoise", "deblur", "derain", "dehaze", "desnow", "low-light", "jpeg", "super-resolution"."""
    variants: Mapping[str, Config] = field(default_factory=dict)
    """The released settings, by name."""
    signature: tuple[str, ...] = ()
    """Some keys that only this network has: used to say "looks like MaIR but these keys are missing"."""
    prepare_state_dict: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    """Renames legacy keys, drops entries that the network computes itself. Applied before `detect`."""
    computed_buffers: tuple[str, ...] = ()
    """Regular expressions of state-dict entries that the network computes itself; a file may lack them."""
    metadata_keys: tuple[str, ...] = ()
    """Config names that shapes do not tell: taken from a safetensors file's metadata or the caller when given."""
    scale: Callable[[Config], int] = _one
    """Output size / input size."""
    multiple_of: Callable[[Config], int] = _one
    """Height and width must be multiples of this (callers pad; see layers.padding)."""
    minimum_size: Callable[[Config], int] = _one
    """Smallest height and width after padding."""
    restore: Callable[..., torch.Tensor] = _call
    """restore(module, image, **context) -> image, for networks whose forward returns something else as well."""
    restore_with_uncertainty: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    """restore_with_uncertainty(module, image, **context) -> (image, uncertainty), both as the image, the second
    positive: for networks that may carry an uncertainty head. Raises ConfigError if this one does not."""
    context: Callable[[nn.Module, torch.Tensor], dict[str, Any]] | None = None
    """What must be decided once on the whole picture (a route, a degradation embedding): keyword arguments for
    `restore`, computed from an image [B, C, H, W] and given to every tile of it. Entries that are tensors with
    leading dimension B, or objects with `__getitem__` over images, follow the batch."""
    wires: tuple[str, ...] = ()
    """Entries of the context that people may connect instead; other networks refuse them."""
    receptive_field: Callable[[Config], int | None] = lambda config: None
    """Radius in input pixels beyond which an input pixel has no influence; None: global."""
    global_statistics: str = ""
    """For networks that are not local: one sentence saying what they compute over the whole picture."""
    bytes_per_pixel: Callable[[Config], float] = lambda config: 4096.0
    """Peak activation memory per input pixel in float32, without the weights; measured, see bench/."""
    half: bool = True
    """False if the network gives wrong numbers in float16/bfloat16 even with its own float32 islands."""


def construct(network: Callable[..., Network], title: str, config: Config, without: Collection[str] = ()) -> Network:
    """network(**config), lists as tuples, without settings that change nothing in it.

    Raises ConfigError in the name of `title` for settings that it does not know.
    """
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k not in without}
    try:
        return network(**settings)
    except TypeError as error:
        raise ConfigError(f"{title}: {error}") from None


@lru_cache(maxsize=1)
def architectures() -> list[Architecture]:
    """All architectures, in detection order."""
    found: list[Architecture] = []
    for name in _MODULES:
        module = importlib.import_module(f".{name}", __package__)
        found.extend(module.ARCHITECTURES)
    ids = [a.id for a in found]
    if len(set(ids)) != len(ids):
        raise RuntimeError(f"two architectures share an id: {sorted(ids)}")
    return found


def get(architecture_id: str) -> Architecture:
    """The architecture with this id."""
    for architecture in architectures():
        if architecture.id == architecture_id:
            return architecture
    known = ", ".join(a.id for a in architectures())
    raise ConfigError(f"no network called {architecture_id!r}; known: {known}")


def network_of(system: str, config: Config) -> tuple[str, Config]:
    """The system whose network `system` uses, and the configuration as that system takes it; mostly as given."""
    lender, settings = _BORROWED.get(system, (system, {}))
    return lender, {**settings, **config}


def find(system: str, config: Config) -> Architecture:
    """The architecture of `system` that takes `config`; or the one with the id `system`, where no system is called so."""
    candidates = [a for a in architectures() if a.system == system]
    if not candidates:
        named = next((a for a in architectures() if a.id == system), None)
        if named is not None:
            return named
        known = ", ".join(sorted({a.system for a in architectures()}))
        raise ConfigError(f"no system called {system!r}; known: {known}")
    for architecture in candidates:
        if architecture.matches_config(config):
            return architecture
    raise ConfigError(f"{system}: no network of this system takes the configuration {dict(config)!r}")


def detect(state: State) -> Architecture | None:
    """The architecture a state dict belongs to, or None."""
    return next((a for a in architectures() if a.detect(state)), None)
