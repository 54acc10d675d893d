"""Compiles every CUDA kernel for every supported architecture, without a GPU or a driver.

    python -m comfyui_mend.kernels.check [--require]

Needs NVRTC (pip install nvidia-cuda-nvrtc, or torch's CUDA packages). Exit status 1 if a kernel does not compile, or if
NVRTC is missing and --require is given.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import jit
from .selective_scan import cuda

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# (N, rank of the dt projection, channels) of the networks' scans: specs of MaIR, MambaIR and MambaIRv2.
_SHAPES = ((1, 4, 66), (4, 3, 96), (8, 3, 48), (10, 4, 72), (16, 12, 360), (16, 22, 348), (32, 24, 768))


def configurations() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every source with the sets of options that are checked: every shape, and every dtype for one of them."""
    for shape in _SHAPES:
        yield cuda.SOURCE, cuda.options(*shape, torch.float32)
        yield cuda.BACKWARD_SOURCE, cuda.backward_options(shape[0], torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        yield cuda.SOURCE, cuda.options(16, 12, 360, dtype)
        yield cuda.BACKWARD_SOURCE, cuda.backward_options(16, dtype)


def compile_all(capability: int) -> int:
    """Compiles every configuration for one compute capability; returns how many. Raises KernelError."""
    everything = list(configurations())
    for source, options in everything:
        jit.compile_source(jit.read_source(source), capability, options, source.name)
    return len(everything)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--require", action="store_true", help="fail when NVRTC is missing")
    required = parser.parse_args(arguments).require
    write = sys.stdout.write
    try:
        version = ".".join(map(str, jit.nvrtc_version()))
    except jit.KernelError as error:
        write(f"skipped: {error}\n")
        return 1 if required else 0
    known = jit.supported_architectures()
    failed = 0
    for capability in ARCHITECTURES:
        begin = time.perf_counter()
        if capability not in known:
            write(f"sm_{capability}: NVRTC {version} does not know it\n")
            continue
        try:
            count = compile_all(capability)
        except jit.KernelError as error:
            failed += 1
            write(f"sm_{capability}: FAILED\n{error}\n")
        else:
            write(f"sm_{capability}: {count} kernels in {time.perf_counter() - begin:.1f} s, NVRTC {version}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
