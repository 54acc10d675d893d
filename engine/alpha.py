"""Transparency: what lies under it is hidden from networks, and it is scaled along with the picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def fill_transparent(colour: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Replaces colours under full transparency by those around it. colour [B, 3, H, W], alpha [B, 1, H, W].

    Push-pull on a pyramid of alpha-weighted averages (Gortler et al. 1996). Opaque pixels stay as they are.
    """
    if bool((alpha > 0).all()):
        return colour
    weight = (alpha > 0).to(colour.dtype)
    filled = _push_pull(colour * weight, weight)
    return torch.where(alpha > 0, colour, filled)


def _push_pull(weighted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    known = weighted / weight.clamp_min(1e-6)
    size = weighted.shape[-2:]
    if max(size) == 1 or bool((weight > 0).all()):
        return known
    pool = {"kernel_size": 2, "ceil_mode": True, "count_include_pad": False}
    below = _push_pull(F.avg_pool2d(weighted, **pool), F.avg_pool2d(weight, **pool))
    below = F.interpolate(below, size=size, mode="bilinear", align_corners=False)
    return torch.where(weight > 0, known, below)


def upscale_alpha(alpha: torch.Tensor, guide: torch.Tensor, scale: int) -> torch.Tensor:
    """Scales alpha [B, 1, H, W] with the restored picture [B, 3, scale H, scale W] as guide (guided filter).

    At scale 1 alpha is returned unchanged.
    """
    if scale == 1:
        return alpha.to(guide.device)
    larger = F.interpolate(alpha.to(guide.device), size=guide.shape[-2:], mode="bicubic", align_corners=False)
    larger = larger.clamp(0, 1)
    if float(alpha.amax() - alpha.amin()) < 1e-6 or min(guide.shape[-2:]) < 2 * scale + 1:
        return larger
    kernel = 2 * scale + 1
    from kornia.filters import guided_blur  # long to import, and only needed here

    refined = guided_blur(guide.clamp(0, 1), larger, (kernel, kernel), 1e-4)
    edges = (larger > 0.01) & (larger < 0.99)
    return torch.where(edges, refined.clamp(0, 1), larger)
