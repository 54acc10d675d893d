"""Real pictures: any size, any batch, no seam, no crash for lack of memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import local_restorer

from comfyui_mend import models
from comfyui_mend.bench import tiles as bench_tiles
from comfyui_mend.engine import host, loaded, tiling
from comfyui_mend.errors import Cancelled, InputError, OutOfMemoryError
from comfyui_mend.models.degradation import Degradation


@given(
    length=st.integers(1, 300).map(lambda n: 4 * n),
    tile=st.integers(2, 80).map(lambda n: 4 * n),
    overlap=st.integers(0, 60),
)
@settings(max_examples=300, deadline=None)
def test_tiles_are_equal_cover_everything_and_their_windows_sum_to_one(length: int, tile: int, overlap: int) -> None:
    axis = tiling.plan_axis(length, tile, overlap, 4)
    total = torch.zeros(length)
    for start, window in zip(axis.starts, axis.windows, strict=True):
        assert len(window) == axis.tile == min(tile, length) and start % 4 == 0
        assert 0 <= start <= length - axis.tile
        total[start : start + axis.tile] += window
    assert torch.allclose(total, torch.ones(length), atol=1e-5)
    assert list(axis.starts) == sorted(set(axis.starts))
    shared = min(overlap, axis.tile - 4)
    assert all(a + axis.tile - b >= shared - 4 for a, b in zip(axis.starts, axis.starts[1:], strict=False))


@given(
    length=st.integers(1, 300).map(lambda n: 4 * n),
    tile=st.integers(2, 80).map(lambda n: 4 * n),
    overlap=st.integers(0, 60),
)
@settings(max_examples=300, deadline=None)
def test_a_fitted_tile_needs_no_more_tiles_and_computes_hardly_more_than_picture_and_overlaps(
    length: int, tile: int, overlap: int
) -> None:
    fitted = tiling.fit_tile(length, tile, overlap, 4)
    count = len(tiling.plan_axis(length, tile, overlap, 4).starts)
    axis = tiling.plan_axis(length, fitted, overlap, 4)
    assert len(axis.starts) == count and fitted <= min(tile, length) and fitted % 4 == 0
    shared = min(overlap, min(tile, length) - 4)
    assert count * fitted < length + (count - 1) * max(shared, 0) + 4 * count


def test_a_picture_a_little_larger_than_the_memory_allows_is_not_computed_twice(monkeypatch) -> None:
    restorer = local_restorer()
    monkeypatch.setattr(tiling, "choose_tile", lambda *args: 128)
    tiling.restore(restorer, torch.rand(1, 3, 136, 136), overlap=16)
    sizes = [call[-2:] for call in restorer.restorer.module.calls]
    assert len(sizes) == 4 and sum(h * w for h, w in sizes) < 1.4 * 136 * 136


def test_a_tiled_run_of_a_local_network_equals_the_whole_run() -> None:
    restorer, image = local_restorer(), torch.rand(2, 3, 150, 203)
    whole = tiling.restore(restorer, image, tile=4096)
    tiled = tiling.restore(restorer, image, tile=64)
    assert len(restorer.restorer.module.calls) > 10
    assert (whole - tiled).abs().max() < 1e-5


def test_there_is_no_seam_where_overlap_is_too_small_for_exactness(moce) -> None:
    image = torch.rand(1, 3, 96, 160) * 0.1 + torch.linspace(0, 0.9, 160)
    tiled = tiling.restore(moce, image, tile=64, overlap=32)
    steps = (tiled - image)[..., 1:] - (tiled - image)[..., :-1]
    columns = steps.mean(dim=(0, 1, 2)).abs()[4:-4]  # the picture's own border is no seam
    assert columns.max() < 0.04


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (33, 47), (8, 8), (65, 200)])
@pytest.mark.parametrize("scale", [1, 3])
def test_output_size_is_input_size_times_scale(size: tuple[int, int], scale: int) -> None:
    restored = tiling.restore(local_restorer(scale), torch.rand(1, 3, *size), tile=64)
    assert restored.shape == (1, 3, size[0] * scale, size[1] * scale)
    assert restored.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_kept(channels: int, moce) -> None:
    image = torch.rand(2, channels, 20, 31)
    restored = tiling.restore(moce, image)
    assert restored.shape == image.shape
    if channels == 4:
        assert torch.equal(restored[:, 3], image[:, 3])


def test_colour_under_transparency_does_not_leak_into_the_picture() -> None:
    image = torch.full((1, 4, 32, 32), 0.5)
    image[:, 3, :, 16:] = 0.0
    spoiled = image.clone()
    spoiled[:, 0, :, 16:] = 1.0
    restorer = local_restorer()
    assert torch.allclose(tiling.restore(restorer, image)[..., :16], tiling.restore(restorer, spoiled)[..., :16])


def test_alpha_is_scaled_with_the_picture() -> None:
    image = torch.ones(1, 4, 24, 24)
    image[:, 3, :, 12:] = 0.0
    restored = tiling.restore(local_restorer(2), image)
    assert restored.shape == (1, 4, 48, 48)
    assert restored[:, 3, :, :20].min() > 0.95 and restored[:, 3, :, 28:].max() < 0.05


def test_values_above_white_survive_and_ordinary_pictures_are_clamped() -> None:
    restorer = local_restorer()
    assert tiling.restore(restorer, torch.full((1, 3, 16, 16), 4.0)).max() > 1.5
    assert tiling.restore(restorer, torch.rand(1, 3, 16, 16)).max() <= 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_values_are_refused_with_the_name_of_the_input(bad: float) -> None:
    image = torch.rand(1, 3, 16, 16)
    image[0, 1, 3, 3] = bad
    with pytest.raises(InputError, match="image: 1 values are NaN or infinite"):
        tiling.restore(local_restorer(), image)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        tiling.restore(local_restorer(), torch.rand(0, 3, 16, 16))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.OutOfMemoryError("XPU out of memory"),
    ],
    ids=["cuda", "mps", "cpu", "python", "torch"],
)
def test_running_out_of_memory_shrinks_the_tile_and_gives_the_same_picture(error, caplog) -> None:
    image = torch.rand(1, 3, 200, 200)
    want = tiling.restore(local_restorer_with_seed(), image)
    restorer = local_restorer_with_seed()
    restorer.restorer.module.fail_above, restorer.restorer.module.fail_with = 110 * 110, error
    got = tiling.restore(restorer, image)
    assert (got - want).abs().max() < 1e-5
    assert "out of memory: going on with tiles of" in caplog.text


def local_restorer_with_seed():
    torch.manual_seed(7)
    return local_restorer()


def test_running_out_of_memory_at_the_smallest_tile_is_an_error_that_says_so() -> None:
    restorer = local_restorer()
    restorer.restorer.module.fail_above = 10
    with pytest.raises(OutOfMemoryError, match="not even a tile of"):
        tiling.restore(restorer, torch.rand(1, 3, 128, 128))


def test_other_errors_pass_through() -> None:
    restorer = local_restorer()
    restorer.restorer.module.fail_above, restorer.restorer.module.fail_with = 10, ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        tiling.restore(restorer, torch.rand(1, 3, 64, 64))


def test_cancel_stops_within_one_tile() -> None:
    restorer, asked = local_restorer(), iter([False] * 4 + [True] * 100)
    host.set_hooks(interrupt=lambda: next(asked))
    try:
        with pytest.raises(Cancelled):
            tiling.restore(restorer, torch.rand(1, 3, 300, 300), tile=64)
    finally:
        host.set_hooks()
    assert len(restorer.restorer.module.calls) <= 3


def test_one_progress_bar_runs_over_all_tiles_of_all_pictures_with_previews() -> None:
    seen = []
    host.set_hooks(progress=lambda done, total, preview: seen.append((done, total, preview)))
    try:
        tiling.restore(local_restorer(), torch.rand(3, 3, 130, 130), tile=64)
    finally:
        host.set_hooks()
    totals = {total for _, total, _ in seen}
    assert len(totals) == 1 and seen[-1][0] == seen[-1][1] and [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)
    assert any(preview is not None for _, _, preview in seen)


def test_a_batch_is_restored_as_its_pictures_are(moce) -> None:
    images = torch.rand(3, 3, 24, 40)
    together = tiling.restore(moce, images)
    alone = torch.cat([tiling.restore(moce, images[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5


def test_tiles_of_one_picture_share_its_route(moce) -> None:
    image, routes = torch.rand(1, 3, 160, 160), []
    module = moce.restorer.module
    original = module.forward
    module.forward = lambda x, routing_noise=None, routing=None: (
        routes.append(routing) or original(x, routing_noise, routing)
    )
    tiling.restore(moce, image, tile=64)
    assert len(routes) > 3 and all(r is not None and torch.equal(r.gates, routes[0].gates) for r in routes)
    assert torch.equal(routes[0].gates, module.route(image).gates)


def test_context_for_another_number_of_pictures_is_refused(moce) -> None:
    routing = moce.restorer.module.route(torch.rand(2, 3, 32, 32))
    with pytest.raises(InputError, match="made for 2 pictures, but the batch has 3"):
        tiling.restore(moce, torch.rand(3, 3, 32, 32), context={"routing": routing})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close_to_single(precision: str, moce) -> None:
    image = torch.rand(1, 3, 48, 48)
    routing = moce.restorer.module.route(image)
    full, half = (tiling.restore(moce, image, precision=p, context={"routing": routing}) for p in ("fp32", precision))
    assert (full - half).abs().max() < 0.05


def test_overflow_in_half_precision_is_repeated_in_single_precision(caplog) -> None:
    restorer = local_restorer()
    module = restorer.restorer.module
    with torch.no_grad():
        module.layers[0].weight.fill_(1e5)
    module.forward = lambda x: module.layers[0](x * 10) * 1e-7 * x.mean()
    restored = tiling.restore(restorer, torch.rand(1, 3, 16, 16), precision="fp16")
    assert restored.isfinite().all() and "repeated in float32" in caplog.text


def test_a_network_that_sees_everything_says_once_that_tiles_change_its_result(moce, caplog) -> None:
    tiling.restore(moce, torch.rand(1, 3, 64, 64))
    tiling.restore(local_restorer(), torch.rand(1, 3, 130, 130), tile=64)
    assert "changes its result" not in caplog.text
    for _ in range(2):
        tiling.restore(moce, torch.rand(1, 3, 130, 130), tile=64)
    assert caplog.text.count("MoCE-IR works in tiles of 64 pixels, which changes its result a little") == 1


def test_the_difference_between_tiles_and_the_whole_is_measured_and_printed(moce, capsys) -> None:
    mean, largest, share = bench_tiles.difference(local_restorer(), torch.rand(1, 3, 130, 130), 64)
    assert largest < 1e-5 and share < 1e-4 and mean <= largest
    assert bench_tiles.main(["--model", "wiring-nafnet.safetensors", "--size", "96", "--tile", "64"]) == 0
    host.set_device(None)
    assert "| wiring-nafnet.safetensors | 96x96 | 64 | whole picture |" in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux only")
def test_a_large_picture_is_restored_in_less_than_three_gigabytes() -> None:
    script = textwrap.dedent("""
        import resource, sys, torch
        from support import local_restorer
        from comfyui_mend.engine import tiling
        torch.set_num_threads(1)
        image = torch.rand(1, 3, 3072, 4096)
        with torch.inference_mode():
            out = tiling.restore(local_restorer(), image)
        assert out.shape == image.shape
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 3e9


def test_a_grey_network_takes_each_channel_by_itself() -> None:
    torch.manual_seed(0)
    config = {"img_channel": 1, "width": 4, "enc_blk_nums": [1], "middle_blk_num": 1, "dec_blk_nums": [1]}
    grey = loaded.wrap(models.load(models.create("dcpt", config).state_dict()))
    assert grey.restorer.channels == 1
    image = torch.rand(2, 3, 20, 31)
    restored = tiling.restore(grey, image)
    alone = tiling.restore(grey, image[1:, 2:])
    assert restored.shape == image.shape and torch.allclose(restored[1:, 2:], alone, atol=1e-6)


def test_what_a_network_does_not_take_is_refused_with_the_one_that_does(moce) -> None:
    routing = moce.restorer.module.route(torch.rand(1, 3, 32, 32))
    degradation = Degradation(embedding=torch.rand(1, 512), source="VLU-Net")
    with pytest.raises(InputError, match="routing: Local takes none, only MoCE-IR does; disconnect it"):
        tiling.restore(local_restorer(), torch.rand(1, 3, 16, 16), context={"routing": routing})
    with pytest.raises(InputError, match="degradation: MoCE-IR takes none, only VLU-Net does; disconnect it"):
        tiling.restore(moce, torch.rand(1, 3, 16, 16), context={"degradation": degradation})
