"""Regions: what lies between bounds in every dimension of a tensor, and the part of its scale that goes with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ..checkpoint import TensorInfo
from .layout import unknown
from .plan import Pair
from .recipe import Recipe, Step

Bounds = tuple[int, int]
"""(start, stop)."""

Region = tuple[Bounds, ...]
"""Bounds in every dimension."""


def whole(shape: Sequence[int]) -> Region:
    """The region that is all of a tensor of this shape."""
    return tuple((0, length) for length in shape)


def extent(region: Region) -> tuple[int, ...]:
    """The shape of a region."""
    return tuple(stop - start for start, stop in region)


def hull(one: Region, other: Region) -> Region:
    """The smallest region that holds both."""
    return tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, other, strict=True))


# -- scales --------------------------------------------------------------------------------------------------------


def _axes(pair: Pair, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[int, int, int]]:
    """(dimension of the weight, dimension of its scale, how long a block is): where the scale varies.

    Raises:
        ValueError: not known.
    """
    kind, block, experts = pair.granularity.kind, pair.granularity.block, pair.granularity.experts
    dims, scale_dims, first = len(tensors[pair.weight].shape), len(tensors[pair.scale].shape), int(experts)
    if kind == "unknown":
        raise ValueError(unknown(pair, tensors))
    if experts:
        yield 0, 0, 1
    if kind == "row":
        yield max(dims - 2, 0), first, 1
    elif kind == "column":
        yield dims - 1, first if pair.granularity.transposed else first + 1, 1
    elif kind == "block":
        assert block is not None
        yield dims - 2, first, block[0]
        # ModelOpt stores [row blocks, 1, column blocks, 1]
        yield dims - 1, first + (2 if scale_dims - first == 4 else 1), block[1]


def covering(pair: Pair, tensors: Mapping[str, TensorInfo], region: Region) -> Region:
    """The part of a scale, as it is stored, that covers a region of its weight: of blocks, all that it touches.

    Raises:
        ValueError: which part of the weight each value covers is not known.
    """
    out = list(whole(tensors[pair.scale].shape))
    for dim, scale_dim, block in _axes(pair, tensors):
        start, stop = region[dim]
        out[scale_dim] = (start // block, -(-stop // block))
    if pair.granularity.chunk and region[0][0] < region[0][1]:
        start, stop = region[0]
        out[0] = (_block_row(pair, start), _block_row(pair, stop - 1) + 1)
    return tuple(out)


def _block_row(pair: Pair, row: int) -> int:
    """The row of a scale that covers a row of a weight whose blocks begin anew with each chunk."""
    covers = pair.granularity
    assert covers.block is not None
    chunk, within = divmod(row, covers.chunk)
    return chunk * -(-covers.chunk // covers.block[0]) + within // covers.block[0]


@dataclass(frozen=True)
class InChunk:
    """The part of some rows that lies in one chunk of a weight (``Granularity.chunk``).

    Attributes:
        chunk: its number.
        rows: the bounds within it.
        local: the bounds among the rows that were asked for.
        scales: the bounds among the scale's rows that cover those.
    """

    chunk: int
    rows: Bounds
    local: Bounds
    scales: Bounds


def in_chunks(pair: Pair, rows: Bounds) -> Iterator[InChunk]:
    """The parts of these rows of a weight, one a chunk."""
    chunk, (first, last) = pair.granularity.chunk, rows
    top = _block_row(pair, first)
    for number in range(first // chunk, -(-last // chunk)) if first < last else ():
        start, stop = max(first, number * chunk), min(last, (number + 1) * chunk)
        scales = _block_row(pair, start) - top, _block_row(pair, stop - 1) + 1 - top
        yield InChunk(number, (start - number * chunk, stop - number * chunk), (start - first, stop - first), scales)


def scale_region(recipe: Recipe, pair: Pair, region: Region) -> Region:
    """The part of a scale, as it comes out, that goes with a region of its weight.

    Raises:
        ValueError: which one is not known, or a bound runs through a block so that no such part would be right; the
            text says what to do.
    """
    scale, tensors = recipe.steps[pair.scale], recipe.plan.tensors
    if scale.action == "requantize":
        return (*region[:-1], (0, 1))
    if recipe.what.layout != "keep":  # one value for all, or a shape that broadcasts over the weight
        if len(scale.shape) != len(region):
            return whole(scale.shape)
        return tuple((0, 1) if n == 1 else bounds for n, bounds in zip(scale.shape, region, strict=True))
    try:
        part = covering(pair, tensors, region)
    except ValueError as error:
        raise ValueError(f'{error}; layout="per_channel" tells it of stacked experts, or load it whole') from None
    chunk = pair.granularity.chunk
    for dim, _, block in _axes(pair, tensors):
        start, stop = region[dim]
        if dim == 0 and chunk:
            if start // chunk != (stop - 1) // chunk and (start % chunk or stop % chunk):
                raise ValueError(
                    f"{start}:{stop} of dimension 0 takes parts of several chunks of {chunk} rows, with each of which "
                    f'its scales\' blocks begin anew; cut at multiples of {chunk}, or layout="per_channel" (one scale '
                    f"a row), or dequantize=[{pair.module!r}]"
                )
            start, stop = start % chunk, start % chunk + stop - start
        if start % block and start // block != (stop - 1) // block:  # within one block its one value will do
            raise ValueError(
                f"{start}:{stop} of dimension {dim} runs through its scales' blocks of {block}, which no part of them "
                f'can say; cut at multiples of {block}, or layout="per_channel" (one scale a row), or '
                f"dequantize=[{pair.module!r}]"
            )
    return part


def is_laid_out(recipe: Recipe, step: Step) -> bool:
    """Does a scale come out in another shape or dtype than it is stored in?"""
    header = recipe.plan.tensors[step.name]
    return (step.shape, step.dtype) != (header.shape, header.dtype)


# -- runs of rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A region seen as the same rows and columns of some matrices.

    Attributes:
        matrices: which ones of those that lie end to end in the tensor.
        height, width: rows and columns of each matrix.
        row, column: the bounds within each.
    """

    matrices: tuple[int, ...]
    height: int
    width: int
    row: Bounds
    column: Bounds

    @property
    def shape(self) -> tuple[int, int, int]:
        """[matrices, rows, columns] of the region."""
        return len(self.matrices), self.row[1] - self.row[0], self.column[1] - self.column[0]


def rows_of(shape: Sequence[int], region: Region) -> Rows:
    """The last two dimensions are the matrix; of a vector, each element is a row."""
    lengths, bounds = list(shape), list(region)
    if len(lengths) < 2:
        lengths, bounds = [*lengths, *[1] * (2 - len(lengths))], [*bounds, *[(0, 1)] * (2 - len(bounds))]
    lead = [range(*each) for each in bounds[:-2]]
    steps = [math.prod(lengths[k + 1 : -2]) for k in range(len(lead))]
    matrices = tuple(sum(i * step for i, step in zip(index, steps, strict=True)) for index in product(*lead))
    return Rows(matrices, lengths[-2], lengths[-1], bounds[-2], bounds[-1])


def joined(shape: Sequence[int], region: Region) -> tuple[tuple[int, ...], Region]:
    """The same elements in as few dimensions as they lie in: one that is whole is joined to the one before it."""
    lengths: list[int] = []
    bounds: list[Bounds] = []
    for length, (start, stop) in zip(reversed(shape), reversed(region), strict=True):
        if lengths and bounds[-1] == (0, lengths[-1]):
            inner = lengths[-1]
            lengths[-1], bounds[-1] = length * inner, (start * inner, stop * inner)
        else:
            lengths.append(length)
            bounds.append((start, stop))
    return tuple(reversed(lengths)), tuple(reversed(bounds))
