"""Writes parity/certificate.json and .md: which recorded cases the networks meet, and by how much.

    python tests/certificate.py CASE_DIR... [--slow NAME...] [--again] [--threads N]

Every case is run as tests/parity.py does and compared as tests/data/check.py does. Cases that the certificate has already
for the same case.json are kept unless --again; those named by --slow are listed as not run here.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import parity
from comfyui_mend import models
from comfyui_mend.errors import MendError

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "parity" / "certificate.json"


check = parity.load(HERE / "data" / "check.py")


def certify(folder: Path) -> dict[str, Any]:
    """One case's entry: worst deviation of all its outputs, in absolute terms and as a share of what is allowed."""
    case = json.loads((folder / "case.json").read_text())
    entry: dict[str, Any] = {
        "case": folder.name,
        "system": case["system"],
        "network": architecture(case),
        "variant": case.get("variant", ""),
        "digest": digest(folder),
    }
    recorded = folder / "expected.safetensors"
    if not case.get("outputs") or not recorded.exists():
        parity.run_case(folder)  # builds the network and checks names and shapes
        return {**entry, "result": "ok", "values": 0, "note": "names and shapes only"}
    expected, start = load_file(recorded), time.perf_counter()
    produced = parity.run_case(folder)
    entry["seconds"] = round(time.perf_counter() - start, 1)
    worst = {"share": 0.0, "error": 0.0, "output": "", "rtol": case["rtol"], "atol": case["atol"]}
    names, values = [n for n in case["outputs"] if n in expected], 0
    for name in names:
        if name not in produced or produced[name].size != expected[name].size:
            return {**entry, "result": "failed", "note": f"{name}: not produced, or of another shape"}
        want, got = expected[name].astype(np.float64), produced[name].astype(np.float64).reshape(expected[name].shape)
        if not np.isfinite(got).all():
            return {**entry, "result": "failed", "note": f"{name}: not finite"}
        rtol, atol = check.tolerance(case, name, want)
        difference = np.abs(got - want)
        share = np.where(difference == 0, 0.0, difference / np.maximum(atol + rtol * np.abs(want), 1e-300))
        values += want.size
        worst["error"] = max(worst["error"], float(difference.max(initial=0.0)))
        if share.max(initial=0.0) >= worst["share"]:
            worst.update(share=float(share.max(initial=0.0)), output=name, rtol=rtol, atol=atol)
    worst = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in worst.items()}
    return {
        **entry,
        "result": "ok" if worst["share"] <= 1 else "failed",
        "outputs": len(names),
        "values": values,
        **worst,
    }


def architecture(case: dict[str, Any]) -> str:
    """Id of the network that the case is about; "" for an operator or a procedure."""
    if not case.get("state_dict"):
        return ""
    try:
        return models.registry.find(case["system"], case.get("config", {})).id
    except MendError:
        return ""


def digest(folder: Path) -> str:
    """Of the description and the recorded numbers: tells whether a case has changed."""
    found = hashlib.sha256()
    for name in ("case.json", "expected.safetensors"):
        if (folder / name).exists():
            found.update((folder / name).read_bytes())
    return found.hexdigest()[:16]


def text(certificate: dict[str, Any]) -> str:
    """The certificate for people."""
    entries = certificate["cases"]
    ran = [e for e in entries if e["result"] != "not run"]
    ok = [e for e in ran if e["result"] == "ok"]
    lines = [
        "# Parity certificate",
        "",
        "Numbers recorded from reference implementations of the published methods, and how far this pack's networks are from",
        "them with the same weights and inputs. *Share* is the largest deviation divided by what the case allows",
        "(atol + rtol x |recorded value|): below 1 is a pass. Written by `python tests/certificate.py`. Recorded cases that are not",
        "listed here were not run for it.",
        "",
        f"{len(ok)} of {len(ran)} cases pass, {sum(e.get('values', 0) for e in ok):,} numbers compared; "
        f"{len(entries) - len(ran)} not run here. {certificate['date']}; {certificate['versions']}.",
        "",
        "| case | network | variant | outputs | numbers | largest error | share | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        network = e["network"] or e["system"]
        figures = f"{e.get('outputs', '')} | {e.get('values', '')} | {e.get('error', '')} | {e.get('share', '')}"
        result = e["result"] + (f": {e['note']}" if e.get("note") else "")
        lines.append(f"| {e['case']} | {network} | {e['variant']} | {figures} | {result} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR")
    parser.add_argument("--slow", nargs="*", default=[], help="names of cases to list as not run")
    parser.add_argument("--again", action="store_true", help="run cases that are in the certificate already")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    known = {e["case"]: e for e in json.loads(TARGET.read_text())["cases"]} if TARGET.is_file() else {}
    for folder in args.cases:
        old = known.get(folder.name)
        if old and old["result"] == "ok" and old["digest"] == digest(folder) and not args.again:
            continue
        if folder.name in args.slow:
            case = json.loads((folder / "case.json").read_text())
            entry = {
                "case": folder.name,
                "system": case["system"],
                "network": architecture(case),
                "variant": case.get("variant", ""),
                "digest": digest(folder),
                "result": "not run",
                "note": "takes minutes; `python tests/certificate.py` on it alone runs it",
            }
        else:
            try:
                entry = certify(folder)
            except Exception as error:
                entry = {"case": folder.name, "system": "", "network": "", "variant": "", "digest": digest(folder)}
                entry |= {"result": "failed", "note": f"{type(error).__name__}: {error}"[:300]}
        known[folder.name] = entry
        print(f"{entry['result']:<8} {folder.name} {entry.get('share', '')} {entry.get('note', '')}", flush=True)
        certificate = {
            "date": datetime.date.today().isoformat(),
            "versions": f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}, CPU, float32",
            "cases": sorted(known.values(), key=lambda e: e["case"]),
        }
        TARGET.parent.mkdir(exist_ok=True)
        rows = ",\n".join(json.dumps(e) for e in certificate["cases"])
        head = json.dumps({k: v for k, v in certificate.items() if k != "cases"})[:-1]
        TARGET.write_text(f'{head}, "cases": [\n{rows}\n]}}\n', encoding="utf-8")
        TARGET.with_suffix(".md").write_text(text(certificate), encoding="utf-8")
    return 1 if any(e["result"] == "failed" for e in known.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
