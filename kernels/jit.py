"""CUDA kernels from source, without a toolkit or a compiler: NVRTC and the driver through ctypes.

NVRTC comes with torch's CUDA wheels on Linux and Windows. Compiled code is kept on disk under a hash of source,
options, architecture and NVRTC version. Nothing here runs at import.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)


class KernelError(RuntimeError):
    """A kernel could not be compiled, loaded or launched on this machine."""


# --- NVRTC ---------------------------------------------------------------------------------------------------------


def _nvrtc_candidates() -> Iterator[str]:
    """Where NVRTC may be: pip's NVIDIA packages, torch's own folder, a toolkit, then by name."""
    windows = sys.platform == "win32"
    pattern = "nvrtc64_*.dll" if windows else "libnvrtc.so*"
    roots = [Path(torch.__file__).parent / "lib"]
    packages = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    packages.append(Path(torch.__file__).parent.parent)
    for package in dict.fromkeys(packages):
        roots += [Path(p) for p in sorted(glob.glob(str(package / "nvidia" / "*" / ("bin" if windows else "lib"))))]
        roots += [Path(p) for p in sorted(glob.glob(str(package / "nvidia" / "*" / "bin" / "x86_64")))]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            roots += [Path(os.environ[variable]) / folder for folder in ("bin", "lib64", "lib")]
    for root in dict.fromkeys(roots):
        yield from (str(p) for p in sorted(root.glob(pattern), reverse=True) if "builtins" not in p.name)
    if windows:
        yield from (f"nvrtc64_{version}_0.dll" for version in ("130", "120", "112"))
    else:
        yield from ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2")


@lru_cache(maxsize=1)
def nvrtc() -> ctypes.CDLL:
    """The NVRTC library. Raises KernelError if there is none."""
    for candidate in _nvrtc_candidates():
        try:
            if sys.platform == "win32" and os.path.isabs(candidate):
                os.add_dll_directory(os.path.dirname(candidate))  # its builtins lie beside it
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise KernelError("NVRTC was not found (it is part of torch's CUDA packages)")


def _nvrtc_call(function: str, *arguments: object) -> None:
    library = nvrtc()
    status = getattr(library, function)(*arguments)
    if status:
        raise KernelError(f"{function}: {library.nvrtcGetErrorString(status).decode()}")


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc_call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@lru_cache(maxsize=1)
def supported_architectures() -> tuple[int, ...]:
    """Compute capabilities that this NVRTC compiles for, as 75, 80, ..."""
    count = ctypes.c_int()
    _nvrtc_call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    archs = (ctypes.c_int * count.value)()
    _nvrtc_call("nvrtcGetSupportedArchs", archs)
    return tuple(archs)


def compile_source(source: str, capability: int, options: Sequence[str] = (), name: str = "kernel.cu") -> bytes:
    """Machine code of CUDA C++ `source` for a compute capability (80 for sm_80).

    PTX of the nearest older architecture where NVRTC does not know this one; the driver then finishes the work.
    Raises KernelError with the compiler's messages.
    """
    known = [arch for arch in supported_architectures() if arch <= capability]
    if not known:
        raise KernelError(f"NVRTC {'.'.join(map(str, nvrtc_version()))} does not compile for sm_{capability}")
    real = capability in known
    architecture = f"--gpu-architecture={'sm' if real else 'compute'}_{max(known)}"
    flags = [option.encode() for option in (architecture, "--std=c++17", *options)]
    program = ctypes.c_void_p()
    _nvrtc_call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        status = nvrtc().nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        if status:
            size = ctypes.c_size_t()
            _nvrtc_call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            _nvrtc_call("nvrtcGetProgramLog", program, text)
            raise KernelError(f"{name} does not compile for sm_{capability}:\n{text.value.decode(errors='replace')}")
        kind = "CUBIN" if real else "PTX"
        size = ctypes.c_size_t()
        _nvrtc_call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        _nvrtc_call(f"nvrtcGet{kind}", program, code)
        return code.raw
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


def read_source(path: Path) -> str:
    """A `.cu` file with the files it includes from its own folder put in: NVRTC looks for none on disk."""

    def included(match: re.Match[str]) -> str:
        return path.with_name(match[1]).read_text(encoding="utf-8")

    return re.sub(r'^#include "([\w.]+)"$', included, path.read_text(encoding="utf-8"), flags=re.MULTILINE)


# --- Cache ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled kernels are kept: MEND_KERNEL_CACHE, else the user's cache folder."""
    if os.environ.get("MEND_KERNEL_CACHE"):
        return Path(os.environ["MEND_KERNEL_CACHE"])
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", tempfile.gettempdir()))
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "comfyui-mend" / "kernels"


def cached_code(source: str, capability: int, options: Sequence[str] = (), name: str = "kernel.cu") -> bytes:
    """`compile_source` through the cache; a cache that cannot be read or written is done without."""
    key = "\0".join((source, str(capability), *options, *map(str, nvrtc_version())))
    path = cache_folder() / f"{Path(name).stem}-sm{capability}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    begin = time.perf_counter()
    code = compile_source(source, capability, options, name)
    log.info("compiled %s for sm_%d in %.1f s", name, capability, time.perf_counter() - begin)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(temporary, path)  # another process may be doing the same
    except OSError as error:
        log.debug("compiled kernels are not kept: %s", error)
    return code


# --- Driver --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the NVIDIA driver was not found ({error})") from None


def _driver_call(function: str, *arguments: object) -> None:
    driver = _driver()
    status = getattr(driver, function)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"{function}: {(text.value or str(status).encode()).decode()}")


class Kernel:
    """A loaded function; called as `kernel(grid, block, *arguments)` on the current stream of its device.

    Tensors are passed as pointers, None as a null pointer, int as 64-bit integers.
    """

    def __init__(self, function: ctypes.c_void_p, device: torch.device, owner: Module) -> None:
        self._function, self._device, self._owner = function, device, owner

    def __call__(self, grid: tuple[int, int, int], block: int, *arguments: torch.Tensor | int | None) -> None:
        values: list[ctypes.c_void_p | ctypes.c_longlong] = []
        for argument in arguments:
            if isinstance(argument, int):
                values.append(ctypes.c_longlong(argument))
            else:
                values.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        _enter(self._device)
        _driver_call("cuLaunchKernel", self._function, *grid, block, 1, 1, 0, stream, pointers, None)


def _enter(device: torch.device) -> None:
    """Makes the device's primary context, which is torch's, current in this thread."""
    context = ctypes.c_void_p()
    _driver_call("cuCtxGetCurrent", ctypes.byref(context))
    handle, index = ctypes.c_int(), device.index if device.index is not None else torch.cuda.current_device()
    _driver_call("cuDeviceGet", ctypes.byref(handle), index)
    if context.value:
        current = ctypes.c_int()
        _driver_call("cuCtxGetDevice", ctypes.byref(current))
        if current.value == handle.value:
            return
    _driver_call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    _driver_call("cuCtxSetCurrent", context)


class Module:
    """Compiled code loaded on one device; stays loaded while it lives."""

    def __init__(self, code: bytes, device: torch.device) -> None:
        torch.cuda.init()
        self._device, self._handle = device, ctypes.c_void_p()
        _enter(device)
        _driver_call("cuModuleLoadData", ctypes.byref(self._handle), code)

    def kernel(self, name: str) -> Kernel:
        """The `extern "C"` function of this name."""
        function = ctypes.c_void_p()
        _driver_call("cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode())
        return Kernel(function, self._device, self)


_modules: dict[tuple, Module] = {}
_lock = threading.Lock()


def load(path: Path, device: torch.device, options: Sequence[str] = ()) -> Module:
    """The module of a `.cu` file for `device`, compiled at first use. Raises KernelError."""
    key = (path, device, tuple(options))
    with _lock:
        if key not in _modules:
            major, minor = torch.cuda.get_device_capability(device)
            code = cached_code(read_source(path), major * 10 + minor, options, path.name)
            _modules[key] = Module(code, device)
        return _modules[key]


def why_not(device: torch.device) -> str:
    """Why kernels cannot be compiled for `device`; "" if they can."""
    if device.type != "cuda":
        return f"computes on an NVIDIA GPU, the tensors are on {device.type}"
    if torch.version.hip:
        return "NVIDIA only; this is torch for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        nvrtc_version()
        _driver()
    except KernelError as error:
        return str(error)
    return ""
