"""Runs in the Python that has ComfyUI's packages: python tests/in_comfyui.py JOB.json RESULT.json

The job is {"workflows": {name: prompt}, "prompts": {name: prompt}, "input": DIR, "output": DIR}: workflows are run,
prompts only checked. The result says how ComfyUI lists our nodes, what it answered, and what it logged about us.
Imports the pack from this checkout, so nothing of it need be installed there.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def import_pack() -> None:
    """Makes `import comfyui_mend` find this checkout."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_mend", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["comfyui_mend"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["comfyui_mend"])


class Warnings(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


def main(job_file: str, result_file: str) -> None:
    import_pack()
    from comfyui_mend.engine import folders
    from comfyui_mend.engine.comfyui import ComfyUI

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    folders.set_folders(inputs=[job["input"]], output=job["output"])
    log = Warnings()
    logging.getLogger().addHandler(log)
    answer: dict[str, Any] = {"workflows": {}, "prompts": {}}
    with ComfyUI.start(device="cpu") as comfyui:
        answer["load_log"] = list(log.lines)
        ours = {name: node for name, node in comfyui.classes.items() if name.startswith("Mend")}
        answer["nodes"] = {name: node.GET_NODE_INFO_V1() for name, node in ours.items()}
        for name, prompt in job["prompts"].items():
            execution = comfyui._modules["execution"]
            valid, error, good, node_errors = asyncio.run(execution.validate_prompt("check", prompt, None))
            answer["prompts"][name] = {"valid": valid, "error": error, "good": good, "node_errors": node_errors}
        answer["cases"] = run_cases(comfyui)
        answer["places"] = places()
        for name, prompt in job["workflows"].items():
            log.lines.clear()
            result = comfyui.run(prompt)
            shown: dict[str, list[str]] = {}
            for node_id, entries in result.outputs.items():
                shown[node_id] = [_keep(comfyui, entry, Path(job["output"])) for entry in entries.get("images", [])]
            texts = {node_id: list(entries.get("text", [])) for node_id, entries in result.outputs.items()}
            answer["workflows"][name] = {
                "complete": result.complete,
                "problem": result.describe(),
                "images": shown,
                "texts": texts,
                "log": list(log.lines),
            }
    Path(result_file).write_text(json.dumps(answer, default=str), encoding="utf-8")


def run_cases(comfyui: Any) -> dict[str, list[dict[str, Any]]]:
    """What ComfyUI does with the workflows of engine_cases.py."""
    sys.path.insert(0, str(ROOT / "tests"))
    from comfy_api.latest import io
    from comfy_execution.graph_utils import GraphBuilder
    from engine_cases import CASES, Nodes, observe

    nodes, seen = Nodes(io, GraphBuilder), {}
    comfyui.classes.update(nodes.classes)
    for name, prompts in CASES.items():
        comfyui.forget()
        seen[name] = [observe(nodes, comfyui.run(json.loads(json.dumps(prompt)))) for prompt in prompts]
    for name in nodes.classes:
        del comfyui.classes[name]
    return seen


def places() -> dict[str, list[str]]:
    """Where the weights of a network and of a prior lie while they are used, by ComfyUI's way with memory, and short of it.

    The card is played by PyTorch's meta device, which takes any weights and none of the memory.
    """
    import comfy.model_management as management
    import torch

    from comfyui_mend.engine import host

    card, seen = torch.device("meta"), {}
    kept = {name: getattr(management, name) for name in ("vram_state", "get_torch_device", "get_free_memory")}
    management.get_torch_device = lambda: card
    management.get_free_memory = lambda device=None, torch_free_too=False: (1e5, 1e5) if torch_free_too else 1e5
    try:
        for state in ("NORMAL_VRAM", "LOW_VRAM", "NO_VRAM"):
            management.vram_state = management.VRAMState[state]
            layers = [torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 512, 3)) for _ in range(2)]
            with host.Managed(layers[0]).on_device(1000):
                seen[state] = sorted({str(p.device) for p in layers[0].parameters()})
            management.load_models_gpu([prior := host.whole_patcher(layers[1])])  # as the core does for a MODEL
            seen[f"{state}, as a MODEL"] = sorted({str(p.device) for p in layers[1].parameters()})
            seen[f"{state}, cloned"] = [type(prior.clone()).__name__]
            management.current_loaded_models.clear()
    finally:
        for name, value in kept.items():
            setattr(management, name, value)
    return seen


def _keep(comfyui: Any, entry: dict[str, str], output: Path) -> str:
    """The file behind an entry; previews are copied to where they outlive the run.

    Not moved: ComfyUI counts the files that are there, and a preview node keeps its random prefix between workflows.
    """
    if entry["type"] != "temp":
        return str(output / entry["subfolder"] / entry["filename"])
    kept = output / "previews" / entry["filename"]
    kept.parent.mkdir(parents=True, exist_ok=True)
    source = comfyui._temp / "temp" / entry["subfolder"] / entry["filename"]
    shutil.copyfile(source, kept)
    return str(kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
