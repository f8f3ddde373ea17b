"""FP8 weights read as bfloat16, a slice at a time: value x scale, exactly rounded once."""

from __future__ import annotations

from typing import Any

import torch

from ..codes.dequantize import dequantize_slice, scale_values
from ..codes.formats import HALF
from ..codes.granularity import Granularity
from ..codes.kernel import translate
from ..codes.scales import check_scale
from ..errors import PlanError, ScaleError, WeightError
from ..host.memory import allocate, as_bytes, shaped
from ..plan import Pair, Plan
from ..plan.layout import can_be_dequantized, scale_shape, unknown
from .index import picked, selectors, spans

_LARGEST = torch.finfo(torch.bfloat16).max / 448  # of a scale under which no value overflows


def read_bfloat16(plan: Plan, pair: Pair, weight: Any, scale: Any, index: Any, nan: str = "error") -> torch.Tensor:
    """A part of an FP8 weight as bfloat16: value x scale, rounded to nearest even once.

    Of the weight, the rows and columns from the first to the last that ``index`` names are read; of the scale, the
    entries that cover them, also where the part begins or ends inside a block.

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
    shape = plan.tensors[pair.weight].shape
    chosen = selectors(index, shape)
    where = spans(chosen)
    codes = weight[tuple(slice(*span) for span in where)]
    if codes.numel() == 0:
        return picked(codes.new_empty(codes.shape, dtype=torch.bfloat16), chosen, where)
    if nan == "error":
        _check_codes(codes, plan.where(pair.weight))
    covers = coverage(plan, pair)
    take, block, offset, grid = _covering(covers, plan.tensors[pair.scale].shape, where)
    part = scale[take] if take else scale[...]
    if nan == "error":
        _check_scale(part, plan.where(pair.scale))
    values = scale_values(part).float().reshape(-1, *grid)
    matrices = codes.reshape(len(values), -1, codes.shape[-1] if codes.dim() > 1 else 1)
    whole = shaped(allocate(2 * codes.numel()), torch.bfloat16, tuple(matrices.shape))
    for matrix, entries, out in zip(matrices, values, whole, strict=True):
        rows = matrix if matrix.stride(1) == 1 else matrix.contiguous()
        dequantize_slice(rows, entries, block or (max(1, rows.shape[0]), rows.shape[1]), offset, out=out)
    return picked(whole.reshape(codes.shape), chosen, where)


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


def unscaled_bfloat16(plan: Plan, name: str, weight: Any, index: Any, nan: str = "error") -> torch.Tensor:
    """A part of an FP8 weight without a scale as bfloat16, which holds every FP8 value. Raises WeightError for NaN."""
    chosen = selectors(index, plan.tensors[name].shape)
    where = spans(chosen)
    codes = weight[tuple(slice(*span) for span in where)]
    if nan == "error" and codes.numel():
        _check_codes(codes, plan.where(name))
    return picked(codes.to(torch.bfloat16), chosen, where)


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


def _check_codes(codes: torch.Tensor, where: str) -> None:
    seen = translate(as_bytes(codes.contiguous()), None, HALF)
    if seen.nan:
        raise WeightError(
            f"{where}: {seen.nan} NaN codes in a part of it; the checkpoint is damaged or badly quantized, or "
            'nan="keep" lets them through'
        )


def _check_scale(part: torch.Tensor, where: str) -> None:
    check_scale(part, where)
    largest = float(scale_values(part).abs().max())
    if largest > _LARGEST:
        raise ScaleError(f"{where}: a scale of {largest:g} takes values beyond bfloat16; it is not plausible")
