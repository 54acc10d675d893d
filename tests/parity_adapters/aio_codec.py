"""The all-in-one codec: forward passes, integers to be coded, and the coding tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support import tapped

from comfyui_mend.codec import tables
from comfyui_mend.models import aio_codec_rates


def _table_outputs(estimator):
    gauss, hyper = tables.gaussian_tables(torch.float32), tables.hyper_tables(estimator, torch.float32)
    named = {"gauss": gauss, "z": hyper}
    outputs = {f"{n}_cdf": t.cdf for n, t in named.items()}
    outputs |= {f"{n}_cdf_length": t.length for n, t in named.items()}
    return (
        outputs
        | {f"{n}_offset": t.offset for n, t in named.items()}
        | {"scale_table": tables.scale_table(torch.float32)}
    )


def _floats(outputs, wanted):
    return {n: torch.as_tensor(v).float() for n, v in outputs.items() if n in wanted}


def _entropy(case):
    module, inputs = case.module(), case.inputs
    estimator = module.bit_estimator_z
    scales = torch.exp(9 * inputs["scales_u"] - 4).clamp_max(20)
    symbols = (inputs["noise"] * scales).round()
    symbols.view(-1)[::97] += 75
    z = inputs["z"].round()
    indexes = tables.scale_index(scales)
    z_indexes = torch.arange(z.shape[1])[None, :, None, None].expand_as(z)
    hyper = tables.hyper_tables(estimator, torch.float32)
    bits_y = tables.table_bits(symbols.long().numpy(), indexes.numpy(), tables.gaussian_tables(torch.float32))
    bits_z = tables.table_bits(z.long().numpy(), z_indexes.numpy(), hyper)
    outputs = _table_outputs(estimator) | {
        "scales": scales,
        "symbols": symbols,
        "z_symbols": z,
        "indexes": indexes,
        "z_indexes": z_indexes,
        "bits_y": aio_codec_rates.gaussian_bits(symbols, scales),
        "bits_z": aio_codec_rates.bits_of(estimator(z + 0.5) - estimator(z - 0.5)),
        "table_bits_y": bits_y.sum().reshape(1),
        "table_bits_z": bits_z.sum().reshape(1),
    }
    if "rans64_stream" in case.outputs:
        from comfyui_mend.codec import rans64

        planes = [(z, z_indexes, hyper), (symbols, indexes, tables.gaussian_tables(torch.float32))]
        outputs["rans64_stream"] = list(rans64.encode([(s.long().numpy(), i.numpy(), t) for s, i, t in planes]))
    return _floats(outputs, case.outputs)


def _tapped(module, run):
    taps = {
        "mid_patch_embed": module.enc.patch_embed,
        "mid_enc_block0": module.enc.encoder_x2.blocks[0],
        "mid_enc_x4": module.enc.encoder_x4,
        "mid_enc_x16": module.enc.encoder_x16,
        "mid_hyper_dec": module.hyper_dec,
        "mid_dec_x4": module.dec.decoder_x4,
    }
    return tapped(taps, run)


def _padded(image):
    """To multiples of 16, as the published test pads both the input and the reference."""
    return F.pad(image, (0, -image.shape[-1] % 16, 0, -image.shape[-2] % 16), mode="replicate")


def run(case):
    if "z_channel" in case.config:
        return _entropy(case)
    module, inputs = case.module(), case.inputs
    x, gt, qualities = inputs["x"], inputs.get("gt"), inputs["q_index"].reshape(-1)
    padded = _padded(x)
    image, quality = padded.repeat(len(qualities), 1, 1, 1), qualities.repeat_interleave(len(x))
    (x_hat, latent), outputs = _tapped(module, lambda: module(image, quality))
    y, z = module.analyse(image, quality)
    bits_y, bits_z = module.estimate_bits(latent)
    pixels = image.shape[-2] * image.shape[-1]
    rate_y, rate_z = (b.sum(dim=(1, 2, 3)) / pixels for b in (bits_y, bits_z))
    outputs |= {
        "x_hat": x_hat,
        "x_padded": padded,
        "x_out": x_hat.clamp(0, 1)[..., : x.shape[-2], : x.shape[-1]],
        "y": y,
        "z": z,
        "z_hat": latent.z_hat,
        "params": module.common_parameters(latent.z_hat, y.shape[-2:]),
        "y_res": latent.y_res,
        "y_q": latent.y_q,
        "y_hat": latent.y_hat,
        "scales_hat": latent.scales_hat,
        "bits_y": bits_y,
        "bits_z": bits_z,
        "bpp_y": rate_y,
        "bpp_z": rate_z,
        "bpp": rate_y + rate_z,
        "bit": (bits_y.sum() + bits_z.sum()).reshape(1),
        "q_enc": module.quality_gain("enc", quality),
        "q_dec": module.quality_gain("dec", quality),
    }
    for k in (0, 1):
        outputs |= {f"y_q_w_{k}": latent.planes[k], f"scales_w_{k}": latent.scales[k]}
        outputs[f"scale_index_{k}"] = tables.scale_index(latent.scales[k])
    if gt is not None:
        outputs["mse"] = (x_hat - _padded(gt).repeat(len(qualities), 1, 1, 1)).square().sum(dim=1).mean(dim=(1, 2))
    outputs |= _table_outputs(module.bit_estimator_z)
    if "rans64_stream" in case.outputs:
        from comfyui_mend.codec import rans64

        channels = torch.arange(latent.z_hat.shape[1])[None, :, None, None].expand_as(latent.z_hat)
        planes = [(latent.z_hat, channels, tables.hyper_tables(module.bit_estimator_z, torch.float32))]
        planes += [
            (latent.planes[k], tables.scale_index(latent.scales[k]), tables.gaussian_tables(torch.float32))
            for k in (0, 1)
        ]
        outputs["rans64_stream"] = list(rans64.encode([(s.long().numpy(), i.numpy(), t) for s, i, t in planes]))
    return _floats(outputs, case.outputs)
