"""Data sets for fine-tuning: pairs stay pairs, the split stays where it is, memory stays within its budget."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from comfyui_mend.engine.pictures import to_pil
from comfyui_mend.errors import InputError
from comfyui_mend.training import dataset_sources, datasets, picture_files
from comfyui_mend.training.datasets import Entry, Mixture, Stream
from comfyui_mend.training.picture_files import PictureCache
from comfyui_mend.training.task_text import tasks_from_text


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> torch.Tensor:
    """Smooth colours, [3, H, W] in 0..1."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[0]


@pytest.fixture
def pairs(tmp_path):
    """FOLDER/clean and FOLDER/damaged: the damaged one is half as bright."""
    for side, gain in (("clean", 1.0), ("damaged", 0.5)):
        (tmp_path / side).mkdir()
        for index in range(12):
            to_pil(picture(index) * gain).save(tmp_path / side / f"{index}.png")
    return tmp_path


@pytest.fixture(autouse=True)
def _forget():
    yield
    picture_files.pictures.clear()


def test_both_pictures_of_a_pair_are_cropped_and_turned_alike(pairs):
    source = dataset_sources.paired_folder(pairs)
    for seed in range(8):
        sample = source.sample(24, torch.Generator().manual_seed(seed))
        assert sample.damaged.shape == sample.clean.shape == (3, 24, 24) and sample.label == "damaged"
        assert torch.allclose(sample.damaged * 2, sample.clean, atol=3 / 255)


def test_names_need_not_have_the_same_suffix_and_folders_are_labels(pairs):
    (pairs / "damaged" / "rain").mkdir()
    to_pil(picture(3) * 0.5).save(pairs / "damaged" / "rain" / "3.jpg")
    (pairs / "damaged" / "3.png").unlink()
    source = dataset_sources.paired_folder(pairs, "dark")
    assert set(source.labels) == {"dark", "rain"} and len(source.entries) == 12


def test_pictures_smaller_than_the_crop_are_padded_alike(pairs):
    sample = dataset_sources.paired_folder(pairs).sample(64, torch.Generator().manual_seed(0))
    assert sample.clean.shape == (3, 64, 64)
    assert torch.allclose(sample.damaged * 2, sample.clean, atol=3 / 255)


def test_a_pair_of_different_sizes_is_named(pairs):
    to_pil(picture(0, (20, 20))).save(pairs / "damaged" / "0.png")
    source = datasets.Dataset("x", (dataset_sources.paired_folder(pairs).entries[0],))
    with pytest.raises(InputError, match="0.*20x20 and 40x48"):
        source.sample(16, torch.Generator())


def test_networks_that_enlarge_get_larger_clean_crops(tmp_path):
    clean = picture(1, (64, 48))
    small = torch.nn.functional.interpolate(clean[None], scale_factor=0.5, mode="area")[0]
    both = dataset_sources.images(clean[None], small[None])
    sample = both.sample(16, torch.Generator().manual_seed(0), scale=2)
    assert sample.damaged.shape == (3, 16, 16) and sample.clean.shape == (3, 32, 32)
    reduced = torch.nn.functional.interpolate(sample.clean[None], scale_factor=0.5, mode="area")[0]
    assert torch.allclose(reduced, sample.damaged, atol=0.02)
    made = dataset_sources.images(clean[None], tasks=tasks_from_text("clean"))
    assert made.sample(12, torch.Generator().manual_seed(0), 3).clean.shape == (3, 36, 36)
    (held,) = made.held_out(20, 1, 3)
    assert held.clean.shape[1] == 3 * held.damaged.shape[1]


def test_the_split_depends_on_names_alone():
    entries = tuple(Entry(f"photo {i}", torch.zeros(3, 8, 8, dtype=torch.uint8)) for i in range(200))
    tasks = tasks_from_text("noise")
    whole = datasets.Dataset("a", entries, tasks)
    part = datasets.Dataset("b", entries[::3], tasks)
    held = {e.name for e in whole.validation}
    assert 8 <= len(held) <= 35 and not held & {e.name for e in whole.training}
    assert {e.name for e in part.validation} == held & {e.name for e in entries[::3]}


@pytest.mark.parametrize("count, held", [(1, 0), (2, 1), (3, 1)])
def test_a_handful_of_photos_has_one_to_validate_with(count, held):
    source = dataset_sources.images(torch.rand(count, 3, 16, 16), tasks=tasks_from_text("noise"), held_out_share=0.01)
    assert len(source.training) == count - held and len(source.validation) >= 1


def test_held_out_pairs_are_always_the_same_and_cover_every_kind():
    source = dataset_sources.images(
        torch.rand(4, 3, 40, 40), tasks=tasks_from_text("noise\nrain 0.5 + jpeg: quality 10\nclean")
    )
    first, again = source.held_out(24, 1), source.held_out(24, 1)
    assert [s.label for s in first] == ["noise", "rain + jpeg", "clean"] == list(source.labels)
    assert all(torch.equal(a.damaged, b.damaged) for a, b in zip(first, again, strict=True))
    assert first[0].damaged.shape == (3, 24, 24) and torch.equal(first[2].damaged, first[2].clean)


def test_the_cache_forgets_what_was_used_least_recently(pairs):
    size = picture(0).numel()
    cache = PictureCache(budget=2 * size)
    paths = sorted((pairs / "clean").iterdir())[:3]
    first = cache(paths[0])
    cache(paths[1]), cache(paths[0]), cache(paths[2])
    assert len(cache) == 2 and cache.used == 2 * size
    assert cache(paths[0]) is first
    cache.clear()
    assert len(cache) == 0 and cache.used == 0


def test_pictures_are_turned_upright_and_broken_ones_named(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    to_pil(picture(0, (20, 30))).save(tmp_path / "a.jpg", exif=exif)
    assert PictureCache()(tmp_path / "a.jpg").shape == (3, 30, 20)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="b.png"):
        PictureCache()(tmp_path / "b.png")


def test_a_stream_is_resumable_and_shares_out_its_batches():
    source = dataset_sources.images(torch.rand(3, 3, 40, 40), tasks=tasks_from_text("noise\nrain"))

    def stream(**share):
        return Stream(source, torch.Generator().manual_seed(5), **share)

    one = stream()
    one.batch(4, 16)
    state = one.generator.get_state()
    damaged, clean, labels = one.batch(4, 16)
    again = stream()
    again.generator.set_state(state)
    assert torch.equal(again.batch(4, 16)[0], damaged)
    halves = [stream(share=(i, 2)) for i in range(2)]
    parts = [h.batch(4, 16) and h.batch(4, 16) for h in halves]
    for index, (d, _, names) in enumerate(parts):
        assert torch.equal(d, damaged[index::2]) and names == labels[index::2]


def test_a_mixture_draws_by_weight_and_keeps_labels():
    dark = dataset_sources.images(torch.rand(2, 3, 24, 24), torch.rand(2, 3, 24, 24), label="dark")
    noisy = dataset_sources.images(torch.rand(2, 3, 24, 24), tasks=tasks_from_text("noise"))
    mixture = Mixture(((dark, 1.0), (noisy, 3.0)))
    drawn = [mixture.sample(8, torch.Generator().manual_seed(s)).label for s in range(80)]
    assert mixture.labels == ("dark", "noise") and 45 <= drawn.count("noise") <= 75
    assert {s.label for s in mixture.held_out(16, 1)} == {"dark", "noise"}
    assert "weight 3" in datasets.describe(mixture)
    with pytest.raises(InputError):
        Mixture(((dark, 0.0),))


def test_a_manifest_lists_pairs_with_their_damage(pairs):
    rows = [
        {
            "clean": "clean/0.png",
            "damaged": "damaged/0.png",
            "degradation": "haze",
            "intensity": {"mu": 0.2, "sigma": 0.1},
        },
        {
            "clean": "clean/1.png",
            "damaged": "damaged/1.png",
            "degradation": "rain",
            "intensity": {"mu": 0.9},
            "seed": 3,
        },
        {"clean": "clean/2.png", "damaged": "damaged/2.png"},
    ]
    (pairs / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert dataset_sources.manifest(pairs).labels == ("haze", "rain", "damaged")
    assert dataset_sources.manifest(pairs / "manifest.jsonl", intensity=(0.0, 0.5)).labels == ("haze", "damaged")
    with (pairs / "manifest.jsonl").open("a") as file:
        file.write('{"clean": "clean/3.pn')  # its writer was interrupted
    assert len(dataset_sources.manifest(pairs).entries) == 3


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 1"),
        ('{"clean": "clean/0.png"}', "line 1"),
        ('{"clean": "clean/0.png", "damaged": "damaged/none.png"}', "none.png"),
        ('{"clean": "/etc/hostname", "damaged": "damaged/0.png"}', "relative"),
        ("[1]", "line 1"),
        ("", "no pairs"),
    ],
)
def test_a_broken_manifest_says_where(pairs, line, said):
    (pairs / "manifest.jsonl").write_text(line)
    with pytest.raises(InputError, match=said):
        dataset_sources.manifest(pairs)


@pytest.mark.parametrize(
    "text", ["", "fog", "noise: sigma", "rain strong", "noise @ 0", "noise @ often", "noise: level 3"]
)
def test_degradations_that_cannot_be_read_are_refused(text):
    with pytest.raises(InputError):
        tasks_from_text(text)


def test_degradations_are_read_from_text():
    noise, mixed, everything = (
        tasks_from_text("noise 0.5 @ 3\nnoise: sigma 25")[0],
        tasks_from_text("haze+ noise")[0],
        tasks_from_text("everything @ 2"),
    )
    assert noise.weight == 4 and len(noise.chains) == 2 and noise.chains[0][0].strength == 0.5
    assert [d.kind for d in mixed.chains[0]] == ["haze", "noise"]
    assert len(everything) > 10


def test_empty_and_missing_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        dataset_sources.clean_folder(tmp_path / "none", tasks_from_text("noise"))
    with pytest.raises(InputError, match="no pictures"):
        dataset_sources.clean_folder(tmp_path, tasks_from_text("noise"))


def test_pictures_of_the_graph_can_be_trained_on():
    with torch.inference_mode():
        source = dataset_sources.images(torch.rand(2, 3, 16, 16), tasks=tasks_from_text("noise"))
    sample = source.sample(8, torch.Generator().manual_seed(0))
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (sample.damaged * weight - sample.clean).square().mean().backward()
    assert weight.grad is not None
