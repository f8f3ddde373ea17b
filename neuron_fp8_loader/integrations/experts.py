"""The experts that a conversion is given: a few bytes of each weight are kept, and its scale.

A conversion stacks, transposes, fuses, pads and renames weights as its model needs, and knows nothing of scales.
After it, those bytes tell where each expert is (``stacked``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..codes.dequantize import scale_values
from ..conventions import module_of
from ..errors import WeightError
from ..plan import Pair
from .check import is_weight
from .names import short_name

_EXPERTS = re.compile(r"(^|\.)(experts|expert_mlps)\.")
_NUMBER = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_ROLES = {
    "gate": ("gate_proj", "w1", "linear", "gate_up_proj"),
    "up": ("up_proj", "w3", "v1", "linear_v"),
}
"""What models call the projections. Bytes tell them apart; names only settle what comes first where bytes are equal
(all zeros, say). A projection of neither kind comes last."""

_ROWS, _COLUMNS = 8, 32  # bytes kept of a weight: this many rows, of each this many columns

Scale = tuple[torch.Tensor, tuple[int, int]]


@dataclass(frozen=True)
class Part:
    """A matrix [out, in] of one expert, as it was before the conversion: a projection, or half of a fused one.

    Attributes:
        name: of the weight.
        scale_name: of its scale.
        layer, expert: the numbers in its name, or its place in a stack; ``""`` and 0 where there is none.
        role: 0 gate, 1 up, 2 any other.
        shape: (out, in).
        rows, columns: indices of the bytes kept, each from the first to the last; shared by all parts of this shape.
        bytes: uint8 [rows, columns].
        zeros: is the whole matrix zeros, so that any scale is right?
        values: float32 [row blocks, column blocks], the scale.
        block: (rows, columns) that one value covers.
    """

    name: str
    scale_name: str
    layer: str
    expert: int
    role: int
    shape: tuple[int, int]
    rows: torch.Tensor
    columns: torch.Tensor
    bytes: torch.Tensor
    zeros: bool
    values: torch.Tensor
    block: tuple[int, int]

    def scale(self, block: tuple[int, int]) -> torch.Tensor:
        """The values for blocks of another size, float32 [row blocks, column blocks].

        Raises:
            ValueError: such a block would need two scales; the text says what there is.
        """
        grid = self.values
        for axis in (0, 1):
            size, old, new = self.shape[axis], self.block[axis], block[axis]
            if old >= size or old % new == 0:
                index = torch.arange(0, size, new) // old
            elif grid.shape[axis] > 1:
                raise ValueError(f"{self.name} has one scale per {self.block[0]} rows and {self.block[1]} columns")
            else:
                index = torch.zeros(-(-size // new), dtype=torch.long)
            grid = grid.index_select(axis, index)
        return grid


def is_expert(name: str) -> bool:
    """Is a tensor, by its name before or after a conversion, one expert's or a stack of them?"""
    return _EXPERTS.search(name) is not None


def parts_of(state_dict: Mapping[str, Any], pairs: Mapping[str, Pair], flat: int = 0) -> list[Part]:
    """The parts of all FP8 experts that have a scale.

    Args:
        state_dict: what the conversion will be given.
        pairs: of the checkpoint, by ``short_name`` of the module.
        flat: how many experts lie one below another in a matrix (see ``Takes.flat``); 0 where they do not.

    Raises:
        WeightError: a flat matrix is not made of so many experts.
    """
    found: list[Part] = []
    for name, weight in state_dict.items():
        if not is_expert(name) or not is_weight(name, weight, state_dict) or weight.dim() not in (2, 3):
            continue
        module = module_of(name)
        pair, scale = pairs.get(short_name(module)), state_dict.get(f"{module}.scale")
        if pair is not None and scale is not None:
            found += _parts(name, weight, scale, pair, flat if weight.dim() == 2 else 0)
    return sorted(found, key=lambda part: part.role)


def layer_of(name: str) -> str:
    """The number of the layer in a tensor's name; "" where there is none."""
    layer = _LAYER.search(name)
    return layer[1] if layer else ""


def _parts(name: str, weight: torch.Tensor, scale: torch.Tensor, pair: Pair, flat: int) -> Iterator[Part]:
    number = _NUMBER.search(name)
    last = module_of(name).rpartition(".")[2].removesuffix("_weight")
    role = next((k for k, names in enumerate(_ROLES.values()) if last in names), 2)
    if flat:
        if weight.shape[0] % flat:
            raise WeightError(f"{name} {list(weight.shape)}: expected the rows of {flat} experts, one below another")
        matrices = weight.reshape(flat, -1, weight.shape[1])
    else:
        matrices = weight if weight.dim() == 3 else weight.unsqueeze(0)
    stacked = weight.dim() == 3
    values, block = _flat_grid(name, matrices, scale, pair) if flat else _grid(name, matrices, scale, pair)
    if role == 2 if flat else stacked and pair.transposed:
        matrices, values, block = matrices.transpose(1, 2), values.transpose(1, 2), block[::-1]
    raw = matrices.view(torch.uint8)
    out = raw.shape[1]
    # gate and up of a stack may be padded apart, so its halves are looked for apart
    cut = out // 2 if stacked and out % 2 == 0 and (block[0] >= out or out // 2 % block[0] == 0) else out
    for place in range(len(raw)):
        expert = place if stacked or flat else int(number[1]) if number else 0
        for top in range(0, out, cut):
            own = values[place][top // block[0] : -(-(top + cut) // block[0])] if block[0] < out else values[place]
            yield Part(
                name,
                f"{module_of(name)}.scale",
                layer_of(name),
                expert,
                role if top == 0 or role != 0 else 1,
                (cut, raw.shape[2]),
                *_probe(raw[place, top : top + cut]),
                own,
                block,
            )


def _flat_grid(
    name: str, matrices: torch.Tensor, scale: torch.Tensor, pair: Pair
) -> tuple[torch.Tensor, tuple[int, int]]:
    """As ``_grid``, of experts one below another in a matrix: [experts, rows of one, columns]."""
    experts, rows, columns = matrices.shape
    values, kind = scale_values(scale).float(), pair.granularity.kind
    if kind == "tensor":
        return values.flatten()[:1].reshape(1, 1, 1).expand(experts, 1, 1), (rows, columns)
    if kind != "block" and values.numel() == scale.shape[0] == experts:
        return values.reshape(experts, 1, 1), (rows, columns)
    if kind == "row":
        return values.reshape(experts, rows, 1), (1, columns)
    height, width = pair.granularity.block or (0, 0)
    if (
        kind == "block"
        and height
        and rows % height == 0
        and scale.dim() == 2
        and scale.shape[1] == -(-columns // width)
    ):
        return values.reshape(experts, rows // height, -1), (height, width)
    raise WeightError(
        f"{name}: {experts} experts of {rows} rows, one below another, with a scale {list(scale.shape)}; expected one "
        "for all, one each, one a row, or blocks of which no two experts share one"
    )


def _grid(name: str, matrices: torch.Tensor, scale: torch.Tensor, pair: Pair) -> tuple[torch.Tensor, tuple[int, int]]:
    """The scale as float32 [experts, row blocks, column blocks], and the size of a block, as the weight lies."""
    experts, rows, columns = matrices.shape
    values = scale_values(scale).float()
    if values.numel() in (1, experts) and (values.numel() == 1 or pair.granularity.kind == "tensor"):
        return values.reshape(-1, 1, 1).expand(experts, 1, 1), (rows, columns)
    one_each = (1, columns) if pair.transposed else (rows, 1)
    laid_out = scale.dim() <= 3 and tuple(scale.shape[-2:]) == one_each
    if pair.granularity.kind == "block" and pair.granularity.block and not laid_out:
        height, width = pair.granularity.block
        return values.reshape(experts, -(-rows // height), -(-columns // width)), (height, width)
    if pair.transposed and values.numel() == experts * columns:
        return values.reshape(experts, 1, columns), (rows, 1)
    if values.numel() != experts * rows or (pair.granularity.kind == "column" and not pair.transposed):
        raise WeightError(
            f"{name} {list(matrices.shape)}: a scale {list(scale.shape)}; expected one for all, or for each expert "
            'one, one a row or one a block. Have it as bfloat16: fp8_rescale={"dequantize": ["*.experts.*"]}, with '
            "modules_to_not_convert left out"
        )
    return values.reshape(experts, rows, 1), (1, columns)


def _probe(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    rows, columns = _spread(matrix.shape[0], _ROWS), _spread(matrix.shape[1], _COLUMNS)
    kept = matrix[rows[:, None], columns]
    return rows, columns, kept, not bool((kept & 0x7F).any()) and not bool((matrix & 0x7F).any())


@functools.cache
def _spread(size: int, most: int) -> torch.Tensor:
    return torch.linspace(0, size - 1, min(size, most), device="cpu").round().long()
