"""What the nodes that ask for a degradation of a wanted intensity share: its kind, its two numbers, the words."""

from __future__ import annotations

from collections.abc import Sequence

from ..guidance import gendeg as intensities
from .api import io

CATEGORY = "Mend/degradation"
KINDS = list(intensities.PRESETS)
KINDS_AND_MIXTURES = [*KINDS, *intensities.MIXED]


def kind_input(kinds: Sequence[str] = KINDS) -> io.Input:
    ranges = "; ".join(
        f"{kind}: mean {p.mu[0]:.2f}..{p.mu[1]:.2f}, deviation {p.sigma[0]:.2f}..{p.sigma[1]:.2f}"
        for kind, p in intensities.PRESETS.items()
    )
    return io.Combo.Input(
        "degradation", options=list(kinds), default="haze", tooltip=f"What goes wrong. Usual intensities: {ranges}."
    )


def _intensity(name: str, default: float, most: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=most, step=0.01, round=0.0001, tooltip=tooltip)


def mu_input(default: float = 0.15, more: str = "") -> io.Input:
    text = "How much the picture changes: mean of |clean - damaged|, 0..1. Training pairs had up to 0.284."
    return _intensity("mu", default, 0.7, f"{text} {more}".strip())


def sigma_input() -> io.Input:
    return _intensity(
        "sigma",
        0.1,
        0.4,
        "How unevenly it changes: standard deviation of |clean - damaged|. Small for a veil all over, larger than the mean "
        "for streaks and flakes.",
    )


def caption_input() -> io.Input:
    return io.String.Input(
        "caption",
        default="",
        multiline=True,
        tooltip="What the picture shows, in a few words; the words for the degradation are added. Taken letter by letter: "
        "brackets change no weights.",
    )
