"""Where pictures come from and go to: ComfyUI's folders inside it, folders of our own elsewhere."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError, WorkflowError
from .host import PACK, inside_comfyui

SHIPPED_INPUTS = PACK / "workflows" / "inputs"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})


class _Folders:
    inputs: tuple[Path, ...] = ()
    output: Path | None = None
    temp: Path | None = None


def set_folders(
    *, inputs: list[str | Path] | None = None, output: str | Path | None = None, temp: str | Path | None = None
) -> None:
    """Outside ComfyUI: where to look for pictures first, where results and previews go. None leaves one as it is."""
    if inputs is not None:
        _Folders.inputs = tuple(Path(p).resolve() for p in inputs)
    if output is not None:
        _Folders.output = Path(output).resolve()
    if temp is not None:
        _Folders.temp = Path(temp).resolve()


def own_input_directories() -> list[Path]:
    """The folders set here, and the one with the pictures of the shipped workflows."""
    return [*_Folders.inputs, SHIPPED_INPUTS]


def input_directories() -> list[Path]:
    """Searched for input pictures, in this order."""
    if inside_comfyui():
        import folder_paths

        return [Path(folder_paths.get_input_directory())]
    return own_input_directories()


def own_output_directory() -> Path:
    """The folder set here, or "output" in the current one."""
    return _Folders.output or Path.cwd() / "output"


def output_directory() -> Path:
    """Where results go."""
    if inside_comfyui():
        import folder_paths

        return Path(folder_paths.get_output_directory())
    return own_output_directory()


def temp_directory() -> Path:
    """Where previews go."""
    if inside_comfyui():
        import folder_paths

        return Path(folder_paths.get_temp_directory())
    if _Folders.temp is None:
        _Folders.temp = Path(tempfile.mkdtemp(prefix="mend-"))
    return _Folders.temp


def input_files(suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[str]:
    """Names of the files directly in the input folders, sorted."""
    found = {
        path.name
        for folder in input_directories()
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in suffixes
    }
    return sorted(found)


def input_path(name: str) -> Path | None:
    """The file behind a name as LoadImage takes it ("a.png", "sub/a.png", "a.png [output]"), or None.

    Names that lead out of the folder are not found.
    """
    marked = re.fullmatch(r"(.*?) ?\[(input|output|temp)\]", name)
    if marked and marked[2] != "input":
        return find_file(marked[1], [output_directory() if marked[2] == "output" else temp_directory()])
    return find_file(marked[1] if marked else name, input_directories())


def find_file(name: str, candidates: Iterable[Path]) -> Path | None:
    """The first file of this name below one of the folders, or None."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    for folder in candidates:
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            return path
    return None


def require_input_path(name: str) -> Path:
    """As `input_path`, but raises InputError."""
    path = input_path(name)
    if path is None:
        looked = ", ".join(str(p) for p in input_directories())
        raise InputError(f"there is no file {name!r} in the input folders ({looked}); copy it there or name another")
    return path


def require_input_directory(name: str) -> Path:
    """A folder with pictures: a full path, or one in the input folders ("" is the first of these); on the command line also
    one in the current folder. Raises InputError.
    """
    name = name.strip().strip('"')
    given = Path(name).expanduser()
    inside = [folder / name for folder in input_directories()]
    candidates = [given, *inside] if given.is_absolute() else [*inside]
    if name and not inside_comfyui():
        candidates.append(
            given
        )  # where the user of a command line stands; ComfyUI's own folder means nothing to its users
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        raise InputError(f"there is no folder {name!r}: give its full path, or copy it into {inside[-1].parent}")
    return found


def require_output_directory(name: str) -> Path:
    """A folder in the output folder; "" is the output folder itself. Raises WorkflowError for one outside."""
    root = output_directory()
    folder = (root / name.strip().strip('"')).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise WorkflowError(f"{name!r} leads out of the output folder {root}; name a folder in it")
    return folder


def save_location(prefix: str, folder: Path, width: int = 0, height: int = 0) -> tuple[Path, str, int, str]:
    """Where a picture with this prefix goes: (folder, file name without number, next free number, subfolder).

    The prefix may hold a subfolder and %width%, %height%, %year%, %month%, %day%, %hour%, %minute%, %second%. Files
    are called `<name>_<5 digits>_<suffix>`. Raises WorkflowError for a prefix that leads out of the folder.
    """
    now = time.localtime()
    values = {"width": width, "height": height, "year": now.tm_year}
    parts = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    values.update({name: f"{value:02}" for name, value in parts.items()})
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", str(value))
    prefix = os.path.normpath(prefix)
    subfolder, name = os.path.dirname(prefix), os.path.basename(prefix)
    target = (folder / subfolder).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise WorkflowError(f"filename_prefix {prefix!r} leads out of the output folder {folder}")
    target.mkdir(parents=True, exist_ok=True)
    numbered = re.compile(re.escape(name) + r"_(\d+)_", re.IGNORECASE if os.name == "nt" else 0)
    taken = [int(match[1]) for match in map(numbered.match, os.listdir(target)) if match]
    return target, name, max(taken, default=0) + 1, subfolder
