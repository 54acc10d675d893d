"""What a prior network's output means: epsilon (ADM), EDM and consistency scalings. Images in -1..1, sigma per image.

Karras et al. 2022 (EDM), table 1; Song et al. 2023 (consistency models), appendix C.
"""

from __future__ import annotations

import torch

SIGMA_DATA = 0.5
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def _image(sigma: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, 1, 1]."""
    return sigma.float().reshape(-1, 1, 1, 1)


def edm_c_in(sigma: torch.Tensor) -> torch.Tensor:
    """Input scaling 1 / sqrt(sigma^2 + sigma_data^2) for sigma [B], as [B, 1, 1, 1]."""
    return (_image(sigma) ** 2 + SIGMA_DATA**2).rsqrt()


def edm_time(sigma: torch.Tensor) -> torch.Tensor:
    """Time input 250 ln(sigma) of the released EDM and consistency networks; finite at sigma 0."""
    return 250.0 * torch.log(sigma.float() + 1e-44)


def edm_denoised(x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """x0 = c_skip x + c_out F (EDM). x, output [B, C, H, W], sigma [B]."""
    s = _image(sigma)
    return x * SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2) + output * s * SIGMA_DATA * edm_c_in(sigma)


def edm_weight(sigma: torch.Tensor) -> torch.Tensor:
    """1 / c_out^2 of sigma: with it the squared errors of x0 at all noise levels weigh alike (EDM, table 1)."""
    return 1 / sigma**2 + 1 / SIGMA_DATA**2


def consistency_denoised(
    x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor, sigma_min: float = SIGMA_MIN
) -> torch.Tensor:
    """x0 with the boundary condition x0(x, sigma_min) = x (consistency models)."""
    s = _image(sigma)
    skip = SIGMA_DATA**2 / ((s - sigma_min) ** 2 + SIGMA_DATA**2)
    return x * skip + output * (s - sigma_min) * SIGMA_DATA * edm_c_in(sigma)
