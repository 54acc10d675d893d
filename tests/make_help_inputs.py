"""Lists every input and output of every node on its help pages: `python tests/make_help_inputs.py`.

An entry is `- **name** (facts): text`. The facts (range, default, optional) come from the node's schema each time; the text
comes from the tooltip, in Chinese from locales/zh, when the entry is new, and stays as it is on the page afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfyui_mend.nodes import node_classes

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 70
"""Characters of a list of options; longer ones are left to the menu and the text."""


@dataclass(frozen=True)
class Words:
    """What the facts are said with in a language."""

    heads: tuple[str, str]
    span: str
    default: str
    on: str
    off: str
    empty: str
    optional: str
    advanced: str
    brackets: str
    comma: str
    stop: str
    colon: str


LANGUAGES = {
    "en": Words(
        ("Inputs", "Outputs"),
        "{} to {}",
        "default {}",
        "on",
        "off",
        "empty",
        "optional",
        "advanced",
        " ({})",
        ", ",
        "; ",
        ": ",
    ),
    "zh": Words(("输入", "输出"), "{} 到 {}", "默认 {}", "开", "关", "空", "可选", "高级", "（{}）", "，", "；", "："),
}
ENTRY = re.compile(r"- \*\*(?P<name>[^*]+)\*\*(?: \(.*?\)(?=: )|（.*?）(?=：))?(?:: ?|：)(?P<text>.*)")


def facts(slot: Any, words: Words) -> Iterator[str]:
    """Options or range, default, whether it may be left out and whether it is hidden at first, each in a few words."""
    options = slot.as_dict()
    default, choices = options.get("default"), options.get("options")
    files = isinstance(choices, (list, tuple)) and any("." in str(choice) for choice in choices)
    if isinstance(choices, (list, tuple)) and not files:
        listed = words.comma.join(map(str, choices))
        if len(listed) <= LONGEST:
            yield listed
    if "max" in options and not options.get("control_after_generate"):
        yield words.span.format(f"{options.get('min', 0):.10g}", f"{options['max']:.10g}")
    if default is not None and not files:
        yield words.default.format(_in_words(default, words))
    if slot.optional:
        yield words.optional
    if options.get("advanced"):
        yield words.advanced


def _in_words(default: Any, words: Words) -> str:
    if isinstance(default, bool):
        return words.on if default else words.off
    if isinstance(default, (int, float)):
        return f"{default:.10g}"
    return str(default).replace("\n", words.comma) or words.empty


def slots(schema: Any, entry: Mapping[str, Any], language: str) -> tuple[list[tuple[str, str, str]], ...]:
    """(name, facts, tooltip) of every input, and of every output."""
    words = LANGUAGES[language]
    inputs, outputs = [], []
    for slot in schema.inputs or []:
        said = words.stop.join(facts(slot, words))
        known = entry["inputs"][slot.id.replace(".", "_")]
        name, text = (slot.id, slot.tooltip) if language == "en" else (known["name"], known["tooltip"])
        inputs.append((name, words.brackets.format(said) if said else "", text))
    for number, slot in enumerate(schema.outputs or []):
        known = entry["outputs"][str(number)]
        name, text = (slot.display_name, slot.tooltip) if language == "en" else (known["name"], known["tooltip"])
        outputs.append((name, "", text))
    return inputs, outputs


def with_slots(page: str, schema: Any, entry: Mapping[str, Any], language: str) -> str:
    """The page with all inputs and outputs at its end; what it said of one stays."""
    words = LANGUAGES[language]
    body, *sections = re.split(rf"^## (?={words.heads[0]}|{words.heads[1]})", page, flags=re.MULTILINE)
    body = body.rstrip()
    for head, listed in zip(words.heads, slots(schema, entry, language), strict=True):
        section = next((s for s in sections if s.startswith(head)), "")
        texts = {m["name"]: m["text"] for m in map(ENTRY.fullmatch, section.splitlines()) if m}
        if listed:
            lines = [f"- **{n}**{said}{words.colon}{texts.get(n, text)}" for n, said, text in listed]
            body += f"\n\n## {head}\n\n" + "\n".join(lines)
    return body + "\n"


def pages() -> Iterator[tuple[Path, str, str]]:
    """(file, text, text with all inputs and outputs) of every help page."""
    entries = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for language in LANGUAGES:
        for node in node_classes():
            schema = node.GET_SCHEMA()
            file = ROOT / "web" / "docs" / schema.node_id / f"{language}.md"
            text = file.read_text(encoding="utf-8")
            yield file, text, with_slots(text, schema, entries[schema.node_id], language)


if __name__ == "__main__":
    for file, before, after in pages():
        if before != after:
            file.write_text(after, encoding="utf-8")
