"""How regions are read: as strips of a few rows, cut and converted while they are in cache.

Rows that lie end to end go straight to where they stay. Of rows that are cut, as many as fill a piece are read whole,
unless what lies between the wanted parts is longer than it is worth to read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import torch

from ..checkpoint import Range, TensorInfo
from ..codes.dequantize import block_of, dequantize_slice, scale_values
from ..codes.formats import E4M3FN, HALF
from ..codes.granularity import TENSOR
from ..codes.kernel import Counts, translate
from ..codes.requantize import Fidelity, Tile, requantize
from ..errors import WeightError
from ..host.grain import copy_matrix, mapped
from ..host.parallel import PIECE, pieces
from ..plan import Pair, Plan, Step
from ..plan.region import Bounds, Region, in_chunks, joined, rows_of

_GAP = 1 << 16  # bytes that are sooner skipped, by a read of their own for each row, than read


class Seen:
    """What the weights held and what requantizing cost; several threads add to it.

    Attributes:
        counts: by FP8 weight, of the codes in its region.
        fidelity: by requantized weight, of the block rows that were looked at.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counts] = {}
        self.fidelity: dict[str, Fidelity] = {}
        self._lock = threading.Lock()

    def codes(self, name: str, counts: Counts) -> None:
        with self._lock:
            self.counts[name] = self.counts.get(name, Counts()) + counts

    def cost(self, name: str, fidelity: Fidelity) -> None:
        with self._lock:
            self.fidelity[name] = self.fidelity.get(name, Fidelity()) + fidelity


def as_stored(
    info: TensorInfo, step: Step | None, region: Region, target: torch.Tensor, seen: Seen, *, change: bool = False
) -> Iterator[Range]:
    """Ranges that fill ``target``, uint8 [bytes of the region], with a region of a tensor as it is stored.

    Args:
        info: the tensor.
        step: what becomes of it; a weight's codes are counted.
        region: which part.
        target: contiguous.
        seen: where the counts go.
        change: translate the codes by the step's table.
    """
    unit = info.nbytes // max(info.numel, 1)
    rows = rows_of(*joined(info.shape, region))
    width, (first, last) = rows.width * unit, (bound * unit for bound in rows.column)
    kept = last - first
    table = step.table if step is not None else None
    if table is not None:
        seen.codes(info.name, Counts())

    def settle(part: torch.Tensor) -> None:
        if table is not None:
            seen.codes(info.name, translate(part, part if change else None, table))

    def cut(part: torch.Tensor, out: torch.Tensor) -> None:
        _columns(part, width, out.view(-1, kept))
        settle(out)

    done = 0
    for matrix in rows.matrices if target.numel() else ():
        top, bottom = (matrix * rows.height + bound for bound in rows.row)
        if kept == width or kept >= PIECE or width - kept >= _GAP:
            runs = [(top, bottom)] if kept == width else [(row, row + 1) for row in range(top, bottom)]
            for start, end in ((a * width + first, (b - 1) * width + last) for a, b in runs):
                for a, b in pieces(end - start):
                    out = target[done : done + b - a]
                    yield Range(info, start + a, start + b, out, settle if table is not None else None)
                    done += b - a
        else:
            for a, b in _cut(top, bottom, PIECE // width):
                out = target[done : done + (b - a) * kept]
                yield Range(info, a * width + first, (b - 1) * width + last, see=partial(cut, out=out))
                done += (b - a) * kept


def dequantized(
    plan: Plan, step: Step, region: Region, scale: torch.Tensor | None, target: torch.Tensor, seen: Seen
) -> Iterator[Range]:
    """Ranges that fill ``target`` with value x scale: bfloat16 rounded once, float16 and float32 by way of float32.

    Args:
        plan: the checkpoint's.
        step: of an e4m3fn weight.
        region: which part of it.
        scale: the part of its scale that covers the region (``plan.region.covering``), as stored; None: it has none.
        target: contiguous, of the region's shape.
        seen: where the counts go.
    """
    info, table = plan.tensors[step.name], step.table
    covers = step.pair.granularity if step.pair is not None else TENSOR
    if covers.chunk:
        assert step.pair is not None
        assert scale is not None
        stack, pair = _as_stack(plan, step.pair)
        for part in in_chunks(step.pair, region[0]):
            inside = ((part.chunk, part.chunk + 1), part.rows, *region[1:])
            own = scale[slice(*part.scales)], target[slice(*part.local)]
            yield from dequantized(stack, step._replace(pair=pair), inside, *own, seen)
        return
    shape = info.shape
    if covers.kind == "tensor" and not covers.experts:
        shape, region = joined(shape, region)
    rows = rows_of(shape, region)
    width, (first, last) = rows.width, rows.column
    values = torch.ones((), device="cpu") if scale is None else scale_values(scale)
    # the scale's part begins with the block that the region begins in
    height, across = block = block_of(covers, rows.height, width, values)
    above, left = rows.row[0] // height * height, first // across * across
    grid = (-(-(rows.row[1] - above) // height), -(-(last - left) // across))
    values = mapped(torch.Tensor.float, values, torch.float32).reshape(-1, *grid).expand(len(rows.matrices), *grid)
    out = target.view(rows.shape)
    assert table is not None  # every weight has one
    seen.codes(step.name, Counts())

    def work(part: torch.Tensor, k: int, top: int, bottom: int) -> None:
        codes = torch.empty(bottom - top, last - first, dtype=torch.uint8, device="cpu")
        _columns(part, width, codes)
        seen.codes(step.name, translate(codes.view(-1), None, table))
        offset, into = (top % height, first - left), out[k, top - rows.row[0] : bottom - rows.row[0]]
        touched = values[k, (top - above) // height : (bottom - 1 - above) // height + 1]
        if target.dtype == torch.bfloat16:
            dequantize_slice(codes, touched, block, offset, out=into)
            return
        factor = _spread(touched, block, offset, codes.shape)
        made = (codes.view(E4M3FN).float() * factor).to(target.dtype)
        if target.dtype == torch.float16 and bool((made.isinf() & factor.isfinite()).any()):
            raise WeightError(f"{plan.where(step.name)}: value x scale is beyond float16; take bfloat16 or float32")
        into.copy_(made)

    at_once = PIECE // max(1, width) if width - (last - first) < _GAP else 1
    for k, matrix in enumerate(rows.matrices if target.numel() else ()):
        base = matrix * rows.height
        for top, bottom in _cut(*rows.row, at_once):
            see = partial(work, k=k, top=top, bottom=bottom)
            yield Range(info, (base + top) * width + first, (base + bottom - 1) * width + last, see=see)


def _spread(
    scales: torch.Tensor, block: tuple[int, int], offset: tuple[int, int], shape: tuple[int, ...]
) -> torch.Tensor:
    """Each element's own scale."""
    for dim, (size, begin, length) in enumerate(zip(block, offset, shape, strict=True)):
        scales = scales.index_select(dim, torch.arange(begin, begin + length, device="cpu") // size)
    return scales


def requantized(
    plan: Plan,
    pair: Pair,
    lead: Region,
    scale: torch.Tensor,
    codes: tuple[Region, torch.Tensor] | None,
    row_scales: torch.Tensor,
    seen: Seen,
) -> Iterator[Range]:
    """Ranges that requantize whole block rows, as the whole weight is requantized, and keep what is wanted of them.

    Args:
        plan: the checkpoint's.
        pair: block scales and their weight.
        lead: which rows, that is, the region without its last dimension.
        scale: the part of the scale that covers these rows (``plan.region.covering``), as stored.
        codes: a region of the weight within ``lead``, and where it goes, uint8 [bytes of the region]; None: nowhere.
        row_scales: float32 of the shape of ``lead``, to be written.
        seen: where counts and costs go.
    """
    info, block = plan.tensors[pair.weight], pair.granularity.block
    assert block is not None
    if pair.granularity.chunk:
        yield from _chunks_requantized(plan, pair, lead[0], scale, codes, row_scales, seen)
        return
    rows = rows_of(info.shape, (*lead, (0, info.shape[-1])))
    above, below = rows.row[0] // block[0] * block[0], min(-(-rows.row[1] // block[0]) * block[0], rows.height)
    count = len(rows.matrices)
    values = scale_values(scale).reshape(count, -(-(below - above) // block[0]), -(-rows.width // block[1]))
    new = row_scales.view(count, -1)
    kept = rows_of(info.shape, codes[0]) if codes is not None else rows
    place = {matrix: k for k, matrix in enumerate(kept.matrices)} if codes is not None else {}
    out = codes[1].view(kept.shape) if codes is not None else None

    def work(part: torch.Tensor, k: int, top: int, bottom: int) -> None:
        src = part.view(bottom - top, rows.width)
        here = max(top, kept.row[0]), min(bottom, kept.row[1])
        wanted = out is not None and rows.matrices[k] in place and here[0] < here[1]
        inside = slice(here[0] - top, here[1] - top), slice(*kept.column)
        if wanted:
            chosen = src[inside]
            if not chosen.is_contiguous():
                chosen = torch.empty(chosen.shape, dtype=torch.uint8, device="cpu")
                copy_matrix(src[inside], chosen)
            seen.codes(pair.weight, translate(chosen.view(-1), None, HALF))
        fresh = torch.empty(bottom - top, dtype=torch.float32, device="cpu")
        part_scales = values[k, (top - above) // block[0] : -(-(bottom - above) // block[0])].contiguous()
        seen.cost(pair.weight, requantize(Tile(src, src, part_scales, fresh, block)))
        a, b = max(top, rows.row[0]), min(bottom, rows.row[1])
        new[k, a - rows.row[0] : b - rows.row[0]] = fresh[a - top : b - top]
        if wanted:
            assert out is not None
            copy_matrix(src[inside], out[place[rows.matrices[k]], here[0] - kept.row[0] : here[1] - kept.row[0]])

    if codes is not None:
        seen.codes(pair.weight, Counts())
    for k, matrix in enumerate(rows.matrices):
        base = matrix * rows.height
        for top, bottom in _cut(above, below, max(1, PIECE // max(1, block[0] * rows.width)) * block[0]):
            see = partial(work, k=k, top=top, bottom=bottom)
            yield Range(info, (base + top) * rows.width, (base + bottom) * rows.width, see=see)


def _chunks_requantized(
    plan: Plan,
    pair: Pair,
    rows: Bounds,
    scale: torch.Tensor,
    codes: tuple[Region, torch.Tensor] | None,
    row_scales: torch.Tensor,
    seen: Seen,
) -> Iterator[Range]:
    """``requantized``, one chunk after the other."""
    stack, alone = _as_stack(plan, pair)
    for part in in_chunks(pair, rows):
        wanted = None
        if codes is not None:
            ((first, last), columns), target = codes
            before = part.chunk * pair.granularity.chunk
            top, bottom = max(first, before + part.rows[0]), min(last, before + part.rows[1])
            if top < bottom:
                inside = ((part.chunk, part.chunk + 1), (top - before, bottom - before), columns)
                wanted = inside, target.view(last - first, -1)[top - first : bottom - first].view(-1)
        lead = ((part.chunk, part.chunk + 1), part.rows)
        own = scale[slice(*part.scales)], wanted, row_scales[slice(*part.local)]
        yield from requantized(stack, alone, lead, *own, seen)


def _as_stack(plan: Plan, pair: Pair) -> tuple[Plan, Pair]:
    """A plan of a pair alone, whose weight is the stack of its chunks."""
    info = plan.tensors[pair.weight]
    covers, shape = pair.granularity.apart(info.shape)
    tensors = {pair.weight: info._replace(shape=shape), pair.scale: plan.tensors[pair.scale]}
    return Plan(plan.source, tensors), pair._replace(granularity=covers)


def _cut(top: int, bottom: int, step: int) -> Iterator[tuple[int, int]]:
    """Bounds of strips of ``step`` rows, at least one."""
    step = max(1, step)
    return ((row, min(row + step, bottom)) for row in range(top, bottom, step))


def _columns(part: torch.Tensor, width: int, out: torch.Tensor) -> None:
    """Copy the first bytes of every ``width``, as many as a row of ``out`` has: uint8 [rows, kept]."""
    copy_matrix(part.as_strided(tuple(out.shape), (width, 1)), out)
