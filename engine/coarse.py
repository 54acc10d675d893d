"""MPMF-Net's coarse clean image: taken out of the network, or put in."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.layers.padding import crop, pad_to_multiple
from ..models.mpmf_net import CoarseImage, MPMFNet
from . import host, tiling
from .loaded import LoadedRestorer
from .values import check_image


def _network(loaded: LoadedRestorer) -> MPMFNet:
    if not isinstance(loaded.restorer.module, MPMFNet):
        raise InputError(
            f"restorer: {loaded.restorer.architecture.title} has no coarse image; load an MPMF-Net network"
        )
    return loaded.restorer.module


def predict(loaded: LoadedRestorer, image: torch.Tensor) -> CoarseImage:
    """The coarse clean image of every picture of [B, C, H, W], from the whole picture; not clamped.

    From the picture at half its size, and so on, after running out of memory. Raises OutOfMemoryError as
    `tiling.until_it_fits`.
    """
    _network(loaded)
    check_image(image)
    multiple, smallest, parts = loaded.restorer.multiple_of, loaded.restorer.minimum_size, []
    progress = host.progress(len(image))

    def look(picture: torch.Tensor) -> torch.Tensor:
        padded, _ = pad_to_multiple(picture, multiple, smallest)
        memory = tiling.activation_bytes(loaded, padded, torch.float32) // 16  # it works on a sixteenth of the pixels
        with loaded.managed.on_device(memory) as (module, device):
            coarse = module.coarse(padded.to(device)).to(host.intermediate_device())
        return crop(coarse, (-(-picture.shape[-2] // 4), -(-picture.shape[-1] // 4)))

    for index in range(len(image)):
        picture, _ = pad_to_multiple(tiling.as_rgb(image[index : index + 1]), multiple, smallest)
        coarse, size = tiling.until_it_fits(loaded, picture, look), [side // 4 for side in picture.shape[-2:]]
        parts.append(coarse if list(coarse.shape[-2:]) == size else F.interpolate(coarse, size=size, mode="bicubic"))
        progress.update()
    return CoarseImage(torch.cat(parts))


def from_picture(guide: torch.Tensor, image: torch.Tensor) -> CoarseImage:
    """A coarse image for [B, C, H, W] from a clean-looking picture [B or 1, C, h, w] of any size."""
    check_image(guide, "coarse")
    if len(guide) not in (1, len(image)):
        raise InputError(f"coarse: {len(guide)} pictures for {len(image)}; use one, or one per picture")
    size = [-(-side // 4) for side in image.shape[-2:]]
    return CoarseImage(F.interpolate(tiling.as_rgb(guide), size=size, mode="bicubic", antialias=True).clamp(0, 1))


def blend(own: CoarseImage, guide: CoarseImage | None, amount: float) -> CoarseImage:
    """`amount` of the guide, the rest the network's own."""
    if guide is None or amount == 0:
        return own
    wanted = F.interpolate(guide.image.to(own.image), size=own.image.shape[-2:], mode="bilinear")
    return CoarseImage(torch.lerp(own.image, wanted.expand_as(own.image), amount))


def restore(
    loaded: LoadedRestorer,
    image: torch.Tensor,
    guide: torch.Tensor | None = None,
    *,
    amount: float = 1.0,
    tile: int = 0,
    overlap: int = -1,
    precision: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Restored [B, C, H, W] and the coarse image used, enlarged to the same size.

    The coarse image is decided on the whole picture and shared by tiles. guide [B or 1, C, h, w]: a clean-looking
    picture of any size to use instead of the network's own, or blended with it by `amount`.
    """
    _network(loaded)
    check_image(image)
    if guide is not None and amount >= 1:
        coarse = from_picture(guide, image)
    else:
        coarse = blend(predict(loaded, image), None if guide is None else from_picture(guide, image), amount)
    if tile == 0 and fits_whole(loaded, image, precision):
        tile = max(image.shape[-2:])
    restored = tiling.restore(
        loaded, image, tile=tile, overlap=overlap, precision=precision, context={"coarse": coarse}
    )
    return restored, enlarged(coarse, image)


def fits_whole(loaded: LoadedRestorer, image: torch.Tensor, precision: str = "auto") -> bool:
    """Whether a picture of [B, C, H, W] fits into memory in one piece, which this network is better off with."""
    target = host.device()
    needed = tiling.activation_bytes(loaded, image[:1], host.working_dtype(precision, target))
    return needed <= 0.6 * host.available_memory(target)


def enlarged(coarse: CoarseImage, image: torch.Tensor) -> torch.Tensor:
    """The coarse image at the size of [B, C, H, W], as the main network is shown it (nearest), clamped."""
    large = F.interpolate(coarse.image, scale_factor=4, mode="nearest")[..., : image.shape[-2], : image.shape[-1]]
    return large.expand(len(image), -1, -1, -1).clamp(0, 1)
