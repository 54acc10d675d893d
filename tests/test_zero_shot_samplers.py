"""Zero-shot restoration with ComfyUI's models and samplers: the same numbers as without, for every parametrisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfyui_mend import models
from comfyui_mend.errors import InputError, MissingDependency
from comfyui_mend.guidance.filters import bicubic_downsampling
from comfyui_mend.guidance.measurement import measure
from comfyui_mend.guidance.operators import Denoising
from comfyui_mend.nodes import zero_shot_samplers
from comfyui_mend.nodes.guidance import Cm4irSigmas
from comfyui_mend.nodes.rdmd import RdmdSigmas

from .comfyui_graphs import run
from .make_sd_checkpoints import write_sd15

SIDE = 32
U_NET = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": ()}
SAMPLINGS = {
    "eps": None,
    "v": ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}),
    "x0": ("ModelSamplingDiscrete", {"sampling": "x0", "zsnr": False}),
    "edm": ("ModelSamplingContinuousEDM", {"sampling": "edm", "sigma_max": 80.0, "sigma_min": 0.002}),
    "flow": ("ModelSamplingSD3", {"shift": 1.0}),
}


def test_outside_comfyui_the_sampler_nodes_say_what_is_missing() -> None:
    found = measure(Denoising(), torch.rand(1, 3, 8, 8))
    for attempt in (
        lambda: zero_shot_samplers.SamplerCm4ir.execute(found),
        lambda: zero_shot_samplers.SamplerRdmd.execute(found),
        lambda: zero_shot_samplers.PriorToModel.execute(None),
        lambda: zero_shot_samplers.MeasurementGuider.execute(None, found),
    ):
        with pytest.raises(MissingDependency, match="ComfyUI"):
            attempt()


def test_deltas_are_read_from_a_line_of_numbers() -> None:
    assert zero_shot_samplers._numbers("0, 0.3 0.05,0.1") == (0.0, 0.3, 0.05, 0.1)
    assert zero_shot_samplers.SamplerCm4ir.validate_inputs("") is True
    assert "deltas" in zero_shot_samplers.SamplerCm4ir.validate_inputs("a, b")
    with pytest.raises(InputError, match="not a list of numbers"):
        zero_shot_samplers._numbers("0; 1")


def test_noise_levels_for_flow_models_run_from_one_to_nought() -> None:
    for node in (Cm4irSigmas, RdmdSigmas):
        usual, flow = (node.execute(steps=5, flow=flow)[0] for flow in (False, True))
        torch.testing.assert_close(flow[:-1] / (1 - flow[:-1]), usual[:-1], rtol=1e-4, atol=0)
        assert float(flow[-1]) == 0 and float(flow.max()) < 1


class Graph(dict):
    """A prompt in ComfyUI's format that is written node by node."""

    def add(self, class_type: str, name: str = "", **inputs: Any) -> str:
        name = name or f"n{len(self)}"
        self[name] = {
            "class_type": class_type,
            "inputs": {k: v if not isinstance(v, tuple) else list(v) for k, v in inputs.items()},
        }
        return name

    def keep(self, name: str, node: str, output: int = 0) -> None:
        self.add("KeepForTest", name, value=(node, output))

    def measurement(self, task: str, side: int = SIDE, noise: float = 0.05) -> str:
        photo = self.add("LoadImage", image="palace.jpg")
        small = self.add("ImageScale", image=(photo, 0), upscale_method="area", width=side, height=side, crop="center")
        if task == "deblur":
            blur = {"kind": "gaussian", "size": 5, "sigma": 2.0, "sigma_across": 2.0, "angle": 0.0}
            operator = self.add("MendOperatorBlur", **blur, borders="circular", official_layout=False)
        else:
            operator = self.add("MendOperatorDownsample", kind="bicubic", factor=4.0)
        return self.add("MendMeasure", operator=(operator, 0), image=(small, 0), noise=noise, seed=3)

    def sample(self, guider: str, sampler: str, sigmas: str, latent: tuple[str, int], seed: int = 5) -> str:
        noise = self.add("RandomNoise", noise_seed=seed)
        return self.add(
            "SamplerCustomAdvanced",
            noise=(noise, 0),
            guider=(guider, 0),
            sampler=(sampler, 0),
            sigmas=(sigmas, 0),
            latent_image=list(latent),
        )

    def restore(self, prior: str, seen: str, **settings: Any) -> str:
        hand = {"start": 250, "gamma": 0.2, "zeta": 0.0, "eta": 0.1, "mu": 1.0, "noise_sign": "turned round"}
        rest = {"weight": 20.0, "renewal": -1.0, "result": "automatic", "tau": 0.5, "steps": 0}
        scheme = {"scheme": "CM4IR", "preset": "by hand", "seed": 5}
        inputs = {**scheme, **hand, **rest, **settings}
        return self.add("MendZeroShotRestore", prior=(prior, 0), measurement=(seen, 0), **inputs)


def pixel_graph(file: str, kind: str, scheme: str, task: str = "super-resolution") -> Graph:
    """The sampler on a pixel prior as MODEL, and the node that does all at once, which the tests compare."""
    g = Graph()
    seen = g.measurement(task)
    prior = g.add("MendLoadPrior", model_name=file, kind=kind, class_index=-1, precision="fp32")
    model = g.add("MendPriorToModel", prior=(prior, 0))
    guider = g.add("MendMeasurementGuider", model=(model, 0), measurement=(seen, 0), zeta=0.0, mu=0.0, cfg=1.0)
    start = g.add("MendCM4IRSigmas", steps=4, start=250, gamma=0.2)
    latent = g.add(
        "MendStartFromMeasurement", prior=(prior, 0), measurement=(seen, 0), sigmas=(start, 0), seed=5, zeta=0.0
    )
    if scheme == "CM4IR":
        rest = {"zeta": 0.0, "eta": 0.1, "mu": 1.0, "noise_sign": "turned round"}
        sampler = g.add("MendSamplerCM4IR", measurement=(seen, 0), **rest, deltas="0, 0.3, 0.05, 0.1")
        sampled = g.sample(guider, sampler, start, (latent, 1))
        whole = g.restore(prior, seen, preset="super-resolution x4 (bedroom)")
    else:
        sampler = g.add("MendSamplerRDMD", measurement=(seen, 0), tau=0.5, weight=20.0, renewal=0.2, result="automatic")
        sigmas = g.add("MendRDMDSigmas", steps=6)
        sampled = g.sample(guider, sampler, sigmas, (latent, 1))
        whole = g.restore(prior, seen, scheme="RDMD", steps=6, renewal=0.2)
    g.keep("whole", whole)
    g.keep("sampled", g.add("MendStateToImage", prior=(prior, 0), state=(sampled, 0)))
    return g


def latent_graph(checkpoint: str, sampling: str, scheme: str) -> Graph:
    """The same on a Stable Diffusion model under one of ComfyUI's parametrisations."""
    g = Graph()
    seen = g.measurement("super-resolution")
    loaded = g.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    model = loaded
    if SAMPLINGS[sampling]:
        kind, settings = SAMPLINGS[sampling]
        model = g.add(kind, model=(loaded, 0), **settings)
    said = {
        "positive": (g.add("CLIPTextEncode", clip=(loaded, 1), text="a palace"), 0),
        "vae": (loaded, 2),
        "cfg": 1.0,
    }
    prior = g.add("MendPriorFromModel", model=(model, 0), **said)
    rest = {"zeta": 0.0, "mu": 0.0, **said}
    guider = g.add("MendMeasurementGuider", model=(model, 0), measurement=(seen, 0), **rest)
    usual = g.add("MendCM4IRSigmas", steps=2, start=250, gamma=0.2)
    latent = g.add(
        "MendStartFromMeasurement", prior=(prior, 0), measurement=(seen, 0), sigmas=(usual, 0), seed=5, zeta=0.0
    )
    flow = sampling == "flow"
    if scheme == "CM4IR":
        sampler = g.add(
            "MendSamplerCM4IR",
            measurement=(seen, 0),
            zeta=0.0,
            eta=0.1,
            mu=1.0,
            noise_sign="turned round",
            vae=(loaded, 2),
        )
        sigmas = g.add("MendCM4IRSigmas", steps=2, start=250, gamma=0.2, flow=flow)
        whole = g.restore(prior, seen, steps=2)
    else:
        sampler = g.add(
            "MendSamplerRDMD",
            measurement=(seen, 0),
            tau=0.5,
            weight=20.0,
            renewal=0.2,
            result="automatic",
            vae=(loaded, 2),
        )
        sigmas = g.add("MendRDMDSigmas", steps=2, flow=flow)
        whole = g.restore(prior, seen, scheme="RDMD", steps=2, renewal=0.2)
    sampled = g.sample(guider, sampler, sigmas, (latent, 1))
    g.keep("whole", whole)
    g.keep("sampled", g.add("VAEDecode", vae=(loaded, 2), samples=(sampled, 0)))
    return g


def guided_graph(file: str, **range_: float) -> Graph:
    """Euler on a pixel prior, guided by a measurement without noise, and the same without guidance."""
    g = Graph()
    seen = g.measurement("super-resolution", noise=0.0)
    prior = g.add("MendLoadPrior", model_name=file, kind="EDM", class_index=-1, precision="fp32")
    model = g.add("MendPriorToModel", prior=(prior, 0))
    sigmas = g.add("KarrasScheduler", steps=3, sigma_max=1.0, sigma_min=0.1, rho=7.0)
    latent = g.add(
        "MendStartFromMeasurement", prior=(prior, 0), measurement=(seen, 0), sigmas=(sigmas, 0), seed=5, zeta=0.0
    )
    euler = g.add("KSamplerSelect", sampler_name="euler")
    for name, options in {"guided": {"mu": 1.0}, "plain": {"mu": 0.0}, "ranged": {"mu": 1.0, **range_}}.items():
        inputs = {"model": (model, 0), "measurement": (seen, 0), "zeta": 0.0, "cfg": 1.0, **options}
        guider = g.add("MendMeasurementGuider", **inputs)
        g.keep(name, g.sample(guider, euler, sigmas, (latent, 1)))
    g.keep("clean", latent, 1)
    return g


def awake(system: str, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random weights under which the network changes what it sees."""
    generator = torch.Generator().manual_seed(seed)
    state = models.create(system, config).state_dict()
    return {
        k: v if v.ndim == 1 else torch.randn(v.shape, generator=generator) * (0.6 / v[0].numel() ** 0.5)
        for k, v in state.items()
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("zero_shot")
    files = {"unet": ("guided-diffusion-unet", {"unet": {**U_NET, "out_channels": 6}})}
    files["consistency"] = ("guided-diffusion-unet", {"unet": U_NET, "wrapper": "karras"})
    files["small"] = ("noise-unet", {"channels": 3, "widths": [8, 8], "blocks": [1, 1], "embedding": 8})
    for seed, (name, (system, config)) in enumerate(files.items()):
        save_file(awake(system, config, seed), str(place / f"{name}.safetensors"))
    write_sd15(place)
    kinds = {"epsilon": "unet", "consistency": "consistency", "EDM": "small"}
    graphs: dict[str, Graph] = {}
    for kind, name in kinds.items():
        graphs[f"CM4IR {kind}"] = pixel_graph(f"{name}.safetensors", kind, "CM4IR")
    for task in ("super-resolution", "deblur"):
        graphs[f"RDMD EDM {task}"] = pixel_graph("small.safetensors", "EDM", "RDMD", task)
    graphs["RDMD epsilon"] = pixel_graph("unet.safetensors", "epsilon", "RDMD")
    for sampling in SAMPLINGS:
        graphs[f"CM4IR latents {sampling}"] = latent_graph("tiny_sd15.ckpt", sampling, "CM4IR")
    for sampling in ("v", "flow"):
        graphs[f"RDMD latents {sampling}"] = latent_graph("tiny_sd15.ckpt", sampling, "RDMD")
    graphs["guider"] = guided_graph("small.safetensors", start_percent=0.99)
    return run(place, graphs, {"restoration": place, "checkpoints": place})


COMPARED = (
    *(f"CM4IR {kind}" for kind in ("epsilon", "consistency", "EDM")),
    *(f"RDMD {what}" for what in ("epsilon", "EDM super-resolution", "EDM deblur")),
    *(f"CM4IR latents {sampling}" for sampling in SAMPLINGS),
    *(f"RDMD latents {sampling}" for sampling in ("v", "flow")),
)


@pytest.mark.comfyui
@pytest.mark.parametrize("name", COMPARED)
def test_a_sampler_in_comfyui_gives_what_zero_shot_restore_gives(outcomes: dict[str, Any], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.complete, outcome.problem
    whole, sampled = outcome.kept["whole"], outcome.kept["sampled"]
    assert whole.shape == sampled.shape and bool(whole.isfinite().all()) and float(whole.std()) > 0.01
    torch.testing.assert_close(sampled, whole, rtol=0, atol=2e-3 if "latents" in name else 2e-4)


@pytest.mark.comfyui
def test_the_guider_puts_estimates_onto_the_measurement_in_its_range_only(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["guider"]
    assert outcome.complete, outcome.problem
    guided, plain, ranged, clean = (outcome.kept[k] for k in ("guided", "plain", "ranged", "clean"))
    operator = bicubic_downsampling(4)
    seen = operator.A(clean)  # the start is the pseudo-inverse of a measurement without noise
    assert float((operator.A(guided) - seen).abs().max()) < 1e-3 < float((operator.A(plain) - seen).abs().max())
    torch.testing.assert_close(ranged, plain)
