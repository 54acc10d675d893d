"""Zero-shot restoration with ComfyUI's models and samplers: the same numbers as without, for every parametrisation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from comfyui_mend import models
from comfyui_mend.engine import comfy_sampling
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
PART = 36
"""A side that is no multiple of the 8 pixels of a latent."""
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


class WholeLatents:
    """A VAE without loss that crops to whole latents of 8 x 8 pixels, as ComfyUI's do."""

    latent_channels = 192

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        height, width = (side // 8 * 8 for side in pictures.shape[1:3])
        return F.pixel_unshuffle(pictures[:, :height, :width].movedim(-1, 1), 8)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(latent, 8).movedim(1, -1)


def latent_session(size: tuple[int, int] | None) -> Any:
    scales = SimpleNamespace(process_latent_in=lambda x: 2 * x, process_latent_out=lambda x: x / 2)
    return comfy_sampling._space(None, WholeLatents(), torch.device("cpu"), scales, size)


@pytest.mark.parametrize("size", [(16, 24), (7, 5), (70, 100), (8, 9)])
def test_a_picture_comes_back_whole_from_latents_that_it_does_not_fill(size: tuple[int, int]) -> None:
    picture = torch.rand(2, 3, *size) * 2 - 1
    session = latent_session(size)
    state = session.encode(picture)
    assert state.shape == (2, 192, -(-size[0] // 8), -(-size[1] // 8))
    torch.testing.assert_close(session.decode(state), picture)
    shown = latent_session(None).decode(state)
    torch.testing.assert_close(shown[..., : size[0], : size[1]], picture)
    torch.testing.assert_close(shown[..., -1, -1], picture[..., -1, -1])


@pytest.mark.parametrize("size", [(7, 5), (13, 20)])
def test_estimates_in_latents_that_the_picture_does_not_fill_get_onto_the_measurement(size: tuple[int, int]) -> None:
    seen, session = measure(Denoising(), torch.rand(1, 3, *size)), latent_session(size)
    state = session.encode(torch.zeros(1, 3, *size))
    moved = session.operator(seen.operator).back_project(state, seen.y)
    torch.testing.assert_close(session.decode(moved), seen.y)


@pytest.mark.parametrize("latent", [(1, 1), (3, 2), (2, 3)])
def test_a_latent_of_another_picture_is_refused_and_both_sizes_are_named(latent: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"{8 * latent[1]} x {8 * latent[0]}, .* 10 x 9; .* Start From Measurement"):
        latent_session((9, 10)).decode(torch.zeros(1, 192, *latent))


def wired_model(channels: int, text_encoder: bool = False, **config: Any) -> Any:
    """What of a MODEL is looked at before it is used."""
    known = {"unet_config": config} | ({"clip_target": lambda: "CLIP"} if text_encoder else {})
    latents = SimpleNamespace(latent_channels=channels)
    return SimpleNamespace(
        get_model_object={"latent_format": latents}.__getitem__,
        model=SimpleNamespace(model_config=SimpleNamespace(**known)),
    )


SAID = [[torch.zeros(1, 77, 768), {}]]


@pytest.mark.parametrize(
    ("model", "wires", "complaint"),
    [
        (wired_model(4), {}, "vae: .* latents of 4 channels; connect"),
        (wired_model(3), {"vae": WholeLatents()}, "vae: .* works on pixels, .* leave vae open"),
        (wired_model(16), {"vae": WholeLatents()}, "vae: its latents have 192 channels, but the model's 16; connect"),
        (wired_model(3, context_dim=768), {}, "positive: .* reads prompts; connect CLIP Text Encode"),
        (wired_model(3, text_encoder=True), {"negative": SAID}, "positive: .* reads prompts"),
        (wired_model(3, context_dim=768), {"positive": SAID, "cfg": 2.5}, "negative: cfg 2.5 .* set cfg to 1"),
    ],
)
def test_prior_from_model_names_the_input_that_its_model_needs_otherwise(
    model: Any, wires: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        zero_shot_samplers.PriorFromModel.execute(model, **wires)


def test_prior_from_model_takes_what_its_model_needs_and_no_more() -> None:
    for model, wires in (
        (wired_model(3), {}),
        (wired_model(3), {"cfg": 3.0}),
        (wired_model(192), {"vae": WholeLatents()}),
        (wired_model(3, context_dim=768), {"positive": SAID}),
        (wired_model(3, text_encoder=True), {"positive": SAID, "negative": SAID, "cfg": 3.0}),
    ):
        prior = zero_shot_samplers.PriorFromModel.execute(model, **wires)[0]
        assert prior.model is model and prior.vae is wires.get("vae")


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


def latent_graph(checkpoint: str, sampling: str, scheme: str, side: int = SIDE) -> Graph:
    """The same on a Stable Diffusion model under one of ComfyUI's parametrisations."""
    g = Graph()
    seen = g.measurement("super-resolution", side)
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
    if side % 8 and scheme == "CM4IR":
        g.keep("start", latent, 2)
        euler = g.add("KSamplerSelect", sampler_name="euler")
        moving = g.add("MendMeasurementGuider", model=(model, 0), measurement=(seen, 0), **{**rest, "mu": 1.0})
        g.keep("guided", g.sample(moving, euler, sigmas, (latent, 1)))
        predicted = g.add(
            "MendPredictClean", prior=(prior, 0), x=(latent, 0), sigmas=(usual, 0), index=0, delta=0.0,
            delta_in_scalings=False,
        )  # fmt: skip
        g.keep("predicted", predicted, 1)
    return g


def open_graph(node: str, checkpoint: str, file: str, *wires: str) -> Graph:
    """A node of a MODEL with only some of its optional inputs connected; `pixels` takes a pixel prior as the MODEL."""
    g = Graph()
    loaded = g.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    said = (g.add("CLIPTextEncode", clip=(loaded, 1), text="a palace"), 0)
    inputs: dict[str, Any] = {"model": (loaded, 0), "cfg": 2.0 if "cfg" in wires else 1.0}
    inputs |= {"vae": (loaded, 2)} if "vae" in wires else {}
    inputs |= {"positive": said} if "positive" in wires else {}
    if "pixels" in wires:
        prior = g.add("MendLoadPrior", model_name=file, kind="EDM", class_index=-1, precision="fp32")
        inputs["model"] = (g.add("MendPriorToModel", prior=(prior, 0)), 0)
    seen = g.measurement("super-resolution")
    if node == "MendMeasurementGuider":
        made = g.add(node, **inputs, measurement=(seen, 0), zeta=0.0, mu=1.0)
        sigmas = g.add("MendCM4IRSigmas", steps=2, start=250, gamma=0.2)
        euler, empty = g.add("KSamplerSelect", sampler_name="euler"), g.add("EmptyLatentImage", width=32, height=32)
        g[empty]["inputs"]["batch_size"] = 1
        g.keep("made", g.sample(made, euler, sigmas, (empty, 0)))
    else:
        g.keep("made", g.restore(g.add(node, **inputs), seen, steps=2))
    return g


OPEN = {
    "no prompt": (("vae",), "positive: this model reads prompts; connect CLIP Text Encode"),
    "no vae": (("positive",), "vae: this model works on latents of 4 channels"),
    "no negative": (("vae", "positive", "cfg"), "negative: cfg 2 compares with it"),
    "a vae for pixels": (("pixels", "vae"), "vae: this model works on pixels"),
}
MODEL_NODES = ("MendPriorFromModel", "MendMeasurementGuider")


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
    for scheme in ("CM4IR", "RDMD"):
        graphs[f"{scheme} latents part"] = latent_graph("tiny_sd15.ckpt", "eps", scheme, side=PART)
    for node in MODEL_NODES:
        for name, (wires, _) in OPEN.items():
            graphs[f"{node} {name}"] = open_graph(node, "tiny_sd15.ckpt", "small.safetensors", *wires)
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
@pytest.mark.parametrize("scheme", ["CM4IR", "RDMD"])
def test_a_picture_that_does_not_fill_its_latents_is_restored_at_its_own_size(
    outcomes: dict[str, Any], scheme: str
) -> None:
    outcome = outcomes[f"{scheme} latents part"]
    assert outcome.complete, outcome.problem
    whole, sampled = outcome.kept["whole"], outcome.kept["sampled"]
    assert whole.shape == (1, PART, PART, 3) and bool(whole.isfinite().all())
    assert sampled.shape == (1, 40, 40, 3)
    torch.testing.assert_close(sampled[:, :PART, :PART], whole, rtol=0, atol=2e-3)


@pytest.mark.comfyui
def test_the_start_is_of_the_size_of_the_picture_and_a_state_alone_shows_all_its_latents_hold(
    outcomes: dict[str, Any],
) -> None:
    kept = outcomes["CM4IR latents part"].kept
    assert kept["start"].shape == (1, PART, PART, 3) and kept["predicted"].shape == (1, 40, 40, 3)
    assert kept["guided"].shape == (1, 4, 5, 5) and bool(kept["guided"].isfinite().all())


@pytest.mark.comfyui
@pytest.mark.parametrize("node", MODEL_NODES)
@pytest.mark.parametrize("name", OPEN)
def test_an_optional_input_that_the_model_needs_is_asked_for_by_name(
    outcomes: dict[str, Any], node: str, name: str
) -> None:
    outcome = outcomes[f"{node} {name}"]
    assert not outcome.complete and OPEN[name][1] in outcome.problem


@pytest.mark.comfyui
def test_the_guider_puts_estimates_onto_the_measurement_in_its_range_only(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["guider"]
    assert outcome.complete, outcome.problem
    guided, plain, ranged, clean = (outcome.kept[k] for k in ("guided", "plain", "ranged", "clean"))
    operator = bicubic_downsampling(4)
    seen = operator.A(clean)  # the start is the pseudo-inverse of a measurement without noise
    assert float((operator.A(guided) - seen).abs().max()) < 1e-3 < float((operator.A(plain) - seen).abs().max())
    torch.testing.assert_close(ranged, plain)
