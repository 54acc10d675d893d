"""MaIR: the nested S-shaped paths, configuration from shapes, the stripe width that no file tells."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, ConfigError, InputError
from comfyui_mend.models.mair import nested_s_orders, nested_s_steps

FLAT, UNET = models.registry.get("mair"), models.registry.get("mair-unet")
SMALL = {"embed_dim": 16, "depths": (2, 1), "d_state": 3, "ssm_ratio": 1.5, "mlp_ratio": 2.0, "scan_len": 4}
SMALL_UNET = {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "scan_len": 4}
PARAMETERS = {
    **{"T-x2": 877_752, "S-x3": 1_362_795, "SR-x4": 19_591_959, "CDN": 14_089_035},
    **{"deblur, real denoising": 26_293_296, "dehaze": 3_404_376},
}


def walked_path(height: int, width: int, scan_len: int, shift: int) -> list[tuple[int, int]]:
    """The nested S path, walked pixel by pixel as the paper draws it."""
    edges = [0, *range(shift or scan_len, width, scan_len), width]
    path = []
    for number, (left, right) in enumerate(zip(edges, edges[1:], strict=False)):
        rows = range(height) if number % 2 == 0 else reversed(range(height))
        for visited, row in enumerate(rows):
            columns = range(left, right) if visited % 2 == 0 else reversed(range(left, right))
            path += [(row, column) for column in columns]
    return path


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("scan_len", [1, 2, 3, 4, 8])
def test_the_closed_form_is_the_path_one_would_walk(scan_len: int, shifted: bool) -> None:
    shift = scan_len // 2 if shifted else 0
    for height in range(1, 10):
        for width in range(max(1, shift), 14):
            steps = nested_s_steps(height, width, scan_len, shift)
            for step, (row, column) in enumerate(walked_path(height, width, scan_len, shift)):
                assert steps[row, column] == step, (height, width)


def test_the_four_sequences_read_every_pixel_once_and_neighbours_follow_each_other() -> None:
    order = nested_s_orders(11, 21, 4, 0, device=torch.device("cpu")).long()
    assert torch.equal(order.sort(dim=1).values, torch.arange(231).expand(4, -1))
    rows, columns = order // 21, order % 21
    assert (
        int((rows.diff(dim=1).abs() + columns.diff(dim=1).abs()).max()) == 1
    )  # all four are continuous when both sides are odd
    turned = 230 - order[0]
    assert torch.equal(order[1], turned) and not torch.equal(order[1], order[0].flip(0))


def test_tables_are_made_once_per_size_and_serve_training_after_inference() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        table = nested_s_orders(9, 11, 4, 2, device=device)
    assert nested_s_orders(9, 11, 4, 2, device=device) is table
    assert nested_s_orders(11, 9, 4, 2, device=device) is not table
    assert not table.is_inference()


@pytest.mark.parametrize("architecture", [FLAT, UNET], ids=lambda a: a.id)
def test_every_hyper_parameter_is_found_in_the_shapes(architecture) -> None:
    shallow = {"depths": (2, 1)} if architecture is FLAT else {"num_blocks": (1, 2, 1, 1)}
    cases = {name: {**config, **shallow} for name, config in architecture.variants.items()}
    if architecture is FLAT:
        cases["grey 3conv"] = {**SMALL, "in_chans": 1, "resi_connection": "3conv", "upsampler": "", "upscale": 1}
    else:
        cases["dual pixel"] = {**SMALL_UNET, "bias": True, "dual_pixel_task": True, "inp_channels": 6, "scan_len": 8}
    for name, config in cases.items():
        with torch.device("meta"):
            state = models.create("mair", config).state_dict()
        assert models.registry.detect(state) is architecture, name
        found = architecture.config_from_state_dict(state)
        assert {k: found[k] for k in config} == config, name
        with torch.device("meta"):
            again = models.create("mair", found)
        assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_released_sizes_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        module = models.create("mair", {**FLAT.variants, **UNET.variants}[name])
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("config", [{**SMALL, "upscale": 2}, SMALL_UNET], ids=["flat", "u-net"])
def test_any_size_is_restored_to_scale(config) -> None:
    module = models.create("mair", config).eval().requires_grad_(False)
    architecture = models.registry.detect(module.state_dict())
    full = architecture.config_from_state_dict(module.state_dict())
    restorer = models.Restorer(architecture, full, module)
    for height, width in ((1, 1), (1, 9), (7, 2), (13, 21)):
        restored = restorer(torch.rand(2, 3, height, width))
        assert restored.shape == (2, 3, height * restorer.scale, width * restorer.scale)
        assert restored.isfinite().all()


def test_another_scan_length_changes_the_picture_for_this_call_only() -> None:
    module = models.create("mair", SMALL).eval().requires_grad_(False)
    _wake(module)
    image = torch.rand(1, 3, 16, 16)
    own = module(image)
    assert (module(image, scan_len=8) - own).abs().max() > 1e-5
    assert torch.equal(module(image, scan_len=4), own) and torch.equal(module(image), own)
    built = models.create("mair", {**SMALL, "scan_len": 8}).eval().requires_grad_(False)
    built.load_state_dict(module.state_dict())
    assert torch.equal(built(image), module(image, scan_len=8))
    with pytest.raises(InputError, match="scan_len is -1"):
        module(image, scan_len=-1)


def test_a_batch_is_restored_like_its_pictures_one_by_one() -> None:
    module = models.create("mair", SMALL).eval().requires_grad_(False)
    _wake(module)
    images = torch.rand(3, 3, 10, 12)
    alone = torch.cat([module(image[None]) for image in images])
    assert (module(images) - alone).abs().max() < 1e-5


@pytest.mark.parametrize("config", [SMALL, SMALL_UNET], ids=["flat", "u-net"])
def test_every_parameter_learns(config) -> None:
    module = models.create("mair", config)
    with torch.inference_mode():
        module(torch.rand(1, 3, 8, 16))  # tables made here must not spoil the training step
    module(torch.rand(2, 3, 8, 16)).square().mean().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_half_precision_stays_close_and_keeps_the_decay_rates() -> None:
    module = models.create("mair", SMALL).eval().requires_grad_(False)
    _wake(module)
    image = torch.rand(1, 3, 16, 16)
    exact = module(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(image)
    assert (mixed - exact).abs().max() < 0.05 * exact.abs().max()
    rates = {
        name: p.clone() for name, p in module.named_parameters() if name.endswith(("A_logs", "Ds", "dt_projs_bias"))
    }
    module.to(torch.bfloat16)
    assert module.conv_first.weight.dtype == torch.bfloat16
    assert all(torch.equal(module.get_parameter(name), value) for name, value in rates.items())
    half = module(image.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_impossible_settings_and_absurd_files_are_refused() -> None:
    for config, message in (
        ({"upsampler": "bilinear"}, "upsampler is 'bilinear'"),
        ({"upsampler": "pixelshuffle", "upscale": 5}, "enlarges 2, 3, 4 or 8 times"),
        ({"resi_connection": "2conv"}, "resi_connection is '2conv'"),
        ({"in_chans": 4}, "in_chans is 4"),
        ({"depths": ()}, "at least one group"),
        ({"d_state": 300}, "at most 256 states"),
        ({"embed_dim": 16, "width": 3}, "unexpected keyword"),
    ):
        with pytest.raises(ConfigError, match=message):
            models.create("mair", {**SMALL, **config})
    with torch.device("meta"):
        state = models.create("mair", SMALL).state_dict()
        state["upsample.0.weight"] = torch.empty(13, 16, 3, 3)
    with pytest.raises(CheckpointError, match="not 3 times a square"):
        FLAT.config_from_state_dict(state)


def _wake(module: torch.nn.Module) -> None:
    """Weights large enough that every part has an effect."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and not name.endswith("A_logs"):
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
