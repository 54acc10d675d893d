"""Runs parity cases through the project's public functions.

    python tests/parity.py CASE_DIR... --out DIR

Builds what each case.json describes, fills weights and inputs as the case says, and writes every output to
DIR/<case name>.safetensors. Never reads expected.safetensors. How a method's cases are called is in
tests/parity_adapters/<system>.py: a function `run(case: Case) -> dict[str, Tensor or array]`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from comfyui_mend import models

HERE = Path(__file__).resolve().parent


def load(path: Path) -> Any:
    """The module of a file that lies beside this one."""
    spec = importlib.util.spec_from_file_location(f"mend_parity_{path.stem.replace('-', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fill = load(HERE / "data" / "fill.py")


class Case:
    """One case folder: its description, and its weights and inputs made from names and shapes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.json: dict[str, Any] = json.loads((folder / "case.json").read_text())
        self.system: str = self.json["system"]
        self.variant: str = self.json.get("variant", "")
        self.config: dict[str, Any] = self.json.get("config", {})
        self.outputs: dict[str, Any] = self.json.get("outputs", {})

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Every named input as a tensor."""
        return {name: self._input(spec) for name, spec in self.json.get("inputs", {}).items()}

    @staticmethod
    def _input(spec: Mapping[str, Any]) -> torch.Tensor:
        if "const" in spec:
            if np.asarray(spec["const"]).dtype.kind == "U":  # names of tasks
                return spec["const"]
            value = torch.as_tensor(spec["const"])
            return value.expand(spec["shape"]).clone() if "shape" in spec else value
        values = fill.make_input(spec["tag"], tuple(spec["shape"]), spec.get("kind", "image"))
        return torch.from_numpy(values) * spec.get("scale", 1.0) + spec.get("shift", 0.0)

    def fill(self, key: str, shape: tuple[int, ...], name: str | None = None) -> torch.Tensor:
        """The case's values for the state-dict entry `key` (`name`: the name the recipe goes by, if another)."""
        rule, gain = "auto", 1.0
        for pattern, its_rule, its_gain in self.json.get("overrides", []):
            if re.search(pattern, key):
                rule, gain = its_rule, its_gain
                break
        return torch.from_numpy(np.asarray(fill.fill_tensor(name or key, tuple(shape), rule, gain)))

    def computed(self, key: str) -> bool:
        """Whether the network builds this entry itself."""
        return any(p == key or re.search(p, key) for p in self.json.get("computed_buffers", []))

    def state_dict(self, entries: list | None = None) -> dict[str, torch.Tensor]:
        """The state dict that the case describes, without the entries that the network computes itself."""
        entries = self.json["state_dict"] if entries is None else entries
        return {
            key: self.fill(key, tuple(shape)).to(getattr(torch, dtype))
            for key, shape, dtype in entries
            if not self.computed(key)
        }

    def check_manifest(self, module: nn.Module, entries: list | None = None) -> None:
        """Raises AssertionError unless the module has exactly the keys, shapes and dtypes of the case."""
        entries = self.json["state_dict"] if entries is None else entries
        want = {key: (tuple(shape), dtype) for key, shape, dtype in entries}
        got = {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in module.state_dict().items()}
        missing, extra = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
        wrong = sorted(k for k in want.keys() & got.keys() if want[k] != got[k])
        assert not (missing or extra or wrong), (
            f"{self.name}: missing {missing[:5]}, extra {extra[:5]}, "
            f"different {[(k, want[k], got[k]) for k in wrong[:5]]}"
        )

    @property
    def generation(self) -> dict[str, str]:
        """The setting that tells generations of one network apart, which cases name beside their config."""
        return {"arch": self.json["arch"]} if self.json.get("arch") else {}

    def check_layout(self, entries: list | None = None, **config: Any) -> dict[str, torch.Tensor]:
        """For a case without outputs: the network has its keys and shapes. No memory is taken for the weights.

        entries: the part of the state dict that is the network's; all of it if not given. config: more settings.
        """
        with torch.device("meta"):
            self.check_manifest(models.create(self.system, {**self.config, **config}), entries)
        return {}

    def module(self, **config: Any) -> nn.Module:
        """`models.create(system, config)` with exactly the case's keys and its weights; eval mode."""
        module = models.create(self.system, {**self.config, **config})
        self.check_manifest(module)
        result = module.load_state_dict(self.state_dict(), strict=False)
        assert not result.unexpected_keys and all(self.computed(k) for k in result.missing_keys), result
        return module.eval().requires_grad_(False)


def run_case(folder: Path) -> dict[str, np.ndarray]:
    """All outputs of a case as arrays."""
    case = Case(folder)
    adapter = HERE / "parity_adapters" / f"{case.system.replace('-', '_')}.py"
    if not adapter.exists():
        raise ValueError(f"{case.name}: the system {case.system!r} is none of those in {adapter.parent.name}/")
    method = load(adapter)
    outputs = method.run(case) if case.outputs else getattr(method, "check_layout", Case.check_layout)(case)
    return {
        name: np.ascontiguousarray(v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else np.asarray(v))
        for name, v in outputs.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the default")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for folder in options.cases:
        try:
            outputs = run_case(folder)
        except Exception:  # told with its traceback and counted: one broken case must not hide what the others give
            traceback.print_exc()
            print(f"FAIL {folder.name}: raised")
            failed += 1
            continue
        save_file(outputs, str(options.out / f"{folder.name}.safetensors"))
        print(f"done {folder.name}: {len(outputs)} outputs")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
