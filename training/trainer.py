"""The training loop: AdamW, warm-up and cosine, EMA, clipping, validation, and stopping and going on at any moment."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from .. import models
from ..errors import Cancelled, CheckpointError, ConfigError
from .data import VALIDATION, PairStream, central_squares
from .degradations import degrade
from .muon import MuonWithAdamW
from .objectives.restoration import Restoration

logger = logging.getLogger(__name__)


class Objective(Protocol):
    """A training method: module, damaged and clean [B, 3, H, W], generator -> loss and its parts."""

    def __call__(
        self, module: nn.Module, damaged: torch.Tensor, clean: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class Stage:
    """What a batch looks like from a share of the training (0..1) on: `batch` crops of `size` x `size` pixels.

    One batch in four has half as many crops of 1.5 times the size, for damage that only shows on a larger picture.
    """

    start: float
    size: int
    batch: int


@dataclass(frozen=True)
class Settings:
    """How a run goes. It ends after `minutes` of training (its own, pauses not counted) or `steps`, whichever is set."""

    minutes: float | None = None
    steps: int | None = None
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6
    warmup_steps: int = 150
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip: float = 1.0
    """Norm to which the gradient of a step is clipped."""
    clip_each: float | None = None
    """Norm to which the gradient of every pair of a batch is clipped before they are added up; None: as they are.

    Where kinds of damage are mixed, a dark or hazy crop's gradient is ten times as long as a noisy one's, and what it
    varies by from crop to crop drowns what the noisy ones have in common."""
    ema_decay: float = 0.999
    stages: tuple[Stage, ...] = (
        Stage(0.0, 64, 8),
        Stage(0.2, 96, 4),
        Stage(0.65, 128, 4),
        Stage(0.9, 192, 2),
    )
    seed: int = 0
    optimizer: str = "adamw"
    """"adamw", or "muon": Muon for the matrices (see `training.muon`), which takes fewer steps."""
    first_and_last: tuple[str, ...] = ("patch_embed", "output")
    """Name prefixes of the layers from and to pictures, which Muon leaves to AdamW."""
    autocast: bool = False
    channels_last: bool = True
    save_every: float = 120.0
    """Seconds between two checkpoints."""
    validate_every: float = 900.0
    """Seconds between two validations; 0: only at the end."""
    validation_size: int = 192
    workers: int = 1
    """Threads that each take a part of the batch. On a busy machine two workers with one PyTorch thread each are much
    faster than two PyTorch threads, which wait for each other at every operation."""

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ConfigError("training: set either minutes or steps")


@dataclass
class Progress:
    """Where a run stands. `seconds` is time spent training; `best` the mean score of weights that a trainer keeps as such."""

    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    scores: dict[str, float] = field(default_factory=dict)

    def spent(self, digits: int = 1) -> dict[str, float]:
        """Steps and minutes of training, for the provenance of weights."""
        return {"steps": self.step, "minutes": round(self.seconds / 60, digits)}


def psnr(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of every image [B, C, H, W] (0..1): [B]."""
    error = (image - target).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def validation_set(
    photos: Sequence[torch.Tensor], size: int, cases: Mapping[str, Sequence[Any]] = VALIDATION
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per case the damaged and the clean central crops [N, 3, size, size]; always the same."""
    clean = central_squares(photos, size)
    return {
        name: (torch.cat([degrade(c, chain, 1000 + i)[0] for i, c in enumerate(clean)]), torch.cat(clean))
        for name, chain in cases.items()
    }


@torch.inference_mode()
def validate(
    restore: Callable[[torch.Tensor], torch.Tensor], cases: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """Mean PSNR in dB of every case, images one by one. `restore`: a network for which their size is right, or a Restorer."""
    scores = {}
    for name, (damaged, clean) in cases.items():
        restored = torch.cat([restore(image) for image in damaged.split(1)])
        scores[name] = float(psnr(restored.clamp(0, 1), clean).mean())
    return scores


def _optimizer(module: nn.Module, settings: Settings) -> torch.optim.Optimizer | MuonWithAdamW:
    options = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "muon":
        return MuonWithAdamW(module, **options, first_and_last=settings.first_and_last)
    if settings.optimizer != "adamw":
        raise ConfigError(f"training: there is no optimizer {settings.optimizer!r}; adamw or muon")
    return torch.optim.AdamW(module.parameters(), **options, foreach=True)


class Trainer:
    """One run: `module` learns from `pairs` by `objective`; everything it needs to go on lies in `folder`.

    `folder` gets log.jsonl (a line every 20 steps and at each validation), last.pt (to go on from) and, when the run
    ends or is cancelled, the averaged weights through `export`. `restorer` makes of the averaged network what is validated,
    where calling it is not enough.
    """

    def __init__(
        self,
        module: nn.Module,
        pairs: PairStream,
        settings: Settings,
        folder: Path,
        objective: Objective | None = None,
        validation: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        restorer: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> None:
        if settings.channels_last:
            module = module.to(memory_format=torch.channels_last)
        self.module, self.pairs, self.settings, self.folder = module.train(), pairs, settings, folder
        self.objective = objective or Restoration()
        self.validation = validation or {}
        self.average = deepcopy(module).eval().requires_grad_(False)
        self.restore = restorer(self.average) if restorer else self.average
        self.optimizer = _optimizer(module, settings)
        self.generator = torch.Generator().manual_seed(settings.seed + 1)
        self.progress = Progress()
        self.pool = ThreadPoolExecutor(settings.workers)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def share(self) -> float:
        """How much of the run is done, 0..1."""
        if self.settings.steps is not None:
            return min(1.0, self.progress.step / self.settings.steps)
        return min(1.0, self.progress.seconds / (60 * self.settings.minutes))

    def learning_rate(self) -> float:
        """Linear warm-up over steps, then half a cosine over the share of the run."""
        s = self.settings
        top, low = s.learning_rate, s.final_learning_rate
        rate = low + (top - low) * 0.5 * (1 + math.cos(math.pi * self.share))
        return rate * min(1.0, (self.progress.step + 1) / s.warmup_steps)

    def stage(self) -> tuple[int, int]:
        """Batch and crop size of the next step."""
        current = [s for s in self.settings.stages if s.start <= self.share][-1]
        if float(torch.rand((), generator=self.generator)) < 0.25 and current.batch >= 2:
            return current.batch // 2, (current.size * 3 // 2) // 8 * 8
        return current.batch, current.size

    def step(self) -> dict[str, float]:
        """One optimiser step; returns loss and parts."""
        batch, size = self.stage()
        damaged, clean, _ = self.pairs.batch(batch, size)
        if self.settings.channels_last:
            damaged = damaged.contiguous(memory_format=torch.channels_last)
        loss, parts = self._backward(damaged, clean)
        return {"loss": loss, **self._descend(self.module.parameters()), **parts}

    def _descend(self, parameters: Iterable[nn.Parameter]) -> dict[str, float]:
        """Ends a step by the gradients there are; returns their norm and the learning rate."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        if bool(torch.isfinite(norm)):  # one broken batch must not cost the run
            self.optimizer.step()
        self.progress.step += 1
        self._update_average()
        return {"norm": float(norm), "lr": rate}

    def _backward(self, damaged: torch.Tensor, clean: torch.Tensor) -> tuple[float, dict[str, float]]:
        """Gradients of the mean over the batch, shared out among the workers; returns loss and parts."""
        count, limit = len(damaged), self.settings.clip_each
        pieces = self.settings.workers if limit is None else count
        shares = list(zip(damaged.tensor_split(pieces), clean.tensor_split(pieces), strict=True))
        shares = [(d, c) for d, c in shares if len(d)]
        seeds = torch.randint(2**31, (len(shares),), generator=self.generator).tolist()
        parameters = list(self.module.parameters())

        def work(share: tuple[torch.Tensor, torch.Tensor], seed: int) -> tuple[float, dict[str, float], Any]:
            part = len(share[0]) / count
            generator = torch.Generator().manual_seed(seed)
            with torch.autocast(damaged.device.type, torch.bfloat16, enabled=self.settings.autocast):
                loss, parts = self.objective(self.module, *share, generator)
            gradients = torch.autograd.grad(loss * part, parameters, allow_unused=True)
            if limit is not None:
                found = [gradient for gradient in gradients if gradient is not None]
                torch._foreach_mul_(found, (limit * part / nn.utils.get_total_norm(found)).clamp_max(1.0))
            return float(loss.detach()) * part, {k: float(v) * part for k, v in parts.items()}, gradients

        results = list(self.pool.map(work, shares, seeds)) if len(shares) > 1 else [work(shares[0], seeds[0])]
        for index, parameter in enumerate(parameters):
            found = [gradients[index] for _, _, gradients in results if gradients[index] is not None]
            parameter.grad = sum(found[1:], found[0]) if found else None
        loss = sum(loss for loss, _, _ in results)
        return loss, {name: sum(parts[name] for _, parts, _ in results) for name in results[0][1]}

    @torch.no_grad()
    def _update_average(self) -> None:
        step = self.progress.step
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        averaged, current = list(self.average.parameters()), list(self.module.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def run(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        bar: bool = True,
        on_step: Callable[[Mapping[str, float]], None] | None = None,
    ) -> dict[str, float]:
        """Trains to the end and returns the validation scores of the averaged weights.

        Stops after the current step, with everything saved, when `should_stop` says so: raises Cancelled. `on_step` is
        told the numbers of every step.
        """
        saved = validated = time.monotonic()
        sums: dict[str, float] = {}
        counted = 0  # fewer than 20 steps after the run was stopped in between
        with tqdm(total=1000, initial=int(1000 * self.share), disable=not bar, unit="‰", mininterval=5) as line:
            while self.share < 1:
                begun = time.monotonic()
                values = self.step()
                now = time.monotonic()
                self.progress.seconds += now - begun
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value
                counted += 1
                if self.progress.step % 20 == 0:
                    means = {name: total / counted for name, total in sums.items()}
                    self._log({name: round(mean, 6) for name, mean in means.items()})
                    line.set_postfix(loss=f"{means['loss']:.4f}", step=self.progress.step, refresh=False)
                    sums, counted = {}, 0
                line.update(int(1000 * self.share) - line.n)
                if on_step is not None:
                    on_step(values)
                if should_stop():
                    self.save()
                    raise Cancelled(f"training stopped after {self.progress.step} steps; run it again to go on")
                if now - saved > self.settings.save_every:
                    self.save()
                    saved = now
                if self.settings.validate_every and now - validated > self.settings.validate_every:
                    self.score()
                    validated = time.monotonic()
        self.score()
        self.save()
        return self.progress.scores

    def evaluate(self) -> dict[str, float]:
        """Scores of the averaged weights by name; none where there is nothing to validate with."""
        return validate(self.restore, self.validation)

    def score(self) -> dict[str, float]:
        """Evaluates the averaged weights; keeps and logs the scores, if there are any."""
        if scores := self.evaluate():
            self.progress.scores = scores
            self._log({"validation": {k: round(v, 3) for k, v in scores.items()}})
        return self.progress.scores

    def _log(self, entry: dict[str, Any]) -> None:
        line = {"step": self.progress.step, "minutes": round(self.progress.seconds / 60, 2), **entry}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Writes last.pt, whole or not at all."""
        torch.save(self.state(), self.folder / "last.pt.part")
        os.replace(self.folder / "last.pt.part", self.folder / "last.pt")

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on."""
        return {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "generators": [self.generator.get_state(), self.pairs.generator.get_state()],
        }

    def resume(self) -> bool:
        """Goes on from last.pt if there is one. Raises CheckpointError if it belongs to another network."""
        path = self.folder / "last.pt"
        if not path.exists():
            return False
        try:
            self.load_state(torch.load(path, map_location="cpu", weights_only=True))
        except RuntimeError as error:
            raise CheckpointError(f"{path}: belongs to another network; choose another folder. {error}") from None
        logger.info("going on at step %d", self.progress.step)
        return True

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave. Raises RuntimeError if it belongs to another network."""
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.generator.set_state(state["generators"][0])
        self.pairs.generator.set_state(state["generators"][1])


OWN_LICENCE = "Apache-2.0"
"""Of weights that were trained from nothing by this project's recipes."""


def export(
    module: nn.Module,
    path: Path,
    system: str,
    config: Mapping[str, Any],
    tasks: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    half: bool = True,
    licence: str | None = None,
) -> None:
    """Writes the weights as safetensors, with what is needed to build the network and to trust it.

    half: in half precision, half the size. licence: of the weights, where they do not come from somebody else's.
    """
    state = {
        name: (value.half() if half and value.is_floating_point() else value).contiguous().clone()
        for name, value in module.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "mend.architecture": system,
        "mend.config": json.dumps(dict(config)),
        "mend.tasks": ",".join(tasks),
        "mend.training": json.dumps(dict(training or {})),
    } | ({} if licence is None else {"mend.licence": licence})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata)


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of an exported file. Raises CheckpointError for other files."""
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
    if not {"mend.architecture", "mend.config"} <= set(metadata):
        raise CheckpointError(f"{path}: no file that Mend wrote; `mend models convert` makes one of it")
    return tensors, metadata


def read_export(path: Path) -> nn.Module:
    """The network of an exported file, in float32, ready to use; for other files use `models.load`."""
    state, metadata = read_weights(path)
    module = models.create(metadata["mend.architecture"], json.loads(metadata["mend.config"]))
    module.load_state_dict(state)
    return module.float().eval()


def _training(metadata: Mapping[str, str]) -> dict[str, Any]:
    """How a file says that it was trained; files that were not say so in words."""
    text = metadata.get("mend.training", "{}")
    try:
        return dict(json.loads(text))
    except ValueError:
        return {"note": text}


def average_exports(first: Path, second: Path, share: float, path: Path) -> None:
    """Writes (1 - share) x the weights of `first` + share x those of `second`, two exported files of one network.

    It says how each was trained, and its share. Raises CheckpointError if the networks differ, ConfigError for a share
    outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share: {share} is outside 0..1")
    (weights, metadata), (others, second_metadata) = (read_weights(file) for file in (first, second))
    alike = metadata.get("mend.architecture") == second_metadata.get("mend.architecture")
    shapes = ({name: value.shape for name, value in each.items()} for each in (weights, others))
    if not alike or next(shapes) != next(shapes):
        raise CheckpointError(f"{second}: another network than {first}; only files of one network can be averaged")
    mixed = {
        name: value.float().lerp(others[name].float(), share).to(value.dtype) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    said = [_training(each) for each in (metadata, second_metadata)]
    training = {"averaged": [{"share": part, **one} for part, one in zip((1 - share, share), said, strict=True)]}
    save_file(mixed, path, {**metadata, "mend.training": json.dumps(training)})
