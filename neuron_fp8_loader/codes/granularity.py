"""How much of a weight one scale value covers, told from the two shapes.

Where the shapes leave it open the answer is "unknown": a constant factor needs no granularity, and whoever does (to
verify, to change the layout of scales) is better off without a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Granularity:
    """Which part of a weight shares one scale value.

    Attributes:
        kind: ``"tensor"``, ``"row"`` (output row), ``"column"``, ``"block"`` or ``"unknown"``.
        block: (rows, columns) of a block; MX groups are (1, 32), or (32, 32). The last block may be cut short.
        experts: does a leading expert dimension of the weight have scales of its own?
        mx: is it a block of an OCP microscaling format, with an e8m0 scale?
        transposed: the scale is stored as [..., columns, 1], so it does not broadcast over its weight.
        chunk: rows after which blocks begin anew, each time with a block that may be cut short before; 0: nowhere.
    """

    kind: str
    block: tuple[int, int] | None = None
    experts: bool = False
    mx: bool = False
    transposed: bool = False
    chunk: int = 0

    def apart(self, shape: Shape) -> tuple[Granularity, Shape]:
        """A matrix of this shape as a stack of its chunks, [chunks, rows, columns], each with scales of its own.

        Weight and scale lie in memory as those of the stack do. Without chunks: as they are.
        """
        if not self.chunk:
            return self, shape
        return replace(self, experts=True, chunk=0), (shape[0] // self.chunk, self.chunk, *shape[1:])

    def __str__(self) -> str:
        name = f"{self.kind} {self.block[0]}x{self.block[1]}" if self.block else self.kind
        if self.mx:
            name = name.replace("block", "MX group")
        if self.transposed:
            name += " (scale stored transposed)"
        if self.chunk:
            name += f" within {self.chunk} rows"
        if not self.experts:
            return name
        return "expert" if self.kind == "tensor" else f"expert {name}"


_USUAL = 128  # rows and columns of the blocks that most producers use

TENSOR, ROW, COLUMN, UNKNOWN = Granularity("tensor"), Granularity("row"), Granularity("column"), Granularity("unknown")


@lru_cache(maxsize=4096)
def granularity(
    weight: Shape,
    scale: Shape,
    declared_block: tuple[int, int] | None = None,
    *,
    e8m0: bool = False,
    fused_qkv: bool = False,
    maybe_transposed: bool = False,
) -> Granularity:
    """Tell the granularity of a weight of shape [..., rows, columns] from its scale's shape.

    Args:
        weight, scale: the shapes.
        declared_block: the checkpoint's own word on the size of a block. Without it only powers of two are
            considered, the one size among those that are in use.
        e8m0: the scale is e8m0: blocks with 32 columns are MX groups.
        fused_qkv: the weight is a fused qkv projection. Its blocks may have been cut within each of several chunks
            (MiMo-V2), which shows in the shapes only if the rows are a multiple of the block.
        maybe_transposed: its convention stores some scales as [experts, columns, 1] (FBGEMM Llama 4).
    """
    if math.prod(scale) == 1:
        return TENSOR
    if not weight or not scale:
        return UNKNOWN
    rest = scale[1:]
    if len(weight) == 1:
        return ROW if scale == weight else UNKNOWN
    if len(weight) > 3:  # convolutions: rows and columns are not what the last two dimensions are
        return UNKNOWN
    if len(weight) == 3:
        if scale[0] != weight[0]:
            return UNKNOWN
        if math.prod(rest) == 1:
            return replace(TENSOR, experts=True)
        found = _stacked(weight[1], weight[2], rest, declared_block, e8m0, maybe_transposed)
    else:
        found = _matrix(weight[0], weight[1], scale, declared_block, e8m0)
    if fused_qkv and found.block and weight[-2] % found.block[0]:
        return UNKNOWN
    return replace(found, experts=len(weight) == 3) if found is not UNKNOWN else UNKNOWN


def _stacked(
    rows: int, columns: int, scale: Shape, declared: tuple[int, int] | None, e8m0: bool, maybe_transposed: bool
) -> Granularity:
    """One expert of a stack, whose weights may be [out, in] or [in, out]."""
    if len(scale) == 1 and rows == columns:
        return UNKNOWN
    if maybe_transposed and scale == (columns, 1):
        return replace(COLUMN, transposed=True) if rows != columns else UNKNOWN
    return _matrix(rows, columns, scale, declared, e8m0)


def _matrix(rows: int, columns: int, scale: Shape, declared: tuple[int, int] | None, e8m0: bool) -> Granularity:
    if len(scale) == 4 and scale[1] == scale[3] == 1:  # ModelOpt: [row blocks, 1, column blocks, 1]
        scale = (scale[0], scale[2])
    if scale in ((rows,), (rows, 1)):  # one dimension: ModelOpt and Quark, per output row
        return ROW
    if scale == (1, columns):
        return COLUMN
    if len(scale) != 2 or 0 in scale or 0 in (rows, columns):
        return UNKNOWN
    block = declared
    if block is None or scale != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        # a declared size that does not fit may be another tensor's (mixed checkpoints), so only whole blocks count
        block = (_block(rows, scale[0], ragged=declared is None), _block(columns, scale[1], ragged=declared is None))
        if block[0] != block[1] and 1 not in block and _is_turned(rows, columns, scale):
            return UNKNOWN
    # numbers from a config size memory later on: no block is larger than what it covers
    block = (_clamped(block[0], rows), _clamped(block[1], columns))
    if 0 in block:
        return UNKNOWN
    return Granularity("block", block, mx=e8m0 and block[1] == 32)


def _is_turned(rows: int, columns: int, scale: Shape) -> bool:
    """Would the scale be one of square blocks if it were transposed? Then it does not lie as its weight does."""
    down, across = _block(columns, scale[0], ragged=True), _block(rows, scale[1], ragged=True)
    return down == across > 1


def _clamped(block: int, size: int) -> int:
    return block if block <= max(size, _USUAL) else _block(size, 1, ragged=True)


def _block(size: int, grid: int, *, ragged: bool) -> int:
    """The power of two that cuts ``size`` into ``grid`` pieces, the last one cut short if ``ragged``; 0: none."""
    if grid == 1:
        return _USUAL if size <= _USUAL else size  # a larger block would cover the same
    for block in (1, 16, 32, 64, 128, 256, 512):
        if math.ceil(size / block) == grid and (ragged or size % block == 0):
            return block
    return 0
