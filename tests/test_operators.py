"""Linear degradations keep the identities that restoration relies on."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend.errors import InputError
from comfyui_mend.guidance import fills, filters, kernels
from comfyui_mend.guidance import operators as ops

SKEWED = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KINDS = {
    "denoising": lambda: (ops.Denoising(), (13, 9)),
    "inpainting": lambda: (ops.Inpainting(torch.rand(13, 9) > 0.5), (13, 9)),
    "colourisation": lambda: (ops.Colourisation(), (7, 11)),
    "average x3": lambda: (ops.AveragePooling(3), (12, 21)),
    "bicubic x4": lambda: (filters.bicubic_downsampling(4), (16, 40)),
    "bicubic x3": lambda: (filters.bicubic_downsampling(3), (27, 15)),
    "gaussian": lambda: (filters.separable_blur(kernels.gaussian_1d(5, 1.0), kernels.gaussian_1d(7, 2.0)), (17, 24)),
    "resize 0.4": lambda: (filters.Resize(0.4).fitted(23, 31), (23, 31)),
    "circular even kernel": lambda: (filters.CircularBlur(torch.rand(4, 6) / 12), (20, 18)),
    "circular x3": lambda: (filters.CircularBlur(SKEWED / SKEWED.sum(), 3), (18, 27)),
    "reflect": lambda: (filters.ReflectBlur(SKEWED / SKEWED.sum()), (9, 14)),
    "hadamard": lambda: (ops.WalshHadamard(torch.randperm(64)[:20], 8), (8, 8)),
    "mask after blur": lambda: (
        ops.Composition(ops.Inpainting(torch.rand(12, 16) > 0.3), filters.ReflectBlur(SKEWED / SKEWED.sum())),
        (12, 16),
    ),
    "smaller, then holes as large as a block": lambda: (
        ops.Composition(ops.Inpainting(torch.arange(48).view(6, 8) % 7 > 3), ops.AveragePooling(2)),
        (12, 16),
    ),
    "blur, then smaller": lambda: (
        ops.Composition(ops.AveragePooling(2), filters.CircularBlur(kernels.gaussian_2d(5, 1.0))),
        (12, 16),
    ),
}


@pytest.fixture(params=KINDS)
def operator_and_images(request):
    operator, size = KINDS[request.param]()
    return operator, torch.randn(2, 3, *size)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.double()).sum())


def test_the_adjoint_is_exact(operator_and_images) -> None:
    operator, x = operator_and_images
    y = torch.randn_like(operator.A(x))
    assert _dot(operator.A(x), y) == pytest.approx(_dot(x, operator.A_adjoint(y)), rel=1e-4, abs=1e-3)


def test_the_operator_is_linear_and_each_image_stands_for_itself(operator_and_images) -> None:
    operator, x = operator_and_images
    assert torch.allclose(operator.A(2 * x + x.flip(0)), 2 * operator.A(x) + operator.A(x).flip(0), atol=1e-4)
    assert torch.allclose(operator.A(x)[:1], operator.A(x[:1]), atol=1e-5)


def test_sizes_are_foretold(operator_and_images) -> None:
    operator, x = operator_and_images
    y = operator.A(x)
    assert tuple(y.shape[-2:]) == tuple(operator.output_size(*x.shape[-2:]))
    assert tuple(operator.input_size(*y.shape[-2:])) == tuple(x.shape[-2:])


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.2, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.3, 7.3, 15.999])
def test_a_resize_finds_the_largest_picture_behind_a_measurement_of_any_size(factor: float) -> None:
    operator = filters.Resize(1 / factor)
    for length in range(1, 400):
        behind = operator.input_size(length, 400 - length)
        assert operator.output_size(*behind) == (length, 400 - length)
        assert all(side > length for side in operator.output_size(behind[0] + 1, behind[0] + 1))


def test_a_resize_forgets_the_pictures_that_it_has_seen() -> None:
    operator, x = filters.Resize(0.5), torch.rand(1, 3, 33, 47)
    y = operator.A(x)
    assert operator.input_size(17, 24) == (34, 48) and operator.A_adjoint(y).shape[-2:] == (34, 48)
    assert operator.fitted(17, 24, measured=True).size == (34, 48)
    assert operator.fitted(33, 47).A_adjoint(y).shape == x.shape and operator.size is None


def test_the_regularised_inverse_solves_its_normal_equations(operator_and_images) -> None:
    operator, x = operator_and_images
    operator.iterations = 300
    y, eta = operator.A(torch.randn_like(x)), 0.05
    z = operator.A_dagger(y, eta)
    normal = operator.A_adjoint(operator.A(z)) + eta * z
    assert torch.allclose(normal, operator.A_adjoint(y), atol=2e-3)


def test_the_pseudo_inverse_explains_the_measurement(operator_and_images) -> None:
    operator, x = operator_and_images
    operator.iterations = 400
    y = operator.A(x)
    again = operator.A(operator.A_dagger(y))
    loose = isinstance(operator, (filters.ReflectBlur, ops.Composition, filters.CircularBlur))
    assert float((again - y).norm() / y.norm()) < (0.05 if loose else 2e-3)


def test_back_projection_moves_onto_the_measurement_and_the_prox_step_in_between(operator_and_images) -> None:
    operator, x = operator_and_images
    operator.iterations = 300
    y = operator.A(torch.randn_like(x))
    before = float((operator.A(x) - y).norm())
    middle = float((operator.A(operator.prox(x, y, 0.5)) - y).norm())
    after = float((operator.A(operator.back_project(x, y, 1e-4)) - y).norm())
    assert after < 0.2 * before and after <= middle <= before


def test_nothing_is_divided_by_zero_where_the_operator_is_blind() -> None:
    blind = filters.separable_blur(kernels.uniform_1d(9), kernels.uniform_1d(9))
    assert blind.A_dagger(torch.randn(1, 3, 33, 20), 0.0).isfinite().all()
    assert filters.CircularBlur(torch.ones(4, 4) / 16).A_dagger(torch.randn(1, 3, 8, 8), 0.0).isfinite().all()


def test_the_pseudo_inverse_takes_measurements_that_no_picture_gives() -> None:
    mask = torch.ones(6, 8)
    mask[2:, 3:] = 0
    operator = ops.Composition(ops.AveragePooling(2), ops.Inpainting(mask))
    y = torch.randn(2, 3, 3, 4)  # also where nothing is known
    matrix = torch.stack([operator.A(one[None, None]).flatten() for one in torch.eye(48).view(48, 6, 8)], dim=1)
    expected = (torch.linalg.pinv(matrix) @ y.flatten(2).transpose(1, 2).flatten(0, 1).view(2, 12, 3)).transpose(1, 2)
    torch.testing.assert_close(operator.A_dagger(y), expected.reshape(2, 3, 6, 8), atol=1e-5, rtol=1e-4)


def test_a_blur_is_undone_as_far_as_its_damping_allows() -> None:
    operator, y = filters.ReflectBlur(kernels.gaussian_2d(9, 3.0)), torch.randn(1, 1, 16, 16)
    matrix = torch.stack([operator.A(one[None, None]).flatten() for one in torch.eye(256).view(256, 16, 16)], dim=1)
    matrix = matrix.double()
    expected = torch.linalg.solve(matrix.T @ matrix + 1e-4 * torch.eye(256), matrix.T @ y.double().flatten())
    found = operator.A_dagger(y, 1e-4).double().flatten()
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_the_published_adjoint_of_an_even_kernel_is_a_pixel_off_and_of_an_odd_one_exact() -> None:
    y = torch.randn(1, 1, 12, 10)
    for sides, shift in (((4, 6), (1, 1)), ((5, 4), (0, 1)), ((3, 5), (0, 0))):
        kernel = torch.rand(sides)
        exact, published = (filters.CircularBlur(kernel, published_adjoint=flag).A_adjoint(y) for flag in (False, True))
        torch.testing.assert_close(published, exact.roll(shift, (2, 3)))


def test_median_fill_keeps_what_is_known_and_fills_the_rest() -> None:
    image, mask = torch.rand(2, 3, 20, 31), (torch.rand(20, 31) > 0.9).float()
    filled = fills.median_fill(image, mask)
    assert filled.isfinite().all() and torch.equal(filled[:, :, mask > 0], image[:, :, mask > 0])
    assert torch.equal(fills.median_fill(image, torch.zeros(20, 31)), torch.zeros_like(image))
    assert torch.equal(fills.median_fill(image, torch.ones(20, 31)), image)


def test_smooth_fill_bends_least_and_keeps_what_is_known() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 3, 24), torch.linspace(0, 3, 31), indexing="ij")
    image = torch.stack([x.sin() * y.cos(), (x + y).sin(), torch.full_like(x, 0.3)]).expand(2, 3, 24, 31)
    mask = (torch.rand(24, 31, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    seen = image * mask
    filled, medians = fills.smooth_fill(seen, mask), fills.median_fill(seen, mask)
    assert torch.equal(filled[:, :, mask > 0], image[:, :, mask > 0])
    assert float((filled - image).square().mean()) < 0.05 * float((medians - image).square().mean())
    padded = torch.nn.functional.pad(filled, (1,) * 4, mode="replicate")
    around = sum(padded[..., 1 + i : 25 + i, 1 + j : 32 + j] for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1)))
    bending, free = around - 4 * filled, (mask == 0).nonzero()[::40]
    for row, column in free:  # the energy has its minimum there: moving a free pixel either way makes it larger
        for step in (-0.01, 0.01):
            moved = torch.zeros(24, 31)
            moved[row, column] = step
            lifted = torch.nn.functional.pad(moved[None, None], (1,) * 4, mode="replicate")
            change = sum(lifted[..., 1 + i : 25 + i, 1 + j : 32 + j] for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1)))
            assert float(((bending + change - 4 * moved) ** 2).sum()) > float((bending**2).sum())


def test_smooth_fill_of_nothing_known_and_of_everything_known() -> None:
    image = torch.rand(1, 3, 5, 7)
    assert torch.equal(fills.smooth_fill(image, torch.ones(5, 7)), image)
    assert torch.equal(fills.smooth_fill(image, torch.zeros(5, 7)), torch.zeros_like(image))
    assert fills.smooth_fill(torch.rand(1, 1, 1, 1), torch.ones(1, 1)).isfinite().all()


def test_a_motion_kernel_has_its_length_and_direction() -> None:
    flat, tilted = kernels.motion_2d(9, 0), kernels.motion_2d(9, 45)
    assert float(flat.sum()) == pytest.approx(1) and (flat.sum(dim=1) > 1e-6).sum() == 1
    assert int((flat[flat.shape[0] // 2] > 1e-6).sum()) == 9
    assert float(tilted.flip(1).diagonal().sum()) > 3 * float(tilted.diagonal().sum())  # rises to the right


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.AveragePooling(4).A(torch.zeros(1, 3, 10, 8)), "not divisible by the factor 4"),
        (lambda: filters.bicubic_downsampling(4).A(torch.zeros(1, 3, 10, 8)), "not divisible by the factor 4"),
        (lambda: ops.Inpainting(torch.ones(4, 4)).A(torch.zeros(1, 3, 5, 4)), "make them the same size"),
        (lambda: filters.ReflectBlur(torch.ones(4, 4)), "sides must be odd"),
        (lambda: filters.ReflectBlur(torch.ones(9, 9)).A(torch.zeros(1, 3, 4, 9)), "too few for a kernel"),
        (lambda: filters.ReflectBlur(torch.ones(9, 9)).A_adjoint(torch.zeros(1, 3, 4, 9)), "too few for a kernel"),
        (lambda: filters.ReflectBlur(torch.ones(1, 3)).A_dagger(torch.zeros(1, 3, 1, 1)), "1 x 1 pixels are too few"),
        (lambda: filters.CircularBlur(torch.ones(9, 9)).A(torch.zeros(1, 3, 4, 9)), "larger than the image"),
        (lambda: ops.WalshHadamard(torch.arange(3), 12), "power of two"),
        (lambda: ops.WalshHadamard(torch.arange(3), 8).A_dagger(torch.zeros(1, 3, 8, 8)), "take it from Measure"),
        (lambda: ops.Colourisation().A(torch.zeros(1, 1, 4, 4)), "1 channels"),
    ],
)
def test_what_an_operator_cannot_take_is_said(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
