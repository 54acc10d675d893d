"""Any size, any damaged workflow file, any run twice, no network: counts and what they found stand in docs/hardening.md."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_mend.engine import core_nodes, loaded, model_folder, tiling
from comfyui_mend.engine.validation import validate_prompt
from comfyui_mend.engine.workflow_format import read, to_api
from comfyui_mend.errors import InputError, WorkflowError
from comfyui_mend.nodes import node_classes
from comfyui_mend.nodes.restore import Restore

from .support import local_restorer

ROOT = Path(__file__).resolve().parent.parent
SIZES, MUTATIONS = 80, 150
CLASSES = {node.GET_SCHEMA().node_id: node for node in [*core_nodes.NODES, *node_classes()]}
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


# Sizes ----------------------------------------------------------------------------------------------------------------


@cache
def tiny(scale: int, multiple: int) -> loaded.LoadedRestorer:
    return local_restorer(scale, multiple)


@given(
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    channels=st.sampled_from([1, 3, 4]),
    batch=st.integers(0, 3),
    scale=st.sampled_from([1, 2, 3]),
    multiple=st.sampled_from([1, 4, 8, 32]),
    tile=st.sampled_from([0, 64]),
    overlap=st.sampled_from([-1, 0, 40]),
)
@settings(max_examples=SIZES, deadline=None, derandomize=True)
def test_every_size_channel_count_and_batch_comes_back_whole(
    height, width, channels, batch, scale, multiple, tile, overlap
):
    image = torch.rand(batch, height, width, channels)
    restorer = tiny(scale, multiple)
    if batch == 0:
        with pytest.raises(InputError, match="image: empty"):
            Restore.execute(restorer, image, tile=tile, overlap=overlap)
        return
    before = image.clone()
    restored = Restore.execute(restorer, image, tile=tile, overlap=overlap)[0]
    assert restored.shape == (batch, height * scale, width * scale, channels)
    assert restored.dtype == torch.float32 and restored.is_contiguous()
    assert restored.isfinite().all() and restored.min() >= 0 and restored.max() <= 1
    assert torch.equal(image, before)


# Workflow files -------------------------------------------------------------------------------------------------------

JUNK = (None, True, -1, 0, 1e308, "", "MendRestore", "\0", [], {}, [[]], ["1", 0], ["1", 99], ["x", -1, 2], {"a": {}})


def mutate(value: object, random_: random.Random) -> object:
    """Changes one place of a JSON value: removes it, doubles it, or puts junk there."""
    parents, stack = [], [value]
    while stack:
        found = stack.pop()
        children = list(found.items()) if isinstance(found, dict) else list(enumerate(found))
        parents += [(found, key) for key, _ in children]
        stack += [child for _, child in children if isinstance(child, (dict, list)) and child]
    parent, key = random_.choice(parents)
    what = random_.randrange(3)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[key] = copy.deepcopy(random_.choice(JUNK))
    return value


def check(path: Path) -> bool:
    """True if the file is a workflow that may run; False if it was refused with an error of ours."""
    try:
        prompt = to_api(read(path), CLASSES)
    except WorkflowError as error:
        assert len(str(error)) > 20
        return False
    valid, error, _, _ = validate_prompt(prompt, CLASSES)
    assert valid or error["message"]
    return valid


@pytest.mark.parametrize("form", ["page", "api"])
def test_a_workflow_file_with_one_to_three_changes_is_refused_in_words_or_valid(form, tmp_path):
    random_, outcomes = random.Random(form), {True: 0, False: 0}
    files = [p if form == "page" else p.parent / "api" / p.name for p in WORKFLOWS]
    texts = [p.read_text(encoding="utf-8") for p in files]
    for _ in range(MUTATIONS):
        workflow = json.loads(random_.choice(texts))
        for _ in range(random_.randint(1, 3)):
            workflow = mutate(workflow, random_)
        (tmp_path / "w.json").write_text(json.dumps(workflow), encoding="utf-8")
        outcomes[check(tmp_path / "w.json")] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_a_workflow_file_with_broken_bytes_or_cut_off_is_refused_in_words(tmp_path):
    random_, data = random.Random(1), min(WORKFLOWS, key=lambda p: p.stat().st_size).read_bytes()
    for _ in range(MUTATIONS):
        broken = bytearray(data[: random_.randrange(len(data))] if random_.random() < 0.5 else data)
        for _ in range(random_.randint(1, 5)):
            if broken:
                broken[random_.randrange(len(broken))] = random_.randrange(256)
        (tmp_path / "w.json").write_bytes(bytes(broken))
        check(tmp_path / "w.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "0", '"x"', "null", "{}", "[" * 100_000, '{"a":' * 50_000, "NaN", "\ufeff{}"]
)
def test_what_is_no_workflow_at_all_is_refused_in_words(text, tmp_path):
    (tmp_path / "w.json").write_text(text, encoding="utf-8")
    with pytest.raises(WorkflowError):
        read(tmp_path / "w.json")


# The same again -------------------------------------------------------------------------------------------------------

SHIPPED = ["wiring-nafnet", "wiring-acl"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_gives_the_same_bits_again_and_at_every_place_of_a_batch(name):
    restorer = loaded.load(model_folder.model_path(f"{name}.safetensors"))
    image = torch.rand(1, 3, 24, 40).expand(3, -1, -1, -1)
    first = tiling.restore(restorer, image)
    torch.rand(7)  # the global generator's state has no part in it
    assert torch.equal(first, tiling.restore(restorer, image))
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])


# No network -----------------------------------------------------------------------------------------------------------

OFFLINE = """
import socket, sys
def refuse(*arguments, **named):
    raise AssertionError("the network was used")
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
from comfyui_mend.engine import core_nodes, folders
from comfyui_mend.engine.runner import Runner
from comfyui_mend.nodes import node_classes
folders.set_folders(output=sys.argv[1])
classes = {n.GET_SCHEMA().node_id: n for n in [*core_nodes.NODES, *node_classes()]}
listed = [n.GET_NODE_INFO_V1() for n in classes.values()]
result = Runner(classes).run({
    "1": {"class_type": "EmptyImage", "inputs": {"width": 40, "height": 24, "batch_size": 2, "color": 8421504}},
    "2": {"class_type": "MendLoadRestorer", "inputs": {"model_name": "wiring-nafnet.safetensors"}},
    "3": {"class_type": "MendRestore",
          "inputs": {"restorer": ["2", 0], "image": ["1", 0], "tile": 0, "overlap": -1, "precision": "auto"}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "offline"}},
    "5": {"class_type": "MendRestorerInfo", "inputs": {"restorer": ["2", 0]}},
    "6": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}},
})
assert result.complete, result.describe()
print(len(listed))
"""


def test_importing_listing_and_running_use_no_network(tmp_path):
    done = subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= len(CLASSES) and len(list(tmp_path.glob("offline_*.png"))) == 2
