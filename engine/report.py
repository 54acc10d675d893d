"""Pictures and figures about restored images: comparisons, differences, metrics, routing maps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import InputError, MissingDependency
from ..models.colour import rgb
from ..models.moce_ir import Routing
from . import host
from .pictures import difference_map, from_pil, heat_map, labelled, to_pil
from .quality import offline
from .values import as_batch, ceiling, check_image


def match_size(image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`image` [B, C, H, W] bicubically resized to the size of `like`, unchanged if it has it already.

    Raises InputError for pictures without pixels.
    """
    return image if image.shape[-2:] == like.shape[-2:] else _resized(image, like, ceiling(image))


def matched(images: torch.Tensor, like: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """`match_size` of a batch picture by picture, [1, C, H, W] in float32 each; a single one `count` times."""
    if len(images) == 1:
        yield from repeat(match_size(images.float(), like), count)
    elif images.shape[-2:] == like.shape[-2:]:
        yield from (picture.float() for picture in images.split(1))
    else:
        most = ceiling(images)
        yield from (_resized(picture.float(), like, most) for picture in images.split(1))


def _resized(image: torch.Tensor, like: torch.Tensor, most: float | None) -> torch.Tensor:
    if 0 in (*image.shape[-2:], *like.shape[-2:]):
        sizes = " and ".join(f"{width} x {height}" for height, width in (image.shape[-2:], like.shape[-2:]))
        raise InputError(f"image: {sizes} pixels cannot be brought to one size; connect pictures that are not empty")
    return F.interpolate(image, size=like.shape[-2:], mode="bicubic", antialias=True).clamp_(0.0, most)


def batch_size(images: list[torch.Tensor]) -> int:
    """How many pictures the largest batch has. Raises InputError if others are not as large, nor of one picture."""
    batch = max(len(i) for i in images)
    if any(len(i) not in (1, batch) for i in images):
        raise InputError(
            f"images: batches of {', '.join(str(len(i)) for i in images)} cannot be compared picture by picture"
        )
    return batch


def compare(
    images: list[torch.Tensor],
    labels: list[str],
    *,
    zoom: float = 1.0,
    centre: tuple[float, float] = (0.5, 0.5),
    difference: bool = False,
    gain: float = 5.0,
) -> torch.Tensor:
    """Pictures [B, C, H, W] side by side under labels, as [B, 3, h, w]; all scaled to the largest.

    zoom > 1 shows a crop around `centre` (x, y in 0..1), enlarged without smoothing. difference: a false-colour map of
    |picture - last picture| times `gain` for each picture but the last. Raises InputError for pictures that are empty or
    not finite, and for batches of several numbers of pictures.
    """
    for image, name in zip(images, ("first", "second", "third"), strict=False):
        check_image(image, name)
    largest = max(images, key=lambda i: i.shape[-1] * i.shape[-2])
    count = batch_size(images)
    progress = host.progress(count)

    def sheets() -> Iterator[torch.Tensor]:
        for pictures in zip(*(matched(i, largest, count) for i in images), strict=True):
            shown, names = [rgb(i)[0] for i in pictures], list(labels)
            if difference:
                shown += [difference_map(i, shown[-1], gain) for i in shown[:-1]]
                names += [f"|{n} - {labels[-1]}| x{gain:g}" for n in labels[:-1]]
            shown = [_magnify(i, zoom, centre) for i in shown]
            columns = len(labels) if difference else len(shown)
            yield from_pil(labelled([to_pil(i) for i in shown], names, columns))
            progress.update()

    return as_batch(sheets(), count)


def _magnify(image: torch.Tensor, zoom: float, centre: tuple[float, float]) -> torch.Tensor:
    if zoom <= 1:
        return image
    height, width = image.shape[-2:]
    h, w = max(1, round(height / zoom)), max(1, round(width / zoom))
    top = min(max(0, round(centre[1] * height - h / 2)), height - h)
    left = min(max(0, round(centre[0] * width - w / 2)), width - w)
    return F.interpolate(image[None, :, top : top + h, left : left + w], size=(height, width), mode="nearest")[0]


def psnr(image: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB per picture, RGB, peak 1; infinite for equal pictures."""
    pairs = zip(image, reference, strict=True)
    errors = [float((a.double() - b.double()).square().mean()) for a, b in pairs]
    return [math.inf if e == 0 else -10 * math.log10(e) for e in errors]


def ssim(image: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Structural similarity per picture (Wang et al. 2004): Gaussian window 11, sigma 1.5, mean over RGB."""
    if min(image.shape[-2:]) < 11:
        raise InputError("images: SSIM needs at least 11 x 11 pixels")
    from kornia.metrics import ssim as ssim_map

    found = []
    for a, b in zip(image, reference, strict=True):  # one by one: what is filtered on the way is many times as large
        # The channels of an IMAGE are interleaved, which is slow to filter.
        pair = (x[None].float().contiguous() for x in (a, b))
        found.append(float(ssim_map(*pair, window_size=11, padding="valid").mean()))
    return found


@lru_cache(maxsize=2)
def _lpips(net: str) -> Any:
    if importlib.util.find_spec("lpips") is None:
        raise MissingDependency("LPIPS needs the package lpips (pip install lpips) and its weights")
    import lpips

    with offline("LPIPS"):
        return lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)


def lpips_distance(image: torch.Tensor, reference: torch.Tensor, net: str = "alex") -> list[float]:
    """Learned perceptual distance per picture; needs the package `lpips` and its weights on disk."""
    with torch.inference_mode(False):
        model = _lpips(net)
    with torch.no_grad():
        return model(image.float().clone() * 2 - 1, reference.float().clone() * 2 - 1).flatten().tolist()


def metrics_table(
    image: torch.Tensor, reference: torch.Tensor, with_lpips: bool = False
) -> tuple[str, dict[str, float]]:
    """PSNR and SSIM (and LPIPS) per picture as text, and their means. The image is scaled to the reference.

    Raises InputError for pictures that are empty or not finite, and for batches of two numbers of pictures.
    """
    check_image(image)
    check_image(reference, "reference")
    measures = {"PSNR dB": psnr}
    if min(reference.shape[-2:]) >= 11:
        measures["SSIM"] = ssim
    if with_lpips:
        measures["LPIPS"] = lpips_distance
    count = batch_size([image, reference])
    columns: dict[str, list[float]] = {name: [] for name in measures}
    progress = host.progress(count)
    for pair in zip(matched(image, reference, count), matched(reference, reference, count), strict=True):
        one, clean = (rgb(picture) for picture in pair)
        for name, measure in measures.items():
            columns[name] += measure(one, clean)
        progress.update()
    lines = [f"picture {i}: " + ", ".join(f"{n} {v[i]:.4g}" for n, v in columns.items()) for i in range(count)]
    means = {name: sum(v) / len(v) for name, v in columns.items()}
    if count > 1:
        lines.append("mean: " + ", ".join(f"{n} {v:.4g}" for n, v in means.items()))
    return "\n".join(lines), means


def routing_map(routing: Routing, image: int = 0) -> torch.Tensor:
    """Blocks x experts heat map of one image's probabilities, the experts taken framed; [1, 3, H, W]."""
    odds, gates = routing.probabilities[:, image].cpu(), routing.gates[:, image].cpu()
    experts = [f"expert {e}" for e in range(odds.shape[1])]
    names = routing.names or [""] * len(odds)
    rows = [f"block {i} ({_level(n)})" if n else f"block {i}" for i, n in enumerate(names)]
    title = f"Routing, image {image}: probability, taken framed"
    return from_pil(heat_map(odds.float().numpy(), rows, experts, title, (gates > 0).numpy()))[None]


def _level(name: str) -> str:
    """ "dec.0.2.layers.1" as "stage 0"."""
    return f"stage {name.split('.')[1]}"


def stack_pictures(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures of any sizes as one batch [B, 3, H, W], padded to the largest."""
    tensors = [from_pil(p) for p in pictures]
    height, width = max(t.shape[1] for t in tensors), max(t.shape[2] for t in tensors)
    return torch.stack([F.pad(t, (0, width - t.shape[2], 0, height - t.shape[1])) for t in tensors])
