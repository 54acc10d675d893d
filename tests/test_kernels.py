"""The state-space operators: every backend against the reference and the recorded cases."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from scans import assert_near, on, reference, scan_inputs, step_inputs
from torch.library import opcheck

import parity
from comfyui_mend import kernels
from comfyui_mend.errors import ConfigError, InputError, MissingDependency
from comfyui_mend.kernels import use_backend
from comfyui_mend.kernels.selective_scan import compiled, selective_scan, state_space_2d

DATA = Path(__file__).resolve().parent / "data"
compare = parity.load(DATA / "check.py").compare

CPU = torch.device("cpu")
HAS_NUMBA = not compiled.why_not(CPU, torch.float32)
BACKENDS = ["torch", pytest.param("jit", marks=pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed"))]


SHAPES = [
    (2, 6, 1, 4, 17),
    (1, 40, 4, 16, 200),
    (2, 34, 2, 1, 131),
    (3, 8, 4, 5, 1),
    (1, 16, 1, 16, 64),
    (1, 3, 1, 8, 2049),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_gives_the_reference_and_its_last_state(backend, shape):
    inputs = scan_inputs(*shape)
    settings = {"delta_softplus": True, "return_last_state": True}
    for got, want in zip(
        on(backend, selective_scan, **inputs, **settings), reference(selective_scan, **inputs, **settings), strict=True
    ):
        assert_near(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 10, 2, 3, 37), (1, 20, 1, 16, 260), (2, 3, 1, 1, 1)])
@pytest.mark.parametrize("softplus", [True, False])
def test_gradients_of_every_backend_are_those_of_the_formula(backend, shape, softplus):
    inputs = scan_inputs(*shape)
    if not softplus:  # step sizes are positive in a network: negative ones grow without bound over 260 steps
        inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs(), inputs["delta_bias"].abs() * 0.1
    weight = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(9))

    def gradients(backend, dtype):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
        y = on(backend, selective_scan, **leaves, delta_softplus=softplus)
        return torch.autograd.grad(y, list(leaves.values()), weight.to(dtype))

    for name, got, want in zip(
        inputs, gradients(backend, torch.float32), gradients("reference", torch.float64), strict=True
    ):
        assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max().clamp_min(1e-3), name


def test_gradients_pass_gradcheck_in_float64():
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(2, 6, 2, 3, 9, dtype=torch.float64).items()}
    names = list(inputs)

    def function(*values):
        return selective_scan(**dict(zip(names, values, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_arguments_may_be_left_out(backend):
    inputs = scan_inputs(1, 12, 3, 4, 50)
    for missing in ({"D"}, {"delta_bias"}, {"D", "delta_bias"}):
        kept = {k: v for k, v in inputs.items() if k not in missing}
        assert_near(
            on(backend, selective_scan, **kept, delta_softplus=True),
            reference(selective_scan, **kept, delta_softplus=True),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_b_and_c_may_lack_groups_or_be_constant(backend):
    inputs = scan_inputs(2, 6, 1, 4, 21)
    full = reference(selective_scan, **inputs, delta_softplus=True)
    flat = inputs | {"B": inputs["B"][:, 0], "C": inputs["C"][:, 0]}
    assert_near(on(backend, selective_scan, **flat, delta_softplus=True), full)
    constant = inputs | {"B": torch.randn(6, 4), "C": torch.randn(6, 4)}
    expanded = constant | {k: constant[k][None, :, :, None].expand(2, 6, 4, 21) for k in "BC"}
    assert_near(
        on(backend, selective_scan, **constant, delta_softplus=True),
        reference(selective_scan, **expanded, delta_softplus=True),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    inputs = scan_inputs(2, 20, 2, 4, 70)
    want = reference(selective_scan, **inputs, delta_softplus=True)
    strided = inputs | {
        k: inputs[k].transpose(-2, -1).contiguous().transpose(-2, -1) for k in ("u", "delta", "B", "C", "A")
    }
    strided["u"] = torch.stack([strided["u"], torch.full_like(strided["u"], math.nan)], dim=-1)[..., 0]
    assert_near(on(backend, selective_scan, **strided, delta_softplus=True), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32_and_rounds_once(backend, dtype):
    inputs = scan_inputs(1, 20, 2, 16, 150)
    halves = inputs | {k: inputs[k].to(dtype) for k in ("u", "delta", "B", "C")}
    z = torch.randn(1, 20, 150).to(dtype)
    y = on(backend, selective_scan, **halves, z=z, delta_softplus=True)
    assert y.dtype == dtype
    assert_near(y, reference(selective_scan, **halves, z=z, delta_softplus=True), torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fast_decay_underflows_to_zero_and_slow_decay_remembers(backend):
    inputs = scan_inputs(1, 6, 2, 16, 400)
    for scale in (1e4, 1e-4):
        inputs["A"] = -scale * torch.ones(6, 16)
        assert_near(
            on(backend, selective_scan, **inputs, delta_softplus=True),
            reference(selective_scan, **inputs, delta_softplus=True),
            1e-5,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_of_the_result_is_written(backend, monkeypatch):
    poisoned = torch.empty

    def empty(*args, **kwargs):
        t = poisoned(*args, **kwargs)
        return t.fill_(math.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", empty)
    inputs = scan_inputs(2, 37, 1, 5, 131)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    y, last = on(backend, selective_scan, **leaves, delta_softplus=True, return_last_state=True)
    assert torch.isfinite(y).all() and torch.isfinite(last).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), list(leaves.values())))
    for merge in (True, False):
        assert torch.isfinite(on(backend, state_space_2d, **step_inputs(2, 70, 19, 4, 3, 2), merge=merge)).all()


RECORDED = [f.parent for pattern in ("selective-scan-*", "mair-small", "mambair-small", "mambairv2-small")
            for f in sorted((DATA / "parity").glob(f"{pattern}/case.json"))]  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_every_backend_meets_the_recorded_cases_gradients_and_networks_included(backend, folder, tmp_path):
    with use_backend(backend):
        outputs = parity.run_case(folder)
    parity.save_file(outputs, str(tmp_path / f"{folder.name}.safetensors"))
    ok, text = compare(folder, tmp_path)
    assert ok, text


def test_no_gradient_flows_through_the_last_state():
    inputs = scan_inputs(1, 4, 1, 2, 6)
    inputs["u"].requires_grad_()
    y, last = selective_scan(**inputs, return_last_state=True)
    (gradient,) = torch.autograd.grad(y.sum() + 100 * last.sum(), inputs["u"])
    (expected,) = torch.autograd.grad(selective_scan(**inputs).sum(), inputs["u"])
    assert torch.equal(gradient, expected)


STEPS = [
    ((2, 35, 6, 4, 2, 4), {}),
    ((2, 130, 20, 1, 3, 8), {"per_image": True, "prompt": True}),
    ((2, 1, 5, 4, 1, 1), {}),
    ((1, 65, 33, 4, 5, 16), {"per_image": True}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "options"), STEPS)
@pytest.mark.parametrize("merge", [True, False])
def test_the_fused_step_is_gather_project_scan_scatter(backend, shape, options, merge):
    inputs = step_inputs(*shape, **options)
    with torch.inference_mode():
        got = on(backend, state_space_2d, **inputs, merge=merge)
    assert_near(got, reference(state_space_2d, **inputs, merge=merge))


def test_the_fused_step_can_be_differentiated():
    inputs = step_inputs(1, 24, 6, 4, 2, 3)

    def gradients(backend, dtype):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in inputs.items() if v is not None and v.is_floating_point()}
        y = on(backend, state_space_2d, **inputs | leaves)
        return torch.autograd.grad(y.square().sum(), list(leaves.values()))

    for got, want in zip(gradients("torch", torch.float32), gradients("reference", torch.float64), strict=True):
        assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max()


def test_the_fused_step_takes_int32_orders_and_half_precision():
    inputs = step_inputs(1, 40, 8, 2, 2, 4)
    want = state_space_2d(**inputs)
    assert torch.equal(state_space_2d(**inputs | {"order": inputs["order"].int()}), want)
    half = state_space_2d(**inputs | {"x": inputs["x"].bfloat16()})
    assert half.dtype == torch.float32
    assert (half - want).abs().max() < 0.05 * want.abs().max()


def test_opcheck_passes():
    inputs = scan_inputs(2, 6, 2, 3, 9)
    arguments = [inputs[k].requires_grad_() for k in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    with use_backend("torch"):
        opcheck(torch.ops.mend.selective_scan.default, (*arguments, True, True))
    generic = step_inputs(2, 12, 5, 2, 2, 3)
    projected = torch.randn(2, 12, 2, 8)
    order = generic["order"].expand(2, -1, -1)
    step = (
        generic["x"],
        projected,
        order,
        generic["dt_weight"],
        generic["dt_bias"],
        -torch.rand(2, 5, 3),
        torch.ones(2, 5),
    )
    opcheck(torch.ops.mend.state_space_2d.default, (*step, None, True))


def test_autocast_and_inference_mode_change_nothing():
    inputs = scan_inputs(1, 8, 2, 4, 33)
    want = selective_scan(**inputs, delta_softplus=True)
    step = step_inputs(1, 33, 8, 2, 2, 4)
    for backend in ("torch", "reference"):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert (on(backend, selective_scan, **inputs, delta_softplus=True) - want).abs().max() < 1e-5
            assert (on(backend, state_space_2d, **step) - state_space_2d(**step)).abs().max() < 1e-4


def test_torch_compile_keeps_the_operator_whole():
    inputs = scan_inputs(1, 4, 1, 2, 12)
    function = torch.compile(lambda **k: selective_scan(**k, delta_softplus=True) * 2, backend="eager", fullgraph=True)
    assert torch.allclose(function(**inputs), selective_scan(**inputs, delta_softplus=True) * 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_threads_may_scan_at_once(backend):
    inputs = scan_inputs(1, 64, 1, 8, 300)
    want = on(backend, selective_scan, **inputs, delta_softplus=True)
    results = {}
    threads = [
        threading.Thread(
            target=lambda i=i: results.update({i: on(backend, selective_scan, **inputs, delta_softplus=True)})
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], want) for i in range(4))


def test_wrong_shapes_are_refused_by_name():
    inputs = scan_inputs(1, 6, 2, 4, 8)
    for name, wrong in (
        ("delta", torch.zeros(1, 6, 7)),
        ("A", torch.zeros(5, 4)),
        ("B", torch.zeros(1, 4, 4, 8)),
        ("D", torch.zeros(7)),
    ):
        with pytest.raises(InputError, match=name):
            selective_scan(**inputs | {name: wrong})
    with pytest.raises(InputError, match="order"):
        state_space_2d(**step_inputs(1, 8, 4, 2, 2, 2) | {"order": torch.zeros(2, 7, dtype=torch.long)})


def test_backends_say_why_they_cannot_run():
    found = {status.name: status for status in kernels.backends("cpu")}
    assert list(found) == ["cuda", "jit", "torch", "reference"]
    assert not found["cuda"].available and "GPU" in found["cuda"].reason
    assert found["torch"].available and found["jit"].available == HAS_NUMBA
    with pytest.raises(MissingDependency, match="cuda"):
        on("cuda", selective_scan, **scan_inputs(1, 2, 1, 2, 3))
    with pytest.raises(ConfigError, match="triton"), use_backend("triton"):
        pass


def test_the_environment_variable_chooses_and_use_backend_wins(monkeypatch):
    monkeypatch.setenv("MEND_SCAN_BACKEND", "cuda")
    inputs = scan_inputs(1, 2, 1, 2, 3)
    with pytest.raises(MissingDependency):
        selective_scan(**inputs)
    on("torch", selective_scan, **inputs)
    monkeypatch.setenv("MEND_SCAN_BACKEND", "nonsense")
    with pytest.raises(ConfigError, match="MEND_SCAN_BACKEND"):
        selective_scan(**inputs)


def test_a_kernel_that_fails_gives_way_to_pytorch_and_says_so_once(monkeypatch, caplog):
    def fail(*arguments):
        raise compiled.KernelError("no such instruction")

    monkeypatch.setattr(compiled, "forward", fail)
    monkeypatch.setattr(compiled, "why_not", lambda device, dtype: "")
    monkeypatch.setattr(kernels.backend, "_broken", {})
    inputs = scan_inputs(1, 2, 1, 2, 3)
    for _ in range(2):
        assert_near(selective_scan(**inputs), reference(selective_scan, **inputs))
    assert [r.message for r in caplog.records if "no such instruction" in r.message] == [caplog.records[-1].message]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux only")
def test_long_sequences_need_little_memory():
    program = """
import resource, torch
from comfyui_mend.kernels import backends, use_backend
from comfyui_mend.kernels.selective_scan import selective_scan
torch.set_num_threads(1)
u, delta = torch.rand(1, 16, 65536), torch.rand(1, 16, 65536)
A, B, C = -torch.rand(16, 16), torch.rand(1, 1, 16, 65536), torch.rand(1, 1, 16, 65536)
for name in [status.name for status in backends() if status.available and status.name != "reference"]:
    with use_backend(name):
        selective_scan(u[..., :300], delta[..., :300], A, B[..., :300], C[..., :300])  # compiles
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        y = selective_scan(u, delta, A, B, C, delta_softplus=True)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - y.nbytes / 2**20)
        del y
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(output.split()) == (2 if HAS_NUMBA else 1)
    assert max(map(float, output.split())) < 40  # MiB beyond the result; (batch, dim, L, N) is 64
