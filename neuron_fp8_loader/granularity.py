"""How much of a weight one scale value covers, told from the two shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Granularity:
    """Which part of a weight shares one scale value.

    Attributes:
        kind: ``"tensor"``, ``"row"`` (output row), ``"column"``, ``"block"`` or ``"unknown"``.
        block: (rows, columns) of a block; MX groups are (1, 32).
        experts: does a leading expert dimension of the weight have scales of its own?
    """

    kind: str
    block: tuple[int, int] | None = None
    experts: bool = False

    def __str__(self) -> str:
        size = f" {self.block[0]}x{self.block[1]}" if self.block else ""
        name = f"{self.kind}{size}"
        if not self.experts:
            return name
        return "expert" if self.kind == "tensor" else f"expert {name}"


def granularity(weight: Shape, scale: Shape, declared_block: tuple[int, int] | None = None) -> Granularity:
    """Tell the granularity of a weight of shape [..., rows, columns] from its scale's shape.

    ``declared_block`` is the checkpoint's own word on block size; without it (or where it does not fit) the size
    is inferred, a ragged last block included, preferring powers of two.
    """
    if math.prod(scale) == 1:
        return Granularity("tensor")
    if len(weight) < 2:
        return Granularity("row") if scale == weight else Granularity("unknown")
    *stack, rows, columns = weight
    if len(scale) == 4 and len(weight) == 2 and scale[1] == scale[3] == 1:  # ModelOpt: [rows/b, 1, columns/b, 1]
        scale = (scale[0], scale[2])
    if len(weight) == 3 and len(scale) >= 1 and scale[0] == stack[0]:
        rest = scale[1:]
        if math.prod(rest) == 1:
            return Granularity("tensor", experts=True)
        inner = _matrix(rows, columns, rest, declared_block)
        return Granularity(inner.kind, inner.block, experts=True)
    return _matrix(rows, columns, scale, declared_block) if len(weight) == 2 else Granularity("unknown")


def _matrix(rows: int, columns: int, scale: Shape, declared: tuple[int, int] | None) -> Granularity:
    if scale in ((rows,), (rows, 1)):
        return Granularity("row")
    if scale == (1, columns):
        return Granularity("column")
    if len(scale) != 2:
        return Granularity("unknown")
    if declared and scale == tuple(math.ceil(n / b) for n, b in zip((rows, columns), declared, strict=True)):
        return Granularity("block", declared)
    block = (_block(rows, scale[0]), _block(columns, scale[1]))
    return Granularity("block", (block[0], block[1])) if block[0] and block[1] else Granularity("unknown")


def _block(size: int, grid: int) -> int:
    """The likeliest block size that cuts ``size`` into ``grid`` pieces; 0 if none does."""
    if grid == size:
        return 1
    if grid == 1:
        # one block: any size from `size` up will do, and the usual one says most
        return 128 if size <= 128 else size
    for block in (128, 32, 64, 16, 256, 512):
        if math.ceil(size / block) == grid:
            return block
    block = math.ceil(size / grid) if grid > 0 else 0
    return block if block and math.ceil(size / block) == grid else 0
