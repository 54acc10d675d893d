"""DA-RCOT (TPAMI 2025): its second pass against its first, trained with and without pairs."""

from __future__ import annotations

from ...training.objectives.recipes import PixelObjective, TransportObjective
from .common import RCOT, conduct, fresh, held_out, judge, learn, options

TEXT = """
# DA-RCOT: is the second pass better than the first, with and without pairs?

The paper: conditioning the second pass on what the first removed, and training by optimal transport, beats plain training; without pairs 2.4 dB (three kinds) to 4.8 dB
(five kinds) are lost. Here: one tiny network trained with L1, with the paired objective and with the unpaired one. Each trained network restores the same pictures by its
first pass alone and by both.
"""


def main() -> None:
    chosen = options(__doc__, steps=150, crop=64)  # the potential wants multiples of 32
    samples = held_out(chosen)

    def arm(objective, rate):
        def train(seed: int) -> dict[str, float]:
            network = learn(chosen, fresh("da-rcot", RCOT, seed), objective, seed, chosen.steps, rate)
            first = judge(network, samples, network.module.first_pass)
            return {**judge(network, samples), "first pass, mean": first["mean"]}

        return train

    arms = {
        "L1": arm(PixelObjective("L1", 0.0), 1e-3),
        "transport, paired": arm(TransportObjective(width=8), 5e-4),
        "transport, unpaired": arm(TransportObjective(paired=False, width=8), 1e-4),
    }
    conduct(
        chosen,
        "da-rcot",
        TEXT,
        arms,
        "MRCNet of dim 8, one block a level; potential of width 8, RMSprop. All columns but the last: both passes.",
    )


if __name__ == "__main__":
    main()
