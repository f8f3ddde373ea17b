"""What FP8 bytes and scales are worth, worked out with numpy and ml_dtypes in float64.

Nothing here uses the tables or kernels that the loader converts with: this is what ``verify`` checks them against.
numpy and ml_dtypes are the extra ``verify``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from ..codes.granularity import Granularity

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

TILE = 1 << 18
"""Weights compared at a time: enough for numpy to be left alone by other threads, little enough for any memory."""

_ALL = np.arange(256, dtype=np.uint8)
GPU: Floats = _ALL.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
"""float64 [256]: each byte as OCP e4m3fn."""
OTHER_FORMATS: dict[torch.dtype, Floats] = {
    torch.float8_e4m3fnuz: _ALL.view(ml_dtypes.float8_e4m3fnuz).astype(np.float64)
}
"""float64 [256]: each byte as AMD's e4m3fnuz."""
NEURON: Floats = _ALL.view(ml_dtypes.float8_e4m3).astype(np.float64)
"""float64 [256]: each byte as IEEE e4m3, the way trn1, inf2 and trn2 read it."""


def _half_steps() -> Floats:
    exponent = np.maximum((_ALL & 0x7F) >> 3, 1).astype(np.float64)
    steps: Floats = np.exp2(exponent - 7 - 3 - 1)
    return steps


HALF_STEP: Floats = _half_steps()
"""float64 [256]: half the distance from each value to the next larger one, the most that rounding to it can cost."""


def _half_steps_down() -> Floats:
    first = ((_ALL & 0x07) == 0) & ((_ALL & 0x7F) > 0x08)  # of an exponent: the next smaller value is half as far
    steps: Floats = np.where(first, HALF_STEP / 2, HALF_STEP)
    return steps


HALF_STEP_DOWN: Floats = _half_steps_down()
"""float64 [256]: half the distance from each value to the next smaller one in magnitude."""


def expected_for(factor: float | None) -> tuple[Bytes, ...] | None:
    """The tables of what codes may become where scales grew by ``factor``, each uint8 [256]; None: any may be right.

    For 448/240 there are two: with the bfloat16 division of Neuron's recipe, and rounded once, as others do it.
    """
    if factor is None:
        return None
    if abs(factor - 1) <= 2.0**-8:
        return (_ALL.copy(),)
    if abs(factor - 2) <= 2.0**-7:
        return (expected("half"),)
    if abs(factor / (448 / 240) - 1) <= 2.0**-8:
        once = (GPU / (448 / 240)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        return (expected("ratio"), once)
    return None


def expected(method: str) -> Bytes:
    """uint8 [256]: what the bytes of a rescaled weight should be, rounded to nearest even by ml_dtypes.

    ``half``: value / 2. ``ratio``: value / (448/240), rounded to bfloat16 first, as the recipe in Neuron's README.
    """
    values = GPU.astype(np.float32)
    scaled = (
        values / np.float32(2) if method == "half" else (values / np.float32(448 / 240)).astype(ml_dtypes.bfloat16)
    )
    codes: Bytes = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """A tensor's bytes, uint8 [nbytes]."""
    flat = tensor.detach().contiguous().reshape(-1)
    raw: Bytes = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
    return raw


def scale_values(scale: torch.Tensor) -> Floats:
    """A scale in float64, in its shape; uint8 and float8_e8m0fnu hold 2^(byte - 127), 255 is NaN."""
    if str(scale.dtype) in ("torch.uint8", "torch.float8_e8m0fnu"):
        powers = np.exp2(_ALL.astype(np.float64) - 127)
        powers[255] = np.nan
        return powers[as_bytes(scale)].reshape(tuple(scale.shape))
    values: Floats = scale.detach().to(torch.float64).numpy()
    return values


@dataclass(frozen=True)
class Tile:
    """Some weights that lie together in memory, [rows, columns], and the scale of each of them.

    Attributes:
        start, end: where they lie in the weight.
        grid: float64 [rows or 1, scales a row]; each is for ``across`` columns, the last perhaps for fewer.
        across: columns that share a scale.
        columns: of the weight.
    """

    start: int
    end: int
    grid: Floats
    across: int
    columns: int

    @property
    def scale(self) -> Floats:
        """float64 that broadcasts to [rows, columns]."""
        return self.grid if self.across >= self.columns else self.grid[:, np.arange(self.columns) // self.across]


def tiles(shape: tuple[int, ...], scale: Floats, granularity: Granularity) -> Iterator[Tile] | None:
    """Cut a weight into tiles with their scales; None where it is not known which scale is whose."""
    kind = granularity.kind
    if granularity.chunk:
        granularity, shape = granularity.apart(shape)
        scale = (
            np.broadcast_to(scale, (shape[0], 1, 1))
            if kind == "tensor"
            else scale.reshape(shape[0], -1, scale.shape[-1])
        )
    if kind == "unknown" or (len(shape) not in (2, 3) and kind != "tensor"):
        return None
    columns = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    experts = int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1
    if 0 in shape:
        return iter(())
    return _tiles(experts, rows, columns, scale, granularity)


def _tiles(experts: int, rows: int, columns: int, scale: Floats, granularity: Granularity) -> Iterator[Tile]:
    step = max(1, TILE // columns)
    for expert in range(experts):
        own = _own(scale, expert, granularity)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            start = (expert * rows + first) * columns
            part = _rows_of(own, first, last, rows, columns, granularity)
            across = granularity.block[1] if granularity.block else -(-columns // part.shape[1])
            yield Tile(start, start + (last - first) * columns, part, across, columns)


def _own(scale: Floats, expert: int, granularity: Granularity) -> Floats:
    return scale[expert] if granularity.experts else scale


def _rows_of(scale: Floats, first: int, last: int, rows: int, columns: int, granularity: Granularity) -> Floats:
    if granularity.kind == "tensor":
        return scale.reshape(1, 1)
    if granularity.kind == "row":
        return scale.reshape(rows, 1)[first:last]
    if granularity.kind == "column":
        return scale.reshape(1, columns)
    assert granularity.block is not None
    down, across = granularity.block
    grid = scale.reshape(-(-rows // down), -(-columns // across))
    rows_of_grid: Floats = grid[np.arange(first, last) // down]
    return rows_of_grid
