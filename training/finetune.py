"""Fine-tuning any network that Mend loads, on any data set, with any objective: the trainer behind graph and command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, InputError
from ..models import Restorer
from ..models.layers.padding import crop, pad_to_multiple
from . import distributed
from .datasets import Sample, Source, Stream
from .objectives.base import Batch, Network, Objective, Parts, Pass, own_copy
from .trainer import Settings, Stage, Trainer, export, psnr

TRAINABLE = ("restorer", "codec", "prior")
KEEP = ("best", "last")
WEIGHTS = "weights.safetensors"
_HISTORY = 400
"""Points of the loss curve that are kept."""


def settings(
    steps: int, *, learning_rate: float = 2e-4, size: int = 96, batch: int = 4, seed: int = 0, **more: Any
) -> Settings:
    """Settings for fine-tuning: crops of one size, a short warm-up, an average that forgets the first steps soon."""
    if steps < 1 or batch < 1 or size < 1:
        raise InputError("training: steps, batch and crop must be at least 1")
    chosen = {
        "steps": steps,
        "learning_rate": learning_rate,
        "final_learning_rate": learning_rate / 100,
        "warmup_steps": max(1, min(100, steps // 10)),
        "stages": (Stage(0.0, size, batch),),
        "ema_decay": min(0.999, 1 - 1 / max(2.0, steps / 5)),
        "validate_every": 0.0,
        "channels_last": False,
        "seed": seed,
    }
    return Settings(**{**chosen, **more})


def trainable_copy(restorer: Restorer) -> Restorer:
    """The restorer with a network of its own, in float32 on the CPU, whose weights can take part in training.

    The given one, which others share, is left alone, wherever it lies. Raises InputError if it cannot be trained.
    """
    if restorer.architecture.kind not in TRAINABLE:
        raise InputError(
            f"restorer: {restorer.architecture.title} is a {restorer.architecture.kind}; it cannot be trained here"
        )
    module = own_copy(restorer.module).requires_grad_(True)
    return Restorer(
        restorer.architecture,
        dict(restorer.config),
        module,
        restorer.source,
        list(restorer.notes),
        dict(restorer.metadata),
    )


def freeze(module: nn.Module, patterns: str) -> list[str]:
    """Lets the parameters below the named submodules keep their values; returns the names that were found, sorted.

    patterns: names of submodules or parameters with commas between them, * for any part of a name: "E", "encoder*". Running
    statistics of batch normalisations still move, as in published training with a frozen encoder (TUR's AirNet). Raises
    InputError for a name that nothing has, and if nothing would be left to learn.
    """
    known = {name for name, _ in [*module.named_modules(), *module.named_parameters()] if name}
    found: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matching = [name for name in sorted(known) if fnmatch(name, pattern) and name.count(".") == pattern.count(".")]
        if not matching:
            top = ", ".join(sorted({name.split(".")[0] for name in known}))
            raise InputError(f"freeze: the network has no part called {pattern!r}; its parts are {top}")
        found.update(matching)
    for name in found:
        part = module.get_parameter(name) if name in dict(module.named_parameters()) else module.get_submodule(name)
        part.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError(f"freeze: {patterns!r} is the whole network; leave out something that is to learn")
    return sorted(found)


class _Step(nn.Module):
    """The loss of one batch as a forward pass: what DistributedDataParallel wraps."""

    def __init__(self, network: Network, method: nn.Module) -> None:
        super().__init__()
        self.module, self.method = network.module, method
        self._network = network

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, Parts]:
        run = Pass(self._network, batch, generator)
        prepared = self.method.prepare(run)
        loss, parts = self.method.loss(run)
        return loss, {name: value.detach() for name, value in {**prepared, **parts}.items()}


@dataclass(frozen=True, eq=False)
class Row:
    """One validation pair for looking at, each [3, H, W] in 0..1: damaged, restored before training and now, clean."""

    label: str
    damaged: torch.Tensor
    before: torch.Tensor
    now: torch.Tensor
    clean: torch.Tensor


class FineTuner(Trainer):
    """One fine-tuning of a `trainable_copy`. The folder gets what a Trainer's gets, and `weights.safetensors`.

    validate_steps: validates the averaged weights every so many steps. keep: "best" of the validated weights, or "last".
    held_out: validation pairs of each label. frozen: what does not learn, as for `freeze`. Raises InputError or ConfigError where network, data and objective do not
    fit together.
    """

    def __init__(
        self,
        restorer: Restorer,
        source: Source,
        objective: Objective,
        settings: Settings,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        validate_steps: int = 0,
        keep: str = "best",
        held_out: int = 3,
        frozen: str = "",
    ) -> None:
        if keep not in KEEP:
            raise ConfigError(f"training: keep {keep!r} is unknown; one of {', '.join(KEEP)}")
        self.restorer, self.source, self.recipe_of, self.keep = restorer, source, objective, keep
        self.frozen = freeze(restorer.module, frozen)
        self.device = torch.device(device)
        self.size, self.batch_size = crop_size(restorer, settings.stages[0].size), settings.stages[0].batch
        which, of = distributed.share()
        if self.batch_size % of:
            raise InputError(f"training: a batch of {self.batch_size} cannot be shared evenly by {of} processes")
        stream = Stream(source, torch.Generator().manual_seed(settings.seed), restorer.scale, (which, of))
        super().__init__(restorer.module.to(self.device), stream, settings, folder)
        self.network = Network(restorer.architecture, restorer.config, self.module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.module.eval()  # what an objective tries out must not move running statistics
            self.method = objective.start(self.network, source.labels, self.size).to(self.device)
            self.module.train()
            self._random = torch.get_rng_state()  # what networks draw by themselves goes on from here
        self.averaged = Network(restorer.architecture, restorer.config, self.average)
        self.optimizer = self._make_optimizer(objective.optimizer)
        self._forward = distributed.wrap(_Step(self.network, self.method))
        self.samples = source.held_out(max(settings.validation_size, self.size), held_out, restorer.scale)
        self.validate_steps = validate_steps
        self.history: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float]] = []
        self.best_weights: dict[str, torch.Tensor] | None = None
        self._best_scores: dict[str, float] = {}
        self.before = self.evaluate() if distributed.leads() else {}
        self._shown = self._pick(4)
        self._first = [self._restore(s.damaged) for s in self._shown] if distributed.leads() else []
        if distributed.leads():
            note = {"model": restorer.source, "recipe": self.recipe()}
            (folder / "run.json").write_text(json.dumps(note, indent=1, default=str))

    def _make_optimizer(self, name: str) -> torch.optim.Optimizer:
        own = self.method.groups()
        learning = [p for p in self.module.parameters() if p.requires_grad]
        self._trained = [*learning, *(p for group in own for p in group["params"])]
        groups = [{"params": learning}, *own]
        if name == "rmsprop":  # as DA-RCOT was published
            return torch.optim.RMSprop(groups, lr=self.settings.learning_rate, foreach=True)
        return torch.optim.AdamW(
            groups,
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            foreach=True,
        )

    def recipe(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "system": self.restorer.architecture.id,
            "objective": self.recipe_of.describe(),
            "labels": list(self.source.labels),
            "crop": self.size,
            **({"frozen": self.frozen} if self.frozen else {}),
        }

    # Steps

    def step(self) -> dict[str, float]:
        """One optimiser step; returns loss and parts."""
        damaged, clean, labels = self.pairs.batch(self.batch_size, self.size)
        other = self.pairs.batch(self.batch_size, self.size)[1].to(self.device) if self.method.wants_other else None
        batch = Batch(damaged.to(self.device), clean.to(self.device), tuple(labels), other)
        # One seed a step, the same in every process; each draws noise of its own from it.
        seed = int(torch.randint(2**62, (), generator=self.generator)) + distributed.share()[0]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast):
                loss, parts = self._forward(batch, torch.Generator().manual_seed(seed))
            self._random = torch.get_rng_state()
        if not loss.requires_grad:
            raise InputError(
                f"freeze: with {', '.join(self.frozen)} frozen, the loss of step {self.progress.step + 1} depends on nothing "
                "that learns (an expert that no picture took, say); freeze less"
            )
        loss.backward()
        descended = self._descend(self._trained)
        values = {"loss": float(loss.detach()), **{name: float(value) for name, value in parts.items()}}
        values = distributed.mean(values)
        every = max(1, -(-self.settings.steps // _HISTORY)) if self.settings.steps else 10
        if self.progress.step % every == 0 or self.progress.step == 1:
            self.history.append((self.progress.step, values["loss"]))
        if self.validate_steps and self.progress.step % self.validate_steps == 0 and self.share < 1:
            self.score()
        return {**values, **descended}

    @torch.no_grad()
    def _update_average(self) -> None:
        super()._update_average()
        for averaged, current in zip(self.average.buffers(), self.module.buffers(), strict=True):
            averaged.copy_(current)

    def train(
        self,
        on_step: Callable[[FineTuner, Mapping[str, float]], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        bar: bool = False,
    ) -> Restorer:
        """Trains to the end; returns the result. However it ends, all is saved to go on from, and the weights so far."""

        def told(values: Mapping[str, float]) -> None:
            if on_step is not None:
                on_step(self, values)

        try:
            self.run(lambda: distributed.agree(should_stop()), bar=bar and distributed.leads(), on_step=told)
        except BaseException:
            if self.progress.step and distributed.leads():
                self.save()
                self.export()
            raise
        self.export()
        return self.result()

    # Validation

    def _restore(self, damaged: torch.Tensor) -> torch.Tensor:
        """[3, h, w] restored by the averaged weights, on the CPU, not clamped."""
        image = damaged[None].to(self.device)
        padded, size = pad_to_multiple(image, self.restorer.multiple_of, self.restorer.minimum_size)
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            restored = crop(self.method.restore(self.averaged, padded), size, self.restorer.scale)
        with torch.inference_mode(False):
            return restored[0].float().cpu().clone()

    def evaluate(self) -> dict[str, float]:
        """Mean PSNR in dB of each label's held-out pairs."""
        found: dict[str, list[float]] = {}
        for sample in self.samples:
            value = psnr(self._restore(sample.damaged).clamp(0, 1)[None], sample.clean[None])
            found.setdefault(sample.label, []).append(float(value))
        return {label: sum(values) / len(values) for label, values in found.items()}

    def score(self) -> dict[str, float]:
        """As every trainer's, once a step; also remembers the best weights."""
        if not distributed.leads() or (self.validations and self.validations[-1][0] == self.progress.step):
            return self.progress.scores
        scores = super().score()
        mean = sum(scores.values()) / len(scores) if scores else math.nan
        self.validations.append((self.progress.step, mean))
        if self.best_weights is None or mean > self.progress.best:
            self.progress.best = mean
            self._best_scores = scores
            self.best_weights = {k: v.detach().cpu().clone() for k, v in self.average.state_dict().items()}
        return scores

    def _pick(self, count: int) -> list[Sample]:
        """Validation pairs to look at, of as many labels as possible."""
        by_label: dict[str, list[Sample]] = {}
        for sample in self.samples:
            by_label.setdefault(sample.label, []).append(sample)
        rounds = max(map(len, by_label.values()), default=0)
        order = [group[i] for i in range(rounds) for group in by_label.values() if i < len(group)]
        return order[:count]

    def rows(self, count: int = 4) -> list[Row]:
        """Validation pairs for looking at, restored by the averaged weights as they are now."""
        pairs = zip(self._shown[:count], self._first, strict=False)
        return [Row(s.label, s.damaged, first, self._restore(s.damaged), s.clean) for s, first in pairs]

    # Files

    def _log(self, entry: dict[str, Any]) -> None:
        if distributed.leads():
            super()._log(entry)

    def save(self) -> None:
        if distributed.leads():
            super().save()

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "method": self.method.state_dict(),
            "random": self._random,
            "best": self.best_weights,
            "best_scores": self._best_scores,
            "before": self.before,
            "history": self.history,
            "validations": self.validations,
            "recipe": json.dumps(self.recipe(), default=str),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        recipe = json.dumps(self.recipe(), default=str)
        if state.get("recipe") != recipe:
            raise CheckpointError(
                f"{self.folder}: this run was begun with another network, objective, crop, frozen part or kinds of damage; start over or "
                f"choose another name. It was {state.get('recipe')}, now {recipe}"
            )
        super().load_state(state)
        self.method.load_state_dict(state["method"])
        self._random = state["random"]
        self.best_weights, self._best_scores, self.before = state["best"], state["best_scores"], state["before"]
        self.history = [tuple(point) for point in state["history"]]
        self.validations = [tuple(point) for point in state["validations"]]

    def scores(self) -> dict[str, float]:
        """Of the weights that are kept."""
        return self._best_scores if self.keep == "best" and self._best_scores else self.progress.scores

    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights that are kept: the best validated ones, or the last."""
        if self.keep == "best" and self.best_weights is not None:
            return self.best_weights
        return {k: v.detach().cpu().clone() for k, v in self.average.state_dict().items()}

    def provenance(self) -> dict[str, Any]:
        """How the weights came about, for a file's metadata."""
        earlier = _training(self.restorer)
        return {
            "from": self.restorer.source,
            **({"earlier": earlier} if earlier else {}),
            "objective": self.recipe_of.describe(),
            "data": self.source.describe(),
            **self.progress.spent(digits=2),
            "learning_rate": self.settings.learning_rate,
            "batch": self.batch_size,
            "crop": self.size,
            **({"frozen": self.frozen} if self.frozen else {}),
            "seed": self.settings.seed,
            "psnr_before": {k: round(v, 3) for k, v in self.before.items()},
            "psnr": {k: round(v, 3) for k, v in self.scores().items()},
        }

    def result(self) -> Restorer:
        """The trained restorer: on the CPU, in evaluation mode, with its provenance in the metadata."""
        with torch.inference_mode(False):
            module = deepcopy(self.module).cpu()
            module.load_state_dict(self.weights())
            module = module.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
        config = dict(self.restorer.config)
        if hasattr(module, "with_complexity"):
            config["with_complexity"] = module.with_complexity
        stated = self.restorer.stated_licence
        metadata = {
            **self.restorer.metadata,
            "tasks": ",".join(self.method.good_for(self.restorer.tasks)),
            "training": json.dumps(self.provenance(), default=str),
            **({"licence": stated} if stated else {}),
        }
        base = self.restorer.source.removesuffix(".safetensors")
        return Restorer(self.restorer.architecture, config, module, f"{base} fine-tuned", [], metadata)

    def companions(self) -> dict[str, Restorer]:
        """What learned beside the network (DCPT's classifier), on the CPU, by the names of its files.

        It belongs to the network's present weights, not to their average.
        """
        stated = self.restorer.stated_licence
        metadata = {
            "training": json.dumps(self.provenance(), default=str),
            **({"licence": stated} if stated else {}),
        }
        found = {}
        with torch.inference_mode(False):
            for name, made in self.method.companions(self.network).items():
                module = deepcopy(made.module).cpu().eval().requires_grad_(False)
                module = module.to(memory_format=torch.contiguous_format)
                found[name] = replace(made, module=module, source=f"{self.folder.name} {name}", metadata=metadata)
        return found

    def export(self) -> Path:
        """Writes the weights that are kept, in half precision, as a file that loads by itself; and its companions."""
        path = self.folder / WEIGHTS
        if distributed.leads():
            write(self.result(), path)
            for name, made in self.companions().items():
                write(made, self.folder / f"{name}.safetensors")
        return path


def crop_size(restorer: Restorer, size: int) -> int:
    """The smallest crop of at least `size` pixels that the network takes without padding."""
    multiple = restorer.multiple_of
    return -(-max(size, restorer.minimum_size) // multiple) * multiple


def write(restorer: Restorer, path: Path, half: bool = True) -> None:
    """Saves a restorer as safetensors with configuration, tasks and provenance; models.load reads it."""
    described = (restorer.architecture.id, restorer.config, restorer.tasks, _training(restorer))
    export(restorer.module, path, *described, half, restorer.stated_licence or None)


def _training(restorer: Restorer) -> dict[str, Any]:
    """What the file that a restorer came from says about its training; {} if nothing."""
    text = restorer.metadata.get("training", "")
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = text
    return found if isinstance(found, dict) else {"note": found}


def run_folder(base: Path, name: str, resume: bool) -> Path:
    """The folder of a run called `name` below `base`: the latest one to go on with, else one with the next free number."""
    name = "".join(c if c.isalnum() or c in "-_ ." else "_" for c in name).strip(". ") or "run"
    taken = sorted(int(p.name[len(name) + 1 :]) for p in base.glob(f"{name}_*") if p.name[len(name) + 1 :].isdigit())
    if resume and taken:
        return base / f"{name}_{taken[-1]:05}"
    return base / f"{name}_{taken[-1] + 1 if taken else 1:05}"


def report(tuner: FineTuner) -> str:
    """What a run did, as text: before and after for each kind of damage."""
    after = tuner.scores()
    lines = [f"{tuner.progress.step} steps, {tuner.batch_size} crops of {tuner.size} pixels each"]
    if after:
        lines.append("validation PSNR in dB, before -> after:")
        lines += [f"  {name}: {tuner.before[name]:.2f} -> {after[name]:.2f}" for name in after]
        if len(after) > 1:
            means = (sum(s.values()) / len(s) for s in (tuner.before, after))
            lines.append("  mean: {:.2f} -> {:.2f}".format(*means))
    return "\n".join(lines)
