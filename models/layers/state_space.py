"""State-space layers that read a feature map along several paths (MambaIR, MaIR, MambaIRv2).

Liu et al., "VMamba: Visual State Space Model", arXiv 2401.10166; Gu and Dao, "Mamba", arXiv 2312.00752. Feature maps
are [B, H, W, C] here: normalisation and linear layers need no transposition, and channels-last convolutions are fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import CheckpointError, ConfigError
from ...kernels.selective_scan import state_space_2d

_LARGEST_STATE = 256
"""Limit of the selective-scan kernel."""


def dt_rank(dim: int) -> int:
    """Rank of the step-size projection in a block of `dim` channels."""
    return math.ceil(dim / 16)


def cached_orders(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Keeps the last scan orders that `build(height, width, *settings)` made, per device: `f(..., device=device)`."""

    @lru_cache(maxsize=8)
    def cached(*settings: int, device: torch.device) -> torch.Tensor:
        # A table made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.device("cpu"):
            return build(*settings).to(device, torch.int32)

    return wraps(build)(cached)


def convolve(convolution: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A 2-D convolution of [B, H, W, C], without copies: permuted, it is a channels-last picture."""
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def scan_sizes(state: Mapping[str, torch.Tensor], block: str, title: str) -> tuple[int, int]:
    """(channels, states of each) that the `self_attention` of a block scans, from a state dict.

    Raises CheckpointError in the name of `title` for absurd numbers of states.
    """
    channels = state[f"{block}.self_attention.conv2d.weight"].shape[0]
    states = state[f"{block}.self_attention.A_logs"].shape[1]
    if not 1 <= states <= _LARGEST_STATE:
        raise CheckpointError(f"{title}: A_logs has {states} states a channel, must be 1 to {_LARGEST_STATE}")
    return channels, states


class StateSpace(nn.Module):
    """Parameters of `sequences` selective scans over `inner` channels with `state` states; keys as released.

    The three that decide the decay rates stay float32 when the module goes to half precision: rounding log(A) or the
    step's bias changes how far the state remembers.
    """

    def __init__(self, sequences: int, inner: int, rank: int, state: int) -> None:
        super().__init__()
        if min(inner, rank) < 1 or not 1 <= state <= _LARGEST_STATE:
            raise ConfigError(
                f"a state-space layer cannot have {inner} channels, rank {rank} and {state} states "
                f"(at least 1 each, at most {_LARGEST_STATE} states)"
            )
        self.x_proj_weight = nn.Parameter(torch.empty(sequences, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(sequences, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(sequences, inner))
        self.A_logs = nn.Parameter(torch.empty(sequences * inner, state))
        self.Ds = nn.Parameter(torch.ones(sequences * inner))
        self.reset_state_space()

    @torch.no_grad()
    def reset_state_space(self) -> None:
        """Mamba's initialisation: A = -1, ..., -N; steps spread log-uniformly over 0.001 .. 0.1."""
        inner, rank = self.dt_projs_weight.shape[1:]
        self.x_proj_weight.uniform_(-(inner**-0.5), inner**-0.5)
        self.dt_projs_weight.uniform_(-(rank**-0.5), rank**-0.5)
        step = torch.exp(torch.empty_like(self.dt_projs_bias).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        states = torch.arange(1, self.A_logs.shape[1] + 1, dtype=torch.float32, device=self.A_logs.device)
        self.A_logs.copy_(states.log().expand_as(self.A_logs))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        exact = {name: getattr(self, name).detach() for name in ("A_logs", "Ds", "dt_projs_bias")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = before.to(parameter.device, torch.float32)
        return self

    def scan(self, x: torch.Tensor, order: torch.Tensor, **options: Any) -> torch.Tensor:
        """`kernels.selective_scan.state_space_2d` of tokens x [B, L, inner] with these parameters; float32."""
        return state_space_2d(
            x, order, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds, **options
        )


class GatedStateSpace2d(StateSpace):
    """2-D selective scan (SS2D): the results of four paths through the picture are added and gated by SiLU(z).

    x [B, H, W, C], order [4, H * W] (see `kernels.selective_scan`) -> [B, H, W, C].
    """

    def __init__(self, dim: int, inner: int, rank: int, state: int) -> None:
        super().__init__(4, inner, rank, state)
        self.in_proj = nn.Linear(dim, inner * 2, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        # Two products instead of one and a split: each half is contiguous, as the convolution wants it.
        weight, gate_weight = self.in_proj.weight.chunk(2)
        tokens = F.silu(convolve(self.conv2d, F.linear(x, weight)))
        mixed = self.out_norm(self.merge(tokens.flatten(1, 2), order).to(x.dtype))
        gate = F.silu(F.linear(x, gate_weight))
        return self.out_proj(mixed.view(gate.shape) * gate)

    def merge(self, tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Scans along all paths and combines the results: [B, L, inner] -> same."""
        return self.scan(tokens, order)


class StateSpaceBlock(nn.Module):
    """A residual state-space layer and a residual second layer; learned scales on both shortcuts. [B, H, W, C] -> same.

    `second` is stored under the key `second_key`. `path` says which of the paths given to `forward` this block takes.
    """

    def __init__(self, dim: int, attention: nn.Module, second_key: str, second: nn.Module, path: int = 0) -> None:
        super().__init__()
        self.skip_scale = nn.Parameter(torch.ones(dim))
        self.skip_scale2 = nn.Parameter(torch.ones(dim))
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = attention
        self.add_module(second_key, second)
        self.ln_2 = nn.LayerNorm(dim)
        self.second_key, self.path = second_key, path

    def forward(self, x: torch.Tensor, orders: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = x * self.skip_scale + self.self_attention(self.ln_1(x), orders[self.path])
        return x * self.skip_scale2 + self.get_submodule(self.second_key)(self.ln_2(x))


@torch.no_grad()
def initialise_linear(module: nn.Module) -> None:
    """For `Module.apply`: linear layers get truncated normal weights (0.02) and no bias, as these networks train."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
