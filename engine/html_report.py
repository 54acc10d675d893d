"""A page about a restoration: one HTML file with everything in it, before and after under a slider."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError
from . import folders, host, quality
from .pictures import to_pil
from .report import matched, metrics_table
from .values import check_image, check_values

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 0 0 2.5rem; } figcaption { margin-top: .4rem; opacity: .8; }
.pair { position: relative; overflow: hidden; line-height: 0; border-radius: 6px; }
.pair img { width: 100%; height: auto; } .pair .before { position: absolute; inset: 0; clip-path: inset(0 50% 0 0); }
.pair span { position: absolute; bottom: 8px; padding: 0 8px; background: #000a; color: #fff; border-radius: 4px;
  font-size: 13px; line-height: 1.7; } .pair .b { left: 8px; } .pair .a { right: 8px; }
input[type=range] { width: 100%; margin: .6rem 0 0; }
.extras { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.extras img { width: 100%; height: auto; }
pre { white-space: pre-wrap; padding: 1rem; border: 1px solid var(--line); border-radius: 6px; overflow-wrap: anywhere; }
"""
SCRIPT = """
for (const slider of document.querySelectorAll('input[type=range]')) {
  const before = slider.parentElement.querySelector('.before');
  slider.addEventListener('input', () => { before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`; });
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def data_uri(image: torch.Tensor, jpeg_quality: int = 90, largest: int = 1600) -> str:
    """[C, H, W] in 0..1 as a JPEG data URI, made smaller if its longer side is more than `largest` pixels."""
    picture = to_pil(image[:3] if image.shape[0] >= 3 else image[:1])
    picture.thumbnail((largest, largest))
    stored = io.BytesIO()
    picture.save(stored, "JPEG", quality=jpeg_quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stored.getvalue()).decode("ascii")


def _check(before: torch.Tensor, after: torch.Tensor, reference: torch.Tensor | None = None) -> None:
    check_image(before, "before")
    check_image(after, "after")
    if len(before) not in (1, len(after)):
        raise InputError(f"before: {len(before)} pictures, but after has {len(after)}; use one, or one per picture")
    if reference is None:
        return
    check_image(reference, "reference")
    if len(reference) > 1 and {len(before), len(after)} - {1, len(reference)}:
        raise InputError(
            f"reference: {len(reference)} pictures, but after has {len(after)}; use one, or one per picture"
        )


def figures(before: torch.Tensor, after: torch.Tensor, reference: torch.Tensor | None = None) -> str:
    """Noise and blur before and after; with a reference also how close both are to it. A few lines of text.

    Raises InputError for pictures that are empty or not finite, and for numbers of pictures that do not fit.
    """
    _check(before, after, reference)
    lines = []
    for part, (name, pictures) in enumerate((("before", before), ("after", after))):
        if reference is not None:
            with host.part_of_progress(2 * part, 4):
                lines.append(f"{name}, against the reference:\n{metrics_table(pictures, reference)[0]}")
        with host.part_of_progress(2 * part + 1, 4):
            lines.append(f"{name}, alone (noise of 0..255, blur of 0..1):\n{quality.table(pictures)[0]}")
    return "\n".join(lines)


def save(text: str, prefix: str, folder: Path) -> Path:
    """Writes the page under the next free number. Raises WorkflowError for a prefix that leaves the folder."""
    target, name, number, _ = folders.save_location(prefix, folder)
    path = target / f"{name}_{number:05}_.html"
    path.write_text(text, encoding="utf-8")
    return path


def page(
    before: torch.Tensor,
    after: torch.Tensor,
    *,
    title: str,
    text: Sequence[tuple[str, str]] = (),
    extras: Sequence[torch.Tensor] = (),
    jpeg_quality: int = 90,
    largest: int = 1600,
) -> str:
    """The page's HTML. before, after: [B or 1, C, H, W]; extras: batches of pictures such as maps; text: (heading, lines).

    Loads nothing from anywhere and runs only its own few lines of script; all text is escaped. Raises InputError for
    pictures that are empty or not finite, and for numbers of pictures that do not fit; no extras are fine.
    """
    _check(before, after)
    for batch in extras:
        check_values(batch, "maps")
    size, pictures = f"{after.shape[-1]} x {after.shape[-2]}", _flat(extras)
    found, shown, progress = [], [], host.progress(len(after) + len(pictures))
    for i, (first, second) in enumerate(zip(matched(before, after, len(after)), after, strict=True)):
        found.append(_figure(first[0], second, f"Picture {i + 1} of {len(after)}, {size}", jpeg_quality, largest))
        progress.update()
    for i, picture in enumerate(pictures):
        shown.append(f'<img src="{data_uri(picture, jpeg_quality, largest)}" alt="Map {i + 1}">')
        progress.update()
    figures = "\n".join(found)
    maps = f'<h2>Maps</h2>\n<div class="extras">{"".join(shown)}</div>' if shown else ""
    words = "\n".join(f"<h2>{html.escape(name)}</h2>\n<pre>{html.escape(lines)}</pre>" for name, lines in text if lines)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
{figures}
{words}
{maps}
<script>{SCRIPT}</script></body></html>
"""


def _figure(before: torch.Tensor, after: torch.Tensor, caption: str, jpeg_quality: int, largest: int) -> str:
    return (
        '<figure><div class="pair">'
        f'<img class="after" src="{data_uri(after, jpeg_quality, largest)}" alt="After restoration">'
        f'<img class="before" src="{data_uri(before, jpeg_quality, largest)}" alt="Before restoration">'
        '<span class="b">before</span><span class="a">after</span></div>'
        '<input type="range" min="0" max="100" value="50" aria-label="How much of the picture is shown before restoration">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _flat(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [picture for batch in batches for picture in batch]
