"""Indices of lazy tensors: what they name, which range of each dimension holds it, and what is picked out of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Selector = range | int | list[int]
"""What an index names of one dimension, by positions from 0 up; an int takes the dimension away."""

Span = tuple[int, int]
"""(first, one past the last) of a dimension."""


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


def spans(chosen: Sequence[Selector]) -> list[Span]:
    """The smallest range of each dimension that holds all that is chosen."""
    return [_span(part) for part in chosen]


def _span(part: Selector) -> Span:
    if isinstance(part, int):
        return part, part + 1
    return (min(part), max(part) + 1) if len(part) else (0, 0)


def picked(slab: torch.Tensor, chosen: Sequence[Selector], where: Sequence[Span]) -> torch.Tensor:
    """What is chosen out of the part of the tensor that its spans cover."""
    dim = 0
    for part, (start, stop) in zip(chosen, where, strict=True):
        if isinstance(part, int):
            slab = slab.select(dim, 0)
            continue
        if isinstance(part, list):
            slab = slab.index_select(dim, torch.tensor([n - start for n in part], dtype=torch.long))
        elif len(part) != stop - start:
            slab = slab[(slice(None),) * dim + (slice(None, None, part.step),)]
        dim += 1
    return slab
