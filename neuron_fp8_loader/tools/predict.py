"""What a load will cost in dB, told from what a scan has seen: the counts of the codes, and the scales.

Exact where a weight has one scale and is translated code by code. Otherwise a model, which takes the codes to be
spread alike over the parts of a weight that have a scale of their own. ``verify`` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..codes.dequantize import scale_values
from ..codes.requantize import Fidelity, best_mantissas
from ..host.grain import GRAIN
from ..plan import Recipe, Step, Verdict

_BLOCKS = 1 << 18
"""Scales looked at in all, some of every weight at least."""
_AT_ONCE = GRAIN // 128
"""Scales looked at of one weight: times the magnitudes, what torch works on without threads."""
_VALUES = torch.arange(128, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).double().nan_to_num(0.0)
_FITS = 240.0


class Prediction(NamedTuple):
    """What a load makes of one weight.

    Attributes:
        signal, noise: sums of squares of its values and of the differences.
        codes: how often each of the 128 magnitude codes will occur; empty where the weight becomes bfloat16.
    """

    signal: float = 0.0
    noise: float = 0.0
    codes: tuple[int, ...] = ()

    @property
    def sqnr(self) -> float:
        """dB; infinite where nothing changes."""
        return Fidelity(self.signal, self.noise).sqnr


def predict(
    recipe: Recipe, histograms: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor], verdict: Verdict
) -> dict[str, Prediction]:
    """What a load makes of each weight.

    Args:
        recipe: of the load.
        histograms: int64 [256] of each weight.
        scales: as on disk, by name; weights without theirs are left out.
        verdict: which weights are rescaled.
    """
    share = min(_AT_ONCE, max(16, _BLOCKS // max(1, len(histograms))))
    found = {}
    for name, histogram in histograms.items():
        step, counts = recipe.steps[name], (histogram[:128] + histogram[128:]).double()
        energy = float(counts @ _VALUES.square())
        if step.pair is None:  # of another format, or without a scale: nothing is lost
            found[name] = Prediction(energy, 0.0, _translated(step, counts))
        elif step.pair.scale in scales:
            scale = scale_values(scales[step.pair.scale]).flatten()
            parts = scale.split(GRAIN)
            squares = sum(float(part.square().sum()) for part in parts) / max(1, scale.numel())
            if energy and math.isfinite(squares):
                loss, codes = _loss(step, counts / energy, scale, verdict, share)
                total = tuple(round(n * energy) for n in codes.tolist())
                found[name] = Prediction(energy * squares, loss * energy * squares, total)
    return found


def _translated(step: Step, counts: torch.Tensor) -> tuple[int, ...]:
    return () if step.action == "dequantize" else tuple(int(n) for n in counts.tolist())


def _loss(
    step: Step, counts: torch.Tensor, scales: torch.Tensor, verdict: Verdict, share: int
) -> tuple[float, torch.Tensor]:
    """Noise as a share of the signal, and what becomes of the counts, of which the squares of the values sum to 1."""
    if step.action == "dequantize":
        return _as_bfloat16(counts, scales, share), counts[:0]
    if step.action == "requantize":
        return _as_rows(counts, step, scales, share)
    if step.table is None or not verdict.applies(step):
        return 0.0, counts
    codes = torch.tensor(list(step.table.out[:128]), device="cpu")
    became = _VALUES[codes] * step.table.scale_factor
    return float(counts @ (became - _VALUES).square()), torch.bincount(codes, counts, 128)


def _as_bfloat16(counts: torch.Tensor, scales: torch.Tensor, share: int) -> float:
    scales = _some(scales[scales != 0], share)
    if not scales.numel():
        return 0.0
    values = scales[:, None] * _VALUES
    noise = (values.to(torch.bfloat16).double() - values).square() @ counts
    return float(noise.sum() / scales.square().sum())


def _as_rows(counts: torch.Tensor, step: Step, scales: torch.Tensor, share: int) -> tuple[float, torch.Tensor]:
    """With the better of the two row scales that ``codes.requantize`` tries, for a row of some block rows."""
    assert step.pair is not None
    block = step.pair.granularity.block
    assert block is not None
    across = -(-step.shape[-1] // block[1])
    rows = _some(scales.reshape(-1, across), max(4, share // across))
    rows = rows[rows.amax(1) > 0]
    if not rows.numel():
        return 0.0, counts
    largest = rows.amax(1) * _largest(counts, min(block[1], step.shape[-1]))
    mantissas = best_mantissas(rows)
    fitting = mantissas * torch.exp2(torch.ceil(torch.log2(largest / _FITS / mantissas)))
    noise, codes = _under(counts, rows, fitting)
    public_noise, public_codes = _under(counts, rows, largest / _FITS)
    better = public_noise < noise
    lost = float(torch.where(better, public_noise, noise).sum() / rows.square().sum())
    return lost, torch.where(better[:, None], public_codes, codes).mean(0)


def _under(counts: torch.Tensor, rows: torch.Tensor, row_scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [rows] and counts of codes [rows, 128] under new scales."""
    noise = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    became = torch.zeros(len(rows), 128, dtype=torch.float64, device="cpu")
    for column in rows.T:
        values = column[:, None] * _VALUES
        codes = (values / row_scales[:, None]).clamp(max=_FITS).to(torch.float8_e4m3fn).view(torch.uint8).long()
        codes[:, 127] = 127
        noise += (_VALUES[codes] * row_scales[:, None] - values).square() @ counts
        became.scatter_add_(1, codes, counts.expand(len(rows), -1) / rows.shape[1])
    return noise, became


def _largest(counts: torch.Tensor, many: int) -> float:
    """The largest magnitude that is to be expected among so many codes."""
    above = counts.flip(0).cumsum(0).flip(0) / counts.sum()
    likely = torch.nonzero(above * many >= 0.5).flatten()
    return max(float(_VALUES[int(likely.max())]), float(_VALUES[1])) if likely.numel() else _FITS


def _some(values: torch.Tensor, most: int) -> torch.Tensor:
    """Entries of the first dimension, from all over."""
    return values[:: max(1, len(values) // max(1, most))]
