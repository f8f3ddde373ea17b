"""FP8 weights back to bfloat16: for layers that take no FP8, and modules whose quality matters more than their memory.

Each value is the exact product of weight and scale, rounded once, to nearest, ties to even. ``weight.float() * scale``
rounded to bfloat16 rounds twice, and is off by one in the last bit where float32's rounding makes a tie.
"""

from __future__ import annotations

import math

import torch

from ..errors import ScaleError
from ..host.grain import GRAIN, mapped, rows_at_once
from ..host.memory import allocate, shaped
from ..host.parallel import run
from . import kernel
from .formats import E4M3FN
from .granularity import TENSOR, Granularity
from .scales import is_e8m0

OTHERS = (torch.float8_e4m3fnuz, torch.float8_e5m2)
"""FP8 dtypes that are read as bfloat16, value by value, and have no kernel."""

_TILE = 1 << 20  # weights at a time


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """float64 values of a scale of any dtype; uint8 and float8_e8m0fnu are 2^(byte - 127), 255 is NaN."""
    if not is_e8m0(scale):
        return mapped(torch.Tensor.double, scale.detach(), torch.float64)
    return mapped(_powers, scale.detach().view(torch.uint8), torch.float64)


def _powers(raw: torch.Tensor) -> torch.Tensor:
    # exponents of float64 are biased by 1023 where those of e8m0 are by 127
    return torch.where(raw == 255, torch.nan, ((raw.long() + (1023 - 127)) << 52).view(torch.float64))


def dequantize_slice(
    codes: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``codes x scale`` for any rectangle of a weight whose blocks have one scale each.

    One scale a row is the block ``(1, columns)``, one for all is ``(rows, columns)``. One call is one thread's work,
    done without the GIL where there is a native kernel: to use several, cut by rows and pass parts of ``out``.

    Args:
        codes: float8_e4m3fn (or uint8, its bytes) [rows, columns] on the CPU: the rectangle. Rows may be apart, but
            the codes of a row lie side by side. float8_e4m3fnuz and float8_e5m2, too, which no native kernel does.
        scale: float32 [ceil((offset[0] + rows) / block[0]), ceil((offset[1] + columns) / block[1])]: the scales of
            the blocks that the rectangle touches, and no others. Any float32 is taken as it is.
        block: (rows, columns) of a block, from 1 up.
        offset: the place of the rectangle's first element within its block; less than ``block``.
        out: bfloat16 [rows, columns] to write into, rows as those of ``codes``; may not overlap ``codes``.

    Returns:
        bfloat16 [rows, columns], ``out`` if given. A NaN code, or a NaN scale, gives NaN; products beyond
        bfloat16's range give an infinity, tiny ones subnormals and zero.

    Raises:
        ScaleError: ``scale`` has another shape than the rectangle needs, or another dtype.
        ValueError: another argument is not as described.
    """
    if out is None:
        out = shaped(allocate(2 * codes.numel()), torch.bfloat16, tuple(codes.shape))
    dequantize_into(out, codes, scale, block, offset)
    return out


def dequantize_into(
    out: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], offset: tuple[int, int]
) -> bool:
    """``dequantize_slice``, which says whether a code was NaN or infinite. Raises what that raises."""
    if codes.dtype not in (E4M3FN, torch.uint8, *OTHERS) or codes.dim() != 2:
        raise ValueError(f"codes: expected float8_e4m3fn or uint8 [rows, columns], not {codes.dtype} {codes.shape}")
    if any(b < 1 or not 0 <= o < b for b, o in zip(block, offset, strict=True)):
        raise ValueError(f"block {block}, offset {offset}: a block is from 1 up, an offset within it")
    grid = tuple(-(-(o + n) // b) for o, n, b in zip(offset, codes.shape, block, strict=True))
    if scale.dtype != torch.float32 or tuple(scale.shape) != grid:
        raise ScaleError(
            f"a slice {list(codes.shape)} that begins at {list(offset)} of a block of {list(block)} needs scales "
            f"float32 {list(grid)}, not {str(scale.dtype).removeprefix('torch.')} {list(scale.shape)}"
        )
    if out.dtype != torch.bfloat16 or out.shape != codes.shape:
        raise ValueError(f"out: expected bfloat16 {list(codes.shape)}, not {out.dtype} {list(out.shape)}")
    if codes.numel() == 0:
        return False
    if kernel.active == "torch" or codes.dtype in OTHERS:
        return _by_torch(codes.detach(), scale.detach(), block, offset, out)
    return kernel.dequantize(
        codes.detach().view(torch.uint8), out.detach(), scale.detach().contiguous(), block, offset
    )


def _by_torch(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], offset: tuple[int, int], out: torch.Tensor
) -> bool:
    codes, seen = codes.view(E4M3FN) if codes.dtype == torch.uint8 else codes, False
    rows, columns = codes.shape
    tall, wide = (
        torch.tensor([k // b for k in range(o, o + n)], device="cpu")
        for o, n, b in zip(offset, (rows, columns), block, strict=True)
    )
    step = rows_at_once(columns)
    for top in range(0, rows, step):
        for left in range(0, columns, GRAIN):
            part = (slice(top, top + step), slice(left, left + GRAIN))
            # index_select, for indexing starts torch's threads, however small
            factor = scale.index_select(0, tall[part[0]]).index_select(1, wide[part[1]])
            value = codes[part].float().double()  # not every torch has a way from any FP8 to float64
            seen = seen or not bool(value.isfinite().all())
            out[part].copy_(_rounded(value, factor.double()))
    return seen


def _rounded(value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """bfloat16 of values of codes times factors. Torch goes from float64 through float32, so it is given what is
    rounded."""
    product = value.abs() * factor.abs()  # 4 bits times 24: exact
    # adding a power of two whose last bit is the product's eighth rounds to that bit; the least is 2^-133
    exponent = (product.view(torch.int64) >> 52).clamp(min=1023 - 126)
    large = ((exponent + 45) << 52).view(torch.float64)
    large = torch.where(product.isfinite(), large, 0.0)
    bits = ((product + large) - large).float().bfloat16().view(torch.int16)
    bits = torch.where(product.isnan(), 0x7FC0, bits)
    negative = torch.signbit(value) != torch.signbit(factor)
    return torch.where(negative, bits | -0x8000, bits).to(torch.int16).view(torch.bfloat16)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, granularity: Granularity, threads: int = 1) -> torch.Tensor:
    """``weight x scale``, rounded once to bfloat16.

    Args:
        weight: float8_e4m3fn [rows, columns] or [experts, rows, columns]; any shape with one scale for all.
        scale: of any dtype and shape that ``granularity`` describes; float64 is rounded to float32 first.
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
    granularity, shape = granularity.apart(tuple(weight.shape))
    rows, columns = shape[-2:] if len(shape) > 1 else (1, weight.numel())
    source, target = weight.detach().reshape(-1, rows, columns), out.view(-1, rows, columns)
    height, width = block_of(granularity, rows, columns, scale)
    grid = (-1, math.ceil(rows / height), math.ceil(columns / width))
    values = mapped(torch.Tensor.float, scale_values(scale), torch.float32).reshape(grid)
    values = values.expand(len(source), *grid[1:])
    step = max(1, _TILE // max(1, columns))
    parts = [(k, top, min(top + step, rows)) for k in range(len(source)) for top in range(0, rows, step)]

    def work(part: tuple[int, int, int]) -> None:
        matrix, top, bottom = part
        touched = values[matrix, top // height : (bottom - 1) // height + 1]
        into = target[matrix, top:bottom]
        dequantize_slice(source[matrix, top:bottom], touched, (height, width), (top % height, 0), out=into)

    run(parts, work, threads)
    return out


def values(weight: torch.Tensor) -> torch.Tensor:
    """A weight without a scale as bfloat16 of its shape, which holds every value of any FP8 dtype exactly."""
    if weight.dtype == E4M3FN and weight.is_contiguous():
        return dequantize(weight, torch.ones(1, device="cpu"), TENSOR)
    return mapped(torch.Tensor.bfloat16, weight.detach(), torch.bfloat16)


def block_of(granularity: Granularity, rows: int, columns: int, scale: torch.Tensor) -> tuple[int, int]:
    """What one scale value covers of a matrix, no larger than the matrix: a size from a file sizes nothing here."""
    if granularity.kind == "tensor":
        return rows, columns
    if granularity.kind == "row":
        return 1, columns
    if granularity.kind == "column":
        return rows, 1
    if granularity.kind == "block" and granularity.block:
        return min(granularity.block[0], rows), min(granularity.block[1], columns)
    raise ScaleError(f"scale of shape {list(scale.shape)}: how it covers the weight is unknown")
