"""Indices of lazy tensors: what they name, and in which pieces that is read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..host.grain import rows_at_once
from ..host.memory import allocate, populate, shaped

Selector = range | int | list[int]
"""What an index names of one dimension, by positions from 0 up; an int takes the dimension away."""

Span = tuple[int, int]
"""(first, one past the last) of a dimension."""


class Rectangle(NamedTuple):
    """A piece of what an index names.

    Attributes:
        where: what is read, one range a dimension.
        target: where it goes in the result, in which an int leaves a dimension of 1.
        picks: what of each dimension goes there, None for all of it; None for all of everything.
    """

    where: list[Span]
    target: tuple[slice, ...]
    picks: tuple[slice | torch.Tensor | None, ...] | None


def selectors(index: Any, shape: Sequence[int]) -> list[Selector]:
    """One selector a dimension.

    Args:
        index: slices with a step from 1 up, ints, at most one list of ints, at most one Ellipsis, or a tuple of them.
        shape: of the tensor that is indexed.

    Raises:
        IndexError: out of range, or too many; TypeError: anything else, such as None or a mask.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    gaps = [at for at, part in enumerate(parts) if part is Ellipsis]
    if len(gaps) > 1:
        raise IndexError("an index can have one Ellipsis")
    given = len(parts) - len(gaps)
    if not shape and given == 1 and parts[0] == slice(None):
        return []  # all of a single value, which torch refuses and readers of scales write
    if given > len(shape):
        raise IndexError(f"{given} indices for a tensor of shape {list(shape)}")
    at = gaps[0] if gaps else len(parts)
    parts[at : at + 1] = [slice(None)] * (len(shape) - given)
    chosen = [_selector(part, size) for part, size in zip(parts, shape, strict=True)]
    if sum(isinstance(part, list) for part in chosen) > 1:
        raise TypeError("an index can have one list")
    return chosen


def _selector(part: Any, size: int) -> Selector:
    if isinstance(part, slice):
        if part.step is not None and part.step < 1:
            raise IndexError(f"a slice's step must be 1 or more, not {part.step}")
        return range(size)[part]
    if isinstance(part, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in part):
        return [_position(n, size) for n in part]
    if isinstance(part, int) and not isinstance(part, bool):
        return _position(part, size)
    raise TypeError(f"cannot index with {part!r}: expected slices, ints, a list of ints or Ellipsis")


def _position(n: int, size: int) -> int:
    if not -size <= n < size:
        raise IndexError(f"index {n} is out of range for a dimension of {size}")
    return n % size


def rectangles(chosen: Sequence[Selector]) -> Iterator[Rectangle]:
    """The pieces that together are all that is chosen, in order, none of them with a row that nobody asked for.

    Positions that follow each other are one piece. Single columns, and every so many rows, are picked out of a range
    that holds them, few rows at a time.
    """
    if not chosen:
        yield Rectangle([], (), None)
        return
    *stack, last = chosen
    columns = _column(last)
    apart = columns[2] is not None or (stack and isinstance(stack[-1], range) and stack[-1].step > 1)
    width = columns[0][1] - columns[0][0]
    parts = [list(_runs(part)) for part in stack]
    if stack and apart and not isinstance(stack[-1], list):
        parts[-1] = list(_strips(stack[-1], rows_at_once(width)))
    for pieces in itertools.product(*parts, [columns]):
        where, target, picks = zip(*pieces, strict=True)
        yield Rectangle(list(where), target, picks if any(pick is not None for pick in picks) else None)


Piece = tuple[Span, slice, "slice | torch.Tensor | None"]
"""Of one dimension: what is read, where it goes, and what of it does (None: all)."""


def _runs(part: Selector) -> Iterator[Piece]:
    if isinstance(part, int):
        yield (part, part + 1), slice(0, 1), None
        return
    begin = 0
    for at in range(1, len(part) + 1):
        if at == len(part) or part[at] != part[at - 1] + 1:
            yield (part[begin], part[at - 1] + 1), slice(begin, at), None
            begin = at
        elif isinstance(part, range):  # what has a step of 1 once has it always
            at = len(part)
            yield (part[0], part[-1] + 1), slice(0, at), None
            return


def _strips(part: range | int, rows: int) -> Iterator[Piece]:
    if isinstance(part, int):
        yield from _runs(part)
        return
    count = max(1, rows // part.step)
    for begin in range(0, len(part), count):
        some = part[begin : begin + count]
        yield (some[0], some[-1] + 1), slice(begin, begin + len(some)), slice(None, None, part.step)


def _column(part: Selector) -> Piece:
    if isinstance(part, int):
        return (part, part + 1), slice(0, 1), None
    span = (min(part), max(part) + 1) if len(part) else (0, 0)
    if isinstance(part, list):
        return span, slice(0, len(part)), torch.tensor([n - span[0] for n in part], dtype=torch.long, device="cpu")
    return span, slice(0, len(part)), slice(None, None, part.step) if part.step > 1 else None


def gathered(
    chosen: Sequence[Selector], dtype: torch.dtype, read: Callable[[list[Span], torch.Tensor], None]
) -> torch.Tensor:
    """All that is chosen, in memory of its own.

    Args:
        chosen: one selector a dimension.
        dtype: of the result.
        read: writes the part that is the ranges, one a dimension, into a tensor of that shape, which may be a view.
            Called with no empty ranges.
    """
    lengths = tuple(1 if isinstance(part, int) else len(part) for part in chosen)
    raw = allocate(dtype.itemsize * math.prod(lengths))
    out = shaped(raw, dtype, lengths)
    if out.numel():
        populate(raw, 0, raw.numel())
        for where, target, picks in rectangles(chosen):
            if picks is None:
                read(where, out[target])
                continue
            shape = tuple(stop - start for start, stop in where)
            slab = shaped(allocate(dtype.itemsize * math.prod(shape)), dtype, shape)
            read(where, slab)
            out[target].copy_(_picked(slab, picks))
    return out.view(tuple(n for n, part in zip(lengths, chosen, strict=True) if not isinstance(part, int)))


def _picked(slab: torch.Tensor, picks: Sequence[slice | torch.Tensor | None]) -> torch.Tensor:
    for dim, pick in enumerate(picks):
        if isinstance(pick, slice):
            slab = slab[(slice(None),) * dim + (pick,)]
        elif pick is not None:
            slab = slab.index_select(dim, pick)
    return slab
