"""PromptIR: Restormer with learned prompts in the decoder; DCPT releases it with the original function.

Potlapalli et al., "PromptIR: Prompting for All-in-One Blind Image Restoration", NeurIPS 2023, arXiv 2306.13090; DCPT:
Hu et al., "Universal Image Restoration Pre-training via Degradation Classification", ICLR 2025, arXiv 2501.15510. Three
prompt blocks choose, per image, a mixture of five learned maps and feed it to the decoder. Keys are the released ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, ConfigError
from .layers.layout import fastest_layout
from .layers.restormer import Downsample, OverlapPatchEmbed, RestormerBlock, Upsample, norm_type, restormer_config
from .registry import Architecture, State, construct

_DIM = 48  # the published class writes its prompt and noise widths out for this one
_PROMPTS = 5
_PROMPT_SHAPES = ((64, 64), (128, 32), (320, 16))  # (channels, side) of prompt 1, 2, 3
_NEVER_USED = tuple(f"{name}{level}.weight" for name in ("chnl_reduce", "reduce_noise_channel_") for level in (1, 2, 3))


class PromptBlock(nn.Module):
    """A mixture of learned maps, its weights decided from the features (section 3.2)."""

    def __init__(self, channels: int, side: int, features: int) -> None:
        super().__init__()
        self.prompt_param = nn.Parameter(torch.rand(1, _PROMPTS, channels, side, side))
        self.linear_layer = nn.Linear(features, _PROMPTS)
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, prompts], adding up to 1."""
        return self.linear_layer(x.mean(dim=(2, 3))).softmax(dim=-1)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], only its size counts, weights [B, prompts] -> [B, P, H, W]."""
        prompt = torch.tensordot(weights.to(x.dtype), self.prompt_param[0], dims=1)
        return self.conv3x3(F.interpolate(prompt, size=x.shape[2:], mode="bilinear"))


class PromptIR(nn.Module):
    """The network. [B, 3, H, W] in 0..1, H and W multiples of 8 -> same shape, not clamped.

    `num_blocks` and `heads` go from shallow to deep.
    """

    def __init__(
        self,
        *,
        dim: int = _DIM,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        LayerNorm_type: str = "WithBias",
        inp_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        if dim != _DIM:
            raise ConfigError(f"PromptIR: dim is {dim}; its prompts are made for {_DIM}")
        if len(num_blocks) != 4 or len(heads) != 4:
            raise ConfigError("PromptIR: num_blocks and heads need four entries, shallow to deep")
        if inp_channels != out_channels:
            raise ConfigError(f"PromptIR: {inp_channels} channels in and {out_channels} out; they must be the same")
        if any(dim * 2**level % count for level, count in enumerate(heads)) or 32 % heads[2]:
            raise ConfigError(f"PromptIR: its widths do not divide into {tuple(heads)} heads")

        def block(channels: int, heads: int) -> RestormerBlock:
            return RestormerBlock(channels, heads, ffn_expansion_factor, norm_bias=LayerNorm_type == "WithBias")

        def stage(channels: int, blocks: int, heads: int) -> nn.Sequential:
            return nn.Sequential(*(block(channels, heads) for _ in range(blocks)))

        def conv(channels: int, out: int) -> nn.Conv2d:
            return nn.Conv2d(channels, out, 1, bias=False)

        one, two, three, four = (dim * 2**level for level in range(4))
        prompt1, prompt2, prompt3 = (channels for channels, _ in _PROMPT_SHAPES)
        self.patch_embed = OverlapPatchEmbed(inp_channels, dim)
        for level, ((channels, side), features) in enumerate(zip(_PROMPT_SHAPES, (two, three, four), strict=True), 1):
            self.add_module(f"prompt{level}", PromptBlock(channels, side, features))
        self.encoder_level1 = stage(one, num_blocks[0], heads[0])
        self.down1_2 = Downsample(one)
        self.encoder_level2 = stage(two, num_blocks[1], heads[1])
        self.down2_3 = Downsample(two)
        self.encoder_level3 = stage(three, num_blocks[2], heads[2])
        self.down3_4 = Downsample(three)
        self.latent = stage(four, num_blocks[3], heads[3])
        self.up4_3 = Upsample(three)
        self.reduce_chan_level3 = conv(two + three, three)
        self.noise_level3 = block(four + prompt3, heads[2])
        self.reduce_noise_level3 = conv(four + prompt3, three)
        self.decoder_level3 = stage(three, num_blocks[2], heads[2])
        self.up3_2 = Upsample(three)
        self.reduce_chan_level2 = conv(two + two, two)
        self.noise_level2 = block(three + prompt2, heads[2])
        self.reduce_noise_level2 = conv(three + prompt2, three)
        self.decoder_level2 = stage(two, num_blocks[1], heads[1])
        self.up2_1 = Upsample(two)
        self.noise_level1 = block(two + prompt1, heads[2])
        self.reduce_noise_level1 = conv(two + prompt1, two)
        self.decoder_level1 = stage(two, num_blocks[0], heads[0])
        self.refinement = stage(two, num_refinement_blocks, heads[0])
        self.output = nn.Conv2d(two, out_channels, 3, padding=1, bias=False)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the four levels, shallow to deep; the last one is the bottleneck."""
        level1 = self.encoder_level1(self.patch_embed(fastest_layout(x)))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        return [level1, level2, level3, self.latent(self.down3_4(level3))]

    def decode(
        self,
        features: list[torch.Tensor],
        prompt_weights: torch.Tensor | None = None,
        taken: list[torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:
        """The maps after each prompt, at 1/8, 1/4 and 1/2 size, then the decoded map at full size.

        The mixtures of prompts that were taken are put in front of the list `taken`.
        """

        def prompted(level: int, x: torch.Tensor) -> torch.Tensor:
            block = self.get_submodule(f"prompt{level}")
            weights = block.weights(x) if prompt_weights is None else prompt_weights[:, level - 1]
            if taken is not None:
                taken.insert(0, weights)
            x = self.get_submodule(f"noise_level{level}")(torch.cat([x, block(x, weights)], dim=1))
            return self.get_submodule(f"reduce_noise_level{level}")(x)

        level1, level2, level3, x = features
        x = prompted(3, x)
        yield x
        x = prompted(2, self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(x), level3], dim=1))))
        yield x
        x = prompted(1, self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), level2], dim=1))))
        yield x
        yield self.decoder_level1(torch.cat([self.up2_1(x), level1], dim=1))

    def decoder_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What a degradation classifier looks at: the maps after each prompt, highest resolution (1/2) first."""
        return list(islice(self.decode(self.encode(x)), 3))[::-1]

    def prompt_weights(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 5]: the mixture of prompts 1, 2, 3 (shallow to deep) this image takes."""
        taken: list[torch.Tensor] = []
        deque(islice(self.decode(self.encode(x), taken=taken), 3), maxlen=0)
        return torch.stack(taken, dim=1)

    def reconstruct(
        self, features: list[torch.Tensor], x: torch.Tensor, prompt_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The restored image from the maps of `encode` and the image they were made from."""
        (decoded,) = deque(self.decode(features, prompt_weights), maxlen=1)  # the earlier maps are freed on the way
        return self.output(self.refinement(decoded)) + x

    def forward(self, x: torch.Tensor, prompt_weights: torch.Tensor | None = None) -> torch.Tensor:
        """prompt_weights [B, 3, 5]: take these mixtures instead of deciding from the image (see `prompt_weights`)."""
        return self.reconstruct(self.encode(x), x, prompt_weights)


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "official": {
        "dim": _DIM,
        "num_blocks": (4, 6, 6, 8),
        "num_refinement_blocks": 4,
        "heads": (1, 2, 4, 8),
        "ffn_expansion_factor": 2.66,
        "LayerNorm_type": "WithBias",
        "inp_channels": 3,
        "out_channels": 3,
    },
}
_SIGNATURE = ("prompt1.prompt_param", "noise_level1.attn.temperature", "reduce_noise_level3.weight")


def _build(config: Mapping[str, Any]) -> PromptIR:
    if config.get("bias", False) or not config.get("decoder", True):
        raise ConfigError("PromptIR: its convolutions have no bias and its prompts are always on")
    return construct(PromptIR, "PromptIR", config, without=("bias", "decoder"))


def _without_dead_layers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original project's files carry six layers that nothing uses, and Lightning's prefix."""
    if "net.prompt1.prompt_param" in state:
        state = {key.removeprefix("net."): tensor for key, tensor in state.items() if key.startswith("net.")}
    if "prompt1.prompt_param" not in state:
        return state
    return {key: tensor for key, tensor in state.items() if key not in _NEVER_USED}


def _config_from_state_dict(state: State) -> dict[str, Any]:
    for level, (channels, side) in enumerate(_PROMPT_SHAPES, 1):
        shape = tuple(state[f"prompt{level}.prompt_param"].shape)
        if shape != (1, _PROMPTS, channels, side, side):
            raise CheckpointError(f"PromptIR: prompt{level} has the shape {shape}, unlike every published PromptIR")
    config = {**restormer_config(state), "LayerNorm_type": norm_type(state)}
    if not (config["dim"] == _DIM and 1 <= config["inp_channels"] <= 64 and 0 < config["ffn_expansion_factor"] <= 64):
        raise CheckpointError(f"PromptIR: absurd sizes: {config}")
    return config


ARCHITECTURES = [
    Architecture(
        id="promptir",
        system="dcpt",
        title="PromptIR",
        paper="Potlapalli et al., PromptIR: Prompting for All-in-One Blind Image Restoration, NeurIPS 2023, arXiv "
        "2306.13090; pre-trained by Hu et al., Universal Image Restoration Pre-training via Degradation "
        "Classification, ICLR 2025, arXiv 2501.15510",
        licence="original code: see va1shn9v/PromptIR; DCPT code and weights: none stated, ask the authors",
        detect=lambda state: all(key in state for key in _SIGNATURE),
        config_from_state_dict=_config_from_state_dict,
        build=_build,
        matches_config=lambda config: "num_refinement_blocks" in config and config.get("dim", _DIM) == _DIM,
        tasks=("derain", "denoise", "dehaze", "low-light", "deblur"),
        variants=VARIANTS,
        signature=_SIGNATURE,
        prepare_state_dict=_without_dead_layers,
        multiple_of=lambda config: 8,
        bytes_per_pixel=lambda config: 220.0 * config["dim"],
        context=lambda module, image: {"prompt_weights": module.prompt_weights(image)},
        global_statistics="the mixture of prompts is decided once on the whole picture and shared by all tiles; channel "
        "attention is computed per tile",
    )
]
