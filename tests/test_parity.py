"""The recorded cases that travel with the project: every network computes the published function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file

import parity
from comfyui_mend import models

HERE = Path(__file__).resolve().parent
CASES = sorted(p.parent for p in (HERE / "data" / "parity").glob("*/case.json"))


check = parity.load(HERE / "data" / "check.py")


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_the_recorded_numbers_of_the_reference_are_met(folder: Path, tmp_path: Path) -> None:
    save_file(parity.run_case(folder), str(tmp_path / f"{folder.name}.safetensors"))
    ok, text = check.compare(folder, tmp_path)
    assert ok, text


def test_a_wrong_number_would_be_noticed(tmp_path: Path) -> None:
    folder = next(f for f in CASES if f.name == "moce-ir-small-train")
    recorded = load_file(folder / "expected.safetensors")
    name = next(n for n in check.json.loads((folder / "case.json").read_text())["outputs"] if recorded[n].size > 1)
    recorded[name] = recorded[name] + 0.1 * (1 + abs(recorded[name]))
    save_file(recorded, str(tmp_path / f"{folder.name}.safetensors"))
    assert not check.compare(folder, tmp_path)[0]


def _changed(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A folder with the recorded case `name` in which top-level entries are others."""
    folder = next(f for f in CASES if f.name == name)
    case = json.loads((folder / "case.json").read_text())
    (tmp_path / "case.json").write_text(json.dumps({**case, **changes}))
    return tmp_path


def _manifest(network: str, config: dict[str, Any]) -> list:
    with torch.device("meta"):
        state = models.create(network, config).state_dict()
    return [[key, list(v.shape), str(v.dtype).removeprefix("torch.")] for key, v in state.items()]


@pytest.mark.parametrize(
    ("case", "network", "arch", "changes"),
    [
        ("mambair-light-small", "mambair", "MambaIR_gen0", {}),
        ("mambair-light-small", "mambair", "MambaIR_gen1", {}),
        ("mambair-unet-small", "mambair-unet", "MambaIRUNet_legacy", {"mlp_ratio": 1.5}),
        ("mambair-unet-small", "mambair-unet", "MambaIRUNet", {"mlp_ratio": 2.0}),
        ("mambairv2-light-small", "mambairv2", "MambaIRv2Light", {"upsampler": "pixelshuffle", "upscale": 2}),
    ],
)
def test_a_case_of_keys_alone_is_of_the_generation_it_names(
    case: str, network: str, arch: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = next(f for f in CASES if f.name == case)
    config = {**json.loads((folder / "case.json").read_text())["config"], **changes}
    described = {"config": config, "arch": arch, "outputs": {}}
    manifest = _manifest(network, {**config, "arch": arch})
    assert parity.run_case(_changed(case, tmp_path, state_dict=manifest, **described)) == {}
    manifest[0][1] = [7, 7]
    with pytest.raises(AssertionError, match="different"):
        parity.run_case(_changed(case, tmp_path, state_dict=manifest, **described))


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("dcpt-restormer", {}),
        ("promptir", {"ffn_expansion_factor": 2.66, "LayerNorm_type": "WithBias"}),
    ],
)
def test_the_keys_tell_dcpt_s_restormer_from_its_promptir(network: str, changes: dict, tmp_path: Path) -> None:
    config = {"dim": 48, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 2, 4, 8], **changes}
    described = {"config": config, "state_dict": _manifest(network, config), "outputs": {}}
    assert parity.run_case(_changed("dcpt-nafnet-tlsc-small", tmp_path, **described)) == {}


@pytest.mark.parametrize("system", ["rdmd", "cm4ir"])
def test_a_method_that_borrows_its_network_is_made_by_its_own_name(system: str) -> None:
    folder = next(f for f in CASES if f.name.startswith(f"{system}-"))
    case = json.loads((folder / "case.json").read_text())
    assert _manifest(system, case["config"]) == case["state_dict"]
    assert system not in {a.system for a in models.registry.architectures()}


def test_the_embedder_alone_is_checked_where_no_lora_is_described(tmp_path: Path) -> None:
    assert parity.run_case(_changed("osdface-vre-small", tmp_path, outputs={})) == {}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mambair-light-small", {"patch_embed": (1, 340, 30), "conv_after_body": (1, 30, 17, 20)}),
        ("mambair-unet-small", {"down1_2": (1, 96, 64), "encoder_level1.0.self_attention": (1, 16, 24, 32)}),
        ("mambairv2-denoise-small", {"layers.0.residual_group.layers.1.win_mhsa": (9, 64, 18), "norm": (1, 576, 18)}),
    ],
)
def test_what_modules_give_inside_comes_in_the_recorded_layout(
    name: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    outputs = parity.run_case(_changed(name, tmp_path, outputs={f"tap.{part}": {} for part in shapes}))
    assert {part: outputs[f"tap.{part}"].shape for part in shapes} == shapes


def test_the_codec_s_reference_is_padded_like_its_input(tmp_path: Path) -> None:
    folder = next(f for f in CASES if f.name == "aio-codec-small-multirate")
    inputs = json.loads((folder / "case.json").read_text())["inputs"]
    inputs["x"]["shape"] = [1, 3, 20, 18]
    inputs["gt"] = {**inputs["x"], "tag": "the clean picture"}
    outputs = parity.run_case(
        _changed("aio-codec-small-multirate", tmp_path, inputs=inputs, outputs={"mse": {}, "x_hat": {}})
    )
    assert outputs["x_hat"].shape[-2:] == (32, 32)
    assert len(outputs["mse"]) == len(outputs["x_hat"])
