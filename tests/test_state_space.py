"""Options, maps and tiling of the state-space networks, as the nodes use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import local_restorer

from comfyui_mend import kernels, models
from comfyui_mend.engine import loaded, official_tiling, state_space, tiling
from comfyui_mend.errors import Cancelled, InputError
from comfyui_mend.nodes.state_space import OfficialTiling, RouteMap, RouteMode, ScanBackend, ScanPath

MAIR = {"embed_dim": 8, "depths": (2,), "d_state": 2, "ssm_ratio": 1.5, "mlp_ratio": 1.0, "scan_len": 4, "upscale": 2}
V2 = {
    **{"embed_dim": 12, "depths": (2,), "num_heads": (2,), "d_state": 3, "mlp_ratio": 1.0, "inner_rank": 4},
    **{"num_tokens": 6, "window_size": 4, "upsampler": "pixelshuffledirect", "upscale": 2},
}


def network(system: str, config) -> loaded.LoadedRestorer:
    module = models.create(system, config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and not name.endswith("A_logs"):
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    architecture = models.registry.detect(module.state_dict())
    return loaded.wrap(models.Restorer(architecture, architecture.config_from_state_dict(module.state_dict()), module))


@pytest.mark.parametrize(
    ("system", "config"),
    [
        ("mair", MAIR),
        ("mair", {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "scan_len": 8}),
        (
            "mambair",
            {"embed_dim": 30, "depths": (1,), "d_state": 2, "mlp_ratio": 1.2, "upsampler": "pixelshuffledirect"},
        ),
        ("mambair", {"dim": 30, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1}),
        ("mambairv2", V2),
    ],
    ids=["mair", "mair u-net", "mambair", "mambair u-net", "mambairv2"],
)
def test_a_checkpoint_in_the_released_wrapper_loads_by_itself(system: str, config, tmp_path: Path) -> None:
    module = models.create(system, config).eval()
    file = tmp_path / "released.pth"
    torch.save({"params": {f"module.{k}": v for k, v in module.state_dict().items()}}, file)
    restorer = models.load(file)
    assert restorer.architecture.system == system
    image = torch.rand(1, 3, 11, 14)
    expected = models.Restorer(restorer.architecture, restorer.config, module.requires_grad_(False))(image)
    assert torch.allclose(restorer(image), expected, atol=1e-6)


def test_a_stripe_width_in_the_metadata_or_by_hand_is_used() -> None:
    state = models.create("mair", {**MAIR, "scan_len": 2}).state_dict()
    assert models.load(state).module.scan_len == 4
    assert models.load(state, config={"scan_len": 2}).module.scan_len == 2


def test_options_travel_with_the_wire_and_leave_the_network_alone() -> None:
    image = torch.rand(1, 16, 16, 3)
    mair = network("mair", MAIR)
    changed = ScanPath.execute(mair, scan_len=8).result[0]
    assert changed.restorer is mair.restorer and not mair.options
    picture = image.movedim(-1, 1)
    assert (tiling.restore(changed, picture) - tiling.restore(mair, picture)).abs().max() > 1e-6
    assert torch.equal(tiling.restore(state_space.with_scan_len(mair, 0), picture), tiling.restore(mair, picture))
    v2 = network("mambairv2", V2)
    drawn = RouteMode.execute(v2, mode="sample", seed=3).result[0]
    assert torch.equal(tiling.restore(drawn, picture), tiling.restore(drawn, picture))
    assert (tiling.restore(drawn, picture) - tiling.restore(v2, picture)).abs().max() > 1e-6


def test_the_scan_backend_travels_with_the_wire_and_gives_the_same_picture() -> None:
    picture, mair = torch.rand(1, 3, 16, 16), network("mair", MAIR)
    changed, text = ScanBackend.execute(mair, backend="reference").result
    used = []

    def asked(*arguments):
        used.append(kernels.backend.requested())

    hook = mair.restorer.module.register_forward_pre_hook(asked)
    slow, fast = tiling.restore(changed, picture), tiling.restore(mair, picture)
    hook.remove()
    assert used == ["reference", "auto"] and torch.allclose(slow, fast, atol=1e-5)
    assert "cuda       not available" in text and "torch      available" in text and "set to reference" in text


def test_a_scan_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch) -> None:
    with pytest.raises(InputError, match="cuda cannot run here"):
        state_space.with_scan_backend(network("mair", MAIR), "cuda")
    with pytest.raises(InputError, match="load a MaIR, MambaIR or MambaIRv2"):
        state_space.with_scan_backend(local_restorer(), "torch")


def test_other_networks_are_refused_with_a_hint() -> None:
    mair, v2 = network("mair", MAIR), network("mambairv2", V2)
    with pytest.raises(InputError, match="MambaIRv2 has no scan length; load a MaIR network"):
        state_space.with_scan_len(v2, 4)
    with pytest.raises(InputError, match="MaIR routes no pixels; load a MambaIRv2 network"):
        state_space.with_route_mode(mair, "argmax", 0, 1)
    assert "is not one of" in RouteMode.validate_inputs("best")
    assert "is not one of" in OfficialTiling.validate_inputs("fp8")


def test_the_route_map_shows_the_classes_of_every_picture() -> None:
    v2 = network("mambairv2", V2)
    image = torch.rand(2, 10, 13, 4)
    picture, text = RouteMap.execute(v2, image, layer=1, opacity=1.0).result
    assert picture.shape == (2, 10, 13, 3) and 0 <= picture.min() and picture.max() <= 1
    classes = state_space.routes(v2, image.movedim(-1, 1))[1]
    colours = {tuple(c) for c in (picture.reshape(-1, 3) * 1e4).round().int().tolist()}
    assert len(colours) == len(classes.unique())
    assert len(text.splitlines()) == 3 and "of 6" in text
    with pytest.raises(InputError, match="layer: 2 is too large, this network has layers 0 to 1"):
        RouteMap.execute(v2, image, layer=2)


@pytest.mark.parametrize(("height", "width"), [(20, 31), (70, 45), (64, 130)])
def test_official_tiles_of_a_local_network_give_the_whole_picture_inside(height: int, width: int) -> None:
    local = local_restorer(scale=2)
    image = torch.rand(2, 3, height, width)
    tiled = official_tiling.restore(local, image, threshold=60)
    whole = tiling.restore(local, image)
    assert tiled.shape == whole.shape == (2, 3, 2 * height, 2 * width)
    # The end is reflected there and padded here: compare without the receptive radius of the border.
    assert (tiled - whole)[..., :-8, :-8].abs().max() < 1e-5


def test_the_published_cut_is_two_by_two_above_two_hundred_pixels() -> None:
    sizes = []

    def remember(tile: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tile.shape[-2:]))
        return tile

    image = torch.rand(1, 3, 205, 199)
    assert torch.equal(official_tiling.official_tiles(image, remember, 1), image)
    assert sizes == [(113, 199), (113, 199)]


def test_official_tiling_can_be_cancelled(monkeypatch) -> None:
    def cancel() -> None:
        raise Cancelled("cancelled")

    monkeypatch.setattr("comfyui_mend.engine.host.check_interrupt", cancel)
    with pytest.raises(Cancelled):
        OfficialTiling.execute(local_restorer(), torch.rand(1, 30, 30, 3))


def test_an_average_over_many_draws_is_cancelled_between_layers(monkeypatch) -> None:
    averaged = state_space.with_route_mode(network("mambairv2", V2), "mean", seed=0, samples=64)
    asked = []

    def cancel_at_the_third() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Cancelled("cancelled")

    monkeypatch.setattr("comfyui_mend.engine.host.check_interrupt", cancel_at_the_third)
    with pytest.raises(Cancelled):
        averaged.restorer(torch.rand(1, 3, 8, 8), **averaged.options)
    assert len(asked) == 3
