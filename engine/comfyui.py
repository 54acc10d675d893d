"""Runs workflows in a real ComfyUI without its server: its own nodes, checks, cache and execution, in this process."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingDependency, WorkflowError
from . import folders
from .host import PACK
from .runner import Result
from .validation import Prompt

logger = logging.getLogger(__name__)


def find_comfyui() -> Path | None:
    """The ComfyUI to use: COMFYUI_PATH, the one whose custom_nodes this pack lies in, or comfy-cli's default."""
    candidates = [PACK.parent.parent, Path.home() / "comfy" / "ComfyUI"]
    named = os.environ.get("COMFYUI_PATH")
    if named:
        candidates = [Path(named)]
    return next(
        (path for path in candidates if (path / "main.py").is_file() and (path / "execution.py").is_file()), None
    )


class _Server:
    """What ComfyUI's executor needs of a server."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.blocked: list[tuple[str, dict[str, Any]]] = []

    def send_sync(self, event: str, data: Any, client: Any = None) -> None:
        if event == "execution_error" and data.get("exception_type") == "ExecutionBlocked":
            self.blocked.append((event, data))

    def queue_updated(self, *args: Any) -> None:
        """Nobody watches the queue."""


def _executor(kind: type, server: _Server) -> Any:
    """A PromptExecutor that caches as usual. Later versions than 0.3.64 need the sizes of the other kinds of cache too."""
    if "cache_args" in inspect.signature(kind).parameters:
        return kind(server, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    return kind(server)


class ComfyUI:
    """One ComfyUI, loaded into this process. Use `start` as a context manager: it owns a temporary folder."""

    def __init__(self, modules: Mapping[str, Any], temp: Path) -> None:
        self._modules, self._temp = modules, temp
        self._server = _Server()
        self._executor = _executor(modules["execution"].PromptExecutor, self._server)
        self.output = folders.own_output_directory()
        self.output.mkdir(parents=True, exist_ok=True)
        modules["folder_paths"].set_output_directory(str(self.output))
        modules["folder_paths"].set_temp_directory(str(temp / "temp"))
        modules["folder_paths"].set_input_directory(str(temp / "input"))

    @classmethod
    def start(cls, device: str | None = None) -> ComfyUI:
        """Loads ComfyUI, its built-in nodes and this pack. Raises WorkflowError if there is none, and
        MissingDependency if this Python lacks its packages."""
        root = find_comfyui()
        if root is None:
            raise WorkflowError(
                "no ComfyUI found: set COMFYUI_PATH to its folder (the one with main.py), put this pack into its "
                "custom_nodes, or use --engine builtin"
            )
        sys.path.insert(0, str(root))
        try:
            importlib.import_module("comfy.options").enable_args_parsing(False)
            options = importlib.import_module("comfy.cli_args").args
            accelerator = getattr(torch, "accelerator", None)
            options.cpu = device == "cpu" or accelerator is None or not accelerator.is_available()
            if (root / "utils" / "install_util.py").is_file():  # before comfy/utils.py can take the name
                importlib.import_module("utils.install_util")
            modules = {name: importlib.import_module(name) for name in ("folder_paths", "nodes", "execution")}
        except ImportError as error:
            raise MissingDependency(
                f"ComfyUI at {root} needs {error.name or error}, which this Python ({sys.executable}) lacks: run "
                "`python -m comfyui_mend` with the Python that runs ComfyUI, or use --engine builtin"
            ) from error
        temp = Path(tempfile.mkdtemp(prefix="mend-comfyui-"))
        for name in ("temp", "input"):
            (temp / name).mkdir()
        asyncio.run(cls._load_nodes(modules["nodes"]))
        return cls(modules, temp)

    @staticmethod
    async def _load_nodes(nodes: Any) -> None:
        switches = {"init_custom_nodes": False, "init_api_nodes": False}
        accepted = inspect.signature(nodes.init_extra_nodes).parameters
        await nodes.init_extra_nodes(**{name: value for name, value in switches.items() if name in accepted})
        if not await nodes.load_custom_node(str(PACK), module_parent="custom_nodes"):
            raise WorkflowError("ComfyUI could not load this pack; its log above says why")

    def __enter__(self) -> ComfyUI:
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._temp, ignore_errors=True)

    @property
    def classes(self) -> dict[str, Any]:
        """Node classes by id: ComfyUI's own and this pack's."""
        return self._modules["nodes"].NODE_CLASS_MAPPINGS

    def run(self, prompt: Prompt, extra_pnginfo: Mapping[str, Any] | None = None) -> Result:
        """Runs a workflow in the API format, as the server would."""
        self._bring_inputs(prompt)
        execution, prompt_id = self._modules["execution"], str(uuid.uuid4())
        check = execution.validate_prompt
        extra = () if len(inspect.signature(check).parameters) < 3 else (None,)
        valid, error, outputs, node_errors = asyncio.run(check(prompt_id, prompt, *extra))
        result = Result(error=error, node_errors=node_errors)
        if not valid:
            return result
        self._server.blocked.clear()
        self._executor.execute(prompt, prompt_id, {"extra_pnginfo": dict(extra_pnginfo or {})}, outputs)
        result.success = bool(self._executor.success)
        result.messages = [*self._server.blocked, *self._executor.status_messages]
        result.outputs = dict(self._executor.history_result["outputs"])
        result.complete = result.success and not node_errors and not self._server.blocked
        return result

    def forget(self) -> None:
        """Drops every result kept."""
        self._executor.reset()

    @staticmethod
    def _bring_folder(name: Any, target: Path) -> None:
        """The same for a folder that a node reads."""
        if not isinstance(name, str) or not name or Path(name).is_absolute():
            return
        for folder in folders.own_input_directories():
            found = (folder / name).resolve()
            if found.is_relative_to(folder.resolve()) and found.is_dir() and not (target / name).exists():
                shutil.copytree(found, target / name)

    def _bring_inputs(self, prompt: Prompt) -> None:
        """Copies the pictures that the workflow names from our input folders into the one folder that ComfyUI has."""
        target = self._temp / "input"
        for node in prompt.values():
            for name in node.get("inputs", {}).values():
                found = folders.find_file(name, folders.own_input_directories())
                if found is not None and not (target / name).exists():
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(found, target / name)
            if "source" in node.get("inputs", {}):
                self._bring_folder(node["inputs"]["source"], target)
