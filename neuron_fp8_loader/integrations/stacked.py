"""Where did a model's conversion put its experts? Told by their bytes, so that their scales can follow them.

The bytes that were kept of each (``experts``) are looked for in the stacked FP8 tensors: NxD's fused layers hold
[experts, in, out], gate and up side by side along the last axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..codes.formats import E4M3FN
from ..errors import WeightError, listing
from ..host.memory import as_bytes, buffer
from .experts import Part, layer_of
from .names import is_of_decoder, short_name


@dataclass
class Placed:
    """A stacked tensor of the converted state dict, and which part lies where in it.

    Attributes:
        name: of the tensor.
        tensor: float8_e4m3fn [experts, in, out].
        places: (place in the stack, first column, part).
    """

    name: str
    tensor: torch.Tensor
    places: list[tuple[int, int, Part]]


def find(parts: list[Part], converted: Mapping[str, Any], source: str) -> list[Placed]:
    """Find the parts in the stacked FP8 weights of what a conversion returned.

    Returns:
        the weights of which every column belongs to a part, but for columns of zeros, which padding made. Stacks in
        which no part was found are left out.

    Raises:
        WeightError: some of a stack was found, and not all of it; or a part is nowhere, and neither is its weight.
    """
    stacks: dict[str, list[Placed]] = {}
    for name, value in converted.items():
        stacks.setdefault(layer_of(name), [])
        if isinstance(value, torch.Tensor) and value.dtype == E4M3FN and value.dim() == 3 and name.endswith(".weight"):
            stacks[layer_of(name)].append(Placed(name, value, []))
    there = {short_name(name) for name in converted}
    lost: dict[str, None] = {}
    for part in sorted(parts, key=lambda part: (part.zeros, not is_of_decoder(part.name))):
        for stack in sorted(stacks.get(part.layer, ()), key=lambda s: ("down" in s.name) != (part.role == 2)):
            if stack.places and is_of_decoder(stack.places[0][2].name) != is_of_decoder(part.name):
                continue
            place = _place(part, stack)
            if place is not None:
                stack.places.append((*place, part))
                break
        else:
            # a layer that the model does not have is no loss, and mtp.layers.0 is not layers.0
            here = part.layer in stacks and is_of_decoder(part.name) and not part.zeros
            if here and short_name(part.name) not in there:
                lost.setdefault(f"{part.name} {list(part.shape)}: its bytes are in no stacked FP8 weight")
    found = [stack for several in stacks.values() for stack in several if stack.places]
    problems = [problem for stack in found for problem in _uncovered(stack)] or list(lost)
    problems = problems or [problem for several in stacks.values() for problem in _not_told_apart(several)]
    if problems:
        raise WeightError(
            f"{source}: the model's conversion did something to its experts that is not understood, "
            f"{listing('problem', problems, 8)}\n"
            "Expected were weights [experts, in, out] of which each column is a row of one expert of the same layer, "
            "unchanged, gate and up side by side, or zeros. Have the experts as bfloat16: "
            'fp8_rescale={"dequantize": ["*.experts.*"]}, with modules_to_not_convert left out'
        )
    return found


def _place(part: Part, stack: Placed) -> tuple[int, int] | None:
    """(place in the stack, first column) where the part's bytes lie."""
    experts, rows, columns = stack.tensor.shape
    out, inner = part.shape
    if rows < inner or columns < out:
        return None
    raw, likely = stack.tensor.view(torch.uint8), columns // 2 if part.role == 1 else 0
    for place in sorted(range(experts), key=lambda k: k != part.expert):
        taken = [(first, first + other.shape[0]) for at, first, other in stack.places if at == place]
        if _is_at(part, raw[place], likely, taken):
            return place, likely
        starts = (raw[place][part.columns] == part.bytes[0][:, None]).all(dim=0).nonzero().flatten().tolist()
        for first in starts:
            if _is_at(part, raw[place], first, taken):
                return place, first
    return None


def _is_at(part: Part, matrix: torch.Tensor, first: int, taken: list[tuple[int, int]]) -> bool:
    end = first + part.shape[0]
    if end > matrix.shape[1] or any(first < other_end and start < end for start, other_end in taken):
        return False
    return torch.equal(matrix[part.columns, part.rows[:, None] + first], part.bytes)


def _uncovered(stack: Placed) -> Iterator[str]:
    """What in a stack belongs to no part, or to two, and is not zero."""
    experts, _, columns = stack.tensor.shape
    raw = stack.tensor.view(torch.uint8)
    free = torch.ones(experts, columns, dtype=torch.bool)
    for place, first, part in stack.places:
        out, inner = part.shape
        below = raw[place, inner:, first : first + out]
        if not bool(free[place, first : first + out].all()) or bool((below & 0x7F).any()):
            yield f"{stack.name} {list(raw.shape)}: {part.name} was found at {place}, and something else with it"
            return
        free[place, first : first + out] = False
    for place in range(experts):
        left = free[place].nonzero().flatten()
        bad = left[((raw[place][:, left] & 0x7F) != 0).any(dim=0)] if len(left) else left
        if len(bad):
            yield (
                f"{stack.name} {list(raw.shape)}: expert {place}, columns {int(bad[0])} to {int(bad[-1])} are not of "
                "this layer's experts"
            )
            return


def _not_told_apart(stacks: list[Placed]) -> Iterator[str]:
    """Parts of a layer of which the same bytes were kept, with different scales. Their names tell which is which, but
    only where names are right of all others: expert n is at n, and gate and up begin at the same columns in all."""
    twins: list[tuple[Part, Part]] = []
    elsewhere: list[str] = []
    for stack in stacks:
        places = [p for p in stack.places if not p[2].zeros]
        alike: dict[bytes, Part] = {}
        columns: dict[int, set[tuple[int, int]]] = {}
        for place, first, part in places:
            if not bool((part.bytes & 0x7F).any()):
                yield f"{part.name} {list(part.shape)}: zeros wherever it was looked at, and not elsewhere"
                return
            other = alike.setdefault(bytes(buffer(as_bytes(part.bytes.contiguous()))), part)
            if other.shape == part.shape and not torch.equal(other.values, part.values):
                twins.append((other, part))
            columns.setdefault(place, set()).add((part.role, first))
        usual = max(columns.values(), key=len, default=set())
        elsewhere += [
            f"{part.name} is at {place} in {stack.name}, column {first}"
            for place, first, part in places
            if place != part.expert or (part.role, first) not in usual
        ]
    if twins and elsewhere:
        one, other = twins[0]
        yield (
            f"{one.name} and {other.name} are alike wherever they were looked at, their scales are not, and names do "
            f"not tell where they are: {elsewhere[0]}"
        )
