"""The four-level U-Net around state-space blocks that MambaIR and MaIR share; Restormer's frame and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError, ConfigError
from .restormer import Downsample, OverlapPatchEmbed, Upsample
from .state_dict import count_indices
from .state_space import convolve

STAGES = (
    *("encoder_level1", "encoder_level2", "encoder_level3", "latent"),
    *("decoder_level3", "decoder_level2", "decoder_level1", "refinement"),
)
LEVEL = {"encoder_level1": 0, "encoder_level2": 1, "encoder_level3": 2, "latent": 3}
LEVEL |= {"decoder_level3": 2, "decoder_level2": 1, "decoder_level1": 0, "refinement": 0}
"""Depth of each stage: its picture is 2^level times smaller."""


class StateSpaceUNet(nn.Module):
    """[B, 3, H, W] in 0..1, H and W multiples of 8 -> same shape, not clamped.

    `block(stage, width)` makes one block of a stage; `orders(height, width, device)` the scan orders of a level. Every
    block works on [B, H, W, C].
    """

    def __init__(
        self,
        block: Callable[[str, int], nn.Module],
        *,
        inp_channels: int,
        out_channels: int,
        dim: int,
        num_blocks: Sequence[int],
        num_refinement_blocks: int,
        bias: bool,
        dual_pixel_task: bool,
    ) -> None:
        super().__init__()
        if len(num_blocks) != 4:
            raise ConfigError(f"num_blocks needs four entries, one a level, not {len(num_blocks)}")
        if dim < 2 or dim % 2:
            raise ConfigError(f"dim is {dim}, must be even")
        self.dual_pixel_task = dual_pixel_task
        counts = dict(zip(STAGES, [*num_blocks, *num_blocks[2::-1], num_refinement_blocks], strict=True))

        def add(stage: str) -> None:
            # The last decoder level is not reduced after the skip connection: twice the width of its level.
            width = dim * 2 if stage in ("decoder_level1", "refinement") else dim * 2 ** LEVEL[stage]
            self.add_module(stage, nn.ModuleList([block(stage, width) for _ in range(counts[stage])]))

        self.patch_embed = OverlapPatchEmbed(inp_channels, dim)
        for level in (1, 2, 3):
            add(f"encoder_level{level}")
            self.add_module(f"down{level}_{level + 1}", Downsample(dim * 2 ** (level - 1)))
        add("latent")
        for level in (3, 2, 1):
            self.add_module(f"up{level + 1}_{level}", Upsample(dim * 2**level))
            if level > 1:
                reduce = nn.Conv2d(dim * 2**level, dim * 2 ** (level - 1), 1, bias=bias)
                self.add_module(f"reduce_chan_level{level}", reduce)
            add(f"decoder_level{level}")
        add("refinement")
        if dual_pixel_task:
            self.skip_conv = nn.Conv2d(dim, dim * 2, 1, bias=bias)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=bias)

    def orders(self, height: int, width: int, device: torch.device, **options: Any) -> tuple[torch.Tensor, ...]:
        """Scan orders for a map of this size."""
        raise NotImplementedError

    def forward(self, image: torch.Tensor, **options: Any) -> torch.Tensor:
        def run(stage: str, x: torch.Tensor) -> torch.Tensor:
            orders = self.orders(x.shape[1], x.shape[2], x.device, **options)
            for block in self.get_submodule(stage):
                x = block(x, orders)
            return x

        def join(reduce: nn.Module, up: nn.Module, deep: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
            return convolve(reduce, torch.cat([convolve(up, deep), skip], dim=-1))

        embedded = convolve(self.patch_embed, image.permute(0, 2, 3, 1))
        first = run("encoder_level1", embedded)
        second = run("encoder_level2", convolve(self.down1_2, first))
        third = run("encoder_level3", convolve(self.down2_3, second))
        x = run("latent", convolve(self.down3_4, third))
        x = run("decoder_level3", join(self.reduce_chan_level3, self.up4_3, x, third))
        x = run("decoder_level2", join(self.reduce_chan_level2, self.up3_2, x, second))
        x = run("decoder_level1", torch.cat([convolve(self.up2_1, x), first], dim=-1))
        x = run("refinement", x)
        if self.dual_pixel_task:
            return convolve(self.output, x + convolve(self.skip_conv, embedded)).permute(0, 3, 1, 2)
        return convolve(self.output, x).permute(0, 3, 1, 2) + image


def unet_config(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The frame's hyper-parameters from a state dict. Raises CheckpointError for shapes that cannot be right."""
    dim, inp_channels = state["patch_embed.proj.weight"].shape[:2]
    num_blocks = tuple(count_indices(state, f"{stage}.") for stage in STAGES[:4])
    refinement = count_indices(state, "refinement.")
    if not (2 <= dim <= 512 and dim % 2 == 0 and min(num_blocks) >= 1 and sum(num_blocks) + refinement <= 512):
        raise CheckpointError(f"absurd sizes: {dim} channels, {num_blocks} blocks, {refinement} in the refinement")
    if tuple(count_indices(state, f"{stage}.") for stage in STAGES[6:3:-1]) != num_blocks[:3]:
        raise CheckpointError("the decoder has other numbers of blocks than the encoder")
    return {
        "inp_channels": inp_channels,
        "out_channels": state["output.weight"].shape[0],
        "dim": dim,
        "num_blocks": num_blocks,
        "num_refinement_blocks": refinement,
        "bias": "output.bias" in state,
        "dual_pixel_task": "skip_conv.weight" in state,
    }
