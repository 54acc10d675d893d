"""What was compared with reference implementations of the published networks: the certificate that comes with the pack."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from .host import PACK

FILE = PACK / "parity" / "certificate.json"
"""Written by tests/certificate.py."""


@lru_cache(maxsize=1)
def certificate() -> dict[str, Any]:
    """The certificate; without its file one that has no cases."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"cases": [], "date": "", "versions": ""}


def summary(architecture_id: str) -> str:
    """One line: how many recorded cases of a network are met, and the worst deviation."""
    cases = [c for c in certificate()["cases"] if c["network"] == architecture_id]
    ran = [c for c in cases if c["result"] != "not run"]
    if not ran:
        rest = f"; {len(cases)} recorded cases were not run" if cases else ""
        return f"no comparison with a reference implementation on record{rest}"
    met = [c for c in ran if c["result"] == "ok"]
    worst = max(met, key=lambda c: c.get("share", 0), default=None)
    text = f"{len(met)} of {len(ran)} recorded cases met, {sum(c.get('values', 0) for c in met):,} numbers"
    if worst and worst.get("share"):
        text += f"; largest deviation {worst['error']:.2g} ({worst['case']}), {100 * worst['share']:.2g} % of what its case allows"
    return f"{text} ({certificate()['date']})"
