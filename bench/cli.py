"""`mend bench`: measures networks, kernels, memory and quality."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHES = {
    "restorer": ("restorer", "time, throughput and peak memory of networks"),
    "memory": ("memory", "bytes per pixel of each network, which tiling plans with"),
    "freed": ("freed_memory", "what keeping freed memory saves on a CPU, and takes"),
    "large": ("large", "peak memory of a process that restores a large picture"),
    "video": ("video_memory", "memory of a process that restores a long video"),
    "steady": ("steady_video", "flicker on a noisy pan, before and after stabilising"),
    "tiles": ("tiles", "a picture in tiles against the same picture whole"),
    "kernels": ("kernels", "operators against the memory bandwidth"),
    "layout": ("layout", "channels-last feature maps on a CPU"),
    "scan": ("state_space", "state-space networks end to end, by scan backend"),
    "reference": ("reference", "networks against their published implementations, fetched beforehand"),
    "training": ("training_steps", "a step of training a starter, and gradients by kind of damage"),
    "samples": ("synthetic_samples", "a restorer trained with and without samples of the degradation model"),
    "quality": ("starter_quality", "the starter weights against classical methods"),
    "enlarge": ("enlarge_quality", "the enlarging starter against interpolation"),
    "zero-shot": ("zero_shot_quality", "the starter prior's restorations against linear methods"),
    "codec": ("codec_curves", "the codec against JPEG, WebP, JPEG 2000 and restoring first"),
    "agreement": ("codec_agreement", "bitstreams written one way and read another"),
}


def main(arguments: Sequence[str]) -> int:
    """Runs one bench; returns its exit status."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        lines = ["usage: mend bench WHAT ...", ""] + [f"  {n:<9} {purpose}" for n, (_, purpose) in BENCHES.items()]
        print("\n".join(lines))
        return 0
    if name not in BENCHES:
        print(f"mend bench: there is no {name!r}; one of {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f".{BENCHES[name][0]}", __package__).main(arguments[1:]) or 0)
