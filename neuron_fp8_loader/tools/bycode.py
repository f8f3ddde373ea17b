"""Comparing a weight by its codes: where each code became the one that it should, counting codes says all.

The same float64 values and differences as value by value, a table at a time instead of a weight at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .arithmetic import NEURON, Bytes, Floats, Tile

Indices = npt.NDArray[np.intp]


class Seen(NamedTuple):
    """What a tile shows: ``WeightCheck`` has the same fields."""

    nan: int = 0
    changed: int = 0
    off: int = 0
    signal: float = 0.0
    noise: float = 0.0


class ByCode:
    """How a weight's codes changed whose scales all grew by one factor, exactly.

    Args:
        values: float64 [256], what the old codes are worth.
        allowed: tables, uint8 [256], of what they may have become.
        factor: new scale / old scale.
    """

    def __init__(self, values: Floats, allowed: tuple[Bytes, ...], factor: float) -> None:
        self._known = np.isfinite(values)
        self._signal = _of_two(np.where(self._known, values, 0.0))
        self._tables = [(table.tobytes(), *self._after(NEURON[table] * factor - values)) for table in allowed]

    def _after(self, difference: Floats) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], Floats]:
        """Which codes are lost; which change; and the noise of two that lie together."""
        lost = self._known & ~np.isfinite(difference)
        rest = np.where(self._known & ~lost, difference, 0.0)
        return lost, rest != 0, _of_two(rest)

    def compare(self, old: Bytes, new: Bytes, tile: Tile) -> Seen | None:
        """Compare a tile; ``tile`` has the scales before.

        Returns:
            None where that cannot be said by codes: some code is not as any table has it, or is inf or NaN to the
            device and was not before, or two codes that lie together have different scales.
        """
        text, became = old.tobytes(), new.tobytes()
        found = next((entry for entry in self._tables if text.translate(entry[0]) == became), None)
        whole = tile.across % 2 == 0 or tile.across >= tile.columns
        if found is None or tile.columns % 2 or not whole or not np.isfinite(tile.grid).all():
            return None
        _, lost, changes, noise_of_two = found
        two = old.view(np.uint16).astype(np.intp)
        counts = _counts(two)
        if counts[lost].any():
            return None
        changed, noise = int(counts[changes].sum()), 0.0
        if changed:
            at = np.flatnonzero(np.take(noise_of_two != 0, two, mode="clip"))
            row, column = np.divmod(2 * at, tile.columns)
            scale = tile.grid[row if tile.grid.shape[0] > 1 else 0, column // tile.across]
            noise = float(np.square(scale) @ noise_of_two[two[at]])
        signal = _weighted(np.take(self._signal, two, mode="clip").reshape(-1, tile.columns // 2), tile)
        return Seen(int(counts[~self._known].sum()), changed, 0, signal, noise)


def _of_two(each: Floats) -> Floats:
    """float64 [65536]: the sum of the squares of two codes, in 16 bits, whatever the byte order."""
    squared = np.square(each)
    both: Floats = np.add.outer(squared, squared).reshape(-1)
    return both


def _counts(two: Indices) -> npt.NDArray[np.intp]:
    """How often each code occurs, int64 [256]."""
    both = np.bincount(two, minlength=1 << 16).reshape(256, 256)
    counts: npt.NDArray[np.intp] = both.sum(0) + both.sum(1)
    return counts


def _weighted(matrix: Floats, tile: Tile) -> float:
    """The sum of a matrix, one entry for each two columns, times the squares of the scales."""
    starts = np.arange(0, matrix.shape[1], max(1, tile.across // 2))
    sums = np.add.reduceat(matrix, starts, axis=1) if starts.size > 1 else matrix.sum(1, keepdims=True)
    return float((sums * np.square(tile.grid)).sum())
