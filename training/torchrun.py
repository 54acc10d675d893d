"""`mend train finetune` in several processes, which torchrun starts.

    torchrun --nproc_per_node 2 -m comfyui_mend.training.torchrun --model FILE --dataset clean:photos --steps 1000 --out RUN

takes the arguments of `mend train finetune`.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import cli_finetune
from .distributed import processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains in this process as one of several; returns the exit status."""
    options = cli_finetune.parse(arguments)
    with processes(options.backend) as device:
        options.device = device
        return cli_finetune.run(options)


if __name__ == "__main__":
    raise SystemExit(main())
