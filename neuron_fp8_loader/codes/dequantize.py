"""FP8 weights back to bfloat16, a tile at a time: for modules whose quality matters more than their memory."""

from __future__ import annotations

import math

import torch

from ..errors import ScaleError
from ..host.memory import allocate, shaped
from ..host.parallel import run
from .granularity import Granularity
from .scales import is_e8m0

_TILE = 1 << 20  # weights at a time; their float32 values are four times that


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """float64 values of a scale of any dtype; uint8 and float8_e8m0fnu are 2^(byte - 127), 255 is NaN."""
    if not is_e8m0(scale):
        return scale.detach().double()
    raw = scale.detach().contiguous().view(torch.uint8).int()
    return torch.where(raw == 255, torch.nan, torch.ldexp(torch.ones_like(raw, dtype=torch.float64), raw - 127))


def dequantize(weight: torch.Tensor, scale: torch.Tensor, granularity: Granularity, threads: int = 1) -> torch.Tensor:
    """``weight x scale``, in float32, then rounded to bfloat16.

    Args:
        weight: float8_e4m3fn [rows, columns] or [experts, rows, columns]; any shape with one scale for all.
        scale: of any dtype and shape that ``granularity`` describes.
        granularity: how the scale covers the weight, as a plan says.
        threads: how many work at once.

    Returns:
        bfloat16 of the weight's shape.

    Raises:
        ScaleError: the granularity is unknown, or the weight is no matrix and no stack of them.
    """
    out = shaped(allocate(2 * weight.numel()), torch.bfloat16, tuple(weight.shape))
    if weight.numel() == 0:
        return out
    if weight.dim() not in (2, 3) and granularity.kind != "tensor":
        raise ScaleError(
            f"scale per {granularity} of a weight of shape {list(weight.shape)}: not known how it covers it"
        )
    rows, columns = weight.shape[-2:] if weight.dim() > 1 else (1, weight.numel())
    source, target = weight.detach().reshape(-1, rows, columns), out.view(-1, rows, columns)
    values = _per_matrix(scale_values(scale).float(), granularity, len(source))
    step = max(1, _TILE // max(1, columns))
    parts = [(k, top, min(top + step, rows)) for k in range(len(source)) for top in range(0, rows, step)]

    def work(part: tuple[int, int, int]) -> None:
        matrix, top, bottom = part
        factor = _rows(values[matrix], granularity, top, bottom, columns)
        target[matrix, top:bottom] = (source[matrix, top:bottom].float() * factor).bfloat16()

    run(parts, work, threads)
    return out


def _per_matrix(values: torch.Tensor, granularity: Granularity, matrices: int) -> torch.Tensor:
    """Scale values with a leading dimension, one entry a matrix of the weight."""
    if granularity.experts:
        return values.reshape(matrices, *values.shape[1:])
    return values.expand(matrices, *values.shape)


def _rows(values: torch.Tensor, granularity: Granularity, top: int, bottom: int, columns: int) -> torch.Tensor:
    """The scale of rows ``top`` to ``bottom`` of one matrix, ready to be multiplied by them."""
    if granularity.kind == "tensor":
        return values.reshape(1, 1)
    if granularity.kind == "row":
        return values.reshape(-1, 1)[top:bottom]
    if granularity.kind == "column":
        return values.reshape(1, -1)
    if granularity.kind == "block" and granularity.block:
        height, width = granularity.block
        grid = values.reshape(-1, math.ceil(columns / width))[top // height : (bottom - 1) // height + 1]
        tall = grid.repeat_interleave(height, dim=0)[top % height : top % height + bottom - top]
        return tall.repeat_interleave(width, dim=1)[:, :columns]
    raise ScaleError(f"scale of shape {list(values.shape)}: how it covers the weight is unknown")
