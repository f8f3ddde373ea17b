"""FP8 weights read as bfloat16, a slice at a time: value x scale, exactly rounded once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from ..codes.dequantize import dequantize_into, scale_values
from ..codes.granularity import Granularity
from ..codes.scales import check_scale, is_e8m0
from ..errors import PlanError, ScaleError, WeightError
from ..host.grain import count, mapped
from ..plan import Pair, Plan
from ..plan.layout import can_be_dequantized, scale_shape, unknown
from .index import Span, gathered, selectors

_BFLOAT16 = torch.bfloat16


def read_bfloat16(plan: Plan, pair: Pair, weight: Any, scale: Any, index: Any, nan: str = "error") -> torch.Tensor:
    """A part of an FP8 weight as bfloat16: value x scale, rounded to nearest even once.

    Read are the rows that ``index`` names, no others, and of a row what lies from the first to the last column; of
    the scale, the entries that cover them, also where the part begins or ends inside a block. Memory is taken for the
    result, for these entries in float32, and for a few rows where columns or rows are apart.

    Args:
        plan: of the checkpoint, for shapes and for messages.
        pair: one of the plan's.
        weight, scale: the two tensors as ``safetensors.safe_open(...).get_slice`` gives them, or tensors.
        index: as torch takes it: slices (with a step from 1 up), ints, one list of ints, Ellipsis, or a tuple of them.
        nan: ``"error"``, or ``"keep"``, which lets NaN codes and scales that are not finite through.

    Returns:
        bfloat16, of the shape that ``index`` has in torch.

    Raises:
        PlanError: it is not known how the scale covers the weight.
        WeightError: NaN codes in the part. ScaleError: a scale there is not finite, or so large that values overflow.
        IndexError, TypeError: no such index.
    """
    covers, shape = coverage(plan, pair), plan.tensors[pair.scale].shape

    def read(where: list[Span], out: torch.Tensor) -> None:
        codes = weight[tuple(slice(*span) for span in where)]
        take, block, offset, grid = _covering(covers, shape, where)
        values = _float32(scale[take] if take else scale[...], codes.dtype, plan.where(pair.scale), nan)
        _fill(out, codes, values.view(-1, *grid), block, offset, plan.where(pair.weight), nan)

    return gathered(selectors(index, plan.tensors[pair.weight].shape), _BFLOAT16, read)


def unscaled_bfloat16(plan: Plan, name: str, weight: Any, index: Any, nan: str = "error") -> torch.Tensor:
    """A part of an FP8 weight without a scale as bfloat16, which holds every FP8 value. Raises WeightError for NaN."""
    one = torch.ones(1, 1, 1, device="cpu")

    def read(where: list[Span], out: torch.Tensor) -> None:
        _fill(out, weight[tuple(slice(*span) for span in where)], one, None, (0, 0), plan.where(name), nan)

    return gathered(selectors(index, plan.tensors[name].shape), _BFLOAT16, read)


def _fill(
    out: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    block: tuple[int, int] | None,
    offset: tuple[int, int],
    where: str,
    nan: str,
) -> None:
    """Matrix by matrix. values: float32 [matrices, ...], the scales of the blocks that each one touches."""
    rows, columns = codes.shape[-2:] if codes.dim() > 1 else (codes.numel(), 1)
    stack = codes.shape[:-2]
    if values.shape[0] == 1 and values[0].numel() == 1:
        values = values.expand(max(1, stack.numel()), 1, 1)
    seen = False
    for number, at in enumerate(itertools.product(*map(range, stack))):
        seen |= dequantize_into(
            out[at].view(rows, columns) if codes.dim() > 1 else out.view(rows, columns),
            codes[at] if codes.dim() > 1 else codes.view(rows, columns),
            values[number],
            block or (max(1, rows), columns),
            offset,
        )
    if seen and nan == "error":
        bad = count(lambda part: ~part.float().isfinite(), codes)
        raise WeightError(
            f"{where}: {bad} NaN codes in a part of it; the checkpoint is damaged or badly quantized, or "
            'nan="keep" lets them through'
        )


def coverage(plan: Plan, pair: Pair) -> Granularity:
    """How the scale covers the weight; where the shapes leave it open, as the convention says.

    Raises:
        PlanError: neither tells.
    """
    if pair.granularity.chunk:
        raise PlanError(
            plan.source,
            [f"{pair.weight}: its scales' blocks begin anew every {pair.granularity.chunk} rows, and parts of it are "
             'not read as bfloat16; load_state_dict(dequantize=[...], qkv="split") gives q, k and v'],
        )  # fmt: skip
    if can_be_dequantized(pair, plan.tensors):
        return pair.granularity
    rows = _rows(plan, pair)
    if rows is None:
        raise PlanError(
            plan.source,
            [f"{pair.weight}: cannot be read as bfloat16; {unknown(pair, plan.tensors)}; register a convention, or "
             "have the checkpoint quantized again with one scale a tensor, a row or a block"],
        )  # fmt: skip
    return Granularity("column" if pair.transposed else "row", experts=True)


def _rows(plan: Plan, pair: Pair) -> tuple[int, ...] | None:
    if len(plan.tensors[pair.weight].shape) != 3:
        return None
    try:
        return scale_shape(pair, plan.tensors, "per_channel")
    except ValueError:
        return None


def _covering(
    covers: Granularity, shape: tuple[int, ...], where: list[tuple[int, int]]
) -> tuple[tuple[slice, ...], tuple[int, int] | None, tuple[int, int], tuple[int, int]]:
    """Which part of a scale covers a part of its weight.

    Returns:
        the scale's index; (rows, columns) of a block, None for one that is as large as the matrix; (rows, columns) by
        which the part begins inside of one; and (rows, columns) of the grid of entries, for each matrix.
    """
    take = [slice(None)] * len(shape)
    if covers.kind == "tensor" and not covers.experts:
        return tuple(take), None, (0, 0), (1, 1)
    first = 0
    if covers.experts:
        take[0], first = slice(*where[0]), 1
    (top, bottom), (left, right) = where[-2:] if len(where) > 1 else (where[0], (0, 1))
    rows, columns = bottom - top, right - left
    if covers.kind == "tensor":
        return tuple(take), None, (0, 0), (1, 1)
    if covers.kind == "row":
        take[first] = slice(top, bottom)
        return tuple(take), (1, columns), (0, 0), (rows, 1)
    if covers.kind == "column":
        last = len(shape) - 1
        take[first if covers.transposed or last == first else last] = slice(left, right)
        return tuple(take), (rows, 1), (0, 0), (1, columns)
    assert covers.block is not None  # the one kind left
    height, width = covers.block
    down, across = (top // height, -(-bottom // height)), (left // width, -(-right // width))
    take[first] = slice(*down)
    take[first + 2 if len(shape) - first == 4 else first + 1] = slice(*across)
    return tuple(take), covers.block, (top % height, left % width), (down[1] - down[0], across[1] - across[0])


def _float32(part: torch.Tensor, dtype: torch.dtype, where: str, nan: str) -> torch.Tensor:
    """Values of scales, which are checked: times codes of ``dtype`` they may not overflow."""
    largest = torch.finfo(_BFLOAT16).max / torch.finfo(dtype).max
    if is_e8m0(part):
        top = 127 + int(math.log2(largest))
        raw = part.view(torch.uint8)
        values = mapped(_powers, raw, torch.float32)
        implausible = count(lambda some: some.max() > top, raw) if raw.numel() else 0  # in so many pieces
    else:
        values = mapped(torch.Tensor.float, part, torch.float32)
        implausible = count(lambda some: ~(some.abs() <= largest), values)
    if nan == "error" and implausible:
        check_scale(part, where)
        raise ScaleError(
            f"{where}: a scale of {float(scale_values(part).abs().max()):g} takes values beyond bfloat16; it is not "
            "plausible"
        )
    return values


def _powers(raw: torch.Tensor) -> torch.Tensor:
    """float32 of e8m0 bytes, which are its exponents; but 0 is 2^-127, a subnormal, and 255 NaN."""
    values = (raw.int() << 23).view(torch.float32)
    if raw.numel():
        least, most = raw.reshape(-1).aminmax()
        if int(least) == 0:
            values = torch.where(raw == 0, 2.0**-127, values)
        if int(most) == 255:
            values = torch.where(raw == 255, torch.nan, values)
    return values
