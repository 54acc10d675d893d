"""Linear degradations: every output that a case names, flattened as it was recorded."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from comfyui_mend.guidance import fills, filters, kernels, operators


def _operator(case):
    config, inputs = case.config, case.inputs
    kind = config["operator"]
    base = config.get("base", kind.removesuffix("-svd").removesuffix("-fft"))
    if kind.endswith("-fft"):
        kernel = _kernel_2d(base, config, inputs)
        return filters.CircularBlur(kernel, config.get("factor", 1), published_adjoint=True)
    if base == "sr-bicubic":
        return filters.bicubic_downsampling(config["factor"])
    if base.startswith("deblur-"):
        vertical, horizontal = _kernels_1d(base)
        tiled = config.get("singulars") == "tiled"
        return filters.separable_blur(vertical, horizontal, drop_last=base == "deblur-aniso", official_layout=tiled)
    if base == "sr-average":
        return operators.AveragePooling(config["factor"])
    if kind == "inpainting":
        return operators.Inpainting(inputs["mask"])
    if kind == "walsh-hadamard-cs":
        kept = inputs["perm_key"].argsort(stable=True)[: config["size"] ** 2 // config["ratio"]]
        return operators.WalshHadamard(kept, config["size"])
    if kind == "blur-reflect-gaussian":
        return filters.ReflectBlur(kernels.gaussian_2d(config["kernel_size"], config["std"]))
    if kind == "blur-reflect-kernel":
        return filters.ReflectBlur(inputs["kernel"] / inputs["kernel"].sum())
    if kind == "circular-blur-downsample-closed-form":
        return filters.CircularBlur(inputs["kernel"] / inputs["kernel"].sum(), config["factor"], centre_after=True)
    simple = {
        "colorization": operators.Colourisation,
        "denoising": operators.Denoising,
        "resize-sr": lambda: filters.Resize(config["scale"]),
        "matlab-imresize": lambda: filters.Resize(config["scale"], equal_margins=False),
    }
    return simple[kind]()


def _kernels_1d(base):
    if base == "deblur-aniso":
        return kernels.gaussian_1d(9, 1.0), kernels.gaussian_1d(9, 20.0)
    line = kernels.gaussian_1d(5, 10.0) if base == "deblur-gauss" else kernels.uniform_1d(9)
    return line, line


def _kernel_2d(base, config, inputs):
    if base == "deblur-kernel":
        return inputs["kernel"] / inputs["kernel"].sum()
    if base == "sr-bicubic":
        return kernels.bicubic_decimation_2d(config["factor"])
    return torch.outer(*_kernels_1d(base))


def _recorded_kernels(case):
    """The kernels as the case shows them: lines for separable blurs, else planes."""
    config, kind = case.config, case.config["operator"]
    base = kind.removesuffix("-svd").removesuffix("-fft")
    if base == "deblur-aniso" and kind.endswith("-svd"):
        vertical, horizontal = _kernels_1d(base)
        return {"kernel_vertical": vertical, "kernel_horizontal": horizontal}
    if base in ("deblur-gauss", "deblur-uniform"):
        return {"kernel": _kernels_1d(base)[0]}
    if kind == "sr-bicubic-svd":
        return {"kernel": kernels.bicubic_decimation_1d(config["factor"])}
    if kind.endswith("-fft"):
        return {"kernel": _kernel_2d(base, config, case.inputs)}
    return {"kernel": kernels.gaussian_2d(config["kernel_size"], config["std"])} if "std" in config else {}


def _measurement(case, operator, x):
    """The arbitrary vector y as the measurement it stands for."""
    y = case.inputs["y"]
    if y.ndim == 4:
        return y
    kind, channels = case.config["operator"], x.shape[1]
    if kind == "inpainting":
        return _scatter(operator, y, x)
    if kind == "walsh-hadamard-cs":
        return y[:, : len(operator.kept) * channels].unflatten(1, (-1, channels)).transpose(1, 2)[:, :, None]
    height, width = operator.output_size(*x.shape[-2:])
    channels = 1 if kind == "colorization" else channels
    return y[:, : channels * height * width].unflatten(1, (channels, height, width))


def _scatter(operator, y, x):
    known = operator.mask[0, 0] > 0.5
    image = torch.zeros_like(x)
    count = int(known.sum())
    image[:, :, known] = y[:, : count * x.shape[1]].unflatten(1, (count, x.shape[1])).transpose(1, 2)
    return image


def _flat_measurement(case, operator, y):
    if case.inputs.get("y", y).ndim == 4:
        return y
    if case.config["operator"] == "inpainting":
        return y[:, :, operator.mask[0, 0] > 0.5].transpose(1, 2).flatten(1)
    if case.config["operator"] == "walsh-hadamard-cs":
        return y[:, :, 0].transpose(1, 2).flatten(1)
    return y.flatten(1)


def run(case):
    kind, inputs = case.config["operator"], case.inputs
    inputs |= {n: (inputs[n] >= s["threshold"]).float() for n, s in case.json["inputs"].items() if "threshold" in s}
    if kind == "cv2-bicubic-up":
        return {"up": F.interpolate(inputs["x"], scale_factor=case.config["factor"], mode="bicubic")}
    if kind == "median-inpainting":
        return {"filled": fills.median_fill(inputs["image"], inputs["mask"])}
    x = inputs["x"]
    operator = _operator(case).fitted(*x.shape[-2:])
    results = {"Ax": _flat_measurement(case, operator, operator.A(x))}
    if "y" not in inputs:
        return results
    y = _measurement(case, operator, x)
    flat = (lambda t: t) if inputs["y"].ndim == 4 else (lambda t: t.flatten(1))
    eta = case.config.get("eta", 1e-4)  # the published default
    makers = {
        "Aty": lambda: flat(operator.A_adjoint(y)),
        "pinv_y": lambda: flat(operator.A_dagger(y)),
        "pinv_eta_y": lambda: flat(operator.A_dagger(y, eta)),
        "AtA_eta_inv_x": lambda: flat(operator.normal_inverse(x, eta)),
        "AAt_eta_inv_y": lambda: _flat_measurement(case, operator, operator.gram_inverse(y, eta)),
        "residual_grad": lambda: operator.gradient(x, y),
        "norm": lambda: (operator.A(x) - y).norm().reshape(1),
        "norm_grad": lambda: operator.gradient(x, y) / (operator.A(x) - y).norm(),
        "prox": lambda: operator.prox(x, y, case.config["alpha"]),
        "otf_real": lambda: operator.transfer(*x.shape[-2:], x.device).real[None, None],
        "otf_imag": lambda: operator.transfer(*x.shape[-2:], x.device).imag[None, None],
    }
    results |= {name: makers[name]() for name in case.outputs if name in makers}
    results |= {n: k.float() for n, k in _recorded_kernels(case).items() if n in case.outputs}
    return results
