"""`mend models`: list, inspect, check, convert and download model files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, MendError, MissingDependency
from . import catalogue, registry
from .checkpoint import load
from .convert import convert, describe
from .stored import size_in_words

_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


def say(text: str) -> None:
    """One line to the standard output."""
    sys.stdout.write(text + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `mend models`."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(function=run)
        return added

    listed = command("list", _list, "the networks known here, or the files that their authors released")
    listed.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="list the model files in these folders")
    listed.add_argument("--released", action="store_true", help="the released files: id, place, licence")
    listed.add_argument("--system", help="only this method")

    for name, run, text in (
        ("info", _info, "what a model file is: network, settings, licence, tasks"),
        ("check", _check, "read model files completely and run the networks once; exit status 1 if one is unusable"),
    ):
        added = command(name, run, text)
        added.add_argument("files", nargs="+", type=Path, metavar="FILE")
        added.add_argument("--system", help="expect this method instead of recognising it")
        if name == "info":
            added.add_argument("--json", action="store_true", help="one JSON object a file")

    converted = command("convert", _convert, "write a checkpoint as safetensors with its settings in the metadata")
    converted.add_argument("file", type=Path, metavar="FILE")
    converted.add_argument("-o", "--output", type=Path, help="default: beside FILE, ending .safetensors")
    converted.add_argument("--precision", choices=("float32", "float16", "bfloat16"), default="float32")
    converted.add_argument("--system", help="expect this method instead of recognising it")
    converted.add_argument("--force", action="store_true", help="overwrite an existing file")

    fetched = command("download", _download, "download a released file (Hugging Face), or say where it is")
    fetched.add_argument("id", metavar="ID", help="as `mend models list --released` prints it")
    fetched.add_argument("--folder", type=Path, default=Path("models/restoration"), help="default: %(default)s")

    made = command("table", _table, "the README's table of methods")
    made.add_argument("--write", type=Path, metavar="README", help="put it between the markers of this file")

    pages = command("pages", _pages, "put reference, licences and files between the markers of the methods' pages")
    pages.add_argument("folder", nargs="?", type=Path, default=Path("docs/methods"), help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    return args.function(args)


def main(argv: Sequence[str] | None = None) -> int:
    """`mend models ...`; returns the exit status. Raises MendError."""
    parser = argparse.ArgumentParser(prog="mend models", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _rows(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _list(args: argparse.Namespace) -> int:
    if args.folders:
        return _list_folders(args.folders)
    if args.released:
        chosen = _of_system(args.system, [(m.id, m) for m in catalogue.methods()])
        rows = [("ID", "FILE", "TASKS", "PLACE", "LICENCE OF THE WEIGHTS")]
        rows += [(f.id, f.path, ", ".join(f.tasks), f.link, f.licence) for m in chosen for f in m.files]
        _rows(rows)
        say(
            "\nNames and places are the official repositories'. None of these files was reachable while this was built."
        )
        return 0
    rows = [("ID", "METHOD", "NETWORK", "KIND", "VARIANTS")]
    chosen = _of_system(args.system, [(a.system, a) for a in registry.architectures()])
    rows += [(a.id, a.system, a.title, a.kind, ", ".join(a.variants) or "-") for a in chosen]
    _rows(rows)
    return 0


def _of_system(system: str | None, known: Sequence[tuple[str, Any]]) -> list[Any]:
    """Those of `known` (method, what belongs to it) that are of one method, or all. Raises InputError for an unknown one."""
    methods = dict.fromkeys(method for method, _ in known)
    if system is not None and system not in methods:
        raise InputError(f"--system: {system!r} is unknown; one of {', '.join(methods)}")
    return [one for method, one in known if system in (None, method)]


def _list_folders(folders: Sequence[Path]) -> int:
    for path in sorted(_model_files(folders)):
        try:
            found = load(path)
            say(f"{path}: {found.architecture.title}, {found.parameters / 1e6:.2f} M parameters")
        except MendError as error:
            say(f"{path}: not usable: {error}")
    return 0


def _model_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        yield from (p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _info(args: argparse.Namespace) -> int:
    for path in args.files:
        described = describe(path, args.system)
        if args.json:
            say(json.dumps(described, default=list))
            continue
        described["parameters"] = f"{described['parameters']:,}"
        described["bytes"] = f"{described['bytes']:,} ({size_in_words(described['bytes'])})"
        for key, value in described.items():
            _say_entry(key, value)
    return 0


def _say_entry(key: str, value: Any) -> None:
    if isinstance(value, dict):
        say(f"{key}:")
        for name, setting in value.items():
            say(f"  {name} = {setting}")
    elif isinstance(value, list):
        say(f"{key}: {'; '.join(map(str, value)) or '-'}")
    else:
        say(f"{key}: {value}")


def _check(args: argparse.Namespace) -> int:
    failed = 0
    for path in args.files:
        try:
            restorer = load(path, system=args.system)
            result = _try(restorer) if restorer.architecture.kind == "restorer" else "loads"
        except MendError as error:
            say(f"FAIL {error}")
            failed += 1
            continue
        say(
            f"ok   {path.name}: {restorer.architecture.title}, {result}"
            + "".join(f"\n     {n}" for n in restorer.notes)
        )
    return 1 if failed else 0


def _try(restorer: Any) -> str:
    """Runs the network once on a grey ramp; returns what came out in words. Raises InputError for NaN."""
    channels = int(restorer.config.get("inp_channels", restorer.config.get("in_chans", 3)))
    ramp = torch.linspace(0.2, 0.8, 48).expand(1, channels, 48, 48)
    with torch.inference_mode():
        restored = restorer(ramp)
    if not restored.isfinite().all():
        raise InputError(f"{restorer.source}: the network gives NaN or infinity")
    return f"runs: 48x48 -> {restored.shape[-1]}x{restored.shape[-2]}"


def _convert(args: argparse.Namespace) -> int:
    target, restorer = convert(args.file, args.output, force=args.force, precision=args.precision, system=args.system)
    before, after = args.file.stat().st_size, target.stat().st_size
    say(f"{target}: {restorer.architecture.title}, {size_in_words(before)} -> {size_in_words(after)}, verified")
    for note in restorer.notes:
        say(f"  {note}")
    return 0


def _download(args: argparse.Namespace) -> int:
    found = catalogue.get(args.id)
    if found is None:
        raise InputError(f"{args.id!r} is not in the catalogue; see `mend models list --released`")
    method, file = found
    target = args.folder / file.name
    if target.exists():
        raise InputError(f"{target}: exists already; nothing was downloaded")
    say(f"{method.title}, {file.name}. Licence of the weights: {file.licence}")
    if not file.hf:
        say(f"It is not on Hugging Face. {file.place}: {file.link}\nDownload it there and put it into {args.folder}/")
        return 1
    fetched = _from_hugging_face(file.hf, file.name)
    args.folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(fetched, partial)
        _place(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    title = method.title if target.suffix == ".onnx" else describe(target)["title"]  # OpenCV's to read, not ours
    say(f"{target}: {title}")
    return 0


def _place(partial: Path, target: Path) -> None:
    """Gives a finished file its name without overwriting what may have appeared there meanwhile."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise InputError(f"{target}: exists already; nothing was changed") from None
    except (
        OSError,
        AttributeError,
        NotImplementedError,
    ):  # a file system without links: there the last one to finish wins
        partial.rename(target)


def _from_hugging_face(repository: str, name: str) -> Path:
    """A file of a Hugging Face repository, in that library's cache, which resumes what was interrupted."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependency(
            "downloading needs huggingface_hub: pip install huggingface_hub. Or download the file by hand: "
            f"https://huggingface.co/{repository}"
        ) from None
    try:
        # The catalogue's names are those of the authors' scripts; in the repository a file may lie in a folder.
        listed = huggingface_hub.list_repo_files(repository)
        matching = [path for path in listed if path.rsplit("/", 1)[-1] == name]
        if not matching:
            raise InputError(
                f"https://huggingface.co/{repository} has no file {name}; it has {', '.join(listed)[:500]}"
            )
        return Path(huggingface_hub.hf_hub_download(repository, matching[0]))
    except MendError:
        raise
    except Exception as error:  # whatever the network and that library come up with
        raise InputError(f"https://huggingface.co/{repository}: the download failed ({error}). Run it again") from error


def _table(args: argparse.Namespace) -> int:
    if args.write is None:
        say(catalogue.table())
    elif not args.write.is_file():
        raise InputError(f"{args.write}: there is no such file")
    else:
        args.write.write_text(catalogue.with_table(args.write.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def _pages(args: argparse.Namespace) -> int:
    for method in catalogue.methods():
        page = args.folder / f"{method.id}.md"
        if not page.is_file():
            raise InputError(f"{page}: {method.title} has no page")
        text = page.read_text(encoding="utf-8")
        page.write_text(catalogue.with_facts(text, method), encoding="utf-8")
    return 0
