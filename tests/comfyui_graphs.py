"""Graphs in a real ComfyUI with model files made for the test, and the very tensors they end in.

`run` starts the Python that has ComfyUI's packages on this file: python tests/comfyui_graphs.py JOB.json RESULT.json
The job is {"graphs": {name: prompt}, "models": {folder name: directory}, "input": DIR, "output": DIR}. A node of the
class KeepForTest with an input "value" hands its value to the caller.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Outcome:
    """What became of a graph."""

    complete: bool
    problem: str
    texts: dict[str, list[str]]
    images: dict[str, list[Path]]
    log: list[str]
    kept: dict[str, Any] = field(default_factory=dict)
    """By the id of a KeepForTest node: a tensor (of a latent its samples, of a conditioning its first tensor)."""


def run(
    place: Path,
    graphs: Mapping[str, Mapping[str, Any]],
    models: Mapping[str, Path],
    inputs: Path | None = None,
    timeout: float = 1800,
) -> dict[str, Outcome]:
    """Runs graphs one after another in one ComfyUI on the CPU. Skips the test where there is no ComfyUI."""
    from safetensors.torch import load_file

    from comfyui_mend.engine import folders

    from .comfyui_process import run_script

    place.mkdir(parents=True, exist_ok=True)
    job = {
        "graphs": graphs,
        "models": {name: str(folder) for name, folder in models.items()},
        "input": str(inputs or folders.SHIPPED_INPUTS),
        "output": str(place / "output"),
        "kept": str(place),
    }
    (place / "job.json").write_text(json.dumps(job))
    run_script("comfyui_graphs.py", place / "job.json", place / "result.json", place=place, timeout=timeout)
    outcomes = {}
    for name, entry in json.loads((place / "result.json").read_text()).items():
        images = {node: [Path(path) for path in paths] for node, paths in entry.pop("images").items()}
        file = place / f"{name}.safetensors"
        outcomes[name] = Outcome(**entry, images=images, kept=load_file(file) if file.is_file() else {})
    return outcomes


def main(job_file: str, result_file: str) -> None:
    import logging

    from in_comfyui import Warnings, _keep, import_pack

    import_pack()
    from safetensors.torch import save_file

    from comfyui_mend.engine import folders
    from comfyui_mend.engine.comfyui import ComfyUI

    job, kept, answer = json.loads(Path(job_file).read_text(encoding="utf-8")), {}, {}
    folders.set_folders(inputs=[job["input"]], output=job["output"])
    log = Warnings()
    logging.getLogger().addHandler(log)

    class Anything(str):
        """A type that every wire fits."""

        def __ne__(self, other: object) -> bool:
            return False

    class KeepForTest:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "tests", True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"value": (Anything("*"), {})}, "hidden": {"node": "UNIQUE_ID"}}

        def keep(self, value: Any, node: str) -> dict[str, Any]:
            while not hasattr(value, "shape"):
                value = value["samples"] if isinstance(value, dict) else value[0]
            kept[node] = value.detach().clone().contiguous()
            return {}

    with ComfyUI.start(device="cpu") as comfyui:
        import folder_paths

        for name, folder in job["models"].items():
            folder_paths.add_model_folder_path(name, folder)
        comfyui.classes["KeepForTest"] = KeepForTest
        for name, graph in job["graphs"].items():
            log.lines.clear(), kept.clear()
            result = comfyui.run(graph)
            answer[name] = {
                "complete": result.complete,
                "problem": result.describe(),
                "texts": {node: list(shown.get("text", [])) for node, shown in result.outputs.items()},
                "images": {
                    node: [_keep(comfyui, entry, Path(job["output"])) for entry in shown.get("images", [])]
                    for node, shown in result.outputs.items()
                },
                "log": list(log.lines),
            }
            if kept:
                save_file(dict(kept), Path(job["kept"]) / f"{name}.safetensors")
    Path(result_file).write_text(json.dumps(answer, default=str), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main(*sys.argv[1:])
