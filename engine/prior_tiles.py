"""A prior's network on pictures larger than memory: image by image, then tile by tile, then in smaller tiles.

For a network that looks no further than its receptive field the result is that of the whole picture. One that sees
everything makes of each tile what it would make of a picture of that size, which is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import product

import torch

from ..errors import OutOfMemoryError
from . import host, tiling
from .loaded import LoadedRestorer

logger = logging.getLogger(__name__)

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def in_parts(network: Network, loaded: LoadedRestorer, dtype: torch.dtype, device: torch.device) -> Network:
    """`network` of `guidance.priors.Prior`, which takes [B, C, H, W] (sides multiples of the network's) and noise levels
    [B], in parts that fit the memory of `device`. Raises OutOfMemoryError if not even the smallest tile does.
    """
    restorer = loaded.restorer
    smallest = tiling.round_up(max(tiling.SMALLEST_TILE, restorer.minimum_size), restorer.multiple_of)
    largest: list[int] = []  # the side that was found to fit; kept from one evaluation to the next

    def evaluate(x: torch.Tensor, sigma: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        side = min([max(height, width), *largest, tiling.choose_tile(loaded, height, width, dtype, device)])
        try:
            return host.first_that_fits(lambda side: _evaluate(x, sigma, told, max(side, smallest)), _halves(side))
        except host.DidNotFitError:
            raise OutOfMemoryError(
                f"{restorer.architecture.title}: not even a tile of {smallest} pixels fits into memory; close other "
                "programs, unload other models, or use a smaller network"
            ) from None

    def _halves(side: int) -> Iterator[int]:
        yield side
        while side > smallest:
            side = max(smallest, tiling.round_up(side // 2, restorer.multiple_of))
            largest.append(side)
            logger.warning("out of memory: the prior goes on with tiles of %d pixels", side)
            yield side

    def _evaluate(x: torch.Tensor, sigma: torch.Tensor, told: torch.Tensor, side: int) -> torch.Tensor:
        height, width = x.shape[-2:]
        if side >= max(height, width):
            fitting = int(host.working_memory(device) / tiling.bytes_per_pixel(loaded, dtype) / (height * width))
            parts = zip(*(t.split(max(1, fitting)) for t in (x, sigma, told)), strict=True)
            return torch.cat([network(*part) for part in parts])
        if restorer.architecture.receptive_field(restorer.config) is None and not largest:
            largest.append(side)
            logger.warning(
                "%s does not fit %d x %d pixels into memory and works in tiles of %d: %s, so the result differs from that "
                "in one piece",
                restorer.architecture.title,
                width,
                height,
                side,
                restorer.architecture.global_statistics or "it looks far",
            )
        overlap = tiling.choose_overlap(loaded, side)
        multiple = restorer.multiple_of
        rows, columns = (
            tiling.plan_axis(n, tiling.fit_tile(n, side, overlap, multiple, restorer.minimum_size), overlap, multiple)
            for n in (height, width)
        )
        result = torch.zeros_like(x)
        for image, (top, down), (left, across) in product(
            range(len(x)),
            zip(rows.starts, rows.windows, strict=True),
            zip(columns.starts, columns.windows, strict=True),
        ):
            host.check_interrupt()
            place = (
                slice(image, image + 1),
                slice(None),
                slice(top, top + rows.tile),
                slice(left, left + columns.tile),
            )
            window = down[:, None].to(x) * across.to(x)
            result[place] += network(x[place], sigma[image : image + 1], told[image : image + 1]) * window
        return result

    return evaluate
