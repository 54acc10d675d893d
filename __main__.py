"""The command line: `mend COMMAND ...`, the same as `python -m comfyui_mend COMMAND ...`."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import MendError

# Command -> (module and function in it, what it is for). The function takes the remaining arguments and returns the
# exit status; nothing is imported before its command is asked for.
COMMANDS = {
    "demo": ("nodes.cli_demo:main", "restore the photo that comes with Mend and measure the result"),
    "restore": ("engine.cli_restore:main", "restore photos: the main job without a graph"),
    "run": ("nodes.cli_run:main", "run a workflow, in the built-in engine or in ComfyUI"),
    "models": ("models.cli:main", "list, inspect, check and convert model files"),
    "encode": ("codec.cli:encode", "compress pictures into bitstreams"),
    "decode": ("codec.cli:decode", "decompress bitstreams, restoring while decoding"),
    "batch": ("nodes.cli_batch:main", "run a workflow for every picture of a folder, here or on a cluster"),
    "train": ("training.cli:main", "train networks, make data sets"),
    "bench": ("bench.cli:main", "measure speed, memory and quality"),
}


def _available() -> dict[str, tuple[str, str]]:
    """The commands whose module is part of this installation; looked up without importing anything."""
    root = Path(__file__).resolve().parent
    return {
        name: (target, purpose)
        for name, (target, purpose) in COMMANDS.items()
        if (root / target.partition(":")[0].replace(".", "/")).with_suffix(".py").is_file()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 cancelled."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = _available()
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        lines = ["usage: mend COMMAND ...", "", "Restores images with published networks.", "", "commands:"]
        lines += [f"  {command:<9} {purpose}" for command, (_, purpose) in commands.items()]
        print("\n".join([*lines, "", "mend COMMAND --help says more about one."]))
        return 0
    if name not in commands:
        print(f"mend: there is no command {name!r}; one of {', '.join(commands)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    module, _, function = commands[name][0].partition(":")
    try:
        return int(getattr(importlib.import_module(f".{module}", __package__), function)(arguments[1:]) or 0)
    except MendError as error:
        print(f"mend {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mend {name}: cancelled", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
