"""OSDFace: embedder, colour fix, one-step formula, and the LoRA's way into ComfyUI's U-Net."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, ConfigError, InputError
from comfyui_mend.guidance import colour_fix
from comfyui_mend.guidance import latent_diffusion as ld
from comfyui_mend.models import lora_sd
from comfyui_mend.models.osdface_vre import Dictionary

SMALL = {
    "n_embed": 128,
    "embed_dim": 32,
    "ch": 32,
    "ch_mult": (1, 1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (16,),
    "resolution": 64,
    "z_channels": 32,
    "embedding_change": (32, 48),
}
MODULES = json.loads((Path(__file__).parent / "data" / "sd21_unet_modules.json").read_text())


def _prompter(**changes):
    torch.manual_seed(0)
    return models.create("osdface", {**SMALL, **changes}).eval().requires_grad_(False)


def _lightning(module) -> dict:
    """The layout of associate_2.ckpt: two autoencoders and a critic."""
    tokenizer = module.vre.state_dict()
    state = {f"vqvae_LQ.{k}": v for k, v in tokenizer.items()}
    state |= {f"vqvae_HQ.{k}": torch.zeros_like(v) for k, v in tokenizer.items()}
    state |= {"vqvae_LQ.decoder.conv_in.weight": torch.zeros(1), "vqvae_LQ.post_quant_conv.weight": torch.zeros(1)}
    return {"state_dict": state | {"loss.discriminator.main.0.weight": torch.zeros(1)}, "global_step": 7}


@pytest.mark.parametrize("identity", ["osdface-prompter", "osdface-projection"])
def test_the_released_setting_is_read_back_from_its_shapes(identity):
    architecture = models.registry.get(identity)
    config = architecture.variants["OSDFace"]
    with torch.device("meta"):
        state = models.create(identity, config).state_dict()
    assert models.registry.detect(state) is architecture
    assert architecture.config_from_state_dict(state) == config


def test_the_embedder_is_found_in_the_lightning_file_and_takes_its_projection_from_the_other(tmp_path):
    module = _prompter()
    torch.save(_lightning(module), tmp_path / "associate_2.ckpt")
    torch.save(module.embedding_change.state_dict(), tmp_path / "embedding_change_weights.pth")
    face = torch.rand(1, 3, 40, 56)
    tokenizer = models.load(tmp_path / "associate_2.ckpt").module
    with pytest.raises(ConfigError, match="embedding_change_weights"):
        tokenizer(face)
    projection = models.load(tmp_path / "embedding_change_weights.pth").module
    assert torch.equal(tokenizer.with_projection(projection)(face), module(face))


def test_a_projection_of_another_dictionary_is_refused():
    other = models.create("osdface", {"dim": 64, "context": 48})
    with pytest.raises(CheckpointError, match="belong together"):
        _prompter().with_projection(other)


def test_one_file_with_both_parts_loads_whole():
    module = _prompter()
    face, names = torch.rand(2, 3, 64, 64), module.state_dict()
    for prefix in ("vre.", "", "vqvae_LQ."):
        restored = models.load({name.replace("vre.", prefix): value for name, value in names.items()})
        assert restored.architecture.id == "osdface-prompter"
        assert torch.equal(restored.module(face), module(face))


def test_a_face_in_a_batch_gets_the_tokens_it_gets_alone():
    module, faces = _prompter(), torch.rand(3, 3, 64, 48)
    together = module.select(faces)
    for index in range(3):
        alone = module.select(faces[index : index + 1])
        assert torch.equal(together.codes[index], alone.codes[0])
        assert torch.equal(together.tokens[index], alone.tokens[0])


def test_tokens_are_the_different_nearest_codes_in_order_and_zero_after_them():
    dictionary = Dictionary(4, 2).requires_grad_(False)
    dictionary.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]))
    points = torch.tensor([[0.3, 0.0], [1.1, 0.0], [0.0, 0.8], [1.0, 0.0]])
    found = dictionary.select(points.T.reshape(1, 2, 2, 2), 6)
    assert found.codes.tolist() == [[1, 2, 0, -1, -1, -1]] and found.distinct.tolist() == [3]
    assert found.tokens[0].tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], *[[0.0, 0.0]] * 3]


def test_too_few_positions_for_concatenated_tokens_are_refused():
    with pytest.raises(InputError, match="too few"):
        _prompter().vre.quantize.select_concatenated(torch.zeros(1, 32, 4, 4), 77)


def test_the_wavelet_fix_keeps_details_and_takes_colours():
    content, style = torch.rand(2, 3, 40, 56), torch.rand(2, 3, 40, 56)
    fixed = colour_fix.wavelet_colour(content, style)
    details = content - colour_fix.low_frequencies(content)
    assert torch.allclose(fixed, details + colour_fix.low_frequencies(style), atol=1e-5)
    assert torch.allclose(colour_fix.wavelet_colour(content, content), content)
    assert torch.allclose(colour_fix.wavelet_colour(content, content + 0.2), content + 0.2, atol=1e-6)


def test_the_statistics_fix_gives_the_mean_and_spread_of_the_style():
    content, style = torch.rand(2, 3, 40, 56), 0.3 * torch.rand(1, 3, 40, 56) + 0.5
    fixed = colour_fix.adain_colour(content, style)
    assert torch.allclose(fixed.mean((2, 3)), style.mean((2, 3)).expand(2, 3), atol=1e-5)
    assert torch.allclose(fixed.std((2, 3)), style.std((2, 3)).expand(2, 3), atol=1e-3)
    with pytest.raises(InputError, match="resize"):
        colour_fix.adain_colour(content, style[..., :8])


def test_the_stock_sampler_reaches_the_one_step_formula_from_the_prescaled_latent():
    z, noise = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    sigma, scale = ld.one_step_sigma(), ld.one_step_prescale()
    assert (sigma, scale) == (pytest.approx(1.1605784), pytest.approx(1.5319737))
    seen = []

    def network(scaled, time):
        seen.append((scaled, time))
        return noise

    denoise = ld.epsilon_denoiser(network)
    end = ld.euler_ancestral(denoise, z * scale, torch.tensor([sigma, 0.0]), lambda step: torch.zeros_like(z))
    assert torch.allclose(end, ld.one_step_clean(z, noise), atol=1e-5)
    assert torch.allclose(seen[0][0], z, atol=1e-6) and seen[0][1].tolist() == pytest.approx([399, 399], abs=1e-3)


def test_every_module_of_the_sd21_unet_has_its_weight():
    weights = {target: torch.empty(shape, device="meta") for target, *shape in MODULES.values()}
    factors = {}
    for module, (_, out, *rest) in MODULES.items():
        factors[f"unet.{module}.lora_A.weight"] = torch.empty([16, *rest], device="meta")
        factors[f"unet.{module}.lora_B.weight"] = torch.empty([out, 16] + [1] * (len(rest) - 1), device="meta")
    match = lora_sd.match_lora(lora_sd.read_lora(factors), weights)
    assert match.describe() == "282 of 282 modules matched"
    assert match.patches.keys() == weights.keys()
    names = lora_sd.diffusers_names(weights)
    assert all(names[f"{module}.weight"] == target for module, (target, *_) in MODULES.items())


def test_low_rank_pairs_of_convolutions_and_layers_are_added_to_their_weights():
    unet = {"out.2.weight": torch.randn(4, 32, 3, 3), "time_embed.0.weight": torch.randn(8, 6)}
    down, up = torch.randn(2, 32, 3, 3), torch.randn(4, 2, 1, 1)
    state = {"unet.conv_out.lora_A.weight": down, "unet.conv_out.lora_B.weight": up}
    state |= {
        "unet.time_embedding.linear_1.lora.down.weight": torch.eye(2, 6),
        "unet.time_embedding.linear_1.lora.up.weight": torch.ones(8, 2),
    }
    result = lora_sd.merged(unet, lora_sd.match_lora(lora_sd.read_lora(state), unet), strength=0.5)
    expected = F.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    assert torch.allclose(result["out.2.weight"], unet["out.2.weight"] + 0.5 * expected, atol=1e-5)
    assert torch.allclose(result["time_embed.0.weight"][:, :2], unet["time_embed.0.weight"][:, :2] + 0.5)


def test_lora_files_that_do_not_fit_say_so():
    pair = {
        "unet.conv_out.lora_A.weight": torch.zeros(2, 32, 3, 3),
        "unet.conv_out.lora_B.weight": torch.zeros(4, 2, 1, 1),
    }
    with pytest.raises(CheckpointError, match="incomplete"):
        lora_sd.read_lora({k: v for k, v in pair.items() if "lora_A" in k})
    with pytest.raises(CheckpointError, match="no low-rank pairs"):
        lora_sd.read_lora({"weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="another"):
        lora_sd.match_lora(lora_sd.read_lora(pair), {"out.2.weight": torch.zeros(4, 64, 3, 3)})
    elsewhere = lora_sd.match_lora(lora_sd.read_lora(pair), {"time_embed.0.weight": torch.zeros(4, 4)})
    assert elsewhere.unmatched == ["conv_out"] and "0 of 1" in elsewhere.describe()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"unet.conv_in.lora_magnitude_vector.weight": torch.ones(4)}, "lora_magnitude_vector"),
        ({"unet.nothing.weight": torch.ones(4)}, r"unet\.nothing\.weight"),
        (
            {f"unet.a.processor.to_k_lora.{k}.weight": torch.ones(2, 2) for k in ("down", "up")},
            "to_k_lora.down.*to_k_lora.up",
        ),
        ({f"unet.k{k}.weight": torch.ones(1) for k in range(9)}, "k0.weight.* and 4 more"),
        ({"conv_in.lora.down.weight": torch.ones(2, 4)}, "under two names"),
        ({"unet.conv_in.alpha": torch.ones(2)}, r"conv_in\.alpha must be one finite number"),
        ({"unet.conv_in.alpha": torch.tensor(float("nan"))}, r"conv_in\.alpha must be one finite number"),
        (
            {"unet.conv_in.lora_A.weight": torch.ones(0, 4), "unet.conv_in.lora_B.weight": torch.ones(4, 0)},
            "empty factors",
        ),
        ({"unet.conv_in.lora_B.weight": torch.ones(4)}, "multiplies"),
    ],
)
def test_every_tensor_of_a_lora_file_must_be_part_of_a_pair(extra, message):
    pair = {"unet.conv_in.lora_A.weight": torch.ones(2, 4), "unet.conv_in.lora_B.weight": torch.ones(4, 2)}
    assert lora_sd.read_lora(pair | {"unet.conv_in.alpha": torch.tensor([4.0])})["conv_in"].scale == 2
    with pytest.raises(CheckpointError, match=message):
        lora_sd.read_lora(pair | extra)


def test_the_embedder_runs_in_half_precision():
    module = _prompter()
    wide, face = module.select(torch.full((1, 3, 64, 64), 0.4)), torch.full((1, 3, 64, 64), 0.4, dtype=torch.bfloat16)
    half = module.bfloat16().select(face)
    assert half.tokens.dtype == torch.bfloat16 and half.tokens.isfinite().all() and wide.tokens.isfinite().all()
