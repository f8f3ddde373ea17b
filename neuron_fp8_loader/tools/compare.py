"""One FP8 weight before and after, value by value in float64."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..codes.formats import LARGEST_FIT
from ..codes.granularity import TENSOR, Granularity
from ..errors import WeightError
from ..host.parallel import run
from .arithmetic import (
    GPU,
    HALF_STEP,
    HALF_STEP_DOWN,
    NEURON,
    OTHER_FORMATS,
    Bytes,
    Floats,
    Tile,
    as_bytes,
    expected_for,
    scale_values,
    tiles,
)
from .bycode import ByCode, Seen

_SCALE_SLACK = 2.0**-8
"""A bfloat16 scale times a factor that is no power of two is off by up to this share; and so is a bfloat16 weight."""
_FLOAT32_SLACK = 2.0**-20
"""What a few roundings of float32 arithmetic may add, as a share."""


@dataclass(frozen=True)
class Side:
    """A weight with its scale, as stored.

    Attributes:
        weight: float8_e4m3fn or float8_e4m3fnuz, or a plain float dtype.
        scale: any scale dtype; None: the weight is the value.
        granularity: which part of the weight each scale value covers, as the plan or the recipe says.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    granularity: Granularity = TENSOR

    @property
    def is_fp8(self) -> bool:
        return self.weight.dtype == torch.float8_e4m3fn

    def scale_values(self) -> Floats:
        return np.ones(()) if self.scale is None else scale_values(self.scale)


@dataclass
class WeightCheck:
    """What became of one weight.

    Attributes:
        name: the tensor's.
        numel: how many weights.
        above: codes above 0x77 after that were no NaN before: inf or nan to the device.
        nan: codes that were NaN before.
        changed: values that differ, however little.
        off: codes that are not those which rounding to nearest gives, where the factor is known; else values further
            from the original than half the distance to the next code.
        factor: new scale / old scale, where one number says it; None where the scales' layout changed.
        signal, noise: sums of squares of the original values and of the differences.
        problem: what is wrong, "" if nothing is.
    """

    name: str
    numel: int = 0
    above: int = 0
    nan: int = 0
    changed: int = 0
    off: int = 0
    factor: float | None = None
    signal: float = 0.0
    noise: float = 0.0
    problem: str = ""

    def judged(self, nan_is_fine: bool) -> WeightCheck:
        """Itself, with ``problem`` set from the counts."""
        if self.above:
            self.problem = f"{self.above} codes above 240: inf or nan on Neuron"
        elif self.off:
            self.problem = f"{self.off} of {self.numel} values are off by more than rounding to the nearest code"
        elif self.nan and not nan_is_fine:
            self.problem = f"{self.nan} NaN codes, in the original too"
        return self

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise of the dequantized weight, dB; inf where nothing changed."""
        return sqnr_db(self.signal, self.noise)


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def compare(
    name: str, old: Side, new: Side, threads: int, *, nan_is_fine: bool = False, codes: Bytes | None = None
) -> WeightCheck:
    """Compare a weight as a GPU reads it with its new form as a Neuron device reads it.

    Args:
        name: of the weight, for messages.
        old: float8_e4m3fn or another FP8 format.
        new: float8_e4m3fn or a plain float dtype, of the same shape.
        threads: how many compare.
        nan_is_fine: NaN codes are no problem.
        codes: uint8 [256], what each code must have become, where that is known; by default the factor between the
            scales tells.

    Raises:
        WeightError: the shapes differ, or it cannot be told which scale is whose.
    """
    if old.weight.shape != new.weight.shape:
        raise WeightError(f"{name}: is {list(new.weight.shape)}, was {list(old.weight.shape)}")
    check = WeightCheck(name, old.weight.numel(), factor=_factor(old, new))
    before = OTHER_FORMATS.get(old.weight.dtype, GPU)
    old_codes, jobs = as_bytes(old.weight), _jobs(name, old, new, check.factor)
    new_codes = as_bytes(new.weight) if new.is_fp8 else None
    allowed: tuple[Bytes, ...] | None = None if codes is None else (codes,)
    if allowed is None and old.is_fp8 and new.is_fp8 and new.scale is not None:
        allowed = expected_for(check.factor)
    by_code = None
    if allowed is not None and check.factor is not None and _grew_exactly(old, new, check.factor):
        by_code = ByCode(before, allowed, check.factor)
    slack = _SCALE_SLACK if new.scale is not None and new.scale.element_size() < 4 else _FLOAT32_SLACK
    plain = None if new.is_fp8 else new.weight.detach().reshape(-1)
    lock, own = threading.Lock(), threading.local()

    def work(job: tuple[Tile, Tile]) -> None:
        was, now = job
        if not hasattr(own, "scratch"):
            own.scratch = _Scratch(max(tile.end - tile.start for tile, _ in jobs))
        if by_code is not None and new_codes is not None:
            seen_by_code = by_code.compare(old_codes[was.start : was.end], new_codes[now.start : now.end], was)
            if seen_by_code is not None:
                add(seen_by_code)
                return
        values = own.scratch.values(0, before, old_codes[was.start : was.end], was)
        if new_codes is not None:
            codes = new_codes[now.start : now.end]
            read = own.scratch.values(1, NEURON, codes, now)
            seen = _differences(values, read, own.scratch.rest, codes, now, slack)
            if allowed is not None:
                seen = seen._replace(off=_unexpected(old_codes[was.start : was.end], codes, allowed))
        else:
            assert plain is not None
            read = plain[now.start : now.end].to(torch.float64).numpy()
            seen = _differences(values, read, own.scratch.rest, None, now, _SCALE_SLACK)
        add(seen)

    def add(seen: Seen) -> None:
        with lock:
            check.nan += seen.nan
            check.changed += seen.changed
            check.off += seen.off
            check.signal += seen.signal
            check.noise += seen.noise

    run(jobs, work, threads)
    if new_codes is not None:
        check.above = max(0, _count_above(new_codes) - check.nan)
    return check.judged(nan_is_fine)


class _Scratch:
    """Memory for one tile, used again and again: fresh pages would cost more than the arithmetic."""

    def __init__(self, size: int) -> None:
        self._index = np.empty(size, np.intp)
        self._values = (np.empty(size), np.empty(size))
        self.rest = np.empty(size)

    def values(self, which: int, table: Floats, codes: Bytes, tile: Tile) -> Floats:
        """The tile's codes as ``table`` reads them, times their scale: float64 [codes]."""
        index, out = self._index[: codes.size], self._values[which][: codes.size]
        index[:] = codes
        np.take(table, index, out=out, mode="clip")
        matrix = out.reshape(-1, tile.columns)
        np.multiply(matrix, tile.scale, out=matrix)
        return out


def _unexpected(old: Bytes, new: Bytes, allowed: tuple[Bytes, ...]) -> int:
    """How many of the new codes are in none of the tables of what the old ones may become; NaN codes do not count."""
    wrong = (new & 0x7F) != 0x7F
    for table in allowed:
        wrong &= np.take(table, old) != new
    return int(np.count_nonzero(wrong))


def _differences(was: Floats, now: Floats, rest: Floats, codes: Bytes | None, tile: Tile, slack: float) -> Seen:
    """Compare the values of one tile. ``codes``: the new ones; None where the new weight is a plain float dtype."""
    difference = np.subtract(now, was, out=rest[: was.size])
    signal, noise = _square_sum(was), _square_sum(difference)
    nan = lost = 0
    if not math.isfinite(signal + noise):  # NaN codes: counted apart, the rest is compared
        there, kept = np.isfinite(was), np.isfinite(now)
        nan, lost = was.size - int(np.count_nonzero(there)), int(np.count_nonzero(there & ~kept))
        was, difference = np.where(there & kept, was, 0.0), np.where(there & kept, difference, 0.0)
        signal, noise = _square_sum(was), _square_sum(difference)
    if not noise:
        return Seen(nan, lost, lost, signal)
    at = np.flatnonzero(difference != 0)
    error, value = np.abs(difference[at]), np.abs(was[at])
    allowed = value * slack
    if codes is not None:
        rows, columns = -(-was.size // tile.columns), tile.columns
        scale = np.broadcast_to(tile.scale, (rows, columns))[at // columns, at % columns]
        down = np.abs(now[at]) > value  # the value lies between the code and the next smaller one
        allowed += np.where(down, HALF_STEP_DOWN[codes[at]], HALF_STEP[codes[at]]) * np.abs(scale)
    off = int(np.count_nonzero(error > allowed))
    return Seen(nan, at.size + lost, off + lost, signal, noise)


def _grew_exactly(old: Side, new: Side, factor: float | None) -> bool:
    """Is every new scale the old one times the factor, in the same place?"""
    was, now = old.scale_values(), new.scale_values()
    same = was.shape == now.shape and old.granularity == new.granularity
    return factor is not None and same and bool(np.array_equal(was * factor, now))


def _square_sum(values: Floats) -> float:
    return float(np.einsum("i,i->", values, values))  # not BLAS, whose own threads would fight with ours


def _count_above(codes: Bytes) -> int:
    return sum(
        int(np.count_nonzero((codes[at : at + (1 << 20)] & 0x7F) > LARGEST_FIT))
        for at in range(0, codes.size, 1 << 20)
    )


def _factor(old: Side, new: Side) -> float | None:
    """New scale / old scale where that is one number, to the precision of a bfloat16 scale."""
    if not new.is_fp8:
        return None
    was, now = old.scale_values().reshape(-1), new.scale_values().reshape(-1)
    if was.size != now.size or not was.size:
        return None
    usable = np.isfinite(was) & np.isfinite(now) & (was != 0) & (now != 0)
    if not usable.any():
        return 1.0
    ratio = now[usable] / was[usable]
    middle = float(np.median(ratio))
    return middle if bool(np.all(np.abs(ratio / middle - 1) <= 2 * _SCALE_SLACK)) else None


def _jobs(name: str, old: Side, new: Side, factor: float | None) -> list[tuple[Tile, Tile]]:
    shape = tuple(old.weight.shape)
    chunk = old.granularity.chunk or new.granularity.chunk  # cut alike
    was = tiles(shape, old.scale_values(), replace(old.granularity, chunk=chunk))
    now = tiles(shape, new.scale_values(), replace(new.granularity, chunk=chunk))
    if was is None or now is None:
        if factor is None or old.scale is None or new.scale is None:
            raise WeightError(f"{name}: it cannot be told which of its scale's values belongs to which weight")
        # which is whose does not matter when all changed alike
        whole = Granularity("tensor")
        flat = (old.weight.numel() // max(1, shape[-1]), shape[-1]) if shape else (1, 1)
        was, now = tiles(flat, np.ones(()), whole), tiles(flat, np.full((), factor), whole)
        assert was is not None
        assert now is not None
    return list(zip(was, now, strict=True))
