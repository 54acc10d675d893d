"""VLU-Net: the network, its CLIP, and degradations that can be read, written and mixed."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.errors import InputError
from comfyui_mend.models import clip, degradation_encoder, vlu_net
from comfyui_mend.models.degradation import Degradation

NET = {
    "de_dim": 3,
    "dim": 12,
    "num_blocks": (1, 1, 1, 1),
    "num_refinement_blocks": 1,
    "heads": (1, 2, 4, 4),
    "embed_dim": 16,
}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
PIPELINE = {"kind": "pipeline", "net": NET, "clip": CLIP}


@pytest.fixture(scope="module")
def pipeline() -> vlu_net.VLUNetPipeline:
    torch.manual_seed(0)
    return models.create("vlu-net", PIPELINE).eval().requires_grad_(False)


def restorer(pipeline: vlu_net.VLUNetPipeline) -> models.Restorer:
    return models.Restorer(models.registry.get("vlu-net-clip"), PIPELINE, pipeline)


@pytest.mark.parametrize("name", ["vlu-net", "vlu-net-clip"])
def test_every_setting_is_read_back_from_the_released_shapes(name: str) -> None:
    architecture = models.registry.get(name)
    for config in architecture.variants.values():
        with torch.device("meta"):
            state = architecture.build(config).state_dict()
            assert models.registry.detect(state) is architecture
            read = architecture.config_from_state_dict(state)
            again = models.create("vlu-net", read).state_dict()
        assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
        for given, found in ((config, read), (config.get("net", {}), read.get("net", {}))):
            assert {k: found[k] for k in given if k not in ("net",)} == {k: given[k] for k in given if k != "net"}


def test_released_networks_have_their_published_sizes() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in models.create("vlu-net", c).parameters()) for c in vlu_net.VARIANTS.values()]
    assert sizes == [35_353_028, 34_364_852]


def test_the_shared_clip_may_be_listed_once_or_twice(pipeline: vlu_net.VLUNetPipeline) -> None:
    prepare = models.registry.get("vlu-net-clip").prepare_state_dict
    both = pipeline.state_dict()
    text = "model_degradation.ad_textEncoder.clip_model."
    once = {k: v for k, v in both.items() if not k.startswith(text)}
    assert prepare(once).keys() == both.keys()
    other = {k: v for k, v in both.items() if not k.startswith(text.replace("text", "image"))}
    assert prepare(other).keys() == both.keys()


def test_a_lightning_file_loads_with_its_clip_and_without_its_optimiser(pipeline, tmp_path) -> None:
    path, image = tmp_path / "5task_vlunet.ckpt", torch.rand(1, 3, 16, 24)
    torch.save({"epoch": 199, "state_dict": pipeline.state_dict(), "optimizer_states": [{"state": {}}]}, path)
    loaded = models.load(path)
    assert loaded.architecture.id == "vlu-net-clip"
    assert torch.allclose(loaded(image), pipeline(image), atol=1e-6)


def test_the_one_number_that_shapes_do_not_tell_is_taken_from_the_caller(pipeline) -> None:
    loaded = models.load(pipeline.state_dict(), config={"text_heads": 2})
    assert loaded.module.model_degradation.ad_textEncoder.clip_model.transformer.resblocks[0].attn.heads == 2


def test_the_network_alone_is_read_from_a_file_without_clip(pipeline, tmp_path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {f"net.{k}": v for k, v in pipeline.net.state_dict().items()}}, path)
    assert models.load(path).architecture.id == "vlu-net"


def test_a_file_without_the_text_tower_still_restores(pipeline: vlu_net.VLUNetPipeline) -> None:
    architecture = models.registry.get("vlu-net-clip")
    state = {k: v for k, v in pipeline.state_dict().items() if "ad_textEncoder" not in k}
    state = architecture.prepare_state_dict(state)
    small = architecture.build(architecture.config_from_state_dict(state))
    small.load_state_dict(state)
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(small.eval()(image), pipeline(image))
    assert small.model_degradation.describe(image).probabilities is None
    with pytest.raises(InputError, match="no CLIP text tower"):
        small.model_degradation.encode_text(degradation_encoder.tokenize(["haze"]))


def test_the_degradation_steers_the_result(pipeline: vlu_net.VLUNetPipeline) -> None:
    image = torch.rand(1, 3, 16, 24)
    first, second = (pipeline(image, 5 * torch.randn(1, 16)) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-6)


def test_the_prompts_own_scale_has_no_effect(pipeline: vlu_net.VLUNetPipeline) -> None:
    image, d = torch.rand(1, 3, 16, 24), torch.randn(1, 16)
    before = pipeline(image, d)
    parameter = pipeline.net.latent.gradient_descent.prompt_param
    saved = parameter.clone()
    parameter.mul_(3.0)
    after = pipeline(image, d)
    parameter.copy_(saved)
    assert torch.allclose(before, after, atol=1e-5)


def test_one_degradation_serves_a_batch(pipeline: vlu_net.VLUNetPipeline) -> None:
    images, d = torch.rand(2, 3, 16, 16), torch.randn(1, 16)
    assert torch.allclose(pipeline(images, d), pipeline(images, d.expand(2, -1)), atol=1e-6)


def test_prompt_weights_sum_to_one_in_every_stage(pipeline: vlu_net.VLUNetPipeline) -> None:
    weights = pipeline.net.prompt_weights(torch.randn(2, 16))
    assert list(weights)[0] == "encoder_level1" and list(weights)[-1] == "refinement" and len(weights) == 8
    assert all(torch.allclose(w.sum(dim=1), torch.ones(2)) for w in weights.values())


def test_the_context_of_the_whole_picture_gives_every_tile_the_same_degradation(pipeline) -> None:
    restore, image = restorer(pipeline), torch.rand(2, 3, 40, 48)
    context = restore.context(image)
    assert torch.allclose(context["degradation"].embedding, pipeline.model_degradation.encode_image(image), atol=1e-6)
    assert torch.allclose(restore(image, **context), restore(image), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (9, 30), (70, 33)])
def test_any_size_is_described_and_restored(pipeline: vlu_net.VLUNetPipeline, size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size)
    assert restorer(pipeline)(image).shape == image.shape
    described = pipeline.model_degradation.describe(image)
    assert described.labels == degradation_encoder.LABELS and described.embedding.shape == (1, 16)
    assert torch.allclose(described.probabilities.sum(dim=1), torch.ones(1))


def test_a_network_without_clip_asks_for_a_degradation(pipeline: vlu_net.VLUNetPipeline) -> None:
    restore = models.Restorer(models.registry.get("vlu-net"), NET, pipeline.net)
    image = torch.rand(1, 3, 16, 16)
    with pytest.raises(InputError, match="connect a degradation"):
        restore(image)
    described = pipeline.model_degradation.describe(image)
    assert torch.allclose(restore(image, degradation=described), pipeline(image), atol=1e-6)


def test_a_degradation_of_another_method_is_refused(pipeline: vlu_net.VLUNetPipeline) -> None:
    for other in (Degradation(embedding=torch.zeros(1, 16), source="dcpt"), torch.zeros(1, 5)):
        with pytest.raises(InputError, match="degradation"):
            restorer(pipeline)(torch.rand(1, 3, 16, 16), degradation=other)


def test_known_texts_need_no_vocabulary_and_unknown_words_are_named() -> None:
    tokens = degradation_encoder.tokenize(degradation_encoder.TEXTS)
    assert tokens.shape == (7, 77)
    assert tokens[6, :6].tolist() == [clip.START, 2867, 593, 1042, 1395, clip.END]
    with pytest.raises(InputError, match="'zebra'"):
        degradation_encoder.tokenize(["image with zebra"])


def test_padding_after_the_end_of_a_text_changes_nothing(pipeline: vlu_net.VLUNetPipeline) -> None:
    encoder, tokens = pipeline.model_degradation, degradation_encoder.tokenize(["haze", "image with low light"])
    assert torch.allclose(encoder.encode_text(tokens)[:1], encoder.encode_text(tokens[:1]), atol=1e-6)
    repeated = torch.where(tokens == 0, clip.END, tokens)
    assert torch.allclose(encoder.encode_text(repeated), encoder.encode_text(tokens), atol=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (301, 420), (420, 301), (10, 10), (1, 300)])
def test_clip_sees_the_central_square_of_any_picture(size: tuple[int, int]) -> None:
    seen = clip.preprocess(torch.full((1, 3, *size), 0.5))
    assert seen.shape == (1, 3, 224, 224)
    mean, std = torch.tensor(clip.MEAN), torch.tensor(clip.STD)
    assert torch.allclose(seen[0, :, 100, 100], (0.5 - mean) / std, atol=1e-4)


def test_half_precision_stays_close(pipeline: vlu_net.VLUNetPipeline) -> None:
    image = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = pipeline(image)
    assert (half - pipeline(image)).abs().max() < 0.1
