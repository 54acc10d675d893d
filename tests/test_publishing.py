"""What is published: the workflows of GitHub Actions, the registry's metadata, and the package that users get.

The steps of the Actions are not run here but dry-run: their shell is parsed, and every program, module and file that
they name must exist in the project or in what they install.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ACTIONS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SHELL = {"test", "sed", "echo", "make"}
INSTALLED_BY = {"ruff": "ruff", "comfy": "comfy-cli", "pytest": "pytest"}
"""Programs that a step may call, and the line of requirements-dev.txt that brings them."""
PACKED_LIMIT = 40_000_000


def read(path: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="reading the Actions needs PyYAML (comfy-cli brings it)")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def action(name: str) -> dict[str, Any]:
    return read(ROOT / ".github" / "workflows" / f"{name}.yml")


def scripts(workflow: dict[str, Any]) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job.get("steps", []) if "run" in step]


def commands(workflow: dict[str, Any]) -> list[list[str]]:
    lines = [line for script in scripts(workflow) for line in script.splitlines() if line.strip()]
    return [shlex.split(line) for line in lines]


def required() -> set[str]:
    """Names of what requirements-dev.txt installs."""
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    return {re.split(r"[<>=;\s]", line)[0] for line in lines if line and not line.startswith("#")}


# GitHub Actions ------------------------------------------------------------------------------------------------------


def test_every_system_and_python_is_tested_and_none_may_fail():
    tested = action("test")
    matrix = tested["jobs"]["test"]["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "windows", "macos"}
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={matrix['python'][0]}"
    assert not any("continue-on-error" in path.read_text(encoding="utf-8") for path in ACTIONS)
    last = tested["jobs"]["passed"]
    assert set(last["needs"]) == set(tested["jobs"]) - {"passed"} and last["if"] == "always()"
    assert f'"{" ".join(["success"] * len(last["needs"]))}"' in last["steps"][0]["run"]


def test_the_tested_pythons_are_the_promised_ones():
    promised = [line.rsplit(" ", 1)[1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert action("test")["jobs"]["test"]["strategy"]["matrix"]["python"] == promised


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.stem)
def test_no_step_may_fail_or_be_left_out_and_every_job_ends_in_time(path):
    workflow = read(path)
    for name, job in workflow["jobs"].items():
        assert name == "passed" or "if" not in job and ("timeout-minutes" in job or "uses" in job), name
        assert {*([job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", []))} <= set(
            workflow["jobs"]
        )
        assert job.get("strategy", {}).get("fail-fast", False) is False, "one system's failure would hide another's"
        for step in job.get("steps", []):
            assert not {"if", "continue-on-error"} & set(step), step
            assert not re.search(r"\|\||;|&(?!&)|\bset \+e\b", re.sub(r"\$\{\{.*?\}\}", "", step.get("run", ""))), step


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.stem)
def test_actions_are_used_at_a_version_and_expressions_name_what_exists(path):
    workflow = read(path)
    for job in workflow["jobs"].values():
        for used in [job.get("uses"), *(step.get("uses") for step in job.get("steps", []))]:
            if used is not None:
                local = used.startswith("./") and (ROOT / used).is_file()
                assert local or re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", used), used
        matrix = set(job.get("strategy", {}).get("matrix", {}))
        assert set(re.findall(r"\$\{\{ *matrix\.(\w+)", str(job))) <= matrix
    for group in re.findall(r"\$\{\{ *(\w+)[.)]", path.read_text(encoding="utf-8")):
        assert group in {"github", "matrix", "secrets", "join"}, group


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.stem)
def test_the_steps_name_programs_modules_and_files_that_exist(path):
    for words in commands(read(path)):
        program, *rest = words
        assert program in SHELL | {"python"} or INSTALLED_BY[program] in required(), words
        if program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert set(rest) <= set(targets), words
        if program == "python":
            assert rest[0] == "-m", words
            name = rest[1]
            assert name == "pip" or importlib.util.find_spec(name.split(".")[0]), words
            if name.startswith("comfyui_mend"):
                assert importlib.util.find_spec(name), words
        for option, value in zip(words, words[1:], strict=False):
            if option in ("-r", "-c"):
                assert (ROOT / value).is_file(), words


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.stem)
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash to parse the steps")
def test_the_steps_are_sound_shell(path):
    for script in scripts(read(path)):
        plain = re.sub(r"\$\{\{.*?\}\}", "value", script)
        assert subprocess.run(["bash", "-n"], input=plain, text=True, capture_output=True).stderr == ""


def test_the_actions_do_what_the_local_check_does():
    local = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    run = "\n".join(scripts(action("test")))
    for command in ("make test", "make demo", "comfyui_mend.kernels.check --require", "node validate"):
        assert command in local and command in run, command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("pytest -n 2 --dist loadfile", "ruff check .", "ruff format --check .", "-m comfyui_mend demo"):
        assert command in makefile and command in run, command


def test_a_tag_is_published_only_after_the_tests_and_with_the_secret():
    publish = action("publish")
    triggers = publish.get("on", publish.get(True))  # YAML 1.1 reads the key `on` as true
    assert triggers == {"push": {"tags": ["v*"]}}
    job = publish["jobs"]["publish"]
    assert publish["jobs"][job["needs"]]["uses"] == "./.github/workflows/test.yml"
    step = job["steps"][-1]
    assert step["uses"].startswith("Comfy-Org/publish-node-action@v")
    assert step["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}
    check = next(step["run"] for step in job["steps"] if "run" in step)
    if shutil.which("bash") and shutil.which("sed"):
        for tag, status in ((f"v{PROJECT['project']['version']}", 0), ("v9.9.9", 1)):
            environment = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
            assert subprocess.run(["bash", "-c", check], cwd=ROOT, env=environment).returncode == status


def test_pinned_versions_exist_for_every_tested_python():
    """A pin is for all Pythons, or the pins of a package divide them at one version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, marker = (line.split("==")[0], *line.partition(";")[1:])
            pins.setdefault(name, []).append(marker.strip())
    for name, markers in pins.items():
        assert markers == [""] or sorted(markers) == ["python_version < '3.11'", "python_version >= '3.11'"], name


# The registry --------------------------------------------------------------------------------------------------------


def test_icon_and_banner_lie_where_the_registry_will_look_for_them():
    comfy = PROJECT["tool"]["comfy"]
    start = PROJECT["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    icon, banner = (ROOT / comfy[key].removeprefix(start) for key in ("Icon", "Banner"))
    width, height = Image.open(icon).size
    assert width == height <= 400
    width, height = Image.open(banner).size
    assert width * 9 == height * 21, "the registry shows banners at 21:9"
    assert icon.stat().st_size < 60_000 and banner.stat().st_size < 200_000


def test_managers_install_exactly_the_dependencies_of_the_package():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line] == PROJECT["project"]["dependencies"]


def test_the_version_is_the_same_wherever_it_stands():
    version = PROJECT["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"## {version}" in changelog and f"version: {version}\n" in citation


def test_the_citation_file_has_what_cff_asks_for():
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license", "repository-code", "version"} <= set(citation)
    assert citation["license"] == "Apache-2.0" and citation["authors"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Repository"]


# The package ---------------------------------------------------------------------------------------------------------


def packed() -> list[str]:
    """Paths that `comfy node pack` would put into the package: tracked ones that .comfyignore does not name."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert all(p.startswith("/") and not set(p) & set("!*?[") for p in patterns), "docs/ would name web/docs too"

    def ignored(path: str) -> bool:
        return any(path.startswith(p[1:]) if p.endswith("/") else path == p[1:] for p in patterns)

    return [path for path in tracked.split("\0") if path and not ignored(path) and (ROOT / path).is_file()]


def test_the_package_holds_what_users_need_and_nothing_else():
    paths = packed()
    folders = {path.split("/")[0] for path in paths if "/" in path}
    assert not folders & {"tests", "docs", ".github", ".ci"}
    assert {"nodes", "models", "engine", "kernels", "weights", "workflows", "web", "locales", "subgraphs"} <= folders
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= set(paths)
    assert not [path for path in paths if path.startswith("bench/results/")]
    assert sum((ROOT / path).stat().st_size for path in paths) < PACKED_LIMIT


def test_the_package_can_be_installed_with_pip():
    """Every Python package of pyproject.toml is in it, and every folder with code is a package."""
    paths = set(packed())
    listed = {
        p.removeprefix("comfyui_mend").replace(".", "/").strip("/") for p in PROJECT["tool"]["setuptools"]["packages"]
    }
    for folder in listed:
        assert f"{folder}/__init__.py".lstrip("/") in paths, folder
    with_code = {path.rpartition("/")[0] for path in paths if path.endswith(".py")}
    assert with_code <= listed


def test_python_packages_carry_their_files():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    kinds = {".py", ".pyc"}
    for path in packed():
        folder, name = Path(path).parent, Path(path)
        if name.suffix in kinds or folder == Path() or folder.parts[0] in ("bench", "subgraphs"):
            continue
        covered = False
        for package, patterns in data.items():
            inside = package.removeprefix("comfyui_mend").replace(".", "/").strip("/")
            if not inside or path.startswith(f"{inside}/"):
                rest = path.removeprefix(f"{inside}/" if inside else "")
                covered |= any(fnmatch.fnmatch(rest, pattern.replace("**/", "*")) for pattern in patterns)
        assert covered, f"{path} is in no wheel"
