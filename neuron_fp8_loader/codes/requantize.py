"""From one scale a block to one scale a row: each value is rounded once more, to the best row scale.

NxD's layers take no block scales. Starting from the checkpoint's own codes (not from halved ones), every row gets
the scale ``mantissa x 2^exponent``: the mantissa is common to the rows of a block row and chosen for the least
rounding error, the exponent is the smallest that keeps the row within +-240. Where all block scales are powers of
two the mantissa is 1, and nothing is rounded but what falls below the subnormals.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from . import kernel
from .formats import E4M3FN, LARGEST_FIT, NAN_CODE, NEURON_MAX

_TILE = 1 << 21  # bytes worked on at a time
_AT_ONCE = 1 << 14  # scales whose candidates are compared at a time
_GRID = 32  # evenly spaced candidates for a mantissa
_FROM_SCALES = 32  # further candidates: mantissas of the largest block scales, which make those blocks exact


class Fidelity(NamedTuple):
    """What a requantization changed: sums of squares over finite weights, in the checkpoint's own values."""

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
    step = max(1, _TILE // max(1, block[0] * columns)) * block[0]
    out = []
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        part = scales[top // block[0] : -(-bottom // block[0])].contiguous()
        out.append(Tile(src[top:bottom], dst[top:bottom], part, row_scales[top:bottom], block))
    return out


def requantize(tile: Tile) -> Fidelity:
    """Requantize one tile, whose block scales are finite, not negative and less than a quarter of float32's range."""
    scales = tile.scales
    largest, occupied = _largest(tile)
    mantissas = best_mantissas(torch.where(occupied, scales, 0.0)).repeat_interleave(tile.block[0])[: largest.numel()]
    exponent = torch.frexp(largest / (NEURON_MAX * mantissas)).exponent
    # frexp gives [0.5, 1) x 2^exponent: one exponent less will do for exactly 0.5
    exponent = torch.where(largest <= NEURON_MAX * torch.ldexp(mantissas, exponent - 1), exponent - 1, exponent)
    row_scales = torch.ldexp(mantissas, exponent.clamp(-126, 128))
    no_weights = scales.amax(dim=1).repeat_interleave(tile.block[0])[: largest.numel()]
    row_scales = torch.where(largest > 0, row_scales, torch.where(no_weights > 0, no_weights, 1.0))
    tile.row_scales.copy_(row_scales)
    return _look_up(tile, tile.row_scales.double())


def best_mantissas(scales: torch.Tensor) -> torch.Tensor:
    """For each block row, the mantissa in [1, 2) of a common row scale that rounds its blocks least.

    Args:
        scales: float64 [block rows, block columns], from 0 up.

    Returns:
        float64 [block rows], exact in float32. The expected error counts blocks by their energy (scale squared) and
        takes all significands for equally frequent.
    """
    rows, across = scales.shape
    step = max(1, _AT_ONCE // max(1, across))
    if rows > step:  # the comparison holds a value a scale and candidate
        return torch.cat([best_mantissas(part) for part in scales.split(step)])
    fractions = torch.frexp(scales).mantissa * 2  # [1, 2), and 0
    # most energy first; the float32 value, so that a candidate is what will be written
    order = scales.argsort(dim=1, descending=True)[:, : min(across, _FROM_SCALES)]
    own = fractions.gather(1, order).float().double()
    own = torch.where((own >= 1) & (own < 2), own, 1.0)
    if bool((own == 1).all()) and bool(((fractions == 1) | (scales == 0)).all()):
        return torch.ones(rows, dtype=torch.float64, device="cpu")
    grid = 1 + torch.arange(_GRID, dtype=torch.float64, device="cpu") / _GRID
    candidates = torch.cat([grid.expand(rows, -1), own], dim=1)
    energy = (scales / scales.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).square()
    ratio = fractions.float()[:, None, :] / candidates.float()[:, :, None]  # [block rows, candidates, block columns]
    ratio = torch.where(ratio < 1, ratio * 2, ratio)
    error = _rounding_errors()[((ratio - 1) * _STEPS).int().clamp(0, _STEPS - 1)]
    # float64: the order of a sum must not decide between two candidates
    cost = torch.einsum("rcb,rb->rc", error.double(), energy)
    return candidates.gather(1, cost.argmin(dim=1, keepdim=True)).squeeze(1)


_STEPS = 4096


@cache
def _rounding_errors() -> torch.Tensor:
    """float32 [_STEPS]: for ratios from 1 to 2, the mean squared error of rounding significand x ratio to four bits,
    over the eight significands, in the units before the ratio."""

    def error(ratio: float) -> float:
        values = [significand * ratio for significand in range(8, 16)]
        changes = [(round(v) if v < 16 else 2 * round(v / 2)) - v for v in values]
        return sum(change * change for change in changes) / (ratio * ratio)

    # not at import, where it would start threads: a process that forks later must not have any
    return torch.tensor([error(1 + k / _STEPS) for k in range(_STEPS)], dtype=torch.float32, device="cpu")


# -- the two passes over the codes: native, or torch with the same results -----------------------------------------


def _values() -> torch.Tensor:
    codes = torch.arange(128, dtype=torch.int32, device="cpu").to(torch.uint8).view(E4M3FN)
    return codes.double().nan_to_num(0.0)


_VALUES = _values()


def _slices(rows: int, columns: int) -> list[tuple[int, int]]:
    """Rows to do at a time in torch, whose temporaries take some 40 bytes a weight."""
    step = max(1, (1 << 18) // max(1, columns))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)] if columns else []


def _largest(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitude of each row, float64 [rows]; and which blocks hold more than zeros, bool as the scales."""
    rows, columns = tile.src.shape
    height, width = tile.block
    across = tile.scales.shape[1]
    top = torch.zeros(rows, across, dtype=torch.uint8, device="cpu")
    if kernel.active != "torch" and tile.src.numel():
        top = kernel.run_max(tile.src, width)
    else:
        for first, last in _slices(rows, columns):
            codes = tile.src[first:last] & 0x7F
            codes = torch.where(codes == NAN_CODE, 0, codes)
            padded = torch.nn.functional.pad(codes, (0, across * width - columns))
            top[first:last] = padded.view(last - first, across, width).amax(dim=2)
    values = _VALUES[top.int()] * tile.scales.repeat_interleave(height, dim=0)[:rows]
    whole = torch.nn.functional.pad(top, (0, 0, 0, tile.scales.shape[0] * height - rows))
    return values.amax(dim=1), whole.view(-1, height, across).amax(dim=1) > 0


def _look_up(tile: Tile, row_scales: torch.Tensor) -> Fidelity:
    rows, columns = tile.src.shape
    if tile.src.numel() == 0:
        return Fidelity()
    if kernel.active != "torch":
        return Fidelity(*kernel.requantize(tile.src, tile.dst, tile.scales.contiguous(), row_scales, tile.block))
    height, width = tile.block
    before = tile.scales.repeat_interleave(height, dim=0)[:rows]
    total = Fidelity()
    for first, last in _slices(rows, columns):
        part = slice(first, last)
        total += _look_up_torch(tile.src[part], tile.dst[part], before[part], row_scales[part], width)
    return total


def _look_up_torch(
    src: torch.Tensor, dst: torch.Tensor, before: torch.Tensor, row_scales: torch.Tensor, width: int
) -> Fidelity:
    columns = src.shape[1]
    ratios, which = torch.unique(before / row_scales[:, None], return_inverse=True)
    tables = _codes_of(_VALUES * ratios[:, None])
    tables[:, NAN_CODE] = NAN_CODE
    codes = src & 0x7F
    # the index of an element's entry in all tables laid end to end
    new = tables.view(-1)[which.repeat_interleave(width, dim=1)[:, :columns] * 128 + codes]
    was = _VALUES[codes.int()] * before.repeat_interleave(width, dim=1)[:, :columns]
    change = _VALUES[new.int()] * row_scales[:, None] - was
    dst.copy_(new | (src & 0x80))
    return Fidelity(float(was.square().sum()), float(change.square().sum()))


def _codes_of(values: torch.Tensor) -> torch.Tensor:
    """uint8: the nearest magnitude codes of values from 0 up, ties to even, no further than 240."""
    midpoints = (_VALUES[:LARGEST_FIT] + _VALUES[1 : LARGEST_FIT + 1]) / 2
    below, upto = torch.searchsorted(midpoints, values), torch.searchsorted(midpoints, values, right=True)
    return torch.where(below % 2 == 0, below, upto).to(torch.uint8)
