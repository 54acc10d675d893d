"""Where model files lie: ComfyUI's models/restoration inside it, folders that MEND_MODELS names elsewhere."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path

from ..errors import InputError
from .folders import output_directory
from .host import PACK, inside_comfyui

MODEL_FOLDER = "restoration"
"""Our folder below ComfyUI's models/, also searched outside ComfyUI."""
MODEL_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".ckpt"})
NAMES = "its name is enough if it comes with Mend or lies in a folder that MEND_MODELS names"
"""What the command line's help says of a file's name."""


def register_model_folder() -> None:
    """Makes ComfyUI know models/restoration (and what extra_model_paths.yaml adds to it). Idempotent."""
    if not inside_comfyui():
        return
    import folder_paths

    default = os.path.join(folder_paths.models_dir, MODEL_FOLDER)
    folder_paths.add_model_folder_path(MODEL_FOLDER, default, is_default=True)
    folder_paths.add_model_folder_path(MODEL_FOLDER, str(saved_models()))  # as it does with output/checkpoints
    paths, suffixes = folder_paths.folder_names_and_paths[MODEL_FOLDER]
    folder_paths.folder_names_and_paths[MODEL_FOLDER] = (paths, set(suffixes) | MODEL_SUFFIXES)


def saved_models() -> Path:
    """Where trained networks are saved: a folder below the output folder, searched like the model folders."""
    return output_directory() / MODEL_FOLDER


def _search_paths() -> list[Path]:
    own = [Path(p) for p in os.environ.get("MEND_MODELS", "").split(os.pathsep) if p]
    return [*own, *([] if inside_comfyui() else [saved_models()]), PACK / "weights"]


def model_files(suffixes: Set[str] = MODEL_SUFFIXES) -> list[str]:
    """Names of every model file to choose from: models/restoration inside ComfyUI, MEND_MODELS elsewhere, and the
    starter weights that come with the pack. suffixes: kinds of files that only some nodes read."""
    names: list[str] = []
    folders = _search_paths()
    if inside_comfyui():
        import folder_paths

        register_model_folder()
        if suffixes == MODEL_SUFFIXES:
            names += folder_paths.get_filename_list(MODEL_FOLDER)
        else:  # ComfyUI lists the kinds that it was told of
            folders = [*map(Path, folder_paths.get_folder_paths(MODEL_FOLDER)), *folders]
    for folder in folders:
        if folder.is_dir():
            found = (p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file())
            names += sorted(p.relative_to(folder).as_posix() for p in found)
    return list(dict.fromkeys(names))


def model_path(name: str) -> Path:
    """The file behind a name of `model_files`, or a path given outright outside ComfyUI. Raises InputError."""
    if inside_comfyui():
        import folder_paths

        register_model_folder()
        found = folder_paths.get_full_path(MODEL_FOLDER, name)
        if found:
            return Path(found)
    elif Path(name).is_file():
        return Path(name)
    for folder in _search_paths():
        path = folder / name
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            return path
    if inside_comfyui():
        advice = f"put it into ComfyUI's models/{MODEL_FOLDER} and refresh, or choose another"
    else:
        advice = "give its path, or put it into a folder named in the environment variable MEND_MODELS"
    raise InputError(f"model: there is no file {name!r}; {advice}")


def lora_files() -> list[str]:
    """Names of low-rank patches to choose from: ComfyUI's models/loras inside it, and what `model_files` lists."""
    names: list[str] = []
    if inside_comfyui():
        import folder_paths

        names += folder_paths.get_filename_list("loras")
    return list(dict.fromkeys([*names, *model_files()]))


def lora_path(name: str) -> Path:
    """The file behind a name of `lora_files`. Raises InputError."""
    if inside_comfyui():
        import folder_paths

        found = folder_paths.get_full_path("loras", name)
        if found:
            return Path(found)
    return model_path(name)
