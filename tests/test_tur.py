"""AirNet, Uformer and TransWeather with TUR's uncertainty heads, and the TUR loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, ConfigError, InputError
from comfyui_mend.models import airnet, transweather, uformer
from comfyui_mend.models.layers.window import relative_position_index, shifted_window_mask
from comfyui_mend.training.objectives.tur import TaskUncertaintyLoss

AIRNET = {"n_groups": 1, "n_blocks": 1, "n_feats": 16, "if_uncertainty": True, "batch_size": 1}
UFORMER = {
    "embed_dim": 32,
    "win_size": 2,
    "mlp_ratio": 1.0,
    "depths": (1, 2, 1, 1, 1, 1, 1, 2, 1),
    "num_heads": (1, 2, 4, 8, 16, 16, 8, 4, 2),
    "modulator": True,
    "if_uncertainty": True,
}
TRANSWEATHER = {
    "enc": {
        "embed_dims": (8, 16, 24, 32),
        "num_heads": (1, 1, 1, 1),
        "patch_heads": (1, 1, 1),
        "mlp_ratio": 2,
        "depths": (2, 1, 1, 1),
        "sr_ratios": (4, 2, 2, 1),
        "patch_sr": (4, 2, 2),
    },
    "dec": {"dim": 64, "num_heads": 1, "mlp_ratio": 4, "depth": 1, "queries": 48, "sr_ratio": 1},
    "edition": "tur",
    "if_uncertainty": True,
}
SMALL = {"airnet": AIRNET, "uformer": UFORMER, "transweather": TRANSWEATHER}
NETWORKS = {"airnet": airnet, "uformer": uformer, "transweather": transweather}
EVERY = [(name, c) for name, m in NETWORKS.items() for c in (*m.VARIANTS.values(), SMALL[name])]
PLAIN = ("R.var_conv.", "var_conv.")


def _create(name: str, **changes) -> torch.nn.Module:
    return models.create("tur", {**SMALL[name], **changes}).eval().requires_grad_(False)


def _spread(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: offsets and biases that start at zero would hide mistakes."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    return module


@pytest.mark.parametrize(("name", "config"), EVERY)
def test_every_setting_is_read_back_from_the_shapes(name: str, config: dict) -> None:
    architecture = models.registry.get(name)
    with torch.device("meta"):
        module = models.create("tur", config)
        state = module.state_dict()
        assert models.registry.detect(state) is architecture
        read = architecture.config_from_state_dict(state)
        again = models.create("tur", read).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
    assert {k: read[k] for k in config} == dict(config)


@pytest.mark.parametrize(
    ("name", "variant", "count"),
    [
        ("airnet", "TUR 3 tasks", 9_005_900),
        ("uformer", "TUR 7 tasks", 50_956_533),
        ("uformer", "TUR defaults", 20_703_904),
        ("transweather", "TUR", 37_756_798),
        ("transweather", "original", 38_052_078),
    ],
)
def test_the_released_networks_have_their_published_sizes(name: str, variant: str, count: int) -> None:
    with torch.device("meta"):
        module = models.create("tur", NETWORKS[name].VARIANTS[variant])
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("wrapper", [lambda s: s, lambda s: {"params": s}, lambda s: {"params": s, "params_ema": s}])
def test_a_released_file_loads_in_the_wrappers_of_its_training_code(name: str, wrapper, tmp_path) -> None:
    module = _spread(_create(name))
    torch.save(wrapper({f"module.{k}": v for k, v in module.state_dict().items()}), tmp_path / "net.pth")
    restorer = models.load(tmp_path / "net.pth")
    x = torch.rand(1, 3, 64, 64)
    assert restorer.architecture.id == name
    torch.testing.assert_close(restorer(x), restorer.architecture.restore(module, x))
    assert {k: restorer.config[k] for k in SMALL[name]} == SMALL[name]


@pytest.mark.parametrize("name", SMALL)
def test_a_file_without_the_uncertainty_head_is_the_plain_network(name: str) -> None:
    module = _spread(_create(name))
    restorer = models.load({k: v for k, v in module.state_dict().items() if not k.startswith(PLAIN)})
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(restorer.module(x), module(x))
    with pytest.raises(ConfigError, match="no uncertainty head"):
        restorer.architecture.restore_with_uncertainty(restorer.module, x)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (37, 50), (90, 65)])
def test_any_size_comes_back_in_its_size(name: str, size: tuple[int, int]) -> None:
    restorer = models.load(_create(name).state_dict())
    out = restorer(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, *size)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_the_image_is_the_same_with_and_without_its_uncertainty(name: str) -> None:
    module, x = _spread(_create(name)), torch.rand(1, 3, 64, 96)
    y, uncertainty = module.forward_with_uncertainty(x)
    torch.testing.assert_close(y, module(x))
    assert uncertainty.shape == x.shape
    assert (uncertainty >= 0).all()


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_restored_image_by_image(name: str) -> None:
    module, x = _spread(_create(name)), torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(module(x), torch.cat([module(i[None]) for i in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_stays_close(name: str) -> None:
    module, x = _create(name), torch.rand(1, 3, 64, 64)
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max() + 0.02
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# AirNet --------------------------------------------------------------------------------------------------------------


def test_zero_offsets_and_a_full_mask_are_an_ordinary_convolution() -> None:
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(4, 8, 3, 3)
    got = airnet.modulated_deformable_convolution(x, weight, torch.zeros(2, 18, 9, 7), torch.ones(2, 9, 9, 7))
    torch.testing.assert_close(got, F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-5)


def test_whole_pixel_offsets_read_the_pixel_they_name_and_zero_outside() -> None:
    x = torch.arange(20.0).view(1, 1, 4, 5) + 1
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 2] = 1  # row -1, column +1: tap 2
    offset = torch.zeros(1, 18, 4, 5)
    offset[:, 4], offset[:, 5] = 2.0, -3.0  # vertical, horizontal
    got = airnet.modulated_deformable_convolution(x, weight, offset, torch.ones(1, 9, 4, 5))
    want = F.pad(x, (2, 0, 0, 1))[..., 1:, :5]  # one row down, two columns to the left
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_strips_of_any_height_give_the_same_numbers(monkeypatch) -> None:
    x, weight = torch.randn(2, 8, 13, 11), torch.randn(8, 8, 3, 3)
    offset, mask = torch.randn(2, 18, 13, 11) * 3, torch.rand(2, 9, 13, 11)
    whole = airnet.modulated_deformable_convolution(x, weight, offset, mask)
    for limit in (1, 100_000):
        monkeypatch.setitem(airnet._STRIP_BYTES, "cpu", limit)
        torch.testing.assert_close(airnet.modulated_deformable_convolution(x, weight, offset, mask), whole)


def test_the_deformable_convolution_has_right_gradients() -> None:
    shapes = (1, 4, 3, 4), (2, 4, 3, 3), (1, 18, 3, 4), (1, 9, 3, 4)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(airnet.modulated_deformable_convolution, inputs)


def test_airnet_restores_without_what_only_its_training_needs() -> None:
    module = _spread(_create("airnet"))
    needed = {k: v for k, v in module.state_dict().items() if k.startswith(("R.", "E.E.encoder_q.E_pre."))}
    restorer, x = models.load(needed), torch.rand(1, 3, 20, 30)
    torch.testing.assert_close(restorer(x), module(x))
    assert not hasattr(restorer.module.E.E, "queue")


def test_a_queue_of_absurd_length_is_refused() -> None:
    state = {k: v.to("meta") for k, v in _create("airnet").state_dict().items()}
    state["E.E.queue"] = torch.empty(256, 10**12, device="meta")
    with pytest.raises(CheckpointError, match="queue"):
        models.load(state)


# Uformer -------------------------------------------------------------------------------------------------------------


def test_uformer_takes_rectangles_as_they_are() -> None:
    module = _spread(_create("uformer", shift_flag=False))
    tall = module(torch.rand(1, 3, 64, 32))
    assert tall.shape[-2:] == (64, 32)
    with pytest.raises(InputError, match="multiples of 32"):
        module(torch.rand(1, 3, 48, 33))


def test_transposed_weights_restore_the_transposed_rectangle() -> None:
    module, x = _spread(_create("uformer")), torch.rand(1, 3, 32, 96)
    want = module(x)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    size = SMALL["uformer"]["win_size"]
    for key, value in state.items():
        if value.ndim == 4:
            state[key] = value.transpose(-1, -2)
        elif key.endswith("relative_position_bias_table"):
            state[key] = value.unflatten(0, (2 * size - 1, 2 * size - 1)).transpose(0, 1).flatten(0, 1)
        elif key.endswith("modulator.weight"):
            state[key] = value.unflatten(0, (size, size)).transpose(0, 1).flatten(0, 1)
    module.load_state_dict(state)
    torch.testing.assert_close(module(x.transpose(-1, -2)).transpose(-1, -2), want, rtol=1e-3, atol=1e-3)


def test_small_declared_pictures_lose_the_shift_as_published() -> None:
    with torch.device("meta"):
        module = models.create("tur", {**SMALL["uformer"], "win_size": 8, "img_size": 64})
        read = models.registry.get("uformer").config_from_state_dict(module.state_dict())
    assert [module.stage(i).window for i in range(5)] == [8, 8, 8, 8, 4]
    assert module.stage(1).blocks[1].shift == 4
    assert read["img_size"] == 64
    assert models.registry.get("uformer").multiple_of(read) == module.multiple_of == 64


def test_the_shift_mask_separates_what_the_roll_joined() -> None:
    mask = shifted_window_mask(8, 12, 4, 2, torch.device("cpu"))
    assert mask.shape == (6, 16, 16)
    assert not mask[0].any()  # an inner window is unbroken
    label = torch.zeros(4, 4)
    label[2:] += 1
    corner = label + 2 * label.T
    assert torch.equal(mask[-1] == 0, corner.flatten()[:, None] == corner.flatten()[None])


def test_relative_positions_depend_on_displacement_alone() -> None:
    index = relative_position_index(3)
    assert index.diagonal().unique().tolist() == [12]
    assert index[0, 8] == 0
    assert index[8, 0] == 24
    assert index[0, 1] == index[7, 8] == 11


def test_an_uncertainty_head_of_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="embed_dim must be 32"):
        models.create("tur", {**SMALL["uformer"], "embed_dim": 16, "num_heads": (1,) * 9})


# TransWeather --------------------------------------------------------------------------------------------------------


def test_queries_are_resized_as_the_published_code_does_it() -> None:
    attention = transweather.TaskQueryAttention(64, 2, 1, 48)
    for height, width in ((1, 2), (6, 8), (9, 13)):
        x = torch.randn(2, height, width, 64)
        query = attention.q(attention.task_query.expand(2, -1, -1)).unflatten(-1, (2, 32)).transpose(1, 2)
        query = F.interpolate(query, size=(height * width, 32), mode="nearest")
        want = F.scaled_dot_product_attention(query, *attention.keys_values(x))
        want = attention.proj(want.transpose(1, 2).flatten(-2)).unflatten(1, (height, width))
        torch.testing.assert_close(attention(x), want, rtol=1e-4, atol=1e-5)


def test_the_input_range_follows_the_edition_and_can_be_set() -> None:
    module, x = _spread(_create("transweather")), torch.rand(1, 3, 48, 64)
    state = module.state_dict()
    torch.testing.assert_close(models.load(state)(x), module(x))
    torch.testing.assert_close(models.load(state, config={"input_range": "-1..1"})(x), module(x * 2 - 1))
    original = models.load({k: v for k, v in state.items() if not k.startswith("var_conv.")})
    torch.testing.assert_close(original(x), module(x * 2 - 1))
    with pytest.raises(CheckpointError, match="input_range"):
        models.load(state, config={"input_range": "0..255"})


def test_measuring_chooses_the_range_in_which_the_picture_stays_itself() -> None:
    class Signed(torch.nn.Module):
        input_range = "measure"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1) / 2

    assert transweather.likely_input_range(Signed(), torch.rand(1, 3, 64, 64)) == "-1..1"
    assert transweather.likely_input_range(torch.nn.Identity(), torch.rand(1, 3, 64, 64)) == "0..1"


def test_layers_that_are_never_called_may_be_missing() -> None:
    module = _create("transweather", edition="original", if_uncertainty=False)
    state = {k: v for k, v in module.state_dict().items() if "mini_patch_embed4" not in k}
    x = torch.rand(1, 3, 48, 48)
    torch.testing.assert_close(models.load(state)(x), module(x * 2 - 1))


def test_too_small_a_picture_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="at least 48"):
        _create("transweather")(torch.rand(1, 3, 32, 64))


# The loss ------------------------------------------------------------------------------------------------------------


def _batch(count: int = 4) -> list[torch.Tensor]:
    return [torch.rand(count, 3, 5, 6) for _ in range(2)] + [torch.rand(count, 3, 5, 6) + 0.1]


def test_the_loss_is_the_formula_of_the_paper() -> None:
    p, t, u = _batch()
    report = TaskUncertaintyLoss(("rain", "haze", "snow"), eps=0.0)(p, t, u, ["haze", "rain", "haze", "haze"])
    haze = u[[0, 2, 3]].mean(dim=0)
    want = [
        (p[1] / u[1] - t[1] / u[1]).abs().mean() + 2 * u[1].mean().log(),
        (p[[0, 2, 3]] / haze - t[[0, 2, 3]] / haze).abs().mean() + 2 * haze.mean().log(),
    ]
    torch.testing.assert_close(report.total, sum(want) / 2)
    torch.testing.assert_close(report.per_task, torch.stack([*want, torch.zeros(())]))


def test_accumulation_counts_early_tasks_again_and_changes_nothing_for_one_task() -> None:
    p, t, u = _batch(2)
    tasks = ("rain", "haze")
    plain, again = (TaskUncertaintyLoss(tasks, accumulate=a) for a in (False, True))
    torch.testing.assert_close(plain(p, t, u, [0, 0]).total, again(p, t, u, [0, 0]).total)
    separate, accumulated = plain(p, t, u, [0, 1]), again(p, t, u, [0, 1])
    torch.testing.assert_close(accumulated.weighted_l1[1], separate.weighted_l1.mean())


def test_the_best_uncertainty_is_proportional_to_the_error() -> None:
    """d/du (e / u + 2 log u) = 0 at u = e / 2: hard tasks end with a large map, so a small weight."""
    p, t = torch.full((2, 1, 1, 1), 0.0), torch.tensor([0.2, 0.8]).view(2, 1, 1, 1)
    log_u = torch.zeros(2, 1, 1, 1, requires_grad=True)
    optimiser, loss = torch.optim.Adam([log_u], lr=0.05), TaskUncertaintyLoss(("easy", "hard"), eps=0.0)
    for _ in range(300):
        optimiser.zero_grad()
        loss(p, t, log_u.exp(), [0, 1]).total.backward()
        optimiser.step()
    torch.testing.assert_close(log_u.exp().flatten(), torch.tensor([0.1, 0.4]), rtol=0.02, atol=0.0)


def test_unknown_tasks_and_wrong_shapes_are_named() -> None:
    p, t, u = _batch(1)
    loss = TaskUncertaintyLoss.released("5task")
    with pytest.raises(InputError, match="5 is unknown; one of noise15"):
        loss(p, t, u, torch.tensor([5]))
    with pytest.raises(InputError, match="one shape"):
        loss(p, t, u[..., :-1], [0])
    with pytest.raises(ConfigError, match="7task"):
        TaskUncertaintyLoss.released("9task")


def test_the_seven_tasks_are_found_in_longer_names_the_weather_first() -> None:
    loss = TaskUncertaintyLoss.released("7task")
    assert [loss.tasks[i] for i in loss.slots(["derain_heavy", "Noise_Blur", "rain_haze", "x4sr"])] == [
        "rain",
        "blur",
        "rain",
        "sr",
    ]
    with pytest.raises(InputError, match="'inpaint' is unknown"):
        loss.slots(["inpaint"])
    with pytest.raises(InputError, match="'derain' is unknown"):
        TaskUncertaintyLoss.released("5task").slots(["derain"])
