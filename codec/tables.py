"""Integer probability tables: 16-bit cumulative counts that encoder and decoder share exactly.

As in the codec family this one derives from (DCVC-DC): 256 zero-mean Gaussians on a geometric scale, and one table per
channel of the hyper-latent. Each table covers symbols offset .. offset + length - 3; the last symbol is the escape for
everything outside. Computed in float64 on the CPU from float32 weights, so that every machine gets the same counts; the
published float32 arithmetic (`dtype`) differs by a count here and there, and between machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..models.aio_codec_rates import SMALLEST_SCALE, BitEstimator, float64_device

PRECISION = 16
TOTAL = 1 << PRECISION
SCALE_MIN, SCALE_MAX, SCALE_LEVELS = 0.11, 64.0, 256
LARGEST_HALF_WIDTH = 50
TAIL = 1e-4


@dataclass(frozen=True, eq=False)
class Tables:
    """cdf [tables, longest] cumulative counts (zero-padded), length [tables] of each, offset [tables]: its first symbol."""

    cdf: np.ndarray
    length: np.ndarray
    offset: np.ndarray

    def counts(self, index: int) -> np.ndarray:
        """Counts of the symbols of one table, the escape last; they sum to 65536."""
        return np.diff(self.cdf[index, : self.length[index]])


def quantise_cdf(probabilities: np.ndarray) -> np.ndarray:
    """Cumulative counts [n + 1] of n probabilities: every symbol gets at least one of 65536."""
    counts = np.floor(np.asarray(probabilities, dtype=np.float64) * TOTAL + 0.5).astype(np.int64)
    cdf = np.concatenate([[0], counts])
    cdf = np.cumsum(cdf * TOTAL // cdf.sum())
    cdf[-1] = TOTAL
    for i in range(len(cdf) - 1):
        if cdf[i] != cdf[i + 1]:
            continue
        widths = np.diff(cdf)
        donor = int(np.argmin(np.where(widths > 1, widths, TOTAL + 1)))  # the narrowest bin that can spare one
        if donor < i:
            cdf[donor + 1 : i + 1] -= 1
        else:
            cdf[i + 1 : donor + 1] += 1
    return cdf


def _pack(rows: list[np.ndarray], offsets: list[int]) -> Tables:
    longest = 2 * LARGEST_HALF_WIDTH + 3
    cdf = np.zeros((len(rows), longest), dtype=np.int32)
    for row, values in zip(cdf, rows, strict=True):
        row[: len(values)] = values
    return Tables(cdf, np.array([len(r) for r in rows], dtype=np.int32), np.array(offsets, dtype=np.int32))


def scale_table(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The 256 standard deviations."""
    return torch.linspace(math.log(SCALE_MIN), math.log(SCALE_MAX), SCALE_LEVELS, dtype=dtype).exp()


@lru_cache(maxsize=2)
def gaussian_tables(dtype: torch.dtype = torch.float64) -> Tables:
    """Tables of the zero-mean Gaussians."""
    rows, offsets = [], []
    for sigma in scale_table(dtype):

        def below(values: torch.Tensor, sigma: torch.Tensor = sigma) -> torch.Tensor:
            return 0.5 * (1 + torch.erf(values.to(dtype) * sigma.reciprocal() / math.sqrt(2)))

        candidates = torch.arange(2, LARGEST_HALF_WIDTH + 1)
        wide_enough = candidates[below(candidates) > 1 - TAIL]
        half = int(wide_enough[0]) if len(wide_enough) else LARGEST_HALF_WIDTH
        symbols = torch.arange(-half, half + 1)
        mass = below(symbols + 0.5) - below(symbols - 0.5)
        escape = 2 * below(torch.tensor([-half - 0.5]))
        rows.append(quantise_cdf(torch.cat([mass, escape]).numpy()))
        offsets.append(-half)
    return _pack(rows, offsets)


def hyper_tables(estimator: BitEstimator, dtype: torch.dtype = torch.float64) -> Tables:
    """Tables of the hyper-latent, one per channel, from the codec's learned distribution."""
    copy = BitEstimator(estimator.f1.h.shape[1])
    copy.load_state_dict({k: v.detach().cpu() for k, v in estimator.state_dict().items()})
    copy = copy.to(dtype)
    channels = estimator.f1.h.shape[1]

    def below(values: np.ndarray) -> np.ndarray:
        """F at these points, [channels, points]."""
        points = torch.from_numpy(np.asarray(values, dtype=np.float64)).to(dtype).reshape(1, 1, 1, -1)
        with torch.no_grad():
            return copy(points.expand(1, channels, 1, -1))[0, :, 0].numpy()

    candidates = np.arange(2, LARGEST_HALF_WIDTH + 1)

    def first(holds: np.ndarray) -> np.ndarray:
        """The smallest candidate per channel for which a condition holds, else the largest."""
        return np.where(holds.any(axis=1), candidates[holds.argmax(axis=1)], LARGEST_HALF_WIDTH)

    minima, maxima = first(below(-candidates) < TAIL), first(below(candidates) > 1 - TAIL)
    # The published tail is taken at the longest channel's last symbol; short channels under-state theirs, harmlessly.
    longest = int((minima + maxima + 1).max())
    rows = []
    for channel, (low, high) in enumerate(zip(minima, maxima, strict=True)):
        symbols = np.arange(-low, high + 1)
        mass = below(symbols + 0.5)[channel] - below(symbols - 0.5)[channel]
        ends = below(np.array([-low - 0.5, -low + longest - 1 + 0.5]))[channel]
        rows.append(quantise_cdf(np.concatenate([mass, [ends[0] + 1 - ends[1]]])))
    return _pack(rows, [-int(m) for m in minima])


def scale_index(scales: torch.Tensor) -> torch.Tensor:
    """Index of the Gaussian table for each predicted scale; negative ones count as tiny. int64, same shape.

    On the CPU where the scales' device has no float64.
    """
    step = (math.log(SCALE_MAX) - math.log(SCALE_MIN)) / (SCALE_LEVELS - 1)
    scales = scales.to(float64_device(scales.device)).double()
    position = (scales.clamp_min(SMALLEST_SCALE).log() - math.log(SCALE_MIN)) / step
    return position.clamp(0, SCALE_LEVELS - 1).long()


def table_bits(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> np.ndarray:
    """Bits that each symbol costs with its table, escapes as the sentinel alone."""
    relative = symbols - tables.offset[indexes]
    last = tables.length[indexes] - 2
    place = np.where((relative < 0) | (relative >= last), last, relative)
    counts = tables.cdf[indexes, place + 1] - tables.cdf[indexes, place]
    return -np.log2(counts / TOTAL)
