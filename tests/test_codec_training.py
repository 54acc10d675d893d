"""The starter codec: it starts as a transform codec, learns from there, and its file says what it is. And its benches."""

from __future__ import annotations

import math

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.bench import codec_agreement, codec_curves
from comfyui_mend.codec.rates import Point
from comfyui_mend.engine import folders
from comfyui_mend.errors import ConfigError
from comfyui_mend.training import codec as starter
from comfyui_mend.training.data import PairStream, PhotoCrops
from comfyui_mend.training.objectives.rate_distortion import LogRateDistortion
from comfyui_mend.training.trainer import Settings, Stage

SMALL = starter.CONFIG | {"dim": 8, "N_ch": 48, "z_ch": 32, "num_blocks": (0, 0, 0, 1), "prior_widths": (40, 40, 40)}
SHIPPED = folders.SHIPPED_INPUTS.parent.parent / "weights" / starter.NAME


def photos() -> list[torch.Tensor]:
    """Smooth uint8 pictures."""
    generator = torch.Generator().manual_seed(3)
    hills = [torch.rand(1, 3, 5 + k, 5 + k, generator=generator) for k in range(4)]
    smooth = [torch.nn.functional.interpolate(h, (96, 96), mode="bicubic")[0].clamp(0, 1) for h in hills]
    return [(s * 255).byte() for s in smooth]


@pytest.fixture
def codec() -> torch.nn.Module:
    torch.manual_seed(0)
    module = models.create("aio-codec", SMALL)
    starter.start_as_transform(module, starter.sample_pictures(photos()))
    return module


@torch.no_grad()
def test_the_start_is_a_transform_codec_at_every_quality(codec) -> None:
    picture = starter.sample_pictures(photos())[1]
    found = []
    for quality in (0, 32, 63):
        decoded, latent = codec(picture, quality)
        bits = sum(float(b.sum()) for b in codec.estimate_bits(latent)) / picture[0, 0].numel()
        found.append((bits, float(-10 * (decoded - picture).square().mean().log10())))
    assert found == sorted(found) and found[0][1] < found[2][1] - 5
    assert found[2][1] > 32 and found[2][0] < 1 and found[0][0] < found[2][0] / 2


def test_a_weight_moves_the_less_the_larger_its_input_is(codec) -> None:
    inputs = starter.input_sizes(codec, starter.sample_pictures(photos())[:1])
    name = "N_dim_decompress.weight"
    share = starter._share(name, codec.N_dim_decompress.weight, inputs)
    assert inputs[name][0] > 2 and torch.allclose(share.flatten() * inputs[name].clamp_min(1), torch.tensor(0.2))
    inside = "enc.encoder_x16.blocks.0.attn.qkv_dwconv.weight"
    depthwise = starter._share(inside, codec.get_parameter(inside), inputs)
    assert depthwise.shape == (3 * 64, 1, 1, 1) and depthwise.max() <= 1


def test_a_run_learns_validates_goes_on_and_exports(codec, tmp_path) -> None:
    pictures = starter.sample_pictures(photos())
    inputs = starter.input_sizes(codec, pictures)

    def trainer(module, steps):
        return starter.CodecTrainer(
            module,
            PairStream(PhotoCrops(photos()), starter.TASKS, torch.Generator().manual_seed(0)),
            Settings(steps=steps, stages=(Stage(0.0, 32, 2),), weight_decay=0.0),
            tmp_path,
            LogRateDistortion(starter.WEIGHTS),
            {"clean": (pictures[0], pictures[0])},
            inputs=inputs,
        )

    before = codec.N_dim_compress.weight.clone()
    scores = trainer(codec, 2).run(bar=False)
    assert {"clean q0 bpp", "clean q63 dB", "clean q32 over JPEG"} <= set(scores)
    assert 0 < (codec.N_dim_compress.weight - before).abs().max() < 1e-3
    again = trainer(models.create("aio-codec", SMALL), 3)
    assert again.resume() and again.progress.step == 2
    starter.save_weights(again.average, tmp_path / "codec.safetensors", SMALL, again.progress)
    loaded = models.load(tmp_path / "codec.safetensors")
    assert loaded.architecture.id == "aio-codec" and "denoise" in loaded.tasks


def test_a_small_codecs_sizes_are_read_from_its_weights() -> None:
    with torch.device("meta"):
        for config in (starter.CONFIG, SMALL | {"prior_expansion": 1.0}, SMALL | {"num_blocks": (1, 0, 2, 1)}):
            module = models.create("aio-codec", config)
            found = models.registry.detect(module.state_dict()).config_from_state_dict(module.state_dict())
            assert {key: found[key] for key in config} == config
            rebuilt = models.create("aio-codec", found).state_dict()
            assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in module.state_dict().items()}
    with pytest.raises(ConfigError, match="three"):
        models.create("aio-codec", SMALL | {"prior_widths": (8, 8)})


def test_the_shipped_codec_is_small_trained_and_has_64_qualities() -> None:
    assert SHIPPED.stat().st_size <= 6e6
    loaded = models.load(SHIPPED)
    assert loaded.architecture.kind == "codec" and '"steps"' in loaded.metadata["training"]
    gains = [float(loaded.module.quality_gain("enc", torch.tensor([q])).mean()) for q in range(64)]
    assert gains == sorted(gains) and gains[0] < gains[63] / 3


# Objective --------------------------------------------------------------------------------------------------------------


def test_every_picture_of_a_step_has_its_own_quality_and_weighs_alike(codec) -> None:
    clean = torch.cat(starter.sample_pictures(photos()))
    objective = LogRateDistortion((6.0, 480.0))
    loss, parts = objective(codec, clean, clean, torch.Generator().manual_seed(1))
    again, _ = objective(codec, clean, clean, torch.Generator().manual_seed(1))
    assert torch.equal(loss, again) and set(parts) == {"cost", "distortion", "bits_per_pixel"}
    loss.backward()
    assert torch.isfinite(codec.q_scale_enc.grad).all() and codec.q_scale_enc.grad.abs().min() > 0
    hopeless = torch.cat([clean[:3], 1 - clean[3:]])  # one picture whose damage nothing takes out
    worse, _ = objective(codec, clean, hopeless, torch.Generator().manual_seed(1))
    assert float((worse - loss).detach()) < 3  # it weighs as the logarithm of its cost
    with pytest.raises(ConfigError, match="ascending"):
        LogRateDistortion((10.0, 1.0))


# Benches ----------------------------------------------------------------------------------------------------------------


def test_curves_are_compared_between_their_files_only() -> None:
    ours, theirs = ([Point(q, size, 30 + 6 * math.log2(size / base)) for q, size in enumerate((1000, 2000, 4000))]
                    for base in (1000, 2000))  # fmt: skip
    assert codec_curves.psnr_at(ours, 2000) == pytest.approx(36)
    assert codec_curves.psnr_at(ours, 1000 * math.sqrt(2)) == pytest.approx(33)
    assert codec_curves.psnr_at(ours, 999) is None
    assert codec_curves.rate_difference(ours, theirs) == pytest.approx(
        math.log(0.5)
    )  # half the bytes for the same PSNR
    table = codec_curves.table({codec_curves.CODEC: [ours], "JPEG": [theirs]}, pixels=32_000)
    assert "| 0.5 | 36.00 (1) | +6.00 (1, ahead on 1) |" in table and "| -50 % (1) |" in table[-1]


def test_no_picture_is_decoded_the_way_it_was_encoded_and_all_ways_occur() -> None:
    pairs = {codec_agreement.pair(n) for n in range(60)}
    assert all(encoder != decoder for encoder, decoder in pairs)
    assert {e for e, _ in pairs} == set(codec_agreement.ENCODERS) and {d for _, d in pairs} == set(
        codec_agreement.DECODERS
    )


def test_streams_are_read_with_other_threads_layouts_and_precisions_in_another_process() -> None:
    pytest.importorskip("constriction", reason="bitstreams are coded by the package constriction")
    failed, integers = codec_agreement.run(SHIPPED, 4)
    assert not failed and integers > 500
