"""Renews the thumbnails of shipped workflows, after weights or nodes have changed what they give.

    python tests/make_thumbnails.py restore_photo mix
    python tests/make_thumbnails.py --with MendLoadRestorer     # every workflow that has the node

Runs each in the built-in engine. Of the pictures that the graph makes, the thumbnail is the one that the present thumbnail
shows, the most alike of the same shape; where none is alike, the workflow is named and its thumbnail stays. Workflows whose
files do not come with Mend are left out.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from make_workflow import WORKFLOWS, as_thumbnail, classes, missing_models, save_thumbnail
from PIL import Image

from comfyui_mend.engine import folders
from comfyui_mend.engine.pictures import to_pil
from comfyui_mend.engine.runner import Runner
from comfyui_mend.engine.workflow_format import read

logger = logging.getLogger(__name__)

ALIKE = 25.0
"""Mean difference, in steps of 255, up to which a picture is taken for what the present thumbnail shows."""


def pictures(name: str) -> Iterator[Image.Image]:
    """Every picture that a node of the workflow gives."""
    for outputs in Runner(classes()).run(read(WORKFLOWS / "api" / f"{name}.json")).values.values():
        for value in (v for values in outputs for v in values):
            if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-1] in (3, 4) and value.numel():
                yield to_pil(value[0, ..., :3].movedim(-1, 0))


def difference(picture: Image.Image, thumbnail: Image.Image) -> float:
    """Mean difference in steps of 255, infinite for another shape."""
    small = as_thumbnail(picture)
    if small.size != thumbnail.size:
        return float("inf")
    return float(np.abs(np.asarray(small, np.float32) - np.asarray(thumbnail, np.float32)).mean())


def renew(name: str) -> bool:
    """Makes one thumbnail again; returns whether the workflow gives what the present one shows."""
    with Image.open(WORKFLOWS / f"{name}.jpg") as present:
        thumbnail = present.convert("RGB")
    found = min(((difference(p, thumbnail), i, p) for i, p in enumerate(pictures(name))), default=None)
    if found is None or found[0] > ALIKE:
        return False
    logger.info("%s: differs by %.2f", name, found[0])
    save_thumbnail(found[2], name)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="names of workflows")
    parser.add_argument("--with", dest="node", help="every workflow that has this node")
    parsed = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = list(parsed.names)
    for path in sorted((WORKFLOWS / "api").glob("*.json")):
        if any(node["class_type"] == parsed.node for node in read(path).values()):
            names.append(path.stem)
    here = [name for name in names if not missing_models(read(WORKFLOWS / f"{name}.json"))]
    with tempfile.TemporaryDirectory() as place:
        folders.set_folders(inputs=[], output=Path(place), temp=Path(place) / "temp")
        unlike = [name for name in here if not renew(name)]
    if unlike:
        logger.info("no picture like the present thumbnail: %s", ", ".join(unlike))
    return bool(unlike)


if __name__ == "__main__":
    sys.exit(main())
