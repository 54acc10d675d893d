"""`mend demo`: the shipped photo through the shipped workflow with the shipped weights."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..engine import folders
from ..engine.runner import Runner
from ..engine.workflow_format import read, to_api
from .cli_run import builtin_classes, find_workflow

WORKFLOW = "restore_photo"


def main(arguments: Sequence[str]) -> int:
    """Runs the workflow, names the files and prints the figures; returns 0 if every output node ran."""
    parser = argparse.ArgumentParser(prog="mend demo", description=f"Runs the workflow {WORKFLOW} on its own photo.")
    parser.add_argument("--output", default="output", help='where results go (default: "output" here)')
    args = parser.parse_args(arguments)
    folders.set_folders(output=args.output)
    classes, start = builtin_classes(), time.perf_counter()
    prompt = to_api(read(find_workflow(WORKFLOW)), classes)
    result = Runner(classes).run(prompt)
    if not result.complete:
        sys.stderr.write(f"mend demo: {result.describe()}\n")
        return 1
    for node_id in prompt:
        shown, title = result.outputs.get(node_id, {}), (prompt[node_id].get("_meta") or {}).get("title", node_id)
        for picture in shown.get("images", []):
            where = Path(folders.output_directory(), picture["subfolder"], picture["filename"])
            sys.stdout.write(f"{title}: {where}\n")
        for text in shown.get("text", []):
            sys.stdout.write(f"{title}: {text}\n")
    sys.stdout.write(f"done in {time.perf_counter() - start:.1f} s\n")
    return 0
