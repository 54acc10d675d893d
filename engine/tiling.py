"""Runs a restorer on real pictures: any size, any batch, alpha, tiles without seams, less memory when there is less.

Tiles are equal and shifted inwards, so that none is a sliver. Each contributes through a separable window that is flat
at the picture's border, zero near the tile's own inner border (where it lacks context) and sums to one with its
neighbours' windows.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from ..errors import InputError, OutOfMemoryError
from ..models import registry
from ..models.colour import rgb
from ..models.layers.padding import pad_to_multiple
from . import host, memory
from .alpha import fill_transparent, upscale_alpha
from .loaded import LoadedRestorer
from .pictures import to_pil
from .values import check_image, clamped

logger = logging.getLogger(__name__)

SMALLEST_TILE = 64
DEFAULT_OVERLAP = 64
"""For networks that see the whole picture anyway: enough for their local layers."""
PREVIEW_SIDE = 512
PICTURES_AT_ONCE = {"cpu": 256 * 256, "accelerator": 2048 * 1024}
"""Pixels of the pictures of a batch that go through the network together. More is hardly faster, and between two such
passes the bar moves and Cancel is heard."""
Result = TypeVar("Result")
_warned: weakref.WeakSet[host.Managed] = weakref.WeakSet()


@dataclass(frozen=True)
class Axis:
    """How one side of a picture is cut: tile length, start of each tile, its window (sums to one over tiles)."""

    tile: int
    starts: tuple[int, ...]
    windows: tuple[torch.Tensor, ...]


def plan_axis(length: int, tile: int, overlap: int, multiple: int = 1) -> Axis:
    """Cuts `length` pixels into equal tiles of `tile` pixels that share at least `overlap` with each neighbour.

    Starts are multiples of `multiple` (`length` and `tile` must be too), so that every tile sees the same phase.
    """
    if tile >= length:
        return Axis(length, (0,), (torch.ones(length),))
    overlap = min(overlap, tile - multiple)
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [i * (length - tile) // (count - 1) // multiple * multiple for i in range(count - 1)]
    starts.append(length - tile)
    windows = []
    for index, start in enumerate(starts):
        window = torch.ones(tile)
        if index > 0:
            window[: starts[index - 1] + tile - start] = _ramp(starts[index - 1] + tile - start)
        if index < count - 1:
            shared = start + tile - starts[index + 1]
            window[tile - shared :] = torch.minimum(window[tile - shared :], _ramp(shared).flip(0))
        windows.append(window)
    total = torch.zeros(length)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + tile] += window
    normalised = tuple(w / total[s : s + tile] for s, w in zip(starts, windows, strict=True))
    return Axis(tile, tuple(starts), normalised)


def fit_tile(length: int, tile: int, overlap: int, multiple: int = 1, smallest: int = 1) -> int:
    """The smallest tile that covers `length` with as many tiles as `tile` does: no pixel is computed for nothing."""
    if tile >= length:
        return length
    overlap = min(overlap, tile - multiple)
    count = math.ceil((length - overlap) / (tile - overlap))
    needed = round_up(math.ceil((length + (count - 1) * overlap) / count), multiple)
    return min(tile, max(needed, smallest))


def _ramp(shared: int) -> torch.Tensor:
    """0 to 1 over the middle half of an overlap: its outer quarters, which lack context on one side, stay out."""
    position = (torch.arange(shared) + 0.5) / shared
    return ((position - 0.25) * 2).clamp(1e-6, 1)


def _stretch(window: torch.Tensor, scale: int) -> torch.Tensor:
    return window if scale == 1 else window.repeat_interleave(scale)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def choose_overlap(loaded: LoadedRestorer, tile: int) -> int:
    """Pixels that neighbouring tiles share: four receptive radii where finite, at most half a tile.

    The window drops a quarter of the overlap on either side, so four radii make the tiled result exact.
    """
    radius = loaded.restorer.architecture.receptive_field(loaded.restorer.config)
    wanted = DEFAULT_OVERLAP if radius is None else 4 * radius
    return max(0, min(wanted, tile // 2))


def bytes_per_pixel(loaded: LoadedRestorer, dtype: torch.dtype) -> float:
    """Activation memory per input pixel: measured if its settings are in the table, else estimated."""
    return memory.bytes_per_pixel(loaded.restorer, dtype)


def choose_tile(loaded: LoadedRestorer, height: int, width: int, dtype: torch.dtype, target: torch.device) -> int:
    """Side of a square tile that fits the free memory; the longer side of the picture if that fits whole."""
    restorer = loaded.restorer
    each = bytes_per_pixel(loaded, dtype)
    if height * width <= host.working_memory(target) / each:
        return max(height, width)
    side = int(math.sqrt(host.part_memory(target) / each)) // restorer.multiple_of * restorer.multiple_of
    return max(side, round_up(SMALLEST_TILE, restorer.multiple_of))


def restore(
    loaded: LoadedRestorer,
    image: torch.Tensor,
    *,
    tile: int = 0,
    overlap: int = -1,
    precision: str = "auto",
    context: Mapping[str, Any] | None = None,
    clamp: bool = True,
) -> torch.Tensor:
    """Restores [B, C, H, W] (C 1, 3 or 4, values 0..1) to [B, C, scale * H, scale * W] on the intermediate device.

    tile: side in pixels, 0 chooses from free memory. overlap: -1 chooses. context: keyword arguments for the network
    (a routing, a degradation); one for the whole batch or one per image. Without it, what a network decides once per
    picture is decided on the whole picture (reduced if need be) and shared by its tiles. clamp: to 0..1.
    Raises InputError for a picture that cannot be restored, OutOfMemoryError if the smallest tile does not fit.
    """
    check_image(image)
    check_context(loaded, context or {})
    given = {**loaded.options, **(context or {})}
    batch, channels, height, width = image.shape
    scale = loaded.restorer.scale
    colour = as_rgb(image)
    wanted = loaded.restorer.channels
    if wanted == 1:
        colour = _per_channel(colour)
    elif wanted != 3:
        raise InputError(f"restorer: it takes {wanted} channels, which an image does not have")
    result = run(loaded, colour, tile, overlap, precision, given)
    if wanted == 1:
        result = result.reshape(batch, 3, *result.shape[-2:])
    result = as_given(result, image, scale)
    return clamped(result, image) if clamp else result


def as_given(restored: torch.Tensor, image: torch.Tensor, scale: int) -> torch.Tensor:
    """A restored [B, 3, H, W] as grey where `image` was grey, and with its transparency where it had some."""
    channels = image.shape[1]
    if channels < 3:
        restored = restored.mean(dim=1, keepdim=True)
    if channels in (2, 4):
        restored = torch.cat([restored, upscale_alpha(image[:, channels - 1 :], restored, scale)], dim=1)
    return restored


def check_context(loaded: LoadedRestorer, context: Mapping[str, Any]) -> None:
    """Raises InputError if something is connected that this network does not take."""
    here = loaded.restorer.architecture
    for name in context.keys() - set(here.wires):
        takers = [a.title for a in registry.architectures() if name in a.wires]
        if takers:
            taker = min(takers)
            raise InputError(f"{name}: {here.title} takes none, only {taker} does; disconnect it, or load a {taker}")


def _per_channel(colour: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] as 3 B greyscale pictures, for networks with one channel."""
    return colour.reshape(-1, 1, *colour.shape[-2:])


def run(
    loaded: LoadedRestorer,
    image: torch.Tensor,
    tile: int,
    overlap: int,
    precision: str,
    given: dict[str, Any],
    output_channels: int | None = None,
) -> torch.Tensor:
    """The network alone on [B, C, H, W], arguments as for `restore`: no alpha, no clamping, no checks.

    output_channels: for a network whose result has more channels than the picture.
    """
    restorer = loaded.restorer
    batch, channels, height, width = image.shape
    target = host.device()
    dtype = host.working_dtype(precision, target)
    if dtype != torch.float32 and not restorer.architecture.half:
        logger.warning("%s needs float32: %s ignored", restorer.architecture.title, precision)
        dtype = torch.float32
    side = tile or choose_tile(loaded, height, width, dtype, target)
    smallest = round_up(max(SMALLEST_TILE, restorer.minimum_size), restorer.multiple_of)
    side = max(round_up(side, restorer.multiple_of), smallest)
    scale = restorer.scale
    size = (batch, output_channels or channels, height * scale, width * scale)
    result = torch.empty(size, device=host.intermediate_device())
    fitting = int(host.working_memory(target) / bytes_per_pixel(loaded, dtype) / (height * width))
    fitting = min(fitting, PICTURES_AT_ONCE["cpu" if target.type == "cpu" else "accelerator"] // (height * width))
    chunk = min(batch, max(1, fitting)) if side >= max(height, width) else 1
    _warn_of_tiles(loaded, height, width, side)
    progress = host.progress(batch * _tile_count(loaded, height, width, side, overlap))
    done = 0
    while done < batch:
        images = slice(done, min(batch, done + chunk))
        needed = activation_bytes(loaded, image[images, :, :side, :side], dtype)

        def work(images: slice = images, side: int = side, needed: int = needed) -> None:
            with loaded.managed.on_device(needed) as (_, where):
                _restore_images(
                    loaded,
                    image[images],
                    result[images],
                    side,
                    overlap,
                    not tile,
                    dtype,
                    where,
                    _slice(given, images, batch),
                    progress,
                )

        try:
            host.attempt(work)
        except host.DidNotFitError:
            if chunk > 1:
                chunk = max(1, chunk // 2)
                logger.warning("out of memory: going on with %d pictures at a time", chunk)
                continue
            longest = min(side, max(height, width))
            side = round_up(longest // 2, restorer.multiple_of)
            if longest <= smallest:
                raise OutOfMemoryError(
                    f"{restorer.architecture.title}: not even a tile of {longest} pixels fits into memory; close other "
                    "programs, unload other models, or use a smaller network"
                ) from None
            side = max(side, smallest)
            logger.warning("out of memory: going on with tiles of %d pixels", side)
            progress.extend(_tile_count(loaded, height, width, side, overlap))
            continue
        done = images.stop
    return result


def _warn_of_tiles(loaded: LoadedRestorer, height: int, width: int, side: int) -> None:
    """Says once a network that what it computes over the whole picture will be computed over tiles."""
    architecture, config = loaded.restorer.architecture, loaded.restorer.config
    if max(height, width) <= side or architecture.receptive_field(config) is not None or loaded.managed in _warned:
        return
    _warned.add(loaded.managed)
    what = architecture.global_statistics or "it looks at the whole picture"
    logger.warning(
        "%s works in tiles of %d pixels, which changes its result a little: %s. Larger tiles change less",
        architecture.title,
        side,
        what.rstrip("."),
    )


def _tile_count(loaded: LoadedRestorer, height: int, width: int, side: int, overlap: int) -> int:
    rows, columns = _plan(loaded, height, width, side, overlap)
    return len(rows.starts) * len(columns.starts)


def _plan(
    loaded: LoadedRestorer, height: int, width: int, side: int, overlap: int, fit: bool = False
) -> tuple[Axis, Axis]:
    """fit: `side` is the largest that may be, not the one that was asked for."""
    restorer = loaded.restorer
    multiple = restorer.multiple_of
    shared = choose_overlap(loaded, side) if overlap < 0 else min(overlap, side // 2)
    axes = []
    for length in (height, width):
        padded = round_up(max(length, restorer.minimum_size), multiple)
        tile = fit_tile(padded, side, shared, multiple, restorer.minimum_size) if fit else min(side, padded)
        axes.append(plan_axis(padded, tile, shared, multiple))
    return axes[0], axes[1]


def _slice(context: Mapping[str, Any], images: slice, batch: int) -> dict[str, Any]:
    """The part of per-image context that belongs to `images`; what holds for all images stays."""

    def cut(value: Any) -> Any:
        per_image = (isinstance(value, torch.Tensor) and value.ndim > 0) or hasattr(value, "__getitem__")
        if not per_image or isinstance(value, (str, bytes, tuple, list, Mapping)) or len(value) == 1:
            return value
        if len(value) != batch:
            raise InputError(f"made for {len(value)} pictures, but the batch has {batch}: use one, or one per picture")
        return value[images]

    return {name: cut(value) for name, value in context.items()}


def _restore_images(
    loaded: LoadedRestorer,
    image: torch.Tensor,
    result: torch.Tensor,
    side: int,
    overlap: int,
    fit: bool,
    dtype: torch.dtype,
    device: torch.device,
    context: dict[str, Any],
    progress: host.Progress,
) -> None:
    """Restores pictures of one size into `result`."""
    restorer, scale = loaded.restorer, loaded.restorer.scale
    height, width = image.shape[-2:]
    rows, columns = _plan(loaded, height, width, side, overlap, fit)
    context = {k: v.to(device) if hasattr(v, "to") else v for k, v in context.items()}
    if len(rows.starts) == len(columns.starts) == 1:
        host.check_interrupt()
        whole = _call(restorer, image.to(device), dtype, context)
        result.copy_(whole)
        progress.update(len(image), lambda: _preview(result[0]))
        return
    context = {**_shared_context(loaded, image, context, dtype, device), **context}
    padded, _ = pad_to_multiple(image, restorer.multiple_of, restorer.minimum_size)
    result.zero_()
    for top, row_window in zip(rows.starts, rows.windows, strict=True):
        for left, column_window in zip(columns.starts, columns.windows, strict=True):
            host.check_interrupt()
            piece = padded[..., top : top + rows.tile, left : left + columns.tile].to(device)
            restored = _call(restorer, piece, dtype, _at(context, top, left))
            window = _stretch(row_window, scale)[:, None] * _stretch(column_window, scale)
            restored = restored.to(result.device, torch.float32).mul_(window.to(result.device))
            place = result[..., top * scale : (top + rows.tile) * scale, left * scale : (left + columns.tile) * scale]
            place += restored[..., : place.shape[-2], : place.shape[-1]]
            progress.update(1, lambda: _preview(result[0]))


def _at(context: dict[str, Any], top: int, left: int) -> dict[str, Any]:
    """Lets context that depends on the place (a coarse image) cut out its part: objects with `at(top, left)`."""
    return {k: v.at(top, left) if hasattr(v, "at") else v for k, v in context.items()}


def _shared_context(
    loaded: LoadedRestorer, image: torch.Tensor, given: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What the network decides once per picture, from the whole picture, reduced if it would not fit."""
    if loaded.restorer.architecture.context is None:
        return {}

    def decide(picture: torch.Tensor) -> dict[str, Any]:
        with _precision(device, dtype):
            return loaded.restorer.context(picture.to(device))

    context = until_it_fits(loaded, reduced(loaded, image, dtype, device), decide)
    return {k: v for k, v in context.items() if k not in given}


def until_it_fits(loaded: LoadedRestorer, image: torch.Tensor, look: Callable[[torch.Tensor], Result]) -> Result:
    """look(image), for what is read off a whole picture [B, C, H, W] and says little of its size: a route, a vector.

    After running out of memory of the picture at half its size, and so on. Raises OutOfMemoryError if even a picture
    of the smallest tile's size does not fit.
    """
    title, size = loaded.restorer.architecture.title, list(image.shape[-2:])

    def smaller_and_smaller() -> Iterator[torch.Tensor]:
        nonlocal size
        picture = image
        yield picture
        while max(size) > SMALLEST_TILE:
            size = [max(1, side // 2) for side in size]
            picture = F.interpolate(picture, size=size, mode="area")
            logger.warning("out of memory: %s looks at the whole picture reduced to %d x %d pixels", title, *size[::-1])
            yield picture

    try:
        return host.first_that_fits(look, smaller_and_smaller())
    except host.DidNotFitError:
        raise OutOfMemoryError(
            f"{title}: what it decides on the whole picture does not fit into memory even for {size[1]} x {size[0]} "
            "pixels; close other programs, unload other models, or use a smaller network"
        ) from None


def reduced(loaded: LoadedRestorer, image: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`image` [B, C, H, W], shrunk by area averaging if the network could not take it whole."""
    needed = activation_bytes(loaded, image, dtype)
    if needed <= host.working_memory(device):
        return image
    factor = math.sqrt(host.part_memory(device) / needed)
    return F.interpolate(image, size=[max(1, int(s * factor)) for s in image.shape[-2:]], mode="area")


def activation_bytes(loaded: LoadedRestorer, image: torch.Tensor, dtype: torch.dtype) -> int:
    """What the network will need for [B, C, H, W] in one piece."""
    return int(len(image) * image.shape[-2] * image.shape[-1] * bytes_per_pixel(loaded, dtype))


def as_rgb(image: torch.Tensor) -> torch.Tensor:
    """[B, 1..4, H, W] as [B, 3, H, W]: grey repeated, colours under transparency filled from around."""
    return fill_transparent(image[:, :3], image[:, 3:4]) if image.shape[1] == 4 else rgb(image)


def _precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


def _call(
    restorer: Callable[..., torch.Tensor], image: torch.Tensor, dtype: torch.dtype, context: Mapping[str, Any]
) -> torch.Tensor:
    """One forward pass; repeated in float32 if half precision overflowed."""
    image = image.float()
    with _precision(image.device, dtype):
        restored = restorer(image, **context)
    if dtype != torch.float32 and not bool(torch.isfinite(restored).all()):
        logger.warning("%s overflowed in %s: repeated in float32", restorer.architecture.title, dtype)
        restored = restorer(image, **context)
    return restored


def _preview(image: torch.Tensor) -> Any:
    step = max(1, max(image.shape[-2:]) // PREVIEW_SIDE)
    return to_pil(image[:3, ::step, ::step])
