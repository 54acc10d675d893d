"""Runs the CUDA sources on a CPU, through the same host code, so that they are tested without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from comfyui_mend.kernels import jit

HERE = Path(__file__).resolve().parent


def why_not() -> str:
    """Why sources cannot be emulated here; "" if they can."""
    if shutil.which("g++") is None:
        return "no g++ to emulate CUDA with"
    flags = Path("/proc/cpuinfo")
    return "" if flags.exists() and "f16c" in flags.read_text() else "emulation needs an x86 processor under Linux"


class Module:
    """A `.cu` file built for the CPU; `kernel(name)` as in `jit.Module`."""

    def __init__(self, source: Path, options: tuple[str, ...], folder: Path) -> None:
        names = re.findall(r"extern \"C\" __global__ void (?:__launch_bounds__\(\w+\) )?(\w+)\(", source.read_text())
        library = folder / (re.sub(r"\W+", "_", source.stem + "".join(options)) + ".so")
        if not library.exists():
            kernels = " ".join(f"KERNEL({name})" for name in names)
            command = ["g++", "-std=c++20", "-O1", "-w", "-mf16c", "-pthread", "-shared", "-fPIC", *options]
            command += [f'-DSOURCE="{source}"', f"-DKERNELS={kernels}", str(HERE / "emulate.cpp"), "-o", str(library)]
            subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library))

    def kernel(self, name: str) -> jit.Kernel:
        return jit.Kernel((self, name), torch.device("cpu"), self)


def _driver_call(function: str, kernel: tuple, gx: int, gy: int, gz: int, bx: int, *rest: object) -> None:
    assert function == "cuLaunchKernel" and rest[:3] == (1, 1, 0)
    module, name = kernel
    assert module.library.launch(name.encode(), gx, gy, gz, bx, rest[4]) == 0, f"no kernel {name}"


@contextlib.contextmanager
def emulation(folder: Path) -> Iterator[None]:
    """Within it, `kernels/*/cuda.py` take CPU tensors and run their kernels emulated. Libraries go to `folder`."""
    modules: dict[tuple, Module] = {}

    def load(path: Path, device: torch.device, options: tuple[str, ...] = ()) -> Module:
        if (path, options) not in modules:
            modules[path, options] = Module(path, options, folder)
        return modules[path, options]

    stream = mock.Mock(cuda_stream=0)
    with (
        mock.patch.object(jit, "load", load),
        mock.patch.object(jit, "_driver_call", _driver_call),
        mock.patch.object(jit, "_enter", lambda device: None),
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: stream),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield
