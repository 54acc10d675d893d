"""`mend batch`: runs a workflow for every picture of a folder."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..engine import batch, folders, host, ray_workers
from ..engine.runner import Runner
from ..engine.validation import Prompt
from ..engine.workflow_format import read, to_api
from .cli_run import assign, builtin_classes, find_node, find_workflow


def main(arguments: Sequence[str]) -> int:
    """Returns 0 if every picture was done (or had been before), 1 if one failed."""
    args = _parser().parse_args(arguments)
    classes = builtin_classes()
    prompt = to_api(read(find_workflow(args.workflow)), classes)
    assign(prompt, args.set)
    node = find_node(prompt, args.node, "--node") if args.node else batch.loader_of(prompt)
    inputs, outputs = args.inputs.resolve(), args.outputs.resolve()
    names = batch.find_pictures(inputs, outputs)
    folders.set_folders(inputs=[inputs])
    given = {"prompt": prompt, "node": node, "inputs": str(inputs), "outputs": str(outputs), "device": args.device}
    if args.ray:
        run_all = functools.partial(_on_ray, args.ray, given, args.workers)
    else:
        run_all = functools.partial(batch.one_by_one, make_worker(**given))
    with tqdm(total=len(names), desc="pictures", disable=args.quiet or not sys.stderr.isatty()) as bar:
        report = batch.run_batch(
            names,
            inputs,
            outputs,
            batch.settings_of(prompt, node, classes),
            lambda waiting: _shown(bar, run_all(waiting)),
            title=f"{Path(args.workflow).stem} for {inputs.name}",
            again=args.again,
        )
    sys.stdout.write(f"{report.text()}\n")
    return 1 if report.count("failed") else 0


def make_worker(prompt: Prompt, node: str, inputs: str, outputs: str, device: str | None) -> batch.Worker:
    """What runs pictures, here or in a worker process."""
    host.set_device(device)
    return batch.Worker(Runner(builtin_classes()), prompt, node, Path(inputs), Path(outputs))


def _on_ray(address: str, given: dict, workers: int, names: list[str]):
    return ray_workers.run_all(address, make_worker, given, names, workers)


def _shown(bar: tqdm, outcomes):
    for outcome in outcomes:
        bar.update()
        yield outcome


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mend batch",
        description="Runs a workflow for every picture of a folder, in place of the one that Load Image names. Results "
        "keep names and sub-folders. What is done is skipped, a picture that fails does not stop the others; a report is "
        "left in the output folder.",
    )
    parser.add_argument("workflow", help="a workflow file, or the name of one that comes with Mend")
    parser.add_argument("--inputs", type=Path, required=True, metavar="DIR", help="the pictures, sub-folders included")
    parser.add_argument("--outputs", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--node", metavar="NODE", help="which Load Image node, if there are several: id or title")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change an input first, as in mend run"
    )
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--device", help="where to compute, as PyTorch names it (default: the best there is)")
    parser.add_argument("--ray", metavar="ADDRESS", help='spread over a Ray cluster; "local" starts one here')
    parser.add_argument("--workers", type=int, default=0, help="with --ray: how many (default: one per GPU)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
