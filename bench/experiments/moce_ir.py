"""MoCE-IR (CVPR 2025) with and without the complexity bias of its routing loss."""

from __future__ import annotations

import torch

from ...training.objectives.base import Weighted
from ...training.objectives.recipes import PixelObjective, RoutingObjective
from .common import MOCE, conduct, fresh, held_out, judge, learn, options

TEXT = """
# MoCE-IR: what does the complexity bias of the routing loss do?

The paper: weighting the importance of experts by their size makes the routers prefer cheap experts, and raises the average PSNR. Here: the same tiny
network with four experts a block, trained with L1 + 0.1 spectrum + 0.01 routing loss, the latter without and with the bias. *cost of experts* is the mean size of the experts
taken, as a share of the largest one's; *experts in use* the mean number of experts a block takes on the validation set.
"""


@torch.inference_mode()
def routes(network, samples) -> dict[str, float]:
    """What the routers choose on the validation set."""
    module = network.module
    complexity = torch.stack([b.adapter.routing.complexity for _, _, stage in module.dec for b in stage.layers])
    taken = torch.stack([module.route(s.damaged[None]).choice[:, 0] for s in samples])  # [pictures, blocks]
    cost = complexity.gather(1, taken.T).mean()
    used = torch.tensor([float(len(column.unique())) for column in taken.T]).mean()
    return {"cost of experts": float(cost), "experts in use": float(used)}


def main() -> None:
    chosen = options(__doc__, steps=200)
    samples = held_out(chosen)

    def arm(weight: float, bias: bool):
        def train(seed: int) -> dict[str, float]:
            objective = Weighted(((PixelObjective("L1", 0.1), 1.0), (RoutingObjective(bias), weight)))
            network = learn(chosen, fresh("moce-ir", MOCE, seed), objective, seed, chosen.steps)
            return {**judge(network, samples), **routes(network, samples)}

        return train

    arms = {"without bias": arm(0.01, False), "with bias": arm(0.01, True)}
    conduct(chosen, "moce-ir", TEXT, arms, "MoCE-IR of dim 8 with three levels, five kinds of damage.")


if __name__ == "__main__":
    main()
