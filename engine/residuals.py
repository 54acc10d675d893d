"""DA-RCOT on real pictures: its first pass, residuals from anywhere, and the potential's score."""

from __future__ import annotations

import logging

import torch

from ..errors import InputError, OutOfMemoryError
from ..models.da_rcot import STRENGTH, MRCNet, Potential, Residual
from ..models.features import principal_components
from . import host, tiling
from .loaded import LoadedRestorer
from .pictures import from_pil, heat_map
from .report import match_size
from .values import check_image, check_mask, clamped

logger = logging.getLogger(__name__)


def _transport_map(loaded: LoadedRestorer) -> MRCNet:
    if not isinstance(loaded.restorer.module, MRCNet):
        raise InputError(f"restorer: {loaded.restorer.architecture.title} has no residual; load a DA-RCOT network")
    return loaded.restorer.module


def first_pass(
    loaded: LoadedRestorer, image: torch.Tensor, *, tile: int = 0, overlap: int = -1, precision: str = "auto"
) -> tuple[torch.Tensor, Residual]:
    """The unconditioned restoration of [B, C, H, W], and what it removed (before clamping, without embeddings)."""
    _transport_map(loaded)
    check_image(image)
    colour = tiling.as_rgb(image)
    restored = tiling.restore(
        loaded, colour, tile=tile, overlap=overlap, precision=precision, context={"strength": 0.0}, clamp=False
    )
    residual = Residual(colour.to(restored.device) - restored)
    return clamped(tiling.as_given(restored, image, loaded.restorer.scale), image), residual


def from_pictures(
    degraded: torch.Tensor, restored: torch.Tensor, mask: torch.Tensor | None = None, gain: float = 1.0
) -> Residual:
    """gain (degraded - restored) for pictures [B, C, H, W] from anywhere, only where `mask` [B or 1, h, w] is white."""
    check_image(degraded, "degraded")
    check_image(restored, "restored")
    if len(restored) not in (1, len(degraded)):
        raise InputError(f"restored: {len(restored)} pictures for {len(degraded)} degraded ones")
    colour = tiling.as_rgb(degraded)
    difference = colour - match_size(tiling.as_rgb(restored), colour).to(colour)
    if mask is not None:
        check_mask(mask, count=len(degraded))
        difference = difference * match_size(mask[:, None].to(difference), difference)
    return Residual(difference * gain)


def encode(loaded: LoadedRestorer, residual: Residual) -> Residual:
    """The residual with its embeddings, computed on the whole picture.

    A picture too large for memory keeps none: Restore then encodes the residual tile by tile.
    """
    _transport_map(loaded)
    parts: list[Residual] = []
    fits = tiling.activation_bytes(loaded, residual.image[:1], torch.float32) <= host.working_memory(host.device())
    progress = host.progress(len(residual))
    for index in range(len(residual) if fits else 0):
        try:
            parts.append(host.attempt(lambda one=residual[index : index + 1]: _encoded(loaded, one)))
        except host.DidNotFitError:
            break
        progress.update()
    if len(parts) < len(residual):
        logger.warning("residual: too large to encode whole, it will be encoded tile by tile")
        return residual
    embeddings = tuple(torch.cat(level) for level in zip(*(p.embeddings for p in parts), strict=True))
    return Residual(torch.cat([p.image for p in parts]), embeddings)


def _encoded(loaded: LoadedRestorer, residual: Residual) -> Residual:
    with loaded.managed.on_device(tiling.activation_bytes(loaded, residual.image, torch.float32)) as (module, device):
        return module.encode_residual(residual.to(device)).to(host.intermediate_device())


def restore(
    loaded: LoadedRestorer,
    image: torch.Tensor,
    residual: Residual | None = None,
    *,
    strength: float = STRENGTH,
    iterations: int = 1,
    tile: int = 0,
    overlap: int = -1,
    precision: str = "auto",
) -> torch.Tensor:
    """The conditioned restoration of [B, C, H, W] in 0..1; see `MRCNet.restore`. Raises InputError if sizes differ."""
    _transport_map(loaded)
    context = {"strength": strength, "iterations": iterations}
    if residual is not None:
        have, want = tuple(residual.image.shape[-2:]), tuple(image.shape[-2:])
        if have != want:
            raise InputError(
                f"residual: made for {have[1]}x{have[0]} pixels, the picture has {want[1]}x{want[0]}; "
                "make it from this picture, or scale one of them"
            )
        context["residual"] = residual
    return tiling.restore(loaded, image, tile=tile, overlap=overlap, precision=precision, context=context)


def picture(residual: Residual, gain: float = 2.0) -> torch.Tensor:
    """A residual to look at, [B, 3, H, W] in 0..1: grey where nothing was removed."""
    return (0.5 + 0.5 * gain * residual.image).clamp(0, 1)


def embedding_picture(residual: Residual) -> torch.Tensor:
    """Principal components of the deepest embedding as colours, at the picture's size; grey if there is none."""
    size = tuple(residual.image.shape[-2:])
    if residual.embeddings is None:
        return torch.full_like(residual.image, 0.5)
    return principal_components(residual.embeddings[0], size)


def score(loaded: LoadedRestorer, image: torch.Tensor) -> torch.Tensor:
    """The potential's score of patches that cover [B, C, H, W]: [B, rows, columns], larger for cleaner."""
    if not isinstance(loaded.restorer.module, Potential):
        raise InputError(
            f"potential: {loaded.restorer.architecture.title} is not a DA-RCOT potential; use Load Potential"
        )
    check_image(image)
    colour, maps = tiling.as_rgb(image), []
    progress = host.progress(len(image))

    def look(picture: torch.Tensor) -> torch.Tensor:
        with loaded.managed.on_device(200_000_000) as (module, device):
            return module.score_map(picture.to(device)).float().cpu()

    for picture in colour.split(1):
        try:
            maps.append(host.attempt(lambda picture=picture: look(picture)))
        except host.DidNotFitError:
            raise OutOfMemoryError(
                f"potential: a picture of {picture.shape[-1]} x {picture.shape[-2]} does not fit into memory beside the "
                "network; make it smaller, close other programs or unload other models"
            ) from None
        progress.update()
    return torch.cat(maps)


def score_picture(scores: torch.Tensor) -> torch.Tensor:
    """Scores [B, rows, columns] as a heat map a picture, [B, 3, h, w]; colours span the batch's range."""
    low, high = scores.min(), scores.max()
    level = (scores - low) / (high - low).clamp_min(1e-12) if high > low else torch.full_like(scores, 0.5)
    rows, columns = (
        [f"{name} {i}" for i in range(n)] for name, n in zip(("row", "column"), scores.shape[1:], strict=True)
    )
    title = f"scores {low:.3g} (0) to {high:.3g} (1)"
    return torch.stack([from_pil(heat_map(one.numpy(), rows, columns, title)) for one in level])


def score_text(scores: torch.Tensor) -> str:
    """Mean, lowest and highest score of every picture, a line each."""
    return "\n".join(
        f"picture {i}: mean {one.mean():.4g}, worst patch {one.min():.4g}, best {one.max():.4g}"
        for i, one in enumerate(scores)
    )
