"""What the experiments share: tiny networks, the same budget for every arm, several seeds, tables with mean and spread."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ... import models
from ...models.layers.padding import crop, pad_to_multiple
from ...training import dataset_sources, datasets, finetune, task_text
from ...training.objectives.base import Objective
from ...training.trainer import psnr

NAFNET = {"width": 8, "enc_blk_nums": (1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1)}
MOCE = {
    "dim": 8,
    "num_blocks": (1, 1, 1),
    "num_dec_blocks": (1, 1),
    "heads": (1, 2, 4),
    "num_refinement_blocks": 1,
}
RCOT = {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 1, 2, 2)}
DAMAGE = "noise: sigma 25\nrain\nhaze\nlow-light\njpeg: quality 10"
DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "experiments"
Scores = dict[str, float]
Arm = Callable[[int], Scores]
"""One way to train: from a seed to its scores."""


def options(description: str, steps: int, crop: int = 48) -> argparse.Namespace:
    """The arguments that every experiment takes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps of an arm ({steps})")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--crop", type=int, default=crop)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=DOCS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def fresh(system: str, config: Mapping[str, Any], seed: int) -> models.Restorer:
    """A new network that begins near the identity, which short runs have no time to find."""
    torch.manual_seed(seed)
    architecture = models.registry.find(system, config)
    module = architecture.build(config)
    with torch.no_grad():
        last = module.ending if hasattr(module, "ending") else module.output
        last.weight.mul_(0.1)
    return models.Restorer(architecture, dict(config), module)


def learn(
    chosen: argparse.Namespace,
    restorer: models.Restorer,
    objective: Objective,
    seed: int,
    steps: int,
    learning_rate: float = 2e-3,
) -> models.Restorer:
    """The averaged network after `steps` of training on the photographs of train/."""
    source = dataset_sources.clean_folder(
        chosen.photos / "train", task_text.tasks_from_text(DAMAGE), held_out_share=0.0
    )
    settings = finetune.settings(
        steps, learning_rate=learning_rate, size=chosen.crop, batch=chosen.batch, seed=seed, save_every=1e9
    )
    with tempfile.TemporaryDirectory() as folder:
        tuner = finetune.FineTuner(
            finetune.trainable_copy(restorer), source, objective, settings, Path(folder), keep="last", held_out=0
        )
        return tuner.train()


def held_out(chosen: argparse.Namespace, size: int = 128) -> list[datasets.Sample]:
    """Every kind of damage on every validation photograph; always the same."""
    source = dataset_sources.clean_folder(
        chosen.photos / "validation", task_text.tasks_from_text(DAMAGE), held_out_share=0.0
    )
    return source.held_out(size, count=len(source.entries))


@torch.inference_mode()
def judge(
    restorer: models.Restorer,
    samples: Sequence[datasets.Sample],
    run: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Scores:
    """Mean PSNR in dB of each kind of damage, and of the kinds. `run` replaces how the network restores."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        padded, size = pad_to_multiple(sample.damaged[None], restorer.multiple_of)
        restored = crop(run(padded), size) if run else restorer(sample.damaged[None])
        found.setdefault(sample.label, []).append(float(psnr(restored.clamp(0, 1), sample.clean[None])))
    scores = {label: statistics.fmean(values) for label, values in found.items()}
    return {**scores, "mean": statistics.fmean(scores.values())}


def damaged_scores(samples: Sequence[datasets.Sample]) -> Scores:
    """Of the damaged pictures themselves."""
    found: dict[str, list[float]] = {}
    for s in samples:
        found.setdefault(s.label, []).append(float(psnr(s.damaged[None], s.clean[None])))
    scores = {label: statistics.fmean(values) for label, values in found.items()}
    return {**scores, "mean": statistics.fmean(scores.values())}


def conduct(chosen: argparse.Namespace, name: str, text: str, arms: Mapping[str, Arm], about: str) -> None:
    """Runs every arm with every seed, going on where an earlier call stopped, and writes OUT/NAME.md after each.

    text: what is asked, in Markdown; about: one line on network and budget.
    """
    chosen.out.mkdir(parents=True, exist_ok=True)
    record = chosen.out / f"{name}.json"
    key = f"{chosen.steps} steps, {chosen.batch} crops of {chosen.crop} px"
    arguments = f"--steps {chosen.steps} --batch {chosen.batch} --crop {chosen.crop} --seeds {chosen.seeds}"
    done: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    if done.get("budget") != key:
        done = {"budget": key, "runs": {}, "input": damaged_scores(held_out(chosen))}
    done["arguments"] = arguments
    for seed in range(chosen.seeds):
        for arm, train in arms.items():
            runs = done["runs"].setdefault(arm, {})
            if str(seed) in runs:
                continue
            begun = time.process_time()
            scores = train(seed)
            runs[str(seed)] = {**scores, "_cpu_seconds": round(time.process_time() - begun, 1)}
            print(f"{arm}, seed {seed}: {scores}", flush=True)
            record.write_text(json.dumps(done, indent=1) + "\n")
            (chosen.out / f"{name}.md").write_text(report(name, text, about, done))


def report(name: str, text: str, about: str, done: Mapping[str, Any]) -> str:
    """The page of an experiment, from what has been run so far."""
    columns = [c for c in done["input"] if c != "mean"] + ["mean"]
    extra = sorted({k for runs in done["runs"].values() for r in runs.values() for k in r} - {*columns, "_cpu_seconds"})
    head = [*columns, *extra]
    lines = [f"| arm | seeds | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    given = [f"{done['input'][c]:.2f}" if c in done["input"] else "" for c in head]
    lines.append(f"| damaged picture | | {' | '.join(given)} |")
    for arm, runs in done["runs"].items():
        cells = []
        for column in head:
            values = [r[column] for r in runs.values() if column in r]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "")
        lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    seconds = [r["_cpu_seconds"] for runs in done["runs"].values() for r in runs.values()]
    lines += ["", *_differences(done["runs"])]
    return f"""{text.strip()}

{about} PSNR in dB on the validation photographs (RGB, central 128 pixels), mean ± standard deviation over seeds; higher is better.

{chr(10).join(lines)}

Budget of an arm: {done["budget"]}, {min(seconds):.0f} to {max(seconds):.0f} s of one CPU core. Run on {date.today().isoformat()} by
`python -m comfyui_mend.bench.experiments.{name.replace("-", "_")} --photos photos/ready {done["arguments"]}`; figures of single runs in [{name}.json]({name}.json).
"""


def _differences(runs: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """Each arm against the first, seed by seed."""
    first, *others = runs
    lines = []
    for arm in others:
        shared = [s for s in runs[arm] if s in runs[first]]
        values = [runs[arm][s]["mean"] - runs[first][s]["mean"] for s in shared]
        if values:
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            lines.append(f"- {arm} against {first}, same seed: {statistics.fmean(values):+.2f}{spread} dB")
    return lines
