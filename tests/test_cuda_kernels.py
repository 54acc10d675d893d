"""The CUDA sources: emulated on the CPU, compiled without a GPU, and run where there is one."""

from __future__ import annotations

import emulation
import pytest
import torch
from scans import assert_near, on, reference, scan_inputs, step_inputs

from comfyui_mend.kernels import check, jit
from comfyui_mend.kernels.selective_scan import chunked, cuda, selective_scan, state_space_2d
from comfyui_mend.kernels.selective_scan.arguments import Scan, Step2d


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    reason = emulation.why_not()
    if reason:
        pytest.skip(reason)
    with emulation.emulation(tmp_path_factory.mktemp("emulation")):
        yield


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_the_cuda_sources_emulated_give_the_reference(emulated, dtype, tolerance):
    for shape, keep in (((2, 10, 2, 4, 300), True), ((1, 70, 1, 4, 130), False), ((2, 3, 1, 4, 1), True)):
        inputs = {k: v if k in ("A", "D", "delta_bias") else v.to(dtype) for k, v in scan_inputs(*shape).items()}
        arguments = [inputs[k] for k in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
        got = cuda.forward(Scan(*arguments, True), keep)
        want = chunked.forward(Scan(*(t.double() for t in arguments), True), keep)
        for g, w, limit in zip(got, want, (tolerance, 3e-6, 3e-6), strict=True):
            assert g.shape == w.shape and (
                not g.numel() or (g.double() - w).abs().max() <= limit * w.abs().max() + 1e-7
            )


@pytest.mark.parametrize(
    ("shape", "softplus", "without", "dtype"),
    [
        ((2, 10, 2, 4, 300), True, (), torch.float32),  # chunks, the last of them not full
        ((1, 70, 1, 4, 130), False, (), torch.float32),  # three blocks of channels, the last of them not full
        ((2, 3, 1, 4, 1), True, ("D", "delta_bias"), torch.float32),
        ((1, 6, 2, 20, 40), True, (), torch.float32),  # more sums than threads
        ((1, 40, 1, 5, 40), True, ("D",), torch.bfloat16),  # steps that do not fill a group of sums
    ],
)
def test_the_cuda_gradients_emulated_are_those_of_the_formula(emulated, shape, softplus, without, dtype):
    inputs = {k: v if k in ("A", "D", "delta_bias") else v.to(dtype) for k, v in scan_inputs(*shape).items()}
    if not softplus:
        inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs(), inputs["delta_bias"].abs() * 0.1
    arguments = [None if k in without else inputs[k] for k in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    grad_y = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    double = Scan(*(None if t is None else t.double() for t in arguments), softplus)
    states = chunked.forward(double, True)[2]
    want = chunked.backward(grad_y.double(), states, double)
    got = cuda._backward(grad_y, states.float(), Scan(*arguments, softplus))
    limit = 2e-5 if dtype == torch.float32 else 1e-2
    for name, t, g, w in zip(Scan._fields, arguments, got, want, strict=False):
        assert g.shape == w.shape and (t is None or g.dtype == t.dtype), name
        assert t is None or (g.double() - w).abs().max() <= limit * w.abs().max().clamp_min(1e-3), name


def test_gradients_come_from_pytorch_where_the_cuda_kernel_fails(monkeypatch, caplog):
    def fail(*arguments):
        raise jit.KernelError("no such instruction")

    monkeypatch.setattr(cuda, "_backward", fail)
    cuda._say_once.cache_clear()
    inputs = scan_inputs(1, 4, 1, 2, 9)
    scan = Scan(*(inputs[k] for k in Scan._fields[:7]), True)
    states = chunked.forward(scan, True)[2]
    for _ in range(2):
        got = cuda.backward(inputs["u"], states, scan)
    assert all(torch.equal(g, w) for g, w in zip(got, chunked.backward(inputs["u"], states, scan), strict=True))
    assert len([r for r in caplog.records if "no such instruction" in r.message]) == 1


@pytest.mark.parametrize("merge", [True, False])
def test_the_fused_cuda_step_emulated_gives_the_reference(emulated, merge):
    for shape, options in (
        ((2, 300, 6, 4, 3, 4), {}),
        ((2, 130, 20, 1, 3, 4), {"prompt": True, "per_image": True}),
        ((1, 257, 70, 2, 3, 4), {}),
    ):
        s = step_inputs(*shape, **options)
        batch, length, width, paths, rank, n = shape
        order = s["order"].expand(batch, -1, -1)
        projected = torch.randn(batch, length, paths, rank + 2 * n)
        A, D = -s["A_logs"].exp().unflatten(0, (paths, width)), s["D"].unflatten(0, (paths, width))
        arguments = (s["x"], projected, order, s["dt_weight"], s["dt_bias"], A, D, s["prompt"])
        double = tuple(t.double() if t is not None and t.is_floating_point() else t for t in arguments)
        got = cuda.state_space_2d(Step2d(*arguments, merge))
        assert_near(got, chunked.state_space_2d(Step2d(*double, merge)))


def _nvrtc() -> str:
    try:
        jit.nvrtc_version()
    except jit.KernelError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_nvrtc()), reason=_nvrtc() or "NVRTC is there")


@needs_nvrtc
def test_the_cuda_sources_compile_for_an_architecture_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MEND_KERNEL_CACHE", str(tmp_path))
    source, options = next(check.configurations())
    code = jit.cached_code(jit.read_source(source), 80, options, source.name)
    assert code[:4] == b"\x7fELF"
    monkeypatch.setattr(jit, "compile_source", None)  # the second time it must come from the cache
    assert jit.cached_code(jit.read_source(source), 80, options, source.name) == code


@needs_nvrtc
def test_an_unknown_newer_architecture_gets_ptx_and_a_mistake_is_reported():
    source = 'extern "C" __global__ void k(float* x) { x[0] = 1.0f; }'
    assert b".version" in jit.compile_source(source, 199)
    with pytest.raises(jit.KernelError, match="undefined_name"):
        jit.compile_source(source.replace("1.0f", "undefined_name"), 80)


@needs_nvrtc
@pytest.mark.slow
def test_all_cuda_sources_compile_for_all_architectures():
    assert check.main(["--require"]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cuda_backend_gives_the_reference_on_a_gpu(dtype):
    inputs = {
        k: v if k in ("A", "D", "delta_bias") else v.to(dtype) for k, v in scan_inputs(2, 360, 4, 16, 3000).items()
    }
    got = on("cuda", selective_scan, **{k: v.cuda() for k, v in inputs.items()}, delta_softplus=True)
    assert_near(got.cpu(), reference(selective_scan, **inputs, delta_softplus=True), max(1e-5, torch.finfo(dtype).eps))
    step = step_inputs(2, 3000, 90, 4, 6, 16)
    fused = on("cuda", state_space_2d, **{k: None if v is None else v.cuda() for k, v in step.items()})
    assert_near(fused.cpu(), reference(state_space_2d, **step), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_cuda_gradients_are_those_of_the_formula_on_a_gpu():
    inputs = scan_inputs(2, 90, 2, 16, 1000)

    def gradients(backend, device, dtype):
        leaves = {k: v.to(device, dtype).requires_grad_() for k, v in inputs.items()}
        y = on(backend, selective_scan, **leaves, delta_softplus=True)
        return torch.autograd.grad(y.square().sum(), list(leaves.values()))

    pairs = zip(gradients("cuda", "cuda", torch.float32), gradients("torch", "cpu", torch.float64), strict=True)
    for got, want in pairs:
        assert (got.cpu().double() - want).abs().max() <= 1e-4 * want.abs().max()
