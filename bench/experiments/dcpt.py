"""Restoration with and without pre-training by degradation classification (DCPT, ICLR 2025)."""

from __future__ import annotations

from ...training.objectives.recipes import ClassificationObjective, PixelObjective
from .common import NAFNET, conduct, fresh, held_out, judge, learn, options

TEXT = """
# DCPT: does learning to name the damage first help to undo it?

The paper: pre-trained networks end 2 dB (NAFNet, five kinds) above plain ones after full fine-tuning. Here, at a tiny fraction of that training: the same network is
fine-tuned with L1 from scratch; or pre-trained for half of the steps and fine-tuned for the other half (the same budget); or pre-trained for half of the
steps and then given all of them for fine-tuning (half as much again).
"""


def main() -> None:
    chosen = options(__doc__, steps=250)
    samples = held_out(chosen)
    pixel, classes = PixelObjective("L1", 0.0), ClassificationObjective(blocks=1)

    def arm(before: int, after: int):
        def train(seed: int) -> dict[str, float]:
            network = fresh("dcpt", NAFNET, seed)
            if before:
                network = learn(chosen, network, classes, seed + 100, before)
            return judge(learn(chosen, network, pixel, seed, after), samples)

        return train

    half = chosen.steps // 2
    arms = {
        "fine-tuning only": arm(0, chosen.steps),
        "half pre-training, half fine-tuning": arm(half, chosen.steps - half),
        "pre-training on top": arm(half, chosen.steps),
    }
    conduct(chosen, "dcpt", TEXT, arms, "NAFNet of width 8 with three levels, five kinds of damage.")


if __name__ == "__main__":
    main()
