"""DCPT's degradation classifier on real pictures, and choices made by what it says."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch

from ..errors import InputError, OutOfMemoryError
from ..models import dcpt_classifier
from ..models.dcpt_classifier import ClassifiedNetwork, DegradationClassifier
from ..models.degradation import Degradation
from . import host, tiling
from .loaded import LoadedRestorer
from .pictures import bars
from .report import stack_pictures
from .values import check_image

logger = logging.getLogger(__name__)

WINDOW = 512


def classify(
    classifier: LoadedRestorer,
    image: torch.Tensor,
    network: LoadedRestorer | None = None,
    *,
    labels: Sequence[str] = (),
    window: int = 0,
    grid: int = 5,
) -> Degradation:
    """What is wrong with every picture of [B, C, H, W], looked at through up to `grid` x `grid` windows of `window`.

    network: whose features a bare classifier reads (DCPT's *_dc files); not needed for a file that holds both.
    window 0: the side the file was trained at if it says so, else `WINDOW`: a small network judges best what looks like its
    training crops. After running out of memory with windows of half the side, and so on. labels: names for its classes
    instead of the file's. Raises InputError if classifier and network do not fit.
    """
    check_image(image)
    module = classifier.restorer.module
    if not isinstance(module, (ClassifiedNetwork, DegradationClassifier)):
        raise InputError(
            f"classifier: {classifier.restorer.architecture.title} is no degradation classifier; load one such as the "
            "starter classifier, or a DCPT *_dc file"
        )
    bare = isinstance(module, DegradationClassifier)
    if bare and network is None:
        raise InputError(
            "network: this classifier reads the features of another network; connect the pre-trained restorer that it "
            "was trained with"
        )
    stages = classifier.restorer.config.get("stages", "")
    if stages:
        raise InputError(
            f"classifier: it reads the maps of {stages}, which the network shows while it is trained; use it in a Classifier "
            "Guidance Objective"
        )
    seen_by = network if bare else classifier
    named = tuple(labels) or tuple(classifier.restorer.config.get("labels") or ())
    classes = (module if bare else module.net_dc).fc.out_features
    if named and len(named) != classes:
        raise InputError(f"labels: {len(named)} names for {classes} classes")
    window = window or int(classifier.restorer.config.get("window") or WINDOW)
    progress, found = host.progress(len(image)), []

    def look(picture: torch.Tensor, side: int) -> Degradation:
        memory = tiling.activation_bytes(seen_by, picture[..., :side, :side], torch.float32)
        with classifier.managed.on_device(memory) as (head, device):
            if not bare:
                return _one(picture.to(device), head.net_g, head.net_dc, classifier, named, side, grid)
            with network.managed.on_device(memory) as (body, device):
                return _one(picture.to(device), body, head.to(device), network, named, side, grid)

    side = min(window, max(image.shape[-2:]))

    def halves() -> Iterator[int]:
        nonlocal side
        yield side
        while side > tiling.SMALLEST_TILE:
            side //= 2
            logger.warning("out of memory: the classifier looks through windows of %d pixels", side)
            yield side

    for picture in tiling.as_rgb(image).split(1):
        try:
            found.append(host.first_that_fits(lambda side, picture=picture: look(picture, side), halves()))
        except host.DidNotFitError:
            raise OutOfMemoryError(
                f"classifier: not even {side} pixels of a picture fit into memory; close other programs, unload other "
                "models, or use a smaller network"
            ) from None
        progress.update()
    return _join(found).to(host.intermediate_device())


def _one(
    picture: torch.Tensor,
    body: torch.nn.Module,
    head: DegradationClassifier,
    network: LoadedRestorer,
    labels: tuple[str, ...],
    window: int,
    grid: int,
) -> Degradation:
    multiple = network.restorer.multiple_of
    return dcpt_classifier.classify(picture, body, head, labels, multiple_of=multiple, window=window, grid=grid)


def _join(parts: Sequence[Degradation]) -> Degradation:
    probabilities = torch.cat([p.probabilities for p in parts])
    return Degradation(parts[0].labels, probabilities, torch.cat([p.embedding for p in parts]), parts[0].source)


def charts(degradation: Degradation) -> torch.Tensor:
    """One bar picture of the probabilities per picture of the batch, [B, 3, H, W]. Raises InputError without any."""
    if degradation.probabilities is None:
        raise InputError("degradation: it has no class probabilities to draw")
    rows = degradation.probabilities.float().cpu().tolist()
    return stack_pictures(
        [bars(row, degradation.labels, f"Picture {i}: {degradation.label(i)}") for i, row in enumerate(rows)]
    )


def overall(degradation: Degradation) -> tuple[str, float]:
    """The most probable label over the whole batch (so that a clip is treated alike), and its mean probability."""
    if degradation.probabilities is None:
        raise InputError("degradation: it has no class probabilities to choose by")
    mean = degradation.probabilities.float().mean(dim=0)
    best = int(mean.argmax())
    return degradation.labels[best], float(mean[best])


def choose(degradation: Degradation, cases: Sequence[str], confidence: float = 0.0) -> int | None:
    """Index of the first case that names the overall label, None if none does or it is less sure than `confidence`.

    A case is a list of labels with commas, upper and lower case alike. Raises InputError for a label that the
    degradation does not know.
    """
    known = {label.casefold() for label in degradation.labels}
    wanted = [{name.strip().casefold() for name in case.split(",")} - {""} for case in cases]
    for names in wanted:
        if names - known:
            raise InputError(
                f"labels: {', '.join(sorted(names - known))} unknown; the classifier knows: "
                f"{', '.join(degradation.labels)}"
            )
    label, probability = overall(degradation)
    if probability < confidence:
        return None
    return next((index for index, names in enumerate(wanted) if label.casefold() in names), None)
