"""The catalogue of methods and of the weight files that their authors released: `catalogue.toml`, read once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE_START = "<!-- methods:start (made by `mend models table`) -->"
TABLE_END = "<!-- methods:end -->"
FACTS_START = "<!-- facts:start (made by `mend models pages`) -->"
FACTS_END = "<!-- facts:end -->"


@dataclass(frozen=True)
class ReleasedFile:
    """A weight file that a method's authors name."""

    id: str
    """"mair/MaIR_SR_x2": what `mend models download` takes."""
    path: str
    """Name, with a folder where the name alone does not tell: "MoCE_IR_AIO3/last.ckpt"."""
    tasks: tuple[str, ...]
    variant: str
    note: str
    url: str
    """Direct address of the file, if one is known."""
    page: str
    """Where people find it."""
    place: str
    """In words: "Google Drive folder linked in the README"."""
    hf: str
    """Hugging Face repository that holds it, or ""."""
    licence: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def link(self) -> str:
        return self.url or (f"https://huggingface.co/{self.hf}" if self.hf else self.page)


@dataclass(frozen=True)
class Method:
    """A published method and what was released of it."""

    id: str
    title: str
    does: str
    paper: str
    authors: str
    venue: str
    arxiv: str
    code: str
    code_licence: str
    weights_licence: str
    place: str
    folder: str
    workflow: str
    """Name of the shipped workflow that shows it, or ""."""
    verified: str
    files: tuple[ReleasedFile, ...]


@cache
def methods() -> tuple[Method, ...]:
    """All methods, in the order of the catalogue."""
    with Path(__file__).with_name("catalogue.toml").open("rb") as file:
        return tuple(_method(table) for table in tomllib.load(file)["system"])


def _method(table: Mapping[str, Any]) -> Method:
    texts = {f: table.get(f, "") for f in Method.__dataclass_fields__ if f != "files"}
    return Method(**texts, files=tuple(_file(table, entry) for entry in table["files"]))


def _file(system: Mapping[str, Any], entry: Mapping[str, Any]) -> ReleasedFile:
    path = PurePosixPath(entry["path"])
    # A file called last.ckpt goes by its folder.
    stem = path.parent.name if len(path.parts) > 1 else path.stem
    return ReleasedFile(
        id=f"{system['id']}/{stem}",
        path=entry["path"],
        tasks=tuple(entry["tasks"]),
        variant=entry.get("variant", ""),
        note=entry.get("note", ""),
        url=entry.get("url", ""),
        page=entry.get("page", system["page"]),
        place=system["place"],
        hf=entry.get("hf", system.get("hf", "")),
        licence=system["weights_licence"],
    )


def find(path: str | Path) -> tuple[Method, ReleasedFile] | None:
    """The released file that a path is by its name (and folder, where the name alone does not tell)."""
    parts = [p.lower() for p in Path(path).parts]
    for method in methods():
        for file in method.files:
            wanted = [p.lower() for p in PurePosixPath(file.path).parts]
            if parts[-len(wanted) :] == wanted:
                return method, file
    return None


def get(file_id: str) -> tuple[Method, ReleasedFile] | None:
    """The released file with this id."""
    return next(((m, f) for m in methods() for f in m.files if f.id == file_id), None)


def where_to_get(path: str | Path) -> str:
    """A sentence about where a missing file comes from, or "" if no method released one of that name."""
    found = find(path)
    if found is None:
        return ""
    method, file = found
    return (
        f"{method.title}'s authors released a file of that name: {file.place}, {file.link} "
        f"(licence of the weights: {file.licence}). Put it into models/{method.folder}/"
    )


def table(chosen: Sequence[Method] | None = None) -> str:
    """The methods as a Markdown table, for the README."""
    lines = [
        "| method | what the graph gets | paper | licence: code / weights | released files | checked | workflow |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in methods() if chosen is None else chosen:
        arxiv = f", [arXiv {m.arxiv}](https://arxiv.org/abs/{m.arxiv})" if m.arxiv else ""
        files = f"{len(m.files)}: {m.place}" if m.files else m.place
        workflow = f"[{m.workflow}](workflows/{m.workflow}.json)" if m.workflow else ""
        cells = (
            f"[{m.title}](docs/methods/{m.id}.md) ([code]({m.code}))",
            m.does,
            f"{m.authors}, {m.venue}{arxiv}",
            f"{m.code_licence} / {m.weights_licence}",
            files,
            m.verified,
            workflow,
        )
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def facts(method: Method) -> str:
    """Reference, licences and released files of a method in Markdown, for its page in docs/methods."""
    arxiv = f" [arXiv:{method.arxiv}](https://arxiv.org/abs/{method.arxiv})." if method.arxiv else ""
    lines = [
        "## Reference, licence, files",
        "",
        f"{method.authors.rstrip('.')}. *{method.paper}.* {method.venue}.{arxiv}",
        "",
        f"- Code of the authors: <{method.code}>, licence: {method.code_licence}",
        f"- Licence of the official weights: {method.weights_licence}",
        f"- Where they are: {method.place}. They go to `ComfyUI/models/{method.folder}/`",
        f"- Checked here: {method.verified}",
    ]
    if method.files:
        lines += ["", "| file | variant | made for | note |", "|---|---|---|---|"]
        for file in method.files:
            lines.append(f"| `{file.path}` | {file.variant} | {', '.join(file.tasks)} | {file.note} |")
    return "\n".join(lines)


def with_facts(text: str, method: Method) -> str:
    """`text` (the page of a method) with the present facts between its markers."""
    return _between(text, FACTS_START, FACTS_END, facts(method))


def with_table(text: str) -> str:
    """`text` (the README) with the present table between its markers."""
    return _between(text, TABLE_START, TABLE_END, table())


def _between(text: str, start: str, end: str, content: str) -> str:
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(f"the marker {start} or {end} is missing")
    return f"{before}{start}\n\n{content}\n\n{end}{after}"
