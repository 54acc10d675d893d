"""`mend bench kernels`: the operators of `kernels/` against the memory bandwidth of the machine, and a roofline plot."""

from __future__ import annotations

import argparse
import ctypes
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ..engine import host
from ..kernels import backends, use_backend
from ..kernels.linear_attention import linear_attention
from ..kernels.selective_scan import _unfused, selective_scan, state_space_2d
from ..kernels.selective_scan.arguments import Step2d
from . import machine

# name: (paths K, channels of a path, N, rank of the dt projection), specs of MaIR and MambaIRv2
SHAPES = {
    "MaIR SR": (4, 360, 16, 12),
    "MaIR-T": (4, 66, 1, 4),
    "MambaIR light": (4, 72, 10, 4),
    "MambaIRv2 base": (1, 348, 16, 22),
    "MambaIRv2 light": (1, 48, 8, 3),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Work:
    """One thing to time: what it must at least read and write, and what it computes."""

    operator: str
    shape: str
    bytes: float
    flops: float
    run: Callable[[], object]


@dataclass
class Result:
    work: Work
    backend: str
    best: float
    median: float


class Clock:
    """Times a call: wall clock, or processor time of all threads, which other programs disturb less."""

    def __init__(self, device: torch.device, processor_time: bool, repeat: int) -> None:
        self.device, self.repeat = device, repeat
        self.now = time.process_time if processor_time else time.perf_counter

    def __call__(self, function: Callable[[], object]) -> tuple[float, float]:
        """(best, median) seconds of several calls, after one that compiles."""
        function()
        seconds = []
        for _ in range(self.repeat):
            self.wait()
            start = self.now()
            function()
            self.wait()
            seconds.append(self.now() - start)
        return min(seconds), statistics.median(seconds)

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()


def scan_work(name: str, length: int, dtype: torch.dtype, device: torch.device) -> Work:
    paths, width, n, _ = SHAPES[name]
    dim, size = paths * width, dtype.itemsize
    u, delta = (torch.randn(1, dim, length, device=device).to(dtype) for _ in range(2))
    B, C = (torch.randn(1, paths, n, length, device=device).to(dtype) for _ in range(2))
    A, D, bias = (
        -torch.rand(dim, n, device=device) * 8,
        torch.ones(dim, device=device),
        torch.full((dim,), -2.0, device=device),
    )
    moved = size * (3 * dim * length + 2 * paths * n * length) + 4 * (dim * n + 2 * dim)
    return Work(
        "selective_scan",
        f"{name}: D {dim}, G {paths}, N {n}, L {length}",
        moved,
        9.0 * dim * n * length + dim * length,
        lambda: selective_scan(u, delta, A, B, C, D, None, bias, True),
    )


def step_work(name: str, length: int, dtype: torch.dtype, device: torch.device) -> list[Work]:
    """The fused 2-D step, and the same out of separate operators."""
    paths, width, n, rank = SHAPES[name]
    row, size = rank + 2 * n, dtype.itemsize
    x = torch.randn(1, length, width, device=device).to(dtype)
    order = torch.stack([torch.arange(length).roll(17 * k) for k in range(paths)]).to(device)
    projection = torch.randn(paths, row, width, device=device) / math.sqrt(width)
    dt_weight = torch.randn(paths, width, rank, device=device) / math.sqrt(rank)
    dt_bias = torch.full((paths, width), -2.0, device=device)
    A_logs, D = torch.rand(paths * width, n, device=device) * 2, torch.ones(paths * width, device=device)

    def unfused() -> torch.Tensor:
        projected = F.linear(x, projection.flatten(0, 1).to(dtype)).unflatten(-1, (paths, -1))
        A = -torch.exp(A_logs).unflatten(0, (paths, width))
        each = order.expand(1, -1, -1)
        D_ = D.unflatten(0, (paths, width))
        return _unfused(Step2d(x, projected, each, dt_weight, dt_bias, A, D_, None, True))

    maps = paths * width * length
    fused_bytes = size * (width * length + 2 * paths * row * length) + 4 * (paths * length + width * length)
    # gather, scan (u, delta, y), un-gather and sum each read and write maps of all paths; delta is written once
    separate = fused_bytes + 4 * (maps + 3 * maps + maps + 2 * maps + maps)
    flops = 9.0 * maps * n + maps + 2.0 * maps * (rank + row)
    shape = f"{name}: {paths} x {width}, N {n}, R {rank}, L {length}"

    def fused() -> torch.Tensor:
        return state_space_2d(x, order, projection, dt_weight, dt_bias, A_logs, D)

    return [
        Work("state_space_2d", shape, fused_bytes, flops, fused),
        Work("the same unfused", shape, separate, flops, unfused),
    ]


def attention_work(length: int, dtype: torch.dtype, device: torch.device, channels: int = 64) -> Work:
    side = int(math.sqrt(length))
    q, k, v = (torch.randn(1, side * side, channels, device=device).to(dtype) for _ in range(3))
    moved, flops = 4.0 * dtype.itemsize * side * side * channels, 4.0 * side * side * channels * 32
    return Work(
        "linear_attention",
        f"C {channels}, head 32, L {side * side}",
        moved,
        flops,
        lambda: linear_attention(q, k, v, channels // 32, side, side),
    )


def step_by_step(length: int) -> Callable[[], object]:
    """What packages fall back to without their CUDA operator: tensors of (batch, dim, L, N) and a loop over L."""
    paths, width, n, _ = SHAPES["MaIR SR"]
    dim = paths * width
    u, delta, B, C = torch.randn(1, dim, length), torch.rand(1, dim, length), *torch.randn(2, 1, dim, n, length)
    A = -torch.rand(dim, n)

    def run() -> torch.Tensor:
        decay = torch.exp(torch.einsum("bdl,dn->bdln", F.softplus(delta), A))
        increment = torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u)
        state, outputs = torch.zeros(1, dim, n), []
        for t in range(length):
            state = decay[:, :, t] * state + increment[:, :, t]
            outputs.append(torch.einsum("bdn,bdn->bd", state, C[..., t]))
        return torch.stack(outputs, dim=2)

    return run


def c_loop(length: int) -> Callable[[], object] | None:
    """`scan_loop.c` on MaIR SR's shape; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = Path(tempfile.mkdtemp()) / "scan_loop.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(
        [compiler, *flags, str(Path(__file__).with_name("scan_loop.c")), "-o", str(library), "-lm"], check=True
    )
    function = ctypes.CDLL(str(library)).scan_loop
    paths, width, n, _ = SHAPES["MaIR SR"]
    dim = paths * width
    tensors = [
        torch.randn(dim, length),
        torch.randn(dim, length),
        -torch.rand(dim, n) * 8,
        torch.randn(paths, length, n),
    ]
    tensors += [torch.randn(paths, length, n), torch.ones(dim), torch.full((dim,), -2.0), torch.empty(dim, length)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    def run(keep: list = tensors) -> None:
        function(*pointers, *(ctypes.c_long(v) for v in (dim, paths, n, length)))

    return run


def copy_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes read and written a second by copying 256 MB."""
    source = torch.zeros(64 << 20, device=device)
    target = torch.empty_like(source)
    best, _ = clock(lambda: target.copy_(source))
    return 2 * source.nbytes / best


def peak_flops(clock: Clock, device: torch.device) -> float:
    """Floating-point operations a second of a matrix product in float32."""
    a = torch.randn(1024, 1024, device=device)
    best, _ = clock(lambda: a @ a)
    return 2 * 1024**3 / best


def roofline(results: Sequence[Result], bandwidth: float, peak: float, path: Path) -> None:
    """A log-log plot of operations a second over operations a byte, with the two limits."""
    width, height, margin = 900, 620, 70
    x_low, x_high = -1.5, 2.0
    y_high = math.ceil(math.log10(peak) * 2) / 2
    y_low = y_high - 4

    def place(intensity: float, rate: float) -> tuple[float, float]:
        x = (math.log10(intensity) - x_low) / (x_high - x_low)
        y = (math.log10(rate) - y_low) / (y_high - y_low)
        return margin + x * (width - 2 * margin), height - margin - y * (height - 2 * margin)

    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    ridge = peak / bandwidth
    roof = [place(10**x_low, bandwidth * 10**x_low), place(ridge, peak), place(10**x_high, peak)]
    draw.line(roof, fill="black", width=2)
    for exponent in range(math.ceil(y_low), math.floor(y_high) + 1):
        x, y = place(10**x_low, 10**exponent)
        draw.line([(x, y), (width - margin, y)], fill="#dddddd")
        draw.text((8, y - 6), f"{10.0 ** (exponent - 9):g}", fill="black")
    for exponent in (-1, 0, 1, 2):
        x, y = place(10.0**exponent, 10**y_low)
        draw.line([(x, margin), (x, y)], fill="#dddddd")
        draw.text((x - 8, y + 6), f"{10.0**exponent:g}", fill="black")
    draw.text((8, 16), "GFLOP/s", fill="black")
    draw.text((width - 260, height - 30), "operations a byte (least bytes)", fill="black")
    colours = {"jit": "#c03020", "torch": "#2060c0", "cuda": "#208040", "reference": "#808080"}
    for number, result in enumerate(results, start=1):
        x, y = place(result.work.flops / result.work.bytes, result.work.flops / result.best)
        colour = colours.get(result.backend, "#606060")
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        draw.text((x + 6, y - 6), str(number), fill=colour)
    image.save(path)


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table; writes the plot if asked."""
    parser = argparse.ArgumentParser(prog="mend bench kernels", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, nargs="+", default=[4096], help="tokens of a sequence")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--backend", nargs="+", help="default: all that can run, without the reference")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--processor-time", action="store_true", help="CPU: time of all threads instead of the wall clock"
    )
    parser.add_argument("--baselines", action="store_true", help="also the step-by-step fallback and a C loop (CPU)")
    parser.add_argument("--plot", type=Path, help="where to write the roofline plot, e.g. roofline.png")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = host.named_device(args.device)
    clock = Clock(device, args.processor_time and device.type == "cpu", args.repeat)
    names = args.backend or [s.name for s in backends(device) if s.available and s.name != "reference"]
    bandwidth, peak = copy_bandwidth(clock, device), peak_flops(clock, device)
    what = "processor time" if args.processor_time else "wall clock"
    print(
        f"`mend bench kernels {' '.join(arguments)}`\n\n{machine.describe(device)}; {what}, best (median) of {args.repeat}"
    )
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, matrix product {peak / 1e9:.0f} GFLOP/s\n")
    print("| # | operator | shape | dtype | backend | ms (median) | GB/s | share of copy | GFLOP/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    results: list[Result] = []
    for dtype in args.dtype:
        for length in args.length:
            everything = [scan_work(name, length, DTYPES[dtype], device) for name in args.shape]
            for name in args.shape:
                everything += step_work(name, length, DTYPES[dtype], device)
            for work in everything:
                for backend in names:
                    with torch.inference_mode(), use_backend(backend):
                        results.append(
                            _report(Result(work, backend, *clock(work.run)), dtype, bandwidth, len(results) + 1)
                        )
            work = attention_work(length, DTYPES[dtype], device)
            with torch.inference_mode():
                results.append(_report(Result(work, "torch", *clock(work.run)), dtype, bandwidth, len(results) + 1))
    if args.baselines and device.type == "cpu":
        _baselines(args.length[0], clock)
    if args.plot:
        roofline(results, bandwidth, peak, args.plot)
        print(f"\nroofline: {args.plot}")
    return 0


def _report(result: Result, dtype: str, bandwidth: float, number: int) -> Result:
    work, rate = result.work, result.work.bytes / result.best
    print(
        f"| {number} | {work.operator} | {work.shape} | {dtype} | {result.backend} | {result.best * 1e3:.2f} "
        f"({result.median * 1e3:.2f}) | {rate / 1e9:.2f} | {rate / bandwidth:.0%} | {work.flops / result.best / 1e9:.1f} |",
        flush=True,
    )
    return result


def _baselines(length: int, clock: Clock) -> None:
    print(f"\n| baseline, MaIR SR: D 1440, N 16, L {length} | ms (median) |\n|---|---|")
    short = Clock(clock.device, clock.now is time.process_time, 2)
    best, median = short(step_by_step(length))
    print(f"| step by step in PyTorch, as packages fall back to | {best * 1e3:.0f} ({median * 1e3:.0f}) |")
    loop = c_loop(length)
    if loop is not None:
        best, median = clock(loop)
        print(
            f"| C loop (bench/scan_loop.c, -O3 -march=native -ffast-math -fopenmp) | {best * 1e3:.1f} ({median * 1e3:.1f}) |"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
