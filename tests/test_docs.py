"""The documentation agrees with the pack: links lead somewhere, methods have pages, nodes and commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.__main__ import COMMANDS
from comfyui_mend.models import catalogue, registry
from comfyui_mend.nodes import node_classes

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".venv", "output", "runs", "node_modules", "build", "dist"}
PAGES = sorted(
    p for p in ROOT.rglob("*.md") if not any(s in SKIPPED or s[0] == "." for s in p.relative_to(ROOT).parts[:-1])
)
METHODS = catalogue.methods()
LANGUAGES = [ROOT / "README.md", ROOT / "README.zh.md"]
WORKFLOWS = {path.stem for path in (ROOT / "workflows").glob("*.json")}
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page):
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = unquote(target).partition("#")
        # ComfyUI's page resolves the pictures of help pages below docs/, not beside the text.
        folder = ROOT / "web" / "docs" if page.is_relative_to(ROOT / "web" / "docs") else page.parent
        file = (folder / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), f"{name(page)} links to {target}"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.id)
def test_a_method_has_a_page_with_its_present_facts(method):
    page = ROOT / "docs" / "methods" / f"{method.id}.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {method.title}\n") and "## When to use it" in text and "## Nodes" in text
    assert catalogue.with_facts(text, method) == text, "run: mend models pages"
    assert method.paper in text and method.weights_licence in text and (not method.arxiv or method.arxiv in text)
    assert not method.workflow or f"workflows/{method.workflow}.json" in text
    assert f"methods/{method.id}.md" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


def test_there_is_no_page_of_a_method_that_is_gone():
    assert {p.stem for p in (ROOT / "docs" / "methods").iterdir()} == {method.id for method in METHODS}


@pytest.mark.parametrize("page", [p for p in PAGES if name(p).startswith(("docs/", "README"))], ids=name)
def test_nodes_and_commands_that_the_documentation_names_exist(page):
    nodes = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in node_classes()}
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\bMend[A-Z]\w+", text)) - {"MendError", "MendExtension"} <= set(nodes)
    assert set(re.findall(r"`mend ([a-z]+)\b", text)) <= set(COMMANDS)
    for title, node_id in re.findall(r"\[([^\]]+)\]\([./]*/web/docs/(\w+)/en\.md\)", text):
        assert title == nodes[node_id].display_name
    for line in re.findall(r"^\| \[[^\]]+\]\([^)]*\) `(Mend\w+)` \|(.*)$", text, re.MULTILINE):
        inputs = {slot.id for slot in nodes[line[0]].inputs or []}
        assert set(re.findall(r"`([a-z_0-9]+)`", line[1].rsplit("|", 2)[-2])) <= inputs, line[0]


@pytest.mark.parametrize("page", LANGUAGES, ids=name)
def test_a_readme_leads_with_the_two_commands_and_to_its_other_language(page):
    text = page.read_text(encoding="utf-8")
    commands = [line.split("#")[0].strip() for line in re.search(r"```sh\n(.*?)```", text, re.DOTALL)[1].splitlines()]
    assert commands == ["make demo", "make test"]
    (other,) = {"README.md", "README.zh.md"} - {page.name}
    assert f"]({other})" in text
    for method in METHODS:
        assert f"docs/methods/{method.id}.md" in text, method.id


@pytest.mark.parametrize("page", LANGUAGES, ids=name)
def test_a_readme_shows_pictures_and_names_only_shipped_workflows(page):
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+\.(?:jpg|png))\)", text)
    assert len(pictures) >= 3 and all((ROOT / p).stat().st_size < 250_000 for p in pictures)
    assert set(re.findall(r"workflows/(\w+)\.json", text)) <= WORKFLOWS


def test_both_readmes_have_the_same_parts():
    one, other = (page.read_text(encoding="utf-8") for page in LANGUAGES)
    for pattern in (r"^## ", r"^!\[", r"^```"):
        assert len(re.findall(pattern, one, re.MULTILINE)) == len(re.findall(pattern, other, re.MULTILINE)), pattern
    assert set(re.findall(r"workflows/(\w+)\.json", one)) == set(re.findall(r"workflows/(\w+)\.json", other))


def test_the_network_of_thirty_lines_loads_and_restores(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "adding-a-network.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    file = tmp_path / "my_net.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("comfyui_mend.models.my_net", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (architecture,) = module.ARCHITECTURES
    known = registry.architectures()
    monkeypatch.setattr(registry, "architectures", lambda: [architecture, *known])
    checkpoint = tmp_path / "anything.pth"
    torch.save({"params": architecture.build({"width": 8, "depth": 3}).state_dict()}, checkpoint)
    restorer = models.load(checkpoint)
    assert restorer.architecture.id == "my-net" and restorer.config == {"width": 8, "depth": 3}
    assert restorer(torch.rand(1, 3, 17, 23)).shape == (1, 3, 17, 23)
