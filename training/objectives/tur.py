"""Task Uncertainty Regularization: a loss that learns how much each restoration task may count.

Wu et al., "Debiased All-in-one Image Restoration with Task Uncertainty Regularization", AAAI 2025. The network
predicts a positive uncertainty map beside the picture. Averaged over the samples of a task it divides that task's L1
loss, so that hard tasks pull less; its logarithm is added, so that it cannot grow for free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError, InputError
from ...models.layers.uncertainty import UncertaintyHead
from .base import Method, Network, Objective, Parts, Pass, last_convolution


@dataclass(frozen=True)
class TaskUncertaintyReport:
    """What the loss found: scalars over the batch, and [tasks] vectors with 0 for tasks that the batch lacks."""

    total: torch.Tensor
    """The loss: mean of `per_task` over the tasks present."""
    per_task: torch.Tensor
    """weighted_l1 + log_term."""
    weighted_l1: torch.Tensor
    """Mean |prediction - target| / U."""
    log_term: torch.Tensor
    """2 log(mean U)."""
    plain_l1: torch.Tensor
    """Mean |prediction - target| of the task's own samples; without graph."""
    mean_uncertainty: torch.Tensor
    """Mean of U; without graph."""


# The published code's numbers for the tasks of its data lists, in the order of its reports.
_RELEASED: Mapping[str, tuple[Mapping[str, int], float, bool]] = {
    "3task": ({"noise15": 0, "noise25": 1, "noise50": 2, "rain": 3, "haze": 4}, 1e-6, True),
    "5task": (
        {"noise15": 0, "noise25": 1, "noise50": 2, "rain": 3, "haze": 4, "blur": 6, "dark": 7},
        1e-6,
        True,
    ),
    "7task": ({"blur": 0, "noise": 1, "jpeg": 2, "rain": 3, "haze": 4, "dark": 5, "sr": 6}, 0.0, False),
}
# The published 7-task code takes the first of these that a sample's type contains: "derain_heavy" is rain.
_CONTAINED = {"7task": ("rain", "haze", "blur", "noise", "jpeg", "dark", "sr")}


class TaskUncertaintyLoss:
    """The loss for a list of tasks.

    tasks: names, or names with the numbers that mark them in a batch (otherwise 0, 1, ...).
    eps: added to the mean uncertainty maps.
    accumulate: False is the paper's formula. True is what the published 3- and 5-task code computes: tasks are
    visited in the order of `tasks`, and every task's L1 term is the mean over the samples of all tasks visited so far
    (each weighted by its own task's map), so tasks with small numbers count several times.
    contained: tasks that a longer name may contain, the first one counts; empty: names must be exact.
    """

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, int],
        *,
        eps: float = 1e-6,
        accumulate: bool = False,
        contained: Sequence[str] = (),
    ) -> None:
        numbers = dict(tasks) if isinstance(tasks, Mapping) else {name: i for i, name in enumerate(tasks)}
        if not numbers or len(set(numbers.values())) != len(numbers):
            raise ConfigError("TUR: tasks must be a non-empty list of different names, with different numbers")
        self.tasks = tuple(numbers)
        self.eps, self.accumulate, self.contained = eps, accumulate, tuple(contained)
        self._slot_of_number = {number: slot for slot, number in enumerate(numbers.values())}
        self._number_of_name = numbers

    @classmethod
    def released(cls, setting: str, *, accumulate: bool | None = None) -> TaskUncertaintyLoss:
        """The loss of a published setting: "3task" (AirNet), "5task" (TransWeather), "7task" (Uformer)."""
        if setting not in _RELEASED:
            raise ConfigError(f"TUR: no setting {setting!r}; one of {', '.join(_RELEASED)}")
        tasks, eps, as_released = _RELEASED[setting]
        accumulate = as_released if accumulate is None else accumulate
        return cls(tasks, eps=eps, accumulate=accumulate, contained=_CONTAINED.get(setting, ()))

    def known(self, task: torch.Tensor | Sequence[int] | Sequence[str]) -> list[int]:
        """Positions in the batch of the samples whose task, given by number or by name, is one of `self.tasks`.

        The published 7-task code leaves the others out without a word; here whoever calls decides.
        """
        return [i for i, number in enumerate(self._numbers(task)[1]) if number in self._slot_of_number]

    def slots(self, task: torch.Tensor | Sequence[int] | Sequence[str]) -> list[int]:
        """Position in `self.tasks` of every sample's task, given by number or by name; InputError if unknown."""
        entries, numbers = self._numbers(task)
        unknown = [e for e, n in zip(entries, numbers, strict=True) if n not in self._slot_of_number]
        if unknown:
            known = ", ".join(f"{name} ({number})" for name, number in self._number_of_name.items())
            raise InputError(f"task: {unknown[0]!r} is unknown; one of {known}")
        return [self._slot_of_number[n] for n in numbers]

    def _numbers(self, task: torch.Tensor | Sequence[int] | Sequence[str]) -> tuple[list[Any], list[int | None]]:
        entries = task.tolist() if isinstance(task, torch.Tensor) else list(task)
        return entries, [self._number(e) if isinstance(e, str) else e for e in entries]

    def _number(self, name: str) -> int | None:
        known = name if name in self._number_of_name else next((c for c in self.contained if c in name.lower()), None)
        return None if known is None else self._number_of_name[known]

    def __call__(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        uncertainty: torch.Tensor,
        task: torch.Tensor | Sequence[int] | Sequence[str],
    ) -> TaskUncertaintyReport:
        """prediction, target, uncertainty (> 0) [B, C, H, W]; task: [B] numbers or names. In float32.

        Gradients reach `prediction` and `uncertainty`. Nothing is clamped: a map near zero gives a huge weight.
        """
        if not prediction.shape == target.shape == uncertainty.shape:
            shapes = [tuple(t.shape) for t in (prediction, target, uncertainty)]
            raise InputError(f"TUR: prediction, target and uncertainty must have one shape, got {shapes}")
        slots = self.slots(task)
        if len(slots) != len(prediction):
            raise InputError(f"task: {len(slots)} entries for a batch of {len(prediction)}")
        difference = (prediction.float() - target.float()).abs()
        samples = {slot: [i for i, s in enumerate(slots) if s == slot] for slot in sorted(set(slots))}
        maps = {slot: uncertainty[indices].float().mean(dim=0) + self.eps for slot, indices in samples.items()}
        terms: dict[str, dict[int, torch.Tensor]] = {"weighted_l1": {}, "log_term": {}}
        weighted: list[torch.Tensor] = []
        for slot, indices in samples.items():
            # |p / U - t / U| = |p - t| / U, as U > 0.
            weighted.append(difference[indices] / maps[slot])
            terms["weighted_l1"][slot] = torch.cat(weighted).mean() if self.accumulate else weighted[-1].mean()
            terms["log_term"][slot] = 2 * maps[slot].mean().log()
        with torch.no_grad():
            plain = self._vector({slot: difference[indices].mean() for slot, indices in samples.items()}, difference)
            mean_uncertainty = self._vector({slot: u.mean() for slot, u in maps.items()}, difference)
        weighted_l1, log_term = (self._vector(values, difference) for values in terms.values())
        per_task = weighted_l1 + log_term
        return TaskUncertaintyReport(
            per_task.sum() / len(samples), per_task, weighted_l1, log_term, plain, mean_uncertainty
        )

    def _vector(self, values: Mapping[int, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """[tasks]: `values` by slot, 0 elsewhere."""
        zero = like.new_zeros(())
        return torch.stack([values.get(slot, zero) for slot in range(len(self.tasks))])


# The objective --------------------------------------------------------------------------------------------------------

_ALIASES = {
    "low-light": "dark",
    "lowlight": "dark",
    "motion-blur": "blur",
    "motionblur": "blur",
    "defocus": "blur",
    "downsample": "sr",
}


@dataclass(frozen=True)
class UncertaintyObjective(Objective):
    """Task Uncertainty Regularization (Wu et al., AAAI 2025): hard kinds of damage pull less.

    setting: "data set" takes its labels as tasks; "3task", "5task", "7task" are the published lists. accumulate: as the
    published 3- and 5-task code computes it; None: as the setting was published (the paper's formula for own tasks).
    Networks without an uncertainty head get one, on what their last convolution reads; it is not part of the result.
    """

    kind: ClassVar[str] = "tur"
    setting: str = "data set"
    accumulate: bool | None = None

    def start(self, network: Network, labels: Sequence[str], size: int) -> Method:
        network.require_restorer("TUR")
        if self.setting == "data set":
            loss = TaskUncertaintyLoss(tuple(labels), accumulate=bool(self.accumulate))
        else:
            loss = TaskUncertaintyLoss.released(self.setting, accumulate=self.accumulate)
        tasks = {label: self._task(label, loss.tasks) for label in labels}
        return _Uncertainty(loss, tasks, self._head(network, size))

    @staticmethod
    def _task(label: str, tasks: Sequence[str]) -> str:
        plain = label.replace(" ", "").lower()
        for name in (label, plain, _ALIASES.get(plain, plain), f"{plain}25"):
            if name in tasks:
                return name
        raise InputError(f"TUR: the data set's {label!r} is none of the tasks {', '.join(tasks)}")

    @staticmethod
    def _head(network: Network, size: int) -> nn.Module | None:
        """None if the network has one."""
        image, generator = network.example(size), torch.Generator()
        if network.architecture.restore_with_uncertainty is not None:
            try:
                with torch.no_grad():
                    network.architecture.restore_with_uncertainty(network.module, image)
                network.own_uncertainty = True
                return None
            except ConfigError:
                pass
        network.last = last_convolution(network.module, lambda: network(image, generator))
        return UncertaintyHead(network.module.get_submodule(network.last).in_channels)


class _Uncertainty(Method):
    def __init__(self, loss: TaskUncertaintyLoss, tasks: Mapping[str, str], head: nn.Module | None) -> None:
        super().__init__()
        self.criterion, self.tasks, self.head = loss, tasks, head

    def loss(self, run: Pass) -> tuple[torch.Tensor, Parts]:
        outputs = run.outputs
        uncertainty = outputs.uncertainty if self.head is None else self.head(outputs.features.float())
        if uncertainty.shape != outputs.restored.shape:  # the last convolution of some works before enlarging
            uncertainty = F.interpolate(uncertainty, outputs.restored.shape[-2:], mode="nearest")
        tasks = [self.tasks[label] for label in run.batch.labels]
        report = self.criterion(outputs.restored, run.batch.clean, uncertainty, tasks)
        present = report.mean_uncertainty > 0
        return report.total, {
            "tur": report.total,
            "L1": report.plain_l1[present].mean(),
            "uncertainty": report.mean_uncertainty[present].mean(),
        }

    def groups(self) -> list[dict[str, Any]]:
        return [] if self.head is None else [{"params": list(self.head.parameters())}]
