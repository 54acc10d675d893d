"""Reading honest checkpoints: every wrapper, every format, what is found is said, and errors say what the file is."""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from comfyui_mend import models
from comfyui_mend.errors import CheckpointError, ConfigError
from comfyui_mend.models import checkpoint as reading
from comfyui_mend.models import convert
from comfyui_mend.models import empty as building

CONFIG = {
    "dim": 8,
    "num_blocks": (1, 1, 1, 1),
    "num_dec_blocks": (1, 1, 1),
    "heads": (1, 1, 1, 1),
    "num_refinement_blocks": 1,
    "ffn_expansion_factor": 2,
    "LayerNorm_type": "WithBias",
    "num_experts": 4,
    "topk": 1,
    "rank_type": "spread",
    "rank": 2,
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.create("moce-ir", CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def state(network):
    return network.state_dict()


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def same(restorer, state):
    loaded = restorer.module.state_dict()
    return loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


# ---- wrappers -------------------------------------------------------------------------------------------------------

WRAPPED = {
    "bare": lambda s: s,
    "params": lambda s: {"params": s},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{}]}},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.25},
    "network in network": lambda s: {"network": {"net": s}},
    "module.": lambda s: prefixed(s, "module."),
    "generator.module.": lambda s: {"state_dict": prefixed(s, "generator.module."), "meta": {"iter": 7}},
    "module.generator.": lambda s: prefixed(s, "module.generator."),
    "_orig_mod.": lambda s: prefixed(s, "_orig_mod."),
    "compiled parts": lambda s: {k.replace("layers.", "layers._orig_mod."): v for k, v in s.items()},
    "Lightning": lambda s: {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed(s, "net."),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4)}}}],
        "lr_schedulers": [],
    },
    "beside other networks": lambda s: (
        prefixed(s, "net.") | {"teacher.weight": torch.ones(3), "loss_fn.bias": torch.ones(2)}
    ),
    "under an unknown name": lambda s: prefixed(s, "restoration_student.") | {"other.weight": torch.ones(3)},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapped_state_dict_loads_from_memory_and_file(wrapper, state, tmp_path):
    wrapped = WRAPPED[wrapper](state)
    torch.save(wrapped, tmp_path / "file.pth")
    for source in (wrapped, tmp_path / "file.pth"):
        restorer = models.load(source)
        assert restorer.architecture.id == "moce-ir"
        assert same(restorer, state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_pickle_protocol_of_torch_save_is_read(protocol, zipped, state, tmp_path):
    file = tmp_path / "file.pth"
    torch.save({"params": state}, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert same(models.load(file), state)


@pytest.mark.parametrize(
    "plain, averaged",
    [
        ("params", "params_ema"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("net", "ema"),
        ("g", "g_ema"),
    ],
)
def test_averaged_weights_are_preferred_and_said(plain, averaged, state):
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    restorer = models.load({plain: other, averaged: state})
    assert same(restorer, state)
    assert any("EMA" in note for note in restorer.notes)
    assert any(averaged in note for note in restorer.notes)
    assert any("not used" in note and plain in note for note in restorer.notes)


def test_averaged_weights_under_a_prefix_are_preferred(state):
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    restorer = models.load(prefixed(other, "net.") | prefixed(state, "net_ema."))
    assert same(restorer, state)
    assert any("EMA" in note for note in restorer.notes)


def test_objects_of_unknown_classes_are_ignored(state, tmp_path):
    module = types.ModuleType("research_code")  # gone when the file is read
    module.Options = type("Options", (), {"__module__": "research_code"})
    sys.modules["research_code"] = module
    options = module.Options()
    options.nested = {"lr": 1e-4, "list": [1, 2, options]}
    extras = {
        "args": argparse.Namespace(lr=1e-3, root=pathlib.PurePosixPath("/data")),
        "options": options,
        "score": np.float64(31.2),
        "counter": collections.Counter(a=1),
        "defaults": collections.defaultdict(list, a=[1]),
        "names": {"a", "b"},
        "frozen": frozenset([1]),
        "array": np.arange(4),
        "big": 2**60,
        "complex": 1j,
        "bytes": b"abc",
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "text": "ünïcode \ud800",
    }
    for zipped in (True, False):
        torch.save({"state_dict": state, **extras}, tmp_path / "file.ckpt", _use_new_zipfile_serialization=zipped)
        try:
            del sys.modules["research_code"]
            assert same(models.load(tmp_path / "file.ckpt"), state)
            assert "research_code" not in sys.modules
        finally:
            sys.modules["research_code"] = module
    del sys.modules["research_code"]


def test_a_pickled_module_gives_its_weights_without_its_class(network, state, tmp_path):
    critic = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.LeakyReLU())
    torch.save({"epoch": 30, "Tnet": network, "Fnet": critic}, tmp_path / "model.pth")
    restorer = models.load(tmp_path / "model.pth")
    assert same(restorer, state)
    assert any("Tnet" in note for note in restorer.notes) and any("Fnet" in note for note in restorer.notes)
    torch.save(torch.nn.DataParallel(network), tmp_path / "parallel.pth")
    assert same(models.load(tmp_path / "parallel.pth"), state)


def test_a_pickled_modules_transient_buffers_and_missing_biases_are_left_out(tmp_path):
    module = torch.nn.Conv2d(1, 1, 1, bias=False)
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("transient", torch.ones(1), persistent=False)
    torch.save(module, tmp_path / "module.pth")
    assert set(reading.read(tmp_path / "module.pth").state) == {"weight", "kept"}


# ---- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_precisions_load_as_float32(dtype, suffix, state, tmp_path):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    file = tmp_path / f"file.{suffix}"
    save_file(stored, file) if suffix == "safetensors" else torch.save(stored, file)
    restorer = models.load(file)
    assert all(p.dtype == torch.float32 for p in restorer.module.parameters())
    assert torch.equal(restorer.module.state_dict()["output.weight"], stored["output.weight"].float())
    assert any(str(dtype).removeprefix("torch.") in note for note in restorer.notes)


def test_views_transposes_and_shared_weights_are_read_right(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "view": base.view(2, 3, 4),
        "transposed": base.view(4, 6).t(),
        "slice": base[5:9],
        "strided": base[::3],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.float16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
        found = reading.read(tmp_path / "file.pth").state
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], tensors[k]) and found[k].dtype == tensors[k].dtype for k in tensors)


def test_writing_to_what_was_read_does_not_change_the_file(tmp_path):
    torch.save({"weight": torch.ones(4)}, tmp_path / "file.pth")
    before = (tmp_path / "file.pth").read_bytes()
    reading.read(tmp_path / "file.pth").state["weight"].zero_()
    assert (tmp_path / "file.pth").read_bytes() == before


def test_a_loaded_network_does_not_need_its_file_any_more(state, tmp_path):
    torch.save(state, tmp_path / "file.pth")
    restorer = models.load(tmp_path / "file.pth")
    (tmp_path / "file.pth").write_bytes(b"")
    assert same(restorer, state)


def test_sparse_and_quantised_tensors_are_refused_by_name(tmp_path):
    torch.save({"weight": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    with pytest.raises(CheckpointError, match="'weight' is sparse"):
        models.load(tmp_path / "sparse.pth")
    with pytest.raises(CheckpointError, match="sparse or quantised"):
        models.load({"weight": torch.eye(3).to_sparse()})


def test_nan_weights_are_said(state):
    broken = {k: v.clone() for k, v in state.items()}
    broken["output.weight"][0] = float("nan")
    assert any("output.weight" in note and "NaN" in note for note in models.load(broken).notes)


# ---- what is found --------------------------------------------------------------------------------------------------


def test_every_hyper_parameter_is_found(state):
    assert {k: models.load(state).config[k] for k in CONFIG} == CONFIG


def test_settings_given_by_the_caller_win(state):
    assert models.load(state, config={"topk": 2}).config["topk"] == 2


def test_metadata_tells_what_shapes_do_not(state, tmp_path):
    metadata = convert.metadata("moce-ir", {**CONFIG, "topk": 2, "dim": 999}, tasks="denoise,jpeg")
    save_file(state, tmp_path / "file.safetensors", metadata=metadata)
    restorer = models.load(tmp_path / "file.safetensors")
    assert restorer.config["topk"] == 2  # named in metadata_keys
    assert restorer.config["dim"] == 8  # told by the shapes, which do not lie
    assert restorer.tasks == ("denoise", "jpeg")


def test_nonsense_metadata_does_no_harm(state, tmp_path):
    for text in ("{", "[1]", "null", '{"topk": null}'.replace("null", "1"), "[" * 10_000):
        save_file(state, tmp_path / "file.safetensors", metadata={"mend.config": text, "mend.architecture": "nothing"})
        assert same(models.load(tmp_path / "file.safetensors"), state)


def test_a_released_files_name_tells_its_tasks(state, tmp_path):
    folder = tmp_path / "MoCE_IR_S_AIO3"
    folder.mkdir()
    torch.save({"state_dict": prefixed(state, "net.")}, folder / "last.ckpt")
    restorer = models.load(folder / "last.ckpt")
    assert restorer.tasks == ("denoise", "dehaze", "derain")
    assert any("moce-ir/MoCE_IR_S_AIO3" in note for note in restorer.notes)


def test_the_system_can_be_given(state):
    assert models.load(state, system="moce-ir").architecture.id == "moce-ir"
    with pytest.raises(CheckpointError, match="not a "):
        models.load(state, system="mair")
    with pytest.raises(ConfigError, match="no system"):
        models.load(state, system="nothing")


def test_loading_leaves_the_random_state_and_makes_trainable_parameters(state):
    before = torch.get_rng_state()
    with torch.inference_mode():
        restorer = models.load(state)
    assert torch.equal(before, torch.get_rng_state())
    parameter = next(restorer.module.parameters())
    assert not parameter.is_inference() and not parameter.requires_grad and not restorer.module.training
    with torch.inference_mode(False), torch.enable_grad():
        image = torch.rand(1, 3, 16, 16, requires_grad=True)
        restorer(image).sum().backward()
    assert image.grad is not None


def test_building_without_random_numbers_keeps_computed_tables(network):
    empty = building.build_empty(models.registry.get("moce-ir"), CONFIG)
    name = "dec.0.2.layers.0.adapter.routing.complexity"
    assert torch.equal(empty.state_dict()[name], network.state_dict()[name])
    assert all(p.isfinite().all() for p in empty.parameters())


# ---- incomplete and foreign files -----------------------------------------------------------------------------------


def test_missing_keys_are_named(state):
    incomplete = {k: v for k, v in state.items() if not k.startswith("refinement.layers.0.ffn.dwconv")}
    with pytest.raises(
        CheckpointError, match=r"looks like MoCE-IR.*missing.*refinement\.layers\.0\.ffn\.dwconv\.weight"
    ):
        models.load(incomplete)


def test_missing_signature_keys_still_tell_the_network(state):
    incomplete = {k: v for k, v in state.items() if not k.startswith("freq_embed.high_conv")}
    with pytest.raises(CheckpointError, match=r"looks like MoCE-IR.*missing.*freq_embed\.high_conv"):
        models.load(incomplete)


def test_entries_that_configuration_needs_are_named_when_missing(state):
    incomplete = {k: v for k, v in state.items() if k != "patch_embed.proj.weight"}
    with pytest.raises(CheckpointError, match=r"looks like MoCE-IR.*missing.*patch_embed\.proj\.weight"):
        models.load(incomplete)


def test_unexpected_entries_and_wrong_shapes_are_named(state):
    with pytest.raises(CheckpointError, match=r"not part of it: extra\.weight"):
        models.load(state | {"extra.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"output\.weight is \(3, 5, 3, 3\) instead of \(3, 8, 3, 3\)"):
        models.load(state | {"output.weight": torch.ones(3, 5, 3, 3)})


def test_leftovers_of_profilers_are_ignored(state):
    assert models.load(state | {"enc.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}).architecture


def tar_head():
    return b"name".ljust(257, b"\0") + b"ustar" + bytes(300)


FOREIGN = {
    b"": "empty: the download failed",
    b"   \n\n\n\n\n  ": "blank",
    b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded": "HTML page: the download failed",
    b"\n\n <html lang='en'>": "HTML page: the download failed",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n": "Git LFS pointer",
    b'{"error": "not found", "code": 404}': "JSON text",
    b"just some notes about the model": "text, not weights",
    b"GGUF\x03\0\0\0" + bytes(64): "GGUF",
    b"\x89HDF\r\n\x1a\n" + bytes(64): "HDF5",
    b"\x89PNG\r\n\x1a\n" + bytes(64): "PNG picture",
    b"\x08\x07\x12\x07pytorch\x1a\x051.9.0" + bytes(64): "ONNX",
    b"7z\xbc\xaf\x27\x1c" + bytes(64): "7-Zip archive: unpack it first",
    b"Rar!\x1a\x07" + bytes(64): "RAR archive: unpack it first",
    b"\x1f\x8b\x08" + bytes(64): "gzip archive: unpack it first",
    tar_head(): "tar archive",
    bytes(512): "nothing but zeros",
    b"MZ" + bytes(64): "Windows program",
    b"\xf3\x11\x92\xfe" * 40: "not a model file of any format",
}


@pytest.mark.parametrize("content", FOREIGN, ids=lambda c: FOREIGN[c][:20])
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(content, tmp_path):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=FOREIGN[content]) as caught:
        models.load(tmp_path / "model.pth")
    assert str(caught.value).startswith("model.pth: ")


def test_folders_missing_files_and_archives_are_called_what_they_are(tmp_path):
    with pytest.raises(CheckpointError, match="this is a folder"):
        models.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        models.load(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="DCPT's authors released a file of that name.*drive.google.com"):
        models.load(tmp_path / "dcpt_nafnet_5d.pth")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("models/last.ckpt", "text")
    with pytest.raises(CheckpointError, match="zip archive, not a model file.*last.ckpt.*Unpack"):
        models.load(tmp_path / "archive.zip")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", "text" * 100)
    with pytest.raises(CheckpointError, match="compressed"):
        models.load(tmp_path / "packed.zip")


def test_a_torchscript_archive_is_called_one(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        models.load(tmp_path / "script.pt")


@pytest.mark.parametrize(
    "key, kind",
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion checkpoint"),
        ("lora_unet_down_blocks_0.lora_down.weight", "LoRA"),
        ("body.0.rdb1.conv1.weight", "ESRGAN"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "CLIP"),
        ("ad_imageEncoder.adapter.0.weight", "CLIP adapters alone.*3task_vlunet.ckpt"),
    ],
)
def test_models_of_other_kinds_are_called_what_they_are(key, kind):
    with pytest.raises(CheckpointError, match=kind):
        models.load({key: torch.ones(2, 2)})


def test_a_file_without_weights_and_an_unknown_network_say_so(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="no weights"):
        models.load(tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="no tensors"):
        models.load({"epoch": 3})
    with pytest.raises(CheckpointError, match=r"no network known here.*strange\.weight.*MoCE-IR"):
        models.load({"strange.weight": torch.ones(2)})


@pytest.mark.parametrize("part", [0.2, 0.9, 0.999])
@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "file.safetensors"])
def test_a_truncated_download_is_called_truncated(part, name, state, tmp_path):
    file = tmp_path / name
    save_file(state, file) if name.endswith("safetensors") else torch.save(
        state, file, _use_new_zipfile_serialization=name.startswith("zip")
    )
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError, match="truncated"):
        models.load(file)


def test_a_damaged_tensor_is_found_by_its_checksum(state, tmp_path):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = bytearray(buffer.getvalue())
    place = data.find(state["output.weight"].numpy().tobytes()[:64])
    data[place + 5] ^= 1
    (tmp_path / "file.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="'output.weight' has a wrong checksum"):
        models.load(tmp_path / "file.pth")
