"""All-in-one training with and without Task Uncertainty Regularization (TUR, AAAI 2025)."""

from __future__ import annotations

from ...training.objectives.recipes import PixelObjective, UncertaintyObjective
from .common import NAFNET, conduct, fresh, held_out, judge, learn, options

TEXT = """
# TUR: does weighing tasks by their uncertainty help all-in-one training?

The paper: a network trained on several kinds of damage gains 1.3 dB (three kinds) to 1.8 dB (five kinds, AirNet) on average when the L1
loss of each kind is divided by a learned uncertainty. Here: the same tiny network, from the same weights, on the same crops, with L1 alone and with TUR's loss
in its place.
"""


def main() -> None:
    chosen = options(__doc__, steps=250)
    samples = held_out(chosen)

    def arm(objective):
        def train(seed: int) -> dict[str, float]:
            return judge(learn(chosen, fresh("dcpt", NAFNET, seed), objective, seed, chosen.steps), samples)

        return train

    arms = {"L1": arm(PixelObjective("L1", 0.0)), "TUR": arm(UncertaintyObjective())}
    conduct(chosen, "tur", TEXT, arms, "NAFNet of width 8 with three levels, five kinds of damage.")


if __name__ == "__main__":
    main()
