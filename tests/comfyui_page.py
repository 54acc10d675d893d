"""Opens workflows in the real page of a ComfyUI server, looks at them, runs them and takes pictures.

    python tests/comfyui_page.py [NAME ...] --out DIR [--no-run] [--rewrite]

Starts ComfyUI on the CPU with a folder of its own for inputs and outputs (this pack is the only custom node), opens
each workflow in headless Chromium and reports missing nodes, alerts of the page, boxes that overlap as the page draws
them, differences between what the page would send and the API twin, and errors of the run; `DIR/NAME.png` shows the
page afterwards. Workflows that need files which do not come with Mend are opened and checked, not run. `--rewrite`
replaces the workflow file by what the page saves. Needs `playwright` and Chromium (CHROMIUM_PATH, /usr/bin/chromium);
ComfyUI is found as by `mend run --engine comfyui`, its Python by MEND_COMFYUI_PYTHON or a venv beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfyui_mend.engine.comfyui import find_comfyui
from comfyui_mend.engine.workflow_format import to_api

try:
    from .make_workflow import classes
except ImportError:  # run as a script
    from make_workflow import classes

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run --disable-quic"
).split()
DRAWN_BY_THE_PAGE = {("PreviewAny", "preview")}
"""Widgets that only the page knows: the text box of a node that shows text."""
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.Persist": False,  # else a reload brings the last workflow back, over the one that is opened next
    "Comfy.Workflow.ShowMissingModelsWarning": False,  # `needs_download` says which workflows are not run
}
READY = (
    "window.app && window.app.graph && window.app.extensionManager && window.LiteGraph && "
    "Object.keys(window.LiteGraph.registered_node_types).length > 50"
)
LOOK = """() => ({
    nodes: app.graph._nodes.map(n => ({
        name: `${n.type} ${n.id}`, box: Array.from(n.getBounding()),
        missing: !(n.type in LiteGraph.registered_node_types), errors: Boolean(n.has_errors)})),
    alerts: Array.from(document.querySelectorAll('.p-toast-message, .p-dialog')).map(e => e.innerText)})"""


def find_python(comfyui: Path) -> str:
    """The Python that has ComfyUI's packages."""
    named = os.environ.get("MEND_COMFYUI_PYTHON")
    beside = [comfyui / folder / "bin" / "python" for folder in ("venv", "../venv", ".venv")]
    beside += [comfyui / folder / "Scripts" / "python.exe" for folder in ("venv", "../venv", ".venv")]
    return named or next((str(path) for path in beside if path.is_file()), sys.executable)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running ComfyUI."""

    def __init__(self, port: int, base: Path, log: Path) -> None:
        self.port, self.base, self.log = port, base, log
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None


@contextmanager
def server(inputs: Path = ROOT / "workflows" / "inputs", timeout: float = 240) -> Iterator[Server]:
    """Starts ComfyUI on a free local port with a temporary base folder; stops it afterwards."""
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("no ComfyUI found; set COMFYUI_PATH")
    base, port = Path(tempfile.mkdtemp(prefix="mend-page-")), _free_port()
    for name in ("models", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir()
    shutil.copytree(inputs, base / "input")
    (base / "custom_nodes" / "ComfyUI-Mend").symlink_to(ROOT)
    log = base / "server.log"
    command = [find_python(comfyui), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=comfyui, stdout=output, stderr=subprocess.STDOUT, env=environment)
    running = Server(port, base, log)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                running.ask("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"ComfyUI did not start:\n{log.read_text()[-4000:]}") from None
                time.sleep(0.5)
        running.ask("/settings", SETTINGS)
        yield running
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(base, ignore_errors=True)


@contextmanager
def browser_page(running: Server) -> Iterator[Any]:
    """ComfyUI's page in headless Chromium, ready to load workflows."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM_PATH", "/usr/bin/chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        page = chromium.new_page(viewport={"width": 1600, "height": 1000})
        reload(page, running)
        yield page
        chromium.close()


def reload(page: Any, running: Server) -> None:
    """Opens the page anew, without the dialogs and drafts of what went before."""
    if page.url.startswith(running.url):
        page.evaluate("() => { localStorage.clear(); sessionStorage.clear() }")
    page.goto(running.url, timeout=180_000)  # a busy machine takes its time
    page.wait_for_function(READY, timeout=180_000)
    page.wait_for_timeout(1500)


def box_overlaps(nodes: list[dict[str, Any]]) -> list[str]:
    """Names of pairs of nodes that lie on each other, from the page's own boxes [x, y, width, height]."""
    found = []
    for index, one in enumerate(nodes):
        for other in nodes[index + 1 :]:
            (x, y, w, h), (u, v, s, t) = one["box"], other["box"]
            if min(x + w, u + s) - max(x, u) > 1 and min(y + h, v + t) - max(y, v) > 1:
                found.append(f"{one['name']} and {other['name']} overlap on the page")
    return found


def differences(sent: dict[str, Any], twin: dict[str, Any]) -> list[str]:
    """Where what the page would send differs from the API file."""
    found = [f"node {n} is only in one of the two forms" for n in sorted(set(sent) ^ set(twin))]
    for node_id in set(sent) & set(twin):
        ours, theirs = twin[node_id], sent[node_id]
        if ours["class_type"] != theirs["class_type"]:
            found.append(f"node {node_id}: {theirs['class_type']} instead of {ours['class_type']}")
        for name in sorted(set(ours["inputs"]) | set(theirs["inputs"])):
            a, b = ours["inputs"].get(name), theirs["inputs"].get(name)
            if a != b and name != "video-preview" and (ours["class_type"], name) not in DRAWN_BY_THE_PAGE:
                found.append(
                    f"node {node_id} ({ours['class_type']}).{name}: the page sends {b!r}, the API file has {a!r}"
                )
    return found


def fresh_nodes(page: Any) -> list[str]:
    """Places every node that both engines know on an empty page: the page must send what our conversion makes of it."""
    known = classes()
    page.evaluate("() => app.graph.clear()")
    made = page.evaluate(
        """types => { for (const [i, type] of types.entries()) {
            const node = LiteGraph.createNode(type); if (!node) continue;
            node.pos = [(i % 10) * 500, Math.floor(i / 10) * 700]; app.graph.add(node); }
            return JSON.stringify(app.graph.serialize()) }""",
        sorted(known),
    )
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    ui = json.loads(made)
    absent = set(known) - {node["type"] for node in ui["nodes"]}
    return [f"the page has no node {name}" for name in sorted(absent)] + differences(sent, to_api(ui, known))


def open_workflow(page: Any, ui: dict[str, Any], name: str) -> dict[str, Any]:
    """Loads a workflow; what the page shows of it: its nodes with their boxes, and its alerts."""
    page.evaluate("async ([ui, name]) => { await app.loadGraphData(ui, true, true, name) }", [ui, name])
    page.wait_for_timeout(800)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(500)
    return page.evaluate(LOOK)


def run_workflow(page: Any, running: Server, timeout: float) -> list[str]:
    """Queues what the page shows and waits; what went wrong."""
    before = set(running.ask("/history"))
    page.evaluate("async () => { await app.queuePrompt(0, 1) }")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        finished = {k: v for k, v in running.ask("/history").items() if k not in before}
        if finished:
            entry = next(iter(finished.values()))
            status = entry["status"]
            failed = [
                data for event, data in status["messages"] if event in ("execution_error", "execution_interrupted")
            ]
            lines = [
                f"{d.get('node_type')} {d.get('node_id')}: {d.get('exception_message', 'interrupted')}" for d in failed
            ]
            return lines if status["status_str"] == "success" else lines or [f"the run ended as {status['status_str']}"]
        alerts = page.evaluate(LOOK)["alerts"]
        if alerts:
            return [f"alert: {text}" for text in alerts]
        time.sleep(0.3)
    return [f"not finished after {timeout} s"]


def needs_download(ui: dict[str, Any]) -> bool:
    """True if a node names a file that does not come with Mend."""
    return any((node.get("properties") or {}).get("models") for node in ui["nodes"])


def inspect(page: Any, running: Server, path: Path, out: Path, run: bool, rewrite: bool, timeout: float) -> list[str]:
    """Opens, checks, runs and photographs one workflow; what is wrong with it."""
    name, ui = path.stem, json.loads(path.read_text(encoding="utf-8"))
    if page.evaluate(LOOK)["alerts"]:
        reload(page, running)
    seen = open_workflow(page, ui, name)
    problems = [f"{n['name']}: the page does not know this node" for n in seen["nodes"] if n["missing"]]
    problems += [f"alert: {text}" for text in seen["alerts"]]
    problems += box_overlaps(seen["nodes"])
    twin = path.parent / "api" / path.name
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    problems += differences(sent, json.loads(twin.read_text(encoding="utf-8"))) if twin.is_file() else ["no API twin"]
    if run and not problems and not needs_download(ui):
        problems += run_workflow(page, running, timeout)
        page.wait_for_timeout(1200)
        problems += box_overlaps(page.evaluate(LOOK)["nodes"])
    out.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(out / f"{name}.png"))
    if rewrite and not problems:
        saved = page.evaluate("() => JSON.stringify(app.graph.serialize(), null, 2)")
        path.write_text(saved + "\n", encoding="utf-8")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="workflows, by name (default: all)")
    parser.add_argument("--workflows", default=str(ROOT / "workflows"), help="the folder they lie in")
    parser.add_argument("--out", default="output/pages", help="where the screenshots go")
    parser.add_argument("--no-run", action="store_true", help="open and check only")
    parser.add_argument("--rewrite", action="store_true", help="replace the files by what the page saves")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run")
    args = parser.parse_args()
    folder, wrong = Path(args.workflows), 0
    paths = [folder / f"{name}.json" for name in args.names] or sorted(folder.glob("*.json"))
    with server(folder / "inputs") as running, browser_page(running) as page:
        problems = fresh_nodes(page)
        print(f"every node by itself: {'ok' if not problems else ''}", *problems, sep="\n  " if problems else "")
        wrong += bool(problems)
        for path in paths:
            problems = inspect(page, running, path, Path(args.out), not args.no_run, args.rewrite, args.timeout)
            print(f"{path.stem}: {'ok' if not problems else ''}", *problems, sep="\n  " if problems else "")
            wrong += bool(problems)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
