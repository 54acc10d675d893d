"""`mend bench reference`: a network against its published implementation, the same weights and picture, turn by turn.

    mend bench reference restormer CHECKOUT --variant deraining [--size 256] [--repeat 3]
    mend bench reference mair CHECKOUT [--mamba CHECKOUT_OF_MAMBA]

CHECKOUT is a directory with the published repository (the table `REFERENCES` names it); it is no part of this project
and is only read. What it imports without using it on a picture is replaced by nothing. Two things that exist only for
CUDA have to be replaced by something: mamba_ssm's selective scan by this project's (so that everything but the scan is
compared) and, where --mamba says where its repository is, also by its own plain PyTorch `selective_scan_ref`; mmcv's
deformable convolution by this project's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import statistics
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

# The published files import these; imported here, they stay when the stand-ins go.
import einops.layers.torch  # noqa: F401
import torch
import torch.utils.checkpoint
from torch import nn

from .. import models
from ..errors import InputError
from ..kernels.selective_scan import selective_scan
from ..models.airnet import modulated_deformable_convolution
from . import machine
from .compare import Measured, measure

HEADER = (
    "| network | size | ours ms | reference ms | ours / reference | ours MB | reference MB | difference | replaced |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
SCAN, DEFORM = "selective scan", "deformable convolution"

Build = Callable[[Callable[..., nn.Module], Mapping[str, Any], int], nn.Module]
Call = Callable[[nn.Module, torch.Tensor], Any]


def accepted(network: Callable[..., nn.Module], config: Mapping[str, Any], **more: Any) -> nn.Module:
    """network(...) with those entries of `config`, and of `more`, that it has parameters for."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in {**config, **more}.items()}
    known = inspect.signature(network).parameters
    return network(**{k: v for k, v in settings.items() if k in known})


@dataclass(frozen=True)
class Reference:
    """Where a published network is and in what its settings and its call differ from ours."""

    repository: str
    module: str
    network: str
    root: str = "."
    build: Build = lambda network, config, size: accepted(network, config)
    call: Call = lambda network, image: network(image)
    ours: Call = lambda network, image: network(image)
    replaced: str = ""
    variants: tuple[str, ...] = ()
    """The released settings that the published code can be built with; all of ours where none are given."""


def _with_degradation(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return network(image, torch.linspace(-1, 1, 512).expand(image.shape[0], -1))


def _sized(network: Callable[..., nn.Module], config: Mapping[str, Any], size: int) -> nn.Module:
    return accepted(network, config, img_size=size)  # for this size the published code keeps its index tables, too


def _as_on_cuda(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with mock.patch.object(torch.cuda, "is_available", lambda: True):  # it makes its index tables only then
        return network(image)


_DCPT = "MILab-PKU/dcpt"
_UNETS = "realDenoising/basicsr/models/archs"
REFERENCES: Mapping[str, Reference] = {
    "moce-ir": Reference(
        "eduardzamfir/MoCE-IR",
        "net.moce_ir",
        "MoCEIR",
        "src",
        lambda network, config, size: accepted(
            network, config, levels=4, with_complexity=True, depth_type="constant", stage_depth=[1, 1, 1]
        ),
    ),
    "nafnet": Reference(_DCPT, "basicsr.archs.nafnet_arch", "NAFNetBaseline", variants=("dcpt-5d", "sidd-width32")),
    "dcpt-swinir": Reference(_DCPT, "basicsr.archs.swinir_arch", "SwinIR"),
    "dcpt-restormer": Reference(_DCPT, "basicsr.archs.restormer_arch", "Restormer"),
    "restormer": Reference("swz30/Restormer", "restormer_arch", "Restormer", "basicsr/models/archs"),
    "promptir": Reference(
        "va1shn9v/PromptIR",
        "net.model",
        "PromptIR",
        build=lambda network, config, size: accepted(network, config, decoder=True),
    ),
    "airnet": Reference(
        "XLearning-SCU/2022-CVPR-AirNet",
        "net.model",
        "AirNet",
        build=lambda network, config, size: network(types.SimpleNamespace(batch_size=32)),
        call=lambda network, image: network(image, image),
        replaced=DEFORM,
        variants=("original",),
    ),
    "da-rcot": Reference(
        "xl-tang3/DA-RCOT",
        "model_res",
        "MRCNet",
        build=lambda network, config, size: accepted(network, config, decoder=True),
    ),
    "vlu-net": Reference("xianggkl/VLU-Net", "net.Final", "VLUNet", call=_with_degradation, ours=_with_degradation),
    "mpmf-net": Reference(
        "chdwyb/MPMF-Net",
        "model",
        "MPMFNet",
    ),
    "mair": Reference("XLearning-SCU/2025-CVPR-MaIR", "basicsr.archs.mair_arch", "MaIR", build=_sized, replaced=SCAN),
    "mair-unet": Reference(
        "XLearning-SCU/2025-CVPR-MaIR", "mairunet_arch", "MaIRUNet", _UNETS, _sized, _as_on_cuda, replaced=SCAN
    ),
    "mambair": Reference(
        "csguoh/MambaIR",
        "basicsr.archs.mambair_arch",
        "MambaIR",
        replaced=SCAN,
        variants=(*(f"{size}-x{scale}" for size in ("SR", "light") for scale in (2, 3, 4)), "CDN", "CAR"),
    ),
    "mambair-unet": Reference(
        "csguoh/MambaIR", "mambairunet_arch", "MambaIRUNet", _UNETS, replaced=SCAN, variants=("real denoising",)
    ),
    "mambairv2": Reference("csguoh/MambaIR", "basicsr.archs.mambairv2_arch", "MambaIRv2", replaced=SCAN),
    "mambairv2-light": Reference(
        "csguoh/MambaIR", "basicsr.archs.mambairv2light_arch", "MambaIRv2Light", replaced=SCAN
    ),
    "transweather": Reference(
        "jeya-maria-jose/TransWeather", "transweather_model", "Transweather", variants=("original",)
    ),
    "uformer": Reference("ZhendongWang6/Uformer", "model", "Uformer", variants=("B",)),
}


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


def stand_ins(scan: Callable[..., Any] = selective_scan) -> dict[str, types.ModuleType]:
    """Modules, by name, in the place of what the published files import."""

    def pair(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else (value, value)

    def deformable(x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, *_: Any) -> Any:
        return modulated_deformable_convolution(x, weight, offset, mask)

    registry = types.SimpleNamespace(register=lambda: lambda network: network)
    small = {
        "DropPath": lambda *_: nn.Identity(),
        "to_2tuple": pair,
        "trunc_normal_": nn.init.trunc_normal_,
        "Local_Base": type("Local_Base", (), {}),
    }
    found = [
        _module("timm"),
        _module("timm.models"),
        _module("timm.models.layers", **small),
        _module("basicsr"),
        _module("basicsr.utils"),
        _module("basicsr.utils.registry", ARCH_REGISTRY=registry),
        _module("basicsr.archs.arch_util", **small),
        _module("mamba_ssm"),
        _module("mamba_ssm.ops"),
        _module("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=scan, selective_scan_ref=scan),
        _module("mamba_ssm.ops.triton"),
        _module("mamba_ssm.ops.triton.layer_norm", _layer_norm_fwd=None),
        _module("mamba_ssm.utils"),
        _module("mamba_ssm.utils.torch", custom_fwd=lambda f: f, custom_bwd=lambda f: f),
        _module("mmcv"),
        _module("mmcv.cnn", ConvModule=None),
        _module("mmcv.ops", modulated_deform_conv2d=deformable),
        _module("torchvision"),
        _module("torchvision.utils", save_image=None),
        _module("fvcore"),
        _module("fvcore.nn", FlopCountAnalysis=None, flop_count_table=None),
    ]
    return {module.__name__: module for module in found}


def published(directory: Path, name: str, scan: Callable[..., Any] = selective_scan) -> types.ModuleType:
    """The module `name` of the checkout at `directory`, its packages' own __init__ files left out."""
    replaced = stand_ins(scan)
    replaced.pop(name, None)
    parts = name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        package = _module(".".join(parts[:depth]))
        package.__path__ = [str(directory.joinpath(*parts[:depth]))]
        replaced[package.__name__] = package
    with mock.patch.dict(sys.modules, replaced), mock.patch.object(sys, "path", [str(directory), *sys.path]):
        return importlib.import_module(name)


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Within, published files that call Tensor.cuda stay on the processor, and routing that draws noise draws none."""

    def most_likely(logits: torch.Tensor, hard: bool = True, dim: int = -1) -> torch.Tensor:
        likely = logits.softmax(dim).max(dim, keepdim=True)[1]
        return torch.zeros_like(logits).scatter_(dim, likely, 1.0)

    with (
        mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_: tensor),
        mock.patch.object(torch, "randn_like", torch.zeros_like),
        mock.patch.object(torch.nn.functional, "gumbel_softmax", most_likely),
    ):
        yield


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def weighted(network: str, variant: str) -> nn.Module:
    """Ours, for evaluation, every parameter moved a little: none stays at the zero that it may start from."""
    architecture = models.registry.get(network)
    ours = architecture.build(architecture.variants[variant]).eval().requires_grad_(False)
    for parameter in ours.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return ours


def row(network: str, size: int, ours: Measured, reference: Measured, replaced: str) -> str:
    """A line of the table: medians of processor time, peaks of tensors, largest difference by the largest value."""
    mine, theirs = (statistics.median(one.processor) * 1e3 for one in (ours, reference))
    difference = float((ours.output - reference.output).abs().max() / reference.output.abs().max())
    cells = [network, str(size), f"{mine:.0f}", f"{theirs:.0f}", f"{mine / theirs:.2f}"]
    cells += [f"{one.peak / 1e6:.0f}" for one in (ours, reference)] + [f"{difference:.0e}", replaced or "nothing"]
    return f"| {' | '.join(cells)} |"


def rows(network: str, variant: str, checkout: Path, mamba: Path | None, size: int, repeat: int) -> Iterator[str]:
    """One line for every way to replace what is missing in the reference."""
    light = "light" in variant and f"{network}-light" in REFERENCES
    reference = REFERENCES[f"{network}-light" if light else network]
    ours, image = weighted(network, variant), torch.rand(1, 3, size, size)
    config = models.registry.get(network).variants[variant]
    image = image[:, : config.get("in_chans", 3)]
    calls = {"ours": lambda: _first(reference.ours(ours, image))}
    scans: dict[str, Callable[..., Any]] = {f"{reference.replaced}: ours" if reference.replaced else "": selective_scan}
    if mamba is not None and reference.replaced == SCAN:
        name = "mamba_ssm.ops.selective_scan_interface"
        scans[f"{SCAN}: selective_scan_ref"] = published(mamba, name).selective_scan_ref
    for title, scan in scans.items():
        file = published(checkout / reference.root, reference.module, scan)
        theirs = reference.build(getattr(file, reference.network), config, size).eval().requires_grad_(False)
        theirs.load_state_dict(ours.state_dict(), strict=False)
        calls[title] = lambda theirs=theirs: _first(reference.call(theirs, image))
    with steady():
        measured = measure(calls, repeat)
    mine = measured.pop("ours")
    for title, theirs in measured.items():
        yield row(f"{network} {variant}", size, mine, theirs, title)


def main(arguments: Sequence[str]) -> int:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="mend bench reference", description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=[name for name in REFERENCES if not name.endswith("-light")])
    parser.add_argument("checkout", type=Path, help="directory with the published repository")
    parser.add_argument("--variant", nargs="*", help="released settings (default: all)")
    parser.add_argument("--mamba", type=Path, help="directory with state-spaces/mamba, for its selective_scan_ref")
    parser.add_argument("--size", type=int, default=256, help="side of the picture (256)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (3)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    reference = REFERENCES[args.network]
    if not (args.checkout / reference.root).joinpath(*reference.module.split(".")).with_suffix(".py").is_file():
        raise InputError(
            f"{args.checkout}: {Path(reference.root, *reference.module.split('.'))}.py is not there; name a checkout of "
            f"https://github.com/{reference.repository}"
        )
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{machine.describe(torch.device('cpu'))}; float32, batch 1\n\n{HEADER}", flush=True)
    variants = REFERENCES[args.network].variants or tuple(models.registry.get(args.network).variants)
    for variant in args.variant or variants:
        for line in rows(args.network, variant, args.checkout, args.mamba, args.size, args.repeat):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
