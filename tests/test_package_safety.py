"""What the package's source may not contain, shown over its syntax trees, and what importing it may not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import comfyui_mend

ROOT = Path(comfyui_mend.__file__).resolve().parent
PACKAGES = ("nodes", "engine", "models", "guidance", "codec", "training", "kernels")
FILES = sorted(
    [p for p in ROOT.glob("*.py") if p.name not in ("setup.py", "conftest.py")]
    + [p for name in PACKAGES for p in (ROOT / name).rglob("*.py")]
)
TREES = {str(p.relative_to(ROOT)).replace("\\", "/"): ast.parse(p.read_text(encoding="utf-8")) for p in FILES}

NETWORK = {
    "socket",
    "urllib",
    "urllib3",
    "requests",
    "http",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "ssl",
    "telnetlib",
}
PROCESSES = {"subprocess", "multiprocessing", "pty", "ctypes", "cffi"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Compiling kernels for the user's own machine is the one reason to run a program.
MAY_COMPILE = ("kernels/",)
ALLOCATOR = "engine/allocator.py"  # what it may do with ctypes has a test of its own
MAY_NAME_DEVICES = ("kernels/", "engine/host.py")
RUNNERS = {
    "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.spawnl", "os.posix_spawn", "os.startfile",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file",
    "torch.jit.load", "torch.utils.model_zoo.load_url",
}  # fmt: skip


def dotted(node: ast.AST) -> str:
    """ "os.path.join" for the node that says so, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def imports(tree: ast.AST):
    """(top-level package, line) of every absolute import, wherever it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno
        elif isinstance(node, ast.Call) and dotted(node.func) in ("__import__", "importlib.import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and not first.value.startswith("."):
                yield first.value.split(".")[0], node.lineno


def found(check, allowed: tuple[str, ...] = ()) -> list[str]:
    return [f"{name}:{line} {what}" for name, tree in TREES.items() if not name.startswith(allowed or ("\0",))
            for what, line in check(tree)]  # fmt: skip


def test_the_whole_package_is_looked_at():
    assert {"models/checkpoint.py", "nodes/__init__.py", "engine/host.py", "__init__.py"} <= set(TREES)


def test_no_text_is_run_as_code():
    def check(tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and dotted(node.func) in (
                "eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile", "execfile",
            ):  # fmt: skip
                yield dotted(node.func), node.lineno

    assert found(check) == []


def test_no_program_is_started():
    def check(tree):
        yield from ((name, line) for name, line in imports(tree) if name in PROCESSES)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Attribute, ast.Name)) and dotted(node) in RUNNERS:
                yield dotted(node), node.lineno

    assert found(check, (*MAY_COMPILE, ALLOCATOR)) == []


def test_the_allocator_is_set_in_this_process_alone():
    """No library is loaded for it: ctypes.CDLL(None) is the process itself."""
    calls = [n for n in ast.walk(TREES[ALLOCATOR]) if isinstance(n, ast.Call)]
    loaded = [n.args for n in calls if dotted(n.func).startswith("ctypes.")]
    assert len(loaded) == 1 and [a.value for a in loaded[0]] == [None]


def test_no_network_outside_the_download_command():
    def check(tree):
        yield from ((name, line) for name, line in imports(tree) if name in NETWORK | {"huggingface_hub"})

    everywhere = found(check)
    assert [f for f in everywhere if not f.endswith(" huggingface_hub")] == []
    assert {f.split(":")[0] for f in everywhere} <= {"models/cli.py"}
    # There, inside one function: importing the module does not import it.
    tree = TREES["models/cli.py"]
    inside = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and any(name == "huggingface_hub" for name, _ in imports(function))
    ]
    assert inside == ["_from_hugging_face"]


def test_nothing_is_unpickled():
    """Not even in models/: checkpoints are read by an interpreter of its own.

    A training run resumes from the file that it wrote itself; that one goes through torch's restricted loader.
    """

    def check(tree):
        yield from ((name, line) for name, line in imports(tree) if name in PICKLES)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and dotted(node.func) in ("numpy.load", "np.load"):
                if not any(k.arg == "allow_pickle" and getattr(k.value, "value", 1) is False for k in node.keywords):
                    yield dotted(node.func), node.lineno

            if isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
                if not any(k.arg == "weights_only" and getattr(k.value, "value", 0) is True for k in node.keywords):
                    yield "torch.load without weights_only=True", node.lineno
                elif tree not in (t for name, t in TREES.items() if name.startswith("training/")):
                    yield "torch.load outside training", node.lineno

    assert found(check) == []


def test_no_cuda_literal_outside_kernels_and_host():
    def check(tree):
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                if node.value.split(":")[0] == "cuda":
                    yield repr(node.value), node.lineno
            if isinstance(node, ast.Attribute) and (node.attr == "cuda" and dotted(node) != "torch.cuda"):
                yield f".{node.attr}", node.lineno

    assert found(check, MAY_NAME_DEVICES) == []


def test_imports_point_downwards():
    order = {"nodes": 0, "engine": 1, "guidance": 1, "codec": 1, "training": 1, "models": 2, "kernels": 3}
    wrong = []
    for name, tree in TREES.items():
        package = name.split("/")[0]
        if package not in order:
            continue
        depth = name.count("/")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == depth + 1 and node.module:
                target = node.module.split(".")[0]
                if target in order and order[target] < order[package]:
                    wrong.append(f"{name}:{node.lineno} imports {target}")
    assert wrong == []


IMPORT = """
import socket, sys
def refuse(*arguments, **named):
    raise AssertionError("the network was used while importing")
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = refuse
import torch
import builtins, time
before = set(sys.modules)
started = time.perf_counter()
import comfyui_mend
import comfyui_mend.nodes
from comfyui_mend import models
models.registry.architectures()
print(round(time.perf_counter() - started, 2), len(set(sys.modules) - before))
for name in ("torchvision", "constriction", "numba", "spandrel", "open_clip", "huggingface_hub", "transformers", "diffusers"):
    assert name not in sys.modules or name in before, name
"""


def test_importing_uses_no_network_and_no_optional_package(record_property):
    """Also reports what the import costs beyond torch's, in seconds and modules."""
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    seconds, modules = result.stdout.split()[-2:]
    record_property("import_seconds_beyond_torch", seconds)
    record_property("modules_beyond_torch", modules)


@pytest.mark.parametrize("name", sorted(TREES))
def test_only_relative_imports_inside_the_package(name):
    assert [line for package, line in imports(TREES[name]) if package == "comfyui_mend"] == []
