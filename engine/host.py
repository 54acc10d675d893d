"""Devices, memory, progress and interrupts: ComfyUI's inside it, plain PyTorch elsewhere.

The only module that knows ComfyUI's `model_management` and `utils`; `folders` and `model_folder` know its `folder_paths`.
"""

from __future__ import annotations

import inspect
import logging
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import Cancelled, InputError
from ..guidance import solvers
from . import allocator

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Trial = TypeVar("Trial")

PACK = Path(__file__).resolve().parent.parent
PREVIEW_INTERVAL = 0.3
"""Seconds between two previews: encoding one costs time."""
CPU_WORKING_MEMORY = 1_200_000_000
"""Bytes that activations may take on a CPU: larger tiles gain nothing there."""


class _Hooks:
    """What the built-in runner listens to."""

    progress: Callable[[int, int, Any], None] | None = None
    interrupt: Callable[[], bool] | None = None
    device: torch.device | None = None


def set_hooks(
    progress: Callable[[int, int, Any], None] | None = None, interrupt: Callable[[], bool] | None = None
) -> None:
    """Outside ComfyUI: called with (done, total, preview PIL image or None); asked whether to stop."""
    _Hooks.progress, _Hooks.interrupt = progress, interrupt


def set_device(device: str | torch.device | None) -> None:
    """Outside ComfyUI: compute here; None chooses by itself. Raises InputError for one that is not there."""
    _Hooks.device = None if device is None else named_device(device)


def named_device(name: str | torch.device) -> torch.device:
    """The device that PyTorch calls so. Raises InputError for one that is unknown, or not there."""
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError):  # the second from builds without CUDA
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        usable = "cpu alone" if accelerator is None else f"cpu and {accelerator.type}"
        raise InputError(
            f"device: {str(name)!r} cannot be used; PyTorch {torch.__version__} finds {usable} here"
        ) from None
    return found


def inside_comfyui() -> bool:
    """True when ComfyUI's model management is loaded in this process."""
    return "comfy.model_management" in sys.modules


def _management() -> Any:
    return sys.modules["comfy.model_management"]


# Devices and precision ------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """Where networks run."""
    if inside_comfyui():
        return _management().get_torch_device()
    if _Hooks.device is not None:
        return _Hooks.device
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None and accelerator.is_available():
        return accelerator.current_accelerator()
    return torch.device("cpu")


def intermediate_device() -> torch.device:
    """Where images travel between nodes."""
    return _management().intermediate_device() if inside_comfyui() else torch.device("cpu")


def working_dtype(precision: str, target: torch.device) -> torch.dtype:
    """ "fp32", "fp16", "bf16" or "auto" (half where the device is good at it, never on a CPU) as a dtype."""
    fixed = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision in fixed:
        return fixed[precision]
    if precision != "auto":
        raise InputError(f"precision: {precision!r} is unknown; one of auto, {', '.join(fixed)}")
    if target.type == "cpu":
        return torch.float32
    if inside_comfyui():
        if _management().should_use_bf16(target):
            return torch.bfloat16
        return torch.float16 if _management().should_use_fp16(target) else torch.float32
    return torch.bfloat16 if target.type not in ("mps",) else torch.float32


def free_memory(target: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU what is free now, within any cap on this process."""
    if target.type != "cpu":
        if inside_comfyui():
            return int(_management().get_free_memory(target))
        module = torch.get_device_module(target)
        if hasattr(module, "mem_get_info"):
            unused = module.memory_reserved(target) - module.memory_allocated(target)
            return int(module.mem_get_info(target)[0] + unused)
        return 4_000_000_000
    return min(_machine_memory(), _process_cap())


def _machine_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if inside_comfyui():
        return int(_management().get_free_memory(torch.device("cpu")))
    return 4_000_000_000


def _process_cap() -> int:
    """What a limit on the address space or the control group leaves, if there is one."""
    cap = sys.maxsize
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            cap = max(0, limit - used)
    except (ImportError, OSError, ValueError):
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        cap = min(cap, max(0, limit - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    except (OSError, ValueError):
        pass
    return cap


def available_memory(target: torch.device) -> int:
    """`free_memory`, and what ComfyUI will take back from other models when a network asks for it.

    Without that, how a picture is cut into tiles would depend on what ran before.
    """
    free = free_memory(target)
    if target.type == "cpu" or not inside_comfyui():
        return free
    loaded = [model for model in _management().loaded_models() if model is not None]
    return free + sum(int(model.loaded_size()) for model in loaded if model.load_device == target)


def working_memory(target: torch.device) -> int:
    """Bytes to plan activations with."""
    budget = int(available_memory(target) * 0.6)
    return min(budget, CPU_WORKING_MEMORY) if target.type == "cpu" else budget


def part_memory(target: torch.device) -> int:
    """Bytes to plan a part of a large picture with: where freed memory is kept meanwhile, it then takes about as much."""
    keeps = target.type == "cpu" and allocator.available()
    return int(working_memory(target) / (allocator.KEPT if keeps else 1.0))


def is_out_of_memory(error: BaseException) -> bool:
    """True for every backend's way of saying that an allocation failed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if inside_comfyui() and isinstance(error, _management().OOM_EXCEPTION):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def release_memory(target: torch.device) -> None:
    """Gives cached blocks back to the device after a failed allocation."""
    if inside_comfyui():
        _management().soft_empty_cache()
    elif target.type != "cpu":
        module = torch.get_device_module(target)
        if hasattr(module, "empty_cache"):
            module.empty_cache()


class DidNotFitError(Exception):
    """An allocation failed, and what had been allocated for it is free again. Never leaves this project's engine."""


def attempt(work: Callable[[], Result]) -> Result:
    """work(); raises DidNotFitError if an allocation failed, so that the caller can do with less."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors that did not fit
    release_memory(device())
    raise DidNotFitError


def first_that_fits(work: Callable[[Trial], Result], trials: Iterable[Trial]) -> Result:
    """work(trial) for the first of the trials, each of which asks for less, whose allocations succeed.

    A further trial is drawn only after the one before failed, so a generator can say there what is done instead. Raises
    DidNotFitError if none fits.
    """
    for trial in trials:
        try:
            return attempt(lambda trial=trial: work(trial))
        except DidNotFitError:
            continue
    raise DidNotFitError


def make_room(target: torch.device) -> None:
    """Before training, which needs the device for itself: other networks make way; they come back when used."""
    if inside_comfyui():
        _management().unload_all_models()
    elif target.type != "cpu":
        _resident.clear()
    release_memory(target)


# Interrupts and progress ----------------------------------------------------------------------------------------------


def check_interrupt() -> None:
    """Raises if the user cancelled: ComfyUI's own exception inside it, `Cancelled` elsewhere."""
    if inside_comfyui():
        _management().throw_exception_if_processing_interrupted()
    elif _Hooks.interrupt is not None and _Hooks.interrupt():
        raise Cancelled("cancelled")


solvers.set_interrupt(check_interrupt)  # one call of an operator's inverse takes up to a minute


def is_interrupt(error: BaseException) -> bool:
    """True for what `check_interrupt` raises."""
    if inside_comfyui() and isinstance(error, _management().InterruptProcessingException):
        return True
    return isinstance(error, Cancelled)


class Progress:
    """One progress bar over all the work of a node; every update also checks for an interrupt."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._last_preview = max(1, total), 0, 0.0
        self._part, self._parts = _part.get()
        self._bar = None
        if inside_comfyui():
            import comfy.utils

            self._bar = comfy.utils.ProgressBar(self.total)

    def update(self, amount: int = 1, preview: Callable[[], Any] | None = None) -> None:
        """Advances; `preview` gives a PIL image and is called a few times a second at most."""
        check_interrupt()
        self.done = min(self.total, self.done + amount)
        picture = None
        if preview is not None and time.monotonic() - self._last_preview >= PREVIEW_INTERVAL:
            picture, self._last_preview = preview(), time.monotonic()
        done, total = self._part * self.total + self.done, self._parts * self.total
        if self._bar is not None:
            shown = None if picture is None else ("JPEG", picture, 768)
            self._bar.update_absolute(done, total, shown)
        elif _Hooks.progress is not None:
            _Hooks.progress(done, total, picture)

    def extend(self, amount: int) -> None:
        """More work turned up (smaller tiles after running out of memory)."""
        self.total += amount


def progress(total: int) -> Progress:
    """A progress bar over `total` steps."""
    return Progress(total)


_part: ContextVar[tuple[int, int]] = ContextVar("mend_progress_part", default=(0, 1))


@contextmanager
def part_of_progress(part: int, parts: int) -> Iterator[None]:
    """Progress bars made inside cover part number `part` (from 0) of `parts` equal ones: one bar for several runs."""
    outer, outer_parts = _part.get()
    token = _part.set((outer * parts + part, outer_parts * parts))
    try:
        yield
    finally:
        _part.reset(token)


# Networks on devices --------------------------------------------------------------------------------------------------


def whole_patcher(model: nn.Module) -> Any:
    """Inside ComfyUI: its `ModelPatcher` for plain layers, which compute only where all their weights are.

    ComfyUI leaves weights behind where memory is short, with --novram all of them, and its own layers fetch them one by
    one. Ours do not: a network is loaded whole or not at all.
    """
    import comfy.model_patcher

    class Whole(comfy.model_patcher.ModelPatcher):
        def partially_load(self, device_to: torch.device, extra_memory: float = 0, *args: Any, **options: Any) -> Any:
            return super().partially_load(device_to, 1e32, *args, **options)

    management = _management()
    return Whole(model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


class Managed:
    """A network whose place in memory the host manages: a `ModelPatcher` inside ComfyUI."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.patcher = None
        if inside_comfyui():
            self.patcher = whole_patcher(module)

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    @contextmanager
    def on_device(self, memory: int = 0) -> Iterator[tuple[nn.Module, torch.device]]:
        """The module, loaded, and its device; `memory` is what its activations will need in bytes."""
        if self.patcher is not None:
            management = _management()
            options = {"memory_required": memory, "force_full_load": True}
            accepted = inspect.signature(management.load_models_gpu).parameters
            management.load_models_gpu([self.patcher], **{k: v for k, v in options.items() if k in accepted})
            module, target = self.patcher.model, self.patcher.load_device
        else:
            module, target = self.module, device()
            _resident.admit(self, target)
        with allocator.kept() if _keeps(target, memory) else nullcontext():
            yield module, target


def _keeps(target: torch.device, memory: int) -> bool:
    """Whether what `memory` bytes of activations free is kept meanwhile: on a CPU with ample room, as estimates err."""
    if target.type != "cpu" or memory < allocator.WORTH_IT:
        return False
    return 4 * memory <= free_memory(target)


class _Resident:
    """Outside ComfyUI: which networks lie on the accelerator, least recently used first, within half its memory."""

    def __init__(self) -> None:
        self._networks: OrderedDict[int, weakref.ref[Managed]] = OrderedDict()

    def admit(self, managed: Managed, target: torch.device) -> None:
        if target.type == "cpu":
            managed.module.to(target)
            return
        self._networks.pop(id(managed), None)
        for key in list(self._networks):
            if free_memory(target) >= 2 * managed.size:
                break
            other = self._networks.pop(key)()
            if other is not None:
                other.module.to("cpu")
                release_memory(target)
        managed.module.to(target)
        self._networks[id(managed)] = weakref.ref(managed)

    def clear(self) -> None:
        """Moves all of them to the CPU."""
        for network in self._networks.values():
            if (managed := network()) is not None:
                managed.module.to("cpu")
        self._networks.clear()


_resident = _Resident()


class NetworkCache:
    """Loaded networks by what they were loaded from: loading the same file twice gives the same object.

    Networks in use elsewhere are shared for as long as they live; beyond that the most recently used ones are kept
    within `budget` bytes (inside ComfyUI none: its own cache of results decides).
    """

    def __init__(self, budget: int = 2_000_000_000) -> None:
        self.budget = budget
        self._alive: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, load: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The object under `key`, loaded if need be; it must be weakly referable."""
        found = self._alive.get(key)
        if found is None:
            found = load()
            self._alive[key] = found
        if not inside_comfyui():
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(size(v) for v in self._kept.values()) > self.budget:
                self._kept.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forgets everything that nobody else holds."""
        self._kept.clear()


networks = NetworkCache()
