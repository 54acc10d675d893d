"""What a loaded network is, in words."""

from __future__ import annotations

from . import certificate
from .loaded import LoadedRestorer


def restorer_text(loaded: LoadedRestorer) -> str:
    """Method, paper, licence, settings, size and needs of a network, a line each."""
    restorer = loaded.restorer
    architecture, config = restorer.architecture, restorer.config
    radius = architecture.receptive_field(config)
    reach = (
        f"local, receptive field radius {radius} px"
        if radius is not None
        else architecture.global_statistics or "global"
    )
    lines = [
        f"{architecture.title} ({architecture.id})",
        f"file: {restorer.source or 'in memory'}",
        f"paper: {architecture.paper}",
        f"licence: {restorer.licence}",
        f"for: {', '.join(restorer.tasks) or 'not stated'}",
        f"size: {restorer.parameters:,} parameters, {loaded.size / 1e6:.1f} MB in memory",
        f"scale x{restorer.scale}, pads to multiples of {restorer.multiple_of}",
        f"reach: {reach}",
        f"parity: {certificate.summary(architecture.id)}",
        "settings: " + ", ".join(f"{k} {_short(v)}" for k, v in config.items()),
    ]
    if loaded.options:
        lines.append("options: " + ", ".join(f"{k} {_short(v)}" for k, v in loaded.options.items()))
    lines += [f"note: {note}" for note in restorer.notes]
    return "\n".join(lines)


def _short(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(str(v) for v in value) + "]"
    return str(value)
