"""How a bench tells what it found: lines of Markdown on the terminal and, where asked, in a file with figures beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import models


def publish(lines: Sequence[str], out: Path | None = None, figures: Any = None) -> None:
    """Prints the lines, and writes them and the figures as `write` does."""
    print("\n".join(lines) + "\n")
    write(lines, out, figures)


def write(lines: Sequence[str], out: Path | None, figures: Any = None) -> None:
    """The lines to `out` (.md), whose folder need not be there, and the figures, if any, beside it (.json). None: nothing."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if figures is not None:
        out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def trained(name: str, restorer: models.Restorer, unit: str = "M") -> str:
    """A file of trained weights in words: its parameters in thousands (k) or millions (M), how long it was trained."""
    training = json.loads(restorer.metadata.get("training") or "{}")
    size = f"{restorer.parameters / 1e3:.0f} k" if unit == "k" else f"{restorer.parameters / 1e6:.2f} M"
    return f"`{name}` ({size} parameters; {training.get('steps', '?')} steps, {training.get('minutes', '?')} minutes of training)"
