"""What the state-space networks let one set and see: scan paths, how pixels are routed to classes."""

from __future__ import annotations

import colorsys

import torch
import torch.nn.functional as F

from .. import kernels
from ..errors import InputError
from ..models.layers.state_space import StateSpace
from ..models.mair import MaIR, MaIRUNet
from ..models.mambairv2 import Choose, MambaIRv2, RouteMode
from . import host, tiling
from .loaded import LoadedRestorer
from .values import check_image


def with_scan_len(loaded: LoadedRestorer, scan_len: int) -> LoadedRestorer:
    """A MaIR network that reads along stripes `scan_len` pixels wide (0: its own width); the original is untouched."""
    if not isinstance(loaded.restorer.module, (MaIR, MaIRUNet)):
        raise InputError(f"restorer: {loaded.restorer.architecture.title} has no scan length; load a MaIR network")
    return loaded.with_options(scan_len=scan_len)


def with_scan_backend(loaded: LoadedRestorer, backend: str) -> tuple[LoadedRestorer, str]:
    """A network whose scans compute on one backend ("auto": the fastest there is), and what backends there are.

    Raises InputError for a network without scans, or if that backend cannot run on the host's device.
    """
    if not any(isinstance(module, StateSpace) for module in loaded.restorer.module.modules()):
        raise InputError(
            f"restorer: {loaded.restorer.architecture.title} scans nothing; load a MaIR, MambaIR or MambaIRv2 network"
        )
    found = {status.name: status for status in kernels.backends(host.device())}
    if backend != "auto" and not found[backend].available:
        raise InputError(f"backend: {backend} cannot run here ({found[backend].reason}); choose auto or another one")
    lines = [f"on {host.device()}, set to {backend}:"]
    lines += [f"{s.name:<9}  {'available' if s.available else 'not available'}: {s.reason}" for s in found.values()]
    return loaded.with_options(scan_backend=backend), "\n".join(lines)


class _CancellableRouteMode(RouteMode):
    """Asks in every layer of every draw whether the run was cancelled."""

    def choosers(self) -> list[Choose]:
        def asking(choose: Choose) -> Choose:
            def ask_then_choose(logits: torch.Tensor) -> torch.Tensor:
                host.check_interrupt()
                return choose(logits)

            return ask_then_choose

        return [asking(choose) for choose in super().choosers()]


def with_route_mode(loaded: LoadedRestorer, mode: str, seed: int, samples: int) -> LoadedRestorer:
    """A MambaIRv2 network that chooses classes as `RouteMode` says; the original is untouched."""
    _network(loaded)
    return loaded.with_options(route=_CancellableRouteMode(mode, seed, samples))


def _network(loaded: LoadedRestorer) -> MambaIRv2:
    if not isinstance(loaded.restorer.module, MambaIRv2):
        raise InputError(f"restorer: {loaded.restorer.architecture.title} routes no pixels; load a MambaIRv2 network")
    return loaded.restorer.module


def routes(loaded: LoadedRestorer, image: torch.Tensor) -> torch.Tensor:
    """The class of every pixel in every layer, [layers, B, h, w] int64, for pictures [B, C, H, W] in 0..1.

    Decided on the whole picture, reduced if it would not fit; drawn as the restorer's route mode says ("mean": the
    first draw). Restoring in tiles routes every tile by itself.
    """
    check_image(image)
    network = _network(loaded)
    mode = loaded.options.get("route") or RouteMode()
    progress, parts = host.progress(len(image)), []
    for index in range(len(image)):
        host.check_interrupt()
        colour = tiling.as_rgb(image[index : index + 1])
        if network.in_chans == 1:
            colour = colour.mean(dim=1, keepdim=True)
        picture = tiling.reduced(loaded, colour, torch.float32, host.device())
        parts.append(tiling.until_it_fits(loaded, picture, lambda p: _routes(loaded, p, mode)))
        progress.update()
    size = min((part.shape[-2:] for part in parts), key=lambda s: s[0])
    parts = [part if part.shape[-2:] == size else _nearest(part, size) for part in parts]
    return torch.cat(parts, dim=1)


def _routes(loaded: LoadedRestorer, picture: torch.Tensor, mode: RouteMode) -> torch.Tensor:
    with loaded.managed.on_device(tiling.activation_bytes(loaded, picture, torch.float32)) as (module, device):
        return module.routes(picture.to(device), mode.choosers()[0]).to(host.intermediate_device())


def _nearest(classes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Classes [layers, B, h, w] at another size: where memory ran out midway, later pictures are smaller."""
    return F.interpolate(classes.float(), size=size, mode="nearest").to(classes)


def class_map(classes: torch.Tensor, image: torch.Tensor, opacity: float) -> torch.Tensor:
    """Classes [B, h, w] as colours over the pictures [B, C, H, W]: [B, 3, H, W]; opacity 1 hides the picture."""
    colours = _palette(int(classes.max()) + 1)[classes.cpu()].movedim(-1, 1)
    colours = F.interpolate(colours, size=image.shape[-2:], mode="nearest")
    grey = tiling.as_rgb(image).mean(dim=1, keepdim=True).cpu()
    return torch.lerp(grey.expand_as(colours), colours, opacity).clamp(0, 1)


def _palette(count: int) -> torch.Tensor:
    """[count, 3]: colours that differ most between neighbouring numbers (hues a golden section apart)."""
    golden = 0.6180339887
    return torch.tensor([colorsys.hsv_to_rgb(i * golden % 1, 0.55 + 0.4 * (i % 2), 0.95) for i in range(count)])


def describe_routes(routes: torch.Tensor, tokens: int) -> str:
    """Per layer: how many of the classes are used, and what share of the pixels the largest has."""
    lines = [f"{'layer':>5}  {'classes used':>12}  {'largest share':>13}  {'most frequent':>13}"]
    for layer, classes in enumerate(routes):
        counts = torch.bincount(classes.flatten(), minlength=tokens)
        share = float(counts.max()) / counts.sum().item()
        used = f"{int((counts > 0).sum())} of {tokens}"
        lines.append(f"{layer:>5}  {used:>12}  {share:>13.1%}  {int(counts.argmax()):>13}")
    return "\n".join(lines)
