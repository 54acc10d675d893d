"""`mend batch`: every picture of a folder through one workflow, here and on a cluster."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
from PIL import Image

from comfyui_mend.__main__ import main
from comfyui_mend.engine import batch, ray_workers
from comfyui_mend.engine.runner import Runner
from comfyui_mend.engine.workflow_format import read
from comfyui_mend.errors import Cancelled, InputError, MissingDependency, WorkflowError
from comfyui_mend.nodes.cli_batch import make_worker
from comfyui_mend.nodes.cli_run import builtin_classes

from .make_workflow import WORKFLOWS

WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "whatever.png"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
}


@pytest.fixture
def place(tmp_path):
    """A workflow, and a folder of five pictures: one below another folder, one of them broken."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "c.jpg", "deep/a.png"]):
        Image.new("RGB", (8, 6), (number * 20, 40, 60)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
    return tmp_path


def run(place, *more: str) -> int:
    command = [str(place / "workflow.json"), "--inputs", str(place / "in"), "--outputs", str(place / "out")]
    return main(["batch", *command, "--quiet", *more])


def report(place) -> dict[str, dict]:
    return {e["source"]: e for e in json.loads((place / "out" / "mend-report.json").read_text())["files"]}


def results(place) -> list[str]:
    out = place / "out"
    return sorted(f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file() and "mend-" not in f.name)


def test_every_picture_goes_through_and_keeps_its_name_and_folder(place, capsys):
    assert run(place) == 1  # one was broken
    assert results(place) == ["a.png", "b.png", "c.png", "deep/a.png"]
    with Image.open(place / "out" / "deep" / "a.png") as picture:
        assert picture.getpixel((0, 0)) == (195, 215, 195)
    assert {e["status"] for e in report(place).values()} == {"done", "failed"}
    assert "broken.png" in capsys.readouterr().out


def test_what_is_done_is_skipped_until_the_picture_or_the_workflow_changes(place):
    (place / "in" / "broken.png").unlink()
    assert run(place) == 0 and run(place) == 0
    assert {e["status"] for e in report(place).values()} == {"skipped"}
    Image.new("RGB", (8, 7)).save(place / "in" / "a.png")
    run(place)
    assert [n for n, e in report(place).items() if e["status"] == "done"] == ["a.png"]
    run(place, "--set", 'SaveImage.filename_prefix="y"')
    assert {e["status"] for e in report(place).values()} == {"done"}
    (place / "out" / "b.png").unlink()
    run(place, "--set", 'SaveImage.filename_prefix="y"')
    assert [n for n, e in report(place).items() if e["status"] == "done"] == ["b.png"]


def test_a_cancel_keeps_what_is_done_and_the_next_run_goes_on(place):
    (place / "in" / "broken.png").unlink()
    inputs, outputs = place / "in", place / "out"
    given = {"node": "1", "inputs": str(inputs), "outputs": str(outputs), "device": None}
    worker, seen = make_worker(prompt=json.loads(json.dumps(WORKFLOW)), **given), []

    def cancel_after_two(names):
        for outcome in batch.one_by_one(worker, names):
            if len(seen) == 2:
                raise Cancelled("cancelled")
            seen.append(outcome[0])
            yield outcome

    names = batch.find_pictures(inputs, outputs)
    with pytest.raises(Cancelled):
        batch.run_batch(names, inputs, outputs, "same", cancel_after_two)
    assert json.loads((outputs / "mend-report.json").read_text())["stopped"]
    again = batch.run_batch(names, inputs, outputs, "same", lambda left: batch.one_by_one(worker, left))
    assert (again.count("skipped"), again.count("done")) == (2, 2)


def test_several_results_of_a_picture_get_names_of_their_own(place):
    (place / "in" / "broken.png").unlink()
    prompt = json.loads(json.dumps(WORKFLOW))
    prompt["4"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "plain"}}
    prompt["4"]["_meta"] = {"title": "As it was"}
    (place / "workflow.json").write_text(json.dumps(prompt))
    assert run(place) == 0
    assert {"a-3.png", "a-As_it_was.png"} <= set(results(place))


@pytest.mark.parametrize("shown", [True, False])
def test_what_is_saved_beside_pictures_is_kept(place, shown):
    (place / "in" / "broken.png").unlink()
    shipped = read(WORKFLOWS / "api" / "compress_photo.json")
    prompt = {node_id: shipped[node_id] for node_id in ("1", "2", "3", "4")}
    prompt["3"]["inputs"].update(by="quality", quality=3)
    prompt["4"]["inputs"]["filename_prefix"] = "small/photo"
    if shown:
        prompt["5"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    (place / "workflow.json").write_text(json.dumps(prompt))
    assert run(place) == 0
    assert results(place) == [
        *("a-small/photo_00001_.mend", "b-small/photo_00001_.mend", "c-small/photo_00001_.mend"),
        "deep/a-small/photo_00001_.mend",
    ]
    assert report(place)["a.png"]["results"] == ["a-small/photo_00001_.mend"]
    assert run(place) == 0 and {e["status"] for e in report(place).values()} == {"skipped"}


def test_workflows_that_cannot_be_batched_are_refused_in_words(place, capsys):
    (place / "workflow.json").write_text(json.dumps({"1": {"class_type": "EmptyImage", "inputs": {}}}))
    assert run(place) == 1 and "no Load Image" in capsys.readouterr().err
    with pytest.raises(WorkflowError, match="--node"):
        batch.loader_of({"1": WORKFLOW["1"], "2": WORKFLOW["1"]})
    with pytest.raises(InputError, match="cannot go into"):
        batch.find_pictures(place / "in", place / "in" / "out")
    with pytest.raises(InputError, match="no pictures"):
        (place / "empty").mkdir()
        batch.find_pictures(place / "empty", place / "out")


def test_a_loaded_network_stays_loaded_from_picture_to_picture(place):
    classes, loads = dict(builtin_classes()), []
    loader = classes["MendLoadRestorer"]

    class Counting(loader):
        @classmethod
        def execute(cls, model_name):
            loads.append(model_name)
            return super().execute(model_name)

    classes["MendLoadRestorer"] = Counting
    starter = "mend-moce-ir-starter.safetensors"
    prompt = {
        **json.loads(json.dumps(WORKFLOW)),
        "2": {
            "class_type": "MendRestore",
            "inputs": {"restorer": ["4", 0], "image": ["1", 0], "tile": 0, "overlap": -1},
        },
        "4": {"class_type": "MendLoadRestorer", "inputs": {"model_name": starter}},
    }
    prompt["2"]["inputs"]["precision"] = "auto"
    worker = batch.Worker(Runner(classes), prompt, "1", place / "in", place / "out")
    assert worker("a.png")["results"] == ["a.png"] and worker("b.png")["results"] == ["b.png"]
    assert loads == [starter]


def test_without_ray_the_option_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingDependency, match="pip install ray"):
        list(ray_workers.run_all("local", make_worker, {}, ["a"]))


class ToyRay:
    """Ray's part in `_spread`, in this process: a worker dies over the pictures in `deadly`, so many times each."""

    class exceptions:
        class RayActorError(Exception): ...

        class RayTaskError(Exception):
            def __init__(self, cause):
                self.cause = cause

    def __init__(self, deadly: dict[str, int]) -> None:
        self.deadly, self.started, self.dead = deadly, 0, set()

    def start(self):
        self.started += 1
        worker, number = SimpleNamespace(), self.started
        worker.do = SimpleNamespace(remote=lambda name: (number, name))
        return worker

    def wait(self, tasks, timeout):
        return tasks[:1], tasks[1:]

    def get(self, task):
        number, name = task
        assert number not in self.dead, "a dead worker got work"
        if self.deadly.get(name, 0):
            self.deadly[name] -= 1
            self.dead.add(number)
            raise self.exceptions.RayActorError("killed")
        if name == "bad":
            raise self.exceptions.RayTaskError(InputError("broken"))
        return name.upper()


def test_work_of_dead_workers_is_done_by_new_ones_and_given_up_after_three():
    ray = ToyRay({"b": 1, "d": 2, "huge": 99})
    names = ["a", "b", "c", "d", "bad", "huge", "e"]
    outcomes = dict(ray_workers._spread(ray, ray.start, [ray.start(), ray.start()], names))
    assert sorted(outcomes) == sorted(names)
    assert {n: o for n, o in outcomes.items() if isinstance(o, str)} == {n: n.upper() for n in "abcde"}
    assert str(outcomes["bad"]) == "broken" and "3 workers died" in str(outcomes["huge"])
    assert ray.started == 2 + 1 + 2 + 3 and ray.deadly["huge"] == 96


def test_a_worker_that_dies_costs_nothing(place):
    """Two workers on this machine, one is killed with its picture in hand: every picture is there in the end.

    MEND_RAY_ADDRESS names a cluster that runs already, on this machine.
    """
    pytest.importorskip("ray", reason="ray is not installed")
    (place / "in" / "broken.png").unlink()
    for number in range(8):
        Image.new("RGB", (16, 16), (number, number, number)).save(place / "in" / f"more{number}.png")
    inputs, outputs, workers = place / "in", place / "out", []
    names = batch.find_pictures(inputs, outputs)
    given = {"prompt": WORKFLOW, "node": "1", "inputs": str(inputs), "outputs": str(outputs), "device": "cpu"}

    def kill_one(processes: list[int]) -> None:
        workers.extend(processes)
        os.kill(processes[0], signal.SIGKILL)

    def on_ray(left):
        address = os.environ.get("MEND_RAY_ADDRESS", "local")
        return ray_workers.run_all(address, make_worker, given, left, workers=2, on_start=kill_one)

    try:
        done = batch.run_batch(names, inputs, outputs, "same", on_ray)
    except InputError as error:
        if "timed out during startup" in str(error):
            pytest.skip("Ray gives itself 30 s to start; this machine is too busy")
        raise
    assert len(workers) == 2 and workers[0] != workers[1]
    assert (done.count("done"), done.count("failed")) == (len(names), 0) and len(results(place)) == len(names)
    assert batch.run_batch(names, inputs, outputs, "same", lambda left: iter(())).count("skipped") == len(names)
