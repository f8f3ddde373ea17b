"""Experts as NxD's fused layers take them, as a decision: which tensor goes where in which stacked tensor.

NxD's ``ExpertFusedColumnParallelLinear`` and ``ExpertFusedRowParallelLinear`` hold all experts of a block, input
before output: ``gate_up_proj.weight`` [E, H, 2I] (gate, then up) and ``down_proj.weight`` [E, I, H], both of
``{block}.expert_mlps.mlp_op``. Their ``.scale`` is [E, 1, 2I] and [E, 1, H] (``expert_wise_per_channel_symmetric``),
or one a block, [E, H/128, 2I/128] and [E, I/128, H/128] (``blockwise_symmetric``, block axes 1 and 2). Source:
neuronx_distributed, ``quantization/quantization_layers.py`` and ``modules/moe/moe_parallel_layers.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..checkpoint import TensorInfo
from ..conventions import module_of
from ..conventions.experts import FAMILIES, ROUTERS, ExpertNames, Located, is_among_experts, locate
from .layout import unknown
from .plan import Pair, Plan

Infos = Mapping[str, TensorInfo]


class Place(NamedTuple):
    """Where a tensor goes, transposed: ``fused[expert, :, column : column + rows] = tensor.t()``.

    Attributes:
        into: the name of the fused tensor.
        expert: which of its matrices; None for a stack that fills all of them.
        column: the first of its columns; for a scale, of the fused scale's columns.
    """

    into: str
    expert: int | None
    column: int


@dataclass(frozen=True)
class Fused:
    """A tensor that comes out, with the experts of a block: its name, torch's name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Fusing:
    """What becomes of the experts of a checkpoint.

    Attributes:
        places: tensor (weight, scale, or unquantized weight) -> where it goes.
        tensors: the fused tensors by name.
        renamed: what becomes of stacks that lie input before output on disk: a weight gets another name, a scale its
            shape too.
        problems: what cannot be done, one text each.
    """

    places: dict[str, Place] = field(default_factory=dict)
    tensors: dict[str, Fused] = field(default_factory=dict)
    renamed: dict[str, Fused] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def becomes(self, name: str) -> Fused | None:
        """The tensor that ``name`` becomes, or becomes a part of; None where it is of no expert."""
        place = self.places.get(name)
        return self.tensors[place.into] if place else self.renamed.get(name)


class _Member(NamedTuple):
    """One projection of one expert (None: of all of them), with its pair where it is FP8."""

    expert: int | None
    part: int
    weight: str
    pair: Pair | None


def fuse(plan: Plan, layout: str) -> Fusing:
    """Decide where the experts of all blocks go.

    Args:
        plan: what is known of the checkpoint.
        layout: ``"per_channel"`` or ``"keep"``.
    """
    done = Fusing()
    blocks: dict[str, dict[ExpertNames, list[_Member]]] = {}
    for located, member in _members(plan, done.problems):
        blocks.setdefault(located.block, {}).setdefault(located.names, []).append(member)
    for block, families in blocks.items():
        if len(families) > 1:
            kinds = " and ".join("/".join(family.parts) for family in families)
            done.problems.append(f"{_path(block)}experts: has experts called {kinds}; expected one kind of names")
            continue
        ((names, members),) = families.items()
        _Block(plan, layout, block, names, members, done).fuse()
    return done


def _members(plan: Plan, problems: list[str]) -> list[tuple[Located, _Member]]:
    """The experts' projections; what else is named like one is a problem, for it would be lost in silence."""
    pairs = {pair.weight: pair for pair in plan.pairs}
    accounted = {pair.scale for pair in plan.pairs} | {scale.name for scale in plan.activation_scales}
    found = []
    for name, info in plan.tensors.items():
        if name in accounted:
            continue
        pair = pairs.get(name)
        located = locate(pair.module if pair else module_of(name))
        stack = name in plan.fp8_weights and len(info.shape) == 3
        if located is None and not stack and not is_among_experts(name):
            continue
        if located is None or (pair is None and info.dtype not in ("bfloat16", "float16", "float32")):
            known = "; ".join(f"{'all in one: ' * names.stacked}{', '.join(names.parts)}" for names in FAMILIES)
            why = f"FP8 weights with their scales, or unquantized ones, called {known}"
            problems.append(f'{name}: is {info.dtype} {list(info.shape)}; experts="fused" expected {why}')
        else:
            found.append((located, _Member(located.expert, located.part, name, pair)))
    return found


def are_inputs_first(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """Do the stacks of a block lie as [experts, in, out]? None: shapes that no such two have."""
    (first, last), other = gate_up[-2:], down[-2:]
    if gate_up[:-2] == down[:-2]:
        if first % 2 == 0 and other == (last, first // 2):
            return False
        if last % 2 == 0 and other == (last // 2, first):
            return True
    return None


def as_they_lie(pairs: Sequence[Pair], tensors: Infos) -> list[Pair]:
    """Pairs whose ``transposed`` is what the shapes of a block's two stacks say, whatever their convention does.

    Qwen3-VL-MoE has the names of transformers' stacks, and inputs before outputs as Llama 4 has.
    """
    found = list(pairs)
    stacks: dict[str, dict[int, int]] = {}
    for number, pair in enumerate(found):
        located = locate(pair.module) if len(tensors[pair.weight].shape) == 3 else None
        if located is not None and located.names.stacked:
            stacks.setdefault(located.block, {})[located.part] = number
    for both in stacks.values():
        if len(both) == 2:
            gate_up, down = (tensors[found[both[part]].weight].shape for part in (0, 1))
            inputs_first = are_inputs_first(gate_up, down)
            if inputs_first is not None:
                for number in both.values():
                    found[number] = found[number]._replace(transposed=inputs_first)
    return found


def _path(block: str) -> str:
    return f"{block}." if block else ""


class _Block:
    """The experts of one block."""

    def __init__(
        self, plan: Plan, layout: str, block: str, names: ExpertNames, members: Sequence[_Member], done: Fusing
    ) -> None:
        self.infos, self.by_scale, self.layout = plan.tensors, plan.by_scale, layout
        self.block, self.names, self.members, self.done = _path(block), names, members, done
        self.experts = 0

    def fuse(self) -> None:
        before = len(self.done.problems)
        self._check_complete()
        down = len(self.names.parts) - 1
        sides = [m for m in self.members if m.part != down], [m for m in self.members if m.part == down]
        for side in sides:
            self._check_alike(side)
        if len(self.done.problems) > before:
            return
        gate_up, downs = (self.infos[side[0].weight].shape for side in sides)
        transposed = self._transposed(gate_up, downs)
        if transposed is None:
            return
        for side, name in zip(sides, ("gate_up_proj", "down_proj"), strict=True):
            self._place(side, f"{self.block}expert_mlps.mlp_op.{name}", transposed)

    def _check_complete(self) -> None:
        """Has every expert all its projections, and is there one for every row of the router?"""
        there: dict[tuple[int | None, int], _Member] = {}
        for member in self.members:
            first = there.setdefault((member.expert, member.part), member)
            if first is not member:
                self.done.problems.append(f"{member.weight}: is the same as {first.weight}; expected one of them")
        numbers = sorted({m.expert for m in self.members if m.expert is not None})
        expected = f"expected {', '.join(self.names.parts)} of each expert"
        gap = next((n for n, number in enumerate(numbers) if n != number), None)
        if gap is not None:
            self._problem(f"{gap}: is missing, and there is expert {numbers[-1]}; {expected}")
        each: Sequence[int | None] = numbers or [None]
        for number in each:
            for part, name in enumerate(self.names.parts):
                if (number, part) not in there:
                    self._problem(f"{name if number is None else f'{number}.{name}'}: is missing; {expected}")
        self.experts = len(numbers) if numbers else self.infos[self.members[0].weight].shape[0]
        for router in ROUTERS:
            info = self.infos.get(self.block + router)
            if info is not None and len(info.shape) == 2 and info.shape[0] != self.experts:
                self.done.problems.append(
                    f"{info.name}: routes to {info.shape[0]} experts, and there are {self.experts}; expected as many"
                )

    def _check_alike(self, side: Sequence[_Member]) -> None:
        """Only tensors of one kind make a stack: the most frequent one is what the others are held against."""
        kinds = [self._kind(member) for member in side]
        usual = Counter(kinds).most_common(1)[0][0] if kinds else ""
        for member, kind in zip(side, kinds, strict=True):
            if kind != usual:
                self.done.problems.append(f"{member.weight}: is {kind}; expected {usual}, as the other experts'")
            elif member.pair and len(self.by_scale[member.pair.scale]) > 1:
                self.done.problems.append(f"{member.pair.scale}: belongs to several weights; expected one for each")

    def _kind(self, member: _Member) -> str:
        info, pair = self.infos[member.weight], member.pair
        dimensions = 3 if self.names.stacked else 2
        if len(info.shape) != dimensions:
            self.done.problems.append(
                f"{member.weight}: has shape {list(info.shape)}; expected {dimensions} dimensions"
            )
        text = f"{info.dtype} {list(info.shape)}"
        if pair is not None:
            scale = self.infos[pair.scale]
            text += f" with a scale per {pair.granularity}, {scale.dtype} {list(scale.shape)} ({pair.convention})"
        return text

    def _transposed(self, gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
        """Do the weights lie out before in, so that they are to be transposed? The two shapes leave no choice."""
        halves = 2 if self.names.stacked else 1
        rows, columns = gate_up[-2:]
        if self.names.stacked:
            inputs_first = are_inputs_first(gate_up, down)
            if inputs_first is not None:
                return not inputs_first
        elif down == (columns, rows):
            return True
        expected = [*gate_up[:-2], columns, rows // halves]
        self._problem(f"{self.names.parts[-1]}: has shape {list(down)}; expected {expected} beside {list(gate_up)}")
        return None

    def _place(self, side: Sequence[_Member], name: str, transposed: bool) -> None:
        """Where the tensors of one fused weight and its scale go."""
        done, info, pair = self.done, self.infos[side[0].weight], side[0].pair
        if not transposed:
            done.renamed[side[0].weight] = Fused(f"{name}.weight", info.dtype, info.shape)
            if pair is not None:
                done.renamed[pair.scale] = Fused(f"{name}.scale", "float32", self._stacked_scale(pair, info))
            return
        rows, columns = info.shape[-2:]
        parts = len({m.part for m in side})  # gate and up lie side by side, if they are not so on disk
        fused = (self.experts, columns, parts * rows)
        done.tensors[f"{name}.weight"] = Fused(f"{name}.weight", info.dtype, fused)
        for member in side:
            column = member.part * rows if parts > 1 else 0
            done.places[member.weight] = Place(f"{name}.weight", member.expert, column)
        if pair is None:
            return
        unit = self._unit(pair, info, side[0].part)
        if unit is None:
            return
        shape = (self.experts, columns // unit[0], parts * rows // unit[1])
        done.tensors[f"{name}.scale"] = Fused(f"{name}.scale", "float32", shape)
        for member in side:
            if member.pair is not None:
                column = done.places[member.weight].column // unit[1]
                done.places[member.pair.scale] = Place(f"{name}.scale", member.expert, column)

    def _unit(self, pair: Pair, info: TensorInfo, part: int) -> tuple[int, int] | None:
        """(inputs, outputs) that one value of the fused scale covers."""
        covers = pair.granularity
        if covers.kind in ("tensor", "row") or (covers.kind == "block" and self.layout == "per_channel"):
            return max(1, info.shape[-1]), 1
        if covers.kind != "block" or covers.block is None:
            self._not_covered(pair)
            return None
        height, width = covers.block
        halves = 2 if self.names.stacked and part == 0 else 1  # up begins in the middle
        if self._whole_blocks(pair, info.shape[-2] // halves, info.shape[-1]):
            return width, height
        return None

    def _stacked_scale(self, pair: Pair, info: TensorInfo) -> tuple[int, ...]:
        """The shape of the scale of a stack that lies input before output: one value an output, or the blocks."""
        covers, scale = pair.granularity, self.infos[pair.scale].shape
        experts, inputs, outputs = info.shape
        told = (
            pair.transposed and scale[:1] == (experts,) and covers.kind == "unknown"
        )  # square, but for its convention
        if not inputs and experts and outputs:
            self.done.problems.append(f"{pair.weight}: has shape {list(info.shape)}, rows without values")
            return scale
        if covers.kind in ("tensor", "column") or (told and sorted(scale[1:]) in ([outputs], [1, outputs])):
            return experts, 1, outputs
        if covers.kind != "block" or covers.block is None:
            self._not_covered(pair)
        elif self.layout == "per_channel":
            return experts, 1, outputs
        else:
            halves = 2 if self.names.parts[0] == pair.module.rpartition(".")[2] else 1
            self._whole_blocks(pair, inputs, outputs // halves)
        return scale

    def _whole_blocks(self, pair: Pair, rows: int, columns: int) -> bool:
        assert pair.granularity.block is not None
        height, width = pair.granularity.block
        if rows % height == 0 and columns % width == 0:
            return True
        self.done.problems.append(
            f"{pair.weight}: {rows}x{columns} is not a multiple of its blocks of {height}x{width}, so they cannot be "
            'kept side by side; layout="per_channel" gives one scale a row'
        )
        return False

    def _not_covered(self, pair: Pair) -> None:
        covers = pair.granularity
        what = unknown(pair, self.infos) if covers.kind == "unknown" else f"has one scale per {covers}"
        self.done.problems.append(f"{pair.weight}: {what}; expected one a tensor, an output or a block")

    def _problem(self, text: str) -> None:
        self.done.problems.append(f"{self.block}{self.names.within}.{text}")
