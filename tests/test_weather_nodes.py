"""The graph faces of DA-RCOT, VLU-Net and MPMF-Net, on pictures as ComfyUI hands them over."""

from __future__ import annotations

import pytest
import torch
from support import wrapped

from comfyui_mend.engine import coarse, degradations, loaded, residuals
from comfyui_mend.errors import InputError
from comfyui_mend.models.degradation import Degradation
from comfyui_mend.nodes import residual, vlu, weather

RCOT = {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 4, 8)}
MPMF = {
    "in_chans": 3,
    "embed_dims": (6, 12, 24, 12, 6),
    "depths": (1, 1, 2, 2, 2, 1),
    "num_heads": (1, 2, 2, 1, 1),
    "attn_ratio": (1.0, 1.0, 1.0, 0.0, 0.0),
}
VLU = {
    "kind": "pipeline",
    "net": {
        "de_dim": 3,
        "dim": 12,
        "num_blocks": (1, 1, 1, 1),
        "num_refinement_blocks": 1,
        "heads": (1, 2, 4, 4),
        "embed_dim": 16,
    },
    "clip": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    },
}


def network(name: str, config: dict) -> loaded.LoadedRestorer:
    torch.manual_seed(0)
    return wrapped(name, config)


@pytest.fixture(scope="module")
def rcot() -> loaded.LoadedRestorer:
    return network("da-rcot", RCOT)


@pytest.fixture(scope="module")
def mpmf() -> loaded.LoadedRestorer:
    return network("mpmf-net", MPMF)


@pytest.fixture(scope="module")
def vlunet() -> loaded.LoadedRestorer:
    return network("vlu-net-clip", VLU)


@pytest.fixture(autouse=True)
def _as_in_a_graph():
    with torch.inference_mode():
        yield


def run(node, *args, **kwargs):
    return node.execute(*args, **kwargs).result


def test_the_first_pass_and_its_residual_add_up_to_the_picture(rcot) -> None:
    image = torch.rand(2, 30, 41, 3)
    restored, found, removed = run(residual.FirstPass, rcot, image)
    assert restored.shape == removed.shape == image.shape
    assert torch.allclose((image.movedim(-1, 1) - found.image).clamp(0, 1), restored.movedim(-1, 1), atol=1e-6)


def test_the_first_passs_residual_on_a_wire_gives_what_the_network_does_by_itself(rcot) -> None:
    image = torch.rand(1, 40, 48, 3)
    (own,) = run(residual.RestoreWithResidual, rcot, image)
    _, found, _ = run(residual.FirstPass, rcot, image)
    assert torch.allclose(run(residual.RestoreWithResidual, rcot, image, residual=found)[0], own, atol=1e-5)


def test_strength_and_iterations_do_something(rcot) -> None:
    image = torch.rand(1, 24, 24, 3)
    first, _, _ = run(residual.FirstPass, rcot, image)
    (zero,) = run(residual.RestoreWithResidual, rcot, image, strength=0.0)
    (one,) = run(residual.RestoreWithResidual, rcot, image)
    (three,) = run(residual.RestoreWithResidual, rcot, image, iterations=3)
    assert torch.allclose(zero, first) and not torch.equal(one, first) and not torch.equal(three, one)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_residual_from_any_two_pictures_can_be_masked_and_encoded(rcot, channels: int) -> None:
    image = torch.rand(1, 32, 48, channels)
    mask = torch.zeros(1, 8, 12)
    found, removed, embedding = run(residual.EncodeResidual, rcot, image, torch.rand(1, 16, 24, 3), 1.0, mask)
    assert found.image.abs().max() == 0 and removed.shape == embedding.shape == (1, 32, 48, 3)
    assert found.embeddings[0].shape == (1, 64, 4, 6)
    assert run(residual.RestoreWithResidual, rcot, image, residual=found)[0].shape == image.shape


def test_an_encoded_residual_is_shared_by_the_tiles(rcot) -> None:
    image = torch.rand(1, 130, 100, 3)
    _, found, _ = run(residual.FirstPass, rcot, image)
    encoded = residuals.encode(rcot, found)
    for given in (found, encoded):
        (restored,) = run(residual.RestoreWithResidual, rcot, image, tile=64, overlap=32, residual=given)
        assert restored.shape == image.shape and restored.isfinite().all()


def test_a_residual_too_large_to_encode_whole_is_left_to_the_tiles(rcot, monkeypatch) -> None:
    monkeypatch.setattr(residuals.host, "working_memory", lambda target: 1000)
    found = residuals.from_pictures(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    assert residuals.encode(rcot, found).embeddings is None
    assert residuals.embedding_picture(found).unique().tolist() == [0.5]


def test_a_residual_of_another_picture_size_is_refused_by_name(rcot) -> None:
    found = residuals.from_pictures(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    with pytest.raises(InputError, match="residual: made for 32x32 pixels, the picture has 40x32"):
        run(residual.RestoreWithResidual, rcot, torch.rand(1, 32, 40, 3), residual=found)


def test_nodes_refuse_networks_of_other_methods_by_name(rcot, mpmf, vlunet) -> None:
    image = torch.rand(1, 32, 32, 3)
    with pytest.raises(InputError, match="MPMF-Net has no residual"):
        run(residual.FirstPass, mpmf, image)
    with pytest.raises(InputError, match="DA-RCOT has no coarse image"):
        run(weather.RemoveWeather, rcot, image)
    with pytest.raises(InputError, match="DA-RCOT holds no CLIP"):
        run(vlu.EncodeDegradation, rcot, image)
    with pytest.raises(InputError, match="VLU-Net with CLIP is not a DA-RCOT potential"):
        run(residual.PotentialScore, vlunet, image)


def test_the_potential_scores_pictures_of_any_size() -> None:
    critic = network("da-rcot-potential", {"kind": "potential", "patch_size": 32, "width": 8})
    score, heat, text = run(residual.PotentialScore, critic, torch.rand(2, 50, 70, 3))
    assert isinstance(score, float) and heat.shape[0] == 2 and len(text.splitlines()) == 2


def test_the_networks_own_coarse_image_given_back_gives_the_same_restoration(mpmf) -> None:
    image = torch.rand(1, 32, 48, 3)
    own, used = run(weather.RemoveWeather, mpmf, image)
    guide = coarse.predict(mpmf, image.movedim(-1, 1))
    again = coarse.tiling.restore(mpmf, image.movedim(-1, 1), context={"coarse": guide})
    assert torch.allclose(again.movedim(1, -1), own, atol=1e-6) and used.shape == image.shape


def test_a_guide_of_any_size_is_blended_in(mpmf) -> None:
    image, guide = torch.rand(2, 33, 45, 3), torch.rand(1, 90, 20, 4)
    (small,) = run(weather.CoarseImage, mpmf, image)
    assert small.shape == (2, 9, 12, 3)
    results = [run(weather.RemoveWeather, mpmf, image, blend=b, coarse=guide) for b in (0.0, 0.5, 1.0)]
    assert all(r.shape == image.shape for r, _ in results)
    assert torch.allclose(results[0][0], run(weather.RemoveWeather, mpmf, image)[0], atol=1e-6)
    assert not torch.allclose(results[1][0], results[2][0])


def test_tiles_share_the_coarse_image_of_the_whole_picture(mpmf) -> None:
    image = torch.rand(1, 100, 140, 3)
    _, whole = run(weather.RemoveWeather, mpmf, image)
    restored, tiled = run(weather.RemoveWeather, mpmf, image, tile=64)
    assert torch.equal(whole, tiled) and restored.shape == image.shape and restored.isfinite().all()


def test_a_picture_is_kept_whole_while_memory_allows_it(mpmf, monkeypatch) -> None:
    image, tiles = torch.rand(1, 3, 64, 96), []
    monkeypatch.setattr(coarse.tiling, "restore", lambda loaded, image, tile, **_: tiles.append(tile) or image)
    for free in (10**12, 1000):
        monkeypatch.setattr(coarse.host, "free_memory", lambda target, free=free: free)
        coarse.restore(mpmf, image)
    assert tiles == [96, 0]


@pytest.mark.parametrize("view", degradations.VIEWS)
@pytest.mark.parametrize("size", [(20, 300), (64, 64), (1, 1)])
def test_a_degradation_is_found_in_every_view_of_any_picture(vlunet, view: str, size: tuple[int, int]) -> None:
    found, chart, text = run(vlu.EncodeDegradation, vlunet, torch.rand(2, *size, 3), view)
    assert len(found) == 2 and chart.shape[0] == 2 and "rain" in text


def test_a_mask_chooses_the_region_and_an_empty_one_chooses_nothing(vlunet) -> None:
    image, mask = torch.rand(1, 64, 64, 3), torch.zeros(1, 64, 64)
    whole, _, _ = run(vlu.EncodeDegradation, vlunet, image, mask=mask)
    assert torch.equal(whole.embedding, run(vlu.EncodeDegradation, vlunet, image)[0].embedding)
    mask[:, 10:30, 20:50] = 1
    part, _, _ = run(vlu.EncodeDegradation, vlunet, image, mask=mask)
    assert torch.allclose(part.embedding, run(vlu.EncodeDegradation, vlunet, image[:, 10:30, 20:50])[0].embedding)


def test_one_degradation_for_all_frames_of_a_video(vlunet) -> None:
    frames = torch.rand(3, 32, 40, 3)
    each, _, _ = run(vlu.EncodeDegradation, vlunet, frames)
    shared, chart, text = run(vlu.EncodeDegradation, vlunet, frames, average=True)
    assert len(shared) == len(chart) == len(text.splitlines()) == 1
    assert torch.allclose(shared.embedding[0], each.embedding.mean(dim=0), atol=1e-6)
    restored = degradations.tiling.restore(vlunet, frames.movedim(-1, 1), context={"degradation": shared})
    assert restored.shape == (3, 3, 32, 40)


def test_texts_are_vectors_in_the_same_space_and_mix_with_what_was_seen(vlunet) -> None:
    seen, _, _ = run(vlu.EncodeDegradation, vlunet, torch.rand(1, 32, 32, 3))
    said, report = run(vlu.DegradationFromText, vlunet, "image with haze")
    assert "haze" in report and said.label() == "haze"
    (mixed,) = run(vlu.MixDegradations, seen, said, 0.25)
    assert torch.allclose(mixed.embedding, 0.75 * seen.embedding + 0.25 * said.embedding, atol=1e-6)


def test_words_outside_the_tuned_texts_need_a_tokenizer(vlunet) -> None:
    with pytest.raises(InputError, match="connect a CLIP"):
        run(vlu.DegradationFromText, vlunet, "image with zebra")

    class Clip:
        def tokenize(self, text):
            return {"l": [[(49406, 1.0), (123, 1.0), (49407, 1.0)] + [(49407, 1.0)] * 74]}

    assert run(vlu.DegradationFromText, vlunet, "image with zebra", Clip())[0].embedding.shape == (1, 16)


def test_the_prompt_weights_of_every_stage_are_shown(vlunet) -> None:
    said, _ = run(vlu.DegradationFromText, vlunet, "rain")
    heat, text = run(vlu.PromptWeights, vlunet, said)
    assert heat.shape[0] == 1 and len(text.splitlines()) == 8
    with pytest.raises(InputError, match="made by dcpt"):
        run(vlu.PromptWeights, vlunet, Degradation(embedding=torch.zeros(1, 16), source="dcpt"))


def test_inputs_are_not_modified(rcot, mpmf, vlunet) -> None:
    image = torch.rand(1, 40, 40, 3)
    kept = image.clone()
    run(residual.FirstPass, rcot, image)
    run(residual.EncodeResidual, rcot, image, image)
    run(weather.RemoveWeather, mpmf, image, coarse=image)
    run(vlu.EncodeDegradation, vlunet, image)
    assert torch.equal(image, kept)
