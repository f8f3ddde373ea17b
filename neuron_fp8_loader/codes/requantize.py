"""From one scale a block to one scale a row: each value is rounded once more, to the better of two row scales.

NxD's layers take no block scales. Starting from the checkpoint's own codes (not from halved ones), every row tries

- row amax / 240, rounded to float32: what the public preprocess scripts take;
- ``mantissa x 2^exponent``, the mantissa common to the rows of a block row and chosen for the least expected error,
  the exponent the smallest that keeps the row within +-240;

and keeps the one with the less squared error, measured on the row itself. The second is kept only if it is no worse
beyond the doubt of single precision, so no row of any weight is worse than by the public formula (where that gives
a normal float32). Where all block scales are powers of two, mantissa 1 rounds nothing but what
falls below the subnormals, and wins for that.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from ..host.grain import GRAIN, entries
from . import kernel
from .requantize_torch import choose, largest_codes, look_up

_TILE = 1 << 22  # bytes worked on at a time
_AT_ONCE = GRAIN // 64  # scales whose candidates are compared at a time
_GRID = 32  # evenly spaced candidates for a mantissa
_FROM_SCALES = 32  # further candidates: mantissas of the largest block scales, which make those blocks exact


class Fidelity(NamedTuple):
    """What a requantization changed: sums of squares over finite weights, in the checkpoint's own values.

    Native code adds up what it chose by: to some thousandths, less than 0.01 dB. Of weights that hold few different
    codes, and whose noise is less than 1e-5 of the signal, it is less exact (0.2 dB at 94 dB); the choice is not.
    """

    signal: float = 0.0
    noise: float = 0.0

    def __add__(self, other: object) -> Fidelity:
        assert isinstance(other, Fidelity)
        return Fidelity(self.signal + other.signal, self.noise + other.noise)

    @property
    def sqnr(self) -> float:
        """dB; infinite where nothing changed."""
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


class Tile(NamedTuple):
    """Whole block rows of one weight: codes before and after (uint8 [rows, columns]), and where their scales go."""

    src: torch.Tensor
    dst: torch.Tensor
    scales: torch.Tensor  # float64 [block rows, block columns]
    row_scales: torch.Tensor  # float32 [rows], written
    block: tuple[int, int]


def tiles(
    src: torch.Tensor, dst: torch.Tensor, scales: torch.Tensor, row_scales: torch.Tensor, block: tuple[int, int]
) -> list[Tile]:
    """Cut a weight into tiles that threads can take one by one.

    Args:
        src, dst: uint8 [rows, columns], contiguous; may be the same.
        scales: float64 [ceil(rows / block[0]), ceil(columns / block[1])].
        row_scales: float32 [rows], to be written.
        block: (rows, columns) of a block; the last ones may be ragged.
    """
    rows, columns = src.shape
    if not src.numel():
        return []
    block = min(block[0], rows), min(block[1], columns)  # sizes from a file size nothing
    step = max(1, min(_TILE // (block[0] * columns), GRAIN // scales.shape[1])) * block[0]
    out = []
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        part = scales[top // block[0] : -(-bottom // block[0])].contiguous()
        out.append(Tile(src[top:bottom], dst[top:bottom], part, row_scales[top:bottom], block))
    return out


def requantize(tile: Tile) -> Fidelity:
    """Requantize one tile, whose block scales are finite, not negative and less than a quarter of float32's range."""
    src, dst, scales, row_scales, block = tile
    if kernel.active != "torch":
        return Fidelity(*kernel.requantize(src, dst, scales, _rounding_errors(), row_scales, block))
    runs, blocks = largest_codes(src, block)
    mantissas = best_mantissas(torch.where(blocks > 0, scales, 0.0))
    signal, noise = choose(src, scales, mantissas, runs, row_scales, block)
    look_up(src, dst, scales, row_scales, block)
    return Fidelity(signal, noise)


def best_mantissas(scales: torch.Tensor) -> torch.Tensor:
    """For each block row, the mantissa in [1, 2) of a common row scale that rounds its blocks least.

    Args:
        scales: float64 [block rows, block columns], from 0 up.

    Returns:
        float64 [block rows], exact in float32. The expected error counts blocks by their energy (scale squared) and
        takes all significands for equally frequent.
    """
    if kernel.active != "torch":
        return kernel.best_mantissas(scales.contiguous(), _rounding_errors())
    rows, across = scales.shape
    step = max(1, _AT_ONCE // max(1, across))
    if rows > step:  # the comparison holds a value a scale and candidate
        return torch.cat([best_mantissas(part) for part in scales.split(step)])
    fractions = torch.frexp(scales).mantissa * 2  # [1, 2), and 0
    if bool(((fractions == 1) | (scales == 0)).all()):
        return torch.ones(rows, dtype=torch.float64, device="cpu")
    # most energy first; the float32 value, so that a candidate is what will be written
    order = scales.argsort(dim=1, descending=True)[:, : min(across, _FROM_SCALES)]
    own = fractions.gather(1, order).float().double()
    own = torch.where((own >= 1) & (own < 2), own, 1.0)
    grid = 1 + torch.arange(_GRID, dtype=torch.float64, device="cpu") / _GRID
    candidates = torch.cat([grid.expand(rows, -1), own], dim=1)
    energy = (scales / scales.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).square()
    cost = torch.zeros(candidates.shape, dtype=torch.float64, device="cpu")
    for part, weight in zip(fractions.float().split(_AT_ONCE, 1), energy.split(_AT_ONCE, 1), strict=True):
        ratio = part[:, None, :] / candidates.float()[:, :, None]  # [block rows, candidates, block columns]
        ratio = torch.where(ratio < 1, ratio * 2, ratio)
        error = entries(_rounding_errors(), ((ratio - 1) * _STEPS).int().clamp(0, _STEPS - 1))
        # float64: the order of a sum must not decide between two candidates
        cost += (error.double() * weight[:, None, :]).sum(dim=2)
    return candidates.gather(1, cost.argmin(dim=1, keepdim=True)).squeeze(1)


_STEPS = 4096


@cache
def _rounding_errors() -> torch.Tensor:
    """float32 [_STEPS]: for ratios from 1 to 2, the mean squared error of rounding significand x ratio to four bits,
    over the eight significands, in the units before the ratio."""

    # not at import, where it would start threads: a process that forks later must not have any
    ratios = 1 + torch.arange(_STEPS, dtype=torch.float64, device="cpu") / _STEPS
    total = torch.zeros_like(ratios)
    for significand in range(8, 16):
        values = significand * ratios
        unit = torch.where(values < 16, 2.0**52, 2.0**53)  # added, it rounds to 1 or 2: round() starts torch's threads
        total += (values + unit - unit - values).square()
    return (total / ratios.square()).float()
