"""Queries, keys and values in one tensor, as a decision: how they lie in it, and what comes out where they are split.

The numbers in config.json say how they would lie; a checkpoint is believed only if the shapes of all its weights and
scales agree, and at least one weight is such that another layout would have another shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checkpoint import TensorInfo
from ..checkpoint.declared import Declared
from ..conventions import module_of
from ..conventions.qkv import FUSED, FusedQkv, Interleaved, family
from .plan import Pair, Plan

if TYPE_CHECKING:
    from .recipe import Step

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Piece:
    """What one part of an interleaved tensor becomes.

    Attributes:
        name: of the tensor.
        rows: (start, stop) in each chunk.
        chunk: rows of a chunk.
        shape: of the tensor.
    """

    name: str
    rows: tuple[int, int]
    chunk: int
    shape: tuple[int, ...]


_FUSED = re.compile(rf"^((model|language_model|mtp)\.)*layers\.\d+\.self_attn\.{FUSED}$")


def is_fused(name: str, info: TensorInfo) -> bool:
    """Is it the weight of a decoder's fused projection, by its name and shape?"""
    return FUSED in name and len(info.shape) == 2 and _FUSED.match(module_of(name)) is not None


def interleaved(
    tensors: Infos, pairs: Sequence[Pair], block: tuple[int, int] | None, settings: Mapping[str, Any]
) -> dict[str, Interleaved]:
    """How queries, keys and values lie in each fused weight.

    Args:
        tensors: all headers.
        pairs: FP8 weights and their scales.
        block: rows and columns of a scale block, as declared.
        settings: of config.json.

    Raises:
        ValueError: it is not known for sure; the text says why.
    """
    names = [name for name, info in tensors.items() if is_fused(name, info)]
    known = family(settings)
    if not names:
        return {}
    if known is None:
        raise ValueError("config.json is of no model whose fused qkv is known")
    scales = {pair.weight: tensors[pair.scale] for pair in pairs}
    found: dict[str, Interleaved] = {}
    telling = False
    for name in names:
        found[name] = layout = _layout(known, settings, tensors[name])
        scale = scales.get(name)
        if scale is None:
            continue
        if block is None:
            raise ValueError("no size of a block of scales is declared")
        height, width = block
        rows, columns = tensors[name].shape
        expected = (layout.chunks * -(-layout.chunk // height), -(-columns // width))
        if scale.shape != expected:
            raise ValueError(
                f"{scale.name} has shape {list(scale.shape)}; expected {list(expected)}, for {layout.chunks} chunks "
                f"of {layout.chunk} rows in blocks of {height}x{width}"
            )
        telling |= expected[0] != -(-rows // height)
    if not telling:
        raise ValueError("no weight has a scale whose shape would tell interleaved parts from others")
    return found


def _layout(known: FusedQkv, settings: Mapping[str, Any], info: TensorInfo) -> Interleaved:
    layout = known.of(settings, info.name)
    if layout.rows != info.shape[0]:
        parts = " + ".join(str(rows) for _, rows in layout.parts)
        raise ValueError(
            f"{info.name} has {info.shape[0]} rows; expected {layout.rows}, {layout.chunks} chunks of {parts}, from "
            "the numbers in config.json"
        )
    return layout


def with_chunks(pairs: Sequence[Pair], found: Mapping[str, Interleaved], block: tuple[int, int] | None) -> list[Pair]:
    """The pairs, with what is known now of the blocks of interleaved weights."""
    out = []
    for pair in pairs:
        layout = found.get(pair.weight)
        if layout is not None and block is not None and layout.chunk % block[0]:
            covers = replace(pair.granularity, kind="block", block=block, chunk=layout.chunk)
            pair = pair._replace(granularity=covers)
        out.append(pair)
    return out


def why_not(plan: Plan) -> str:
    """Why it is not known how queries, keys and values lie; for an error."""
    try:
        interleaved(plan.tensors, plan.pairs, plan.declared.block, dict(plan.declared.settings))
    except ValueError as error:
        return str(error)
    return "it was not planned with the whole checkpoint"


def pieces_of(layout: Interleaved, name: str, shape: Sequence[int]) -> tuple[Piece, ...]:
    """What a tensor whose first dimension is the rows of a fused weight is split into.

    Args:
        layout: of the weight.
        name: that the whole would come out with.
        shape: that the whole would have.
    """
    head, _, tail = name.rpartition(f"{FUSED}.")
    out, start = [], 0
    for part, rows in layout.parts:
        out.append(
            Piece(f"{head}{part}.{tail}", (start, start + rows), layout.chunk, (rows * layout.chunks, *shape[1:]))
        )
        start += rows
    return tuple(out)


def split(plan: Plan, steps: MutableMapping[str, Step], problems: list[str]) -> None:
    """Have fused weights, and their scales, come out as queries, keys and values: each row must have its own scale.

    Args:
        plan: of the checkpoint.
        steps: what becomes of each tensor; changed.
        problems: what cannot be split, one text each, is added.
    """
    for name, info in plan.tensors.items():
        if not is_fused(name, info):
            continue
        layout = plan.interleaved.get(name)
        if layout is None:
            problems.append(f'{name}: qkv="split", but {why_not(plan)}; qkv="keep" leaves it as it is')
            continue
        if f"{module_of(name)}.bias" in plan.tensors:
            problems.append(f'{name}: has a bias, of which it is not known how it lies; qkv="keep" leaves both as is')
        step = steps[name]
        for each in [step] if step.pair is None else [step, steps[step.pair.scale]]:
            if each.role == "scale" and each.action != "drop" and each.shape != (layout.rows, 1):
                problems.append(
                    f"{name}: its scales' blocks run across q, k and v, which cannot be split with them; "
                    'layout="per_channel" gives one scale a row, or dequantize it'
                )
            steps[each.name] = each._replace(pieces=pieces_of(layout, each.out, each.shape))


def unfused(plan: Plan) -> Plan:
    """The plan as if queries, keys and values were tensors of their own: for their names, not for their scales."""
    if not plan.interleaved:
        return plan
    lies = {**plan.interleaved}
    lies |= {pair.scale: lies[pair.weight] for pair in plan.pairs if pair.weight in lies}
    tensors: dict[str, TensorInfo] = {}
    for name, info in plan.tensors.items():
        pieces = pieces_of(lies[name], name, info.shape) if name in lies else ()
        tensors |= {piece.name: info._replace(name=piece.name, shape=piece.shape) for piece in pieces} or {name: info}
    pairs: list[Pair] = []
    for pair in plan.pairs:
        if pair.weight not in lies:
            pairs.append(pair)
            continue
        names = (pieces_of(lies[pair.weight], name, ()) for name in (pair.weight, pair.scale))
        for module, weight, scale in zip(parts_of(plan, pair.module), *names, strict=True):
            pairs.append(pair._replace(weight=weight.name, scale=scale.name, module=module))
    plain = tuple(part for module in plan.unquantized for part in parts_of(plan, module))
    return replace(plan, tensors=tensors, pairs=tuple(pairs), unquantized=plain, interleaved={})


def parts_of(plan: Plan, module: str) -> list[str]:
    """The modules that a module becomes in ``unfused``: queries, keys and values, or itself."""
    layout = plan.interleaved.get(f"{module}.weight")
    return [module] if layout is None else [module.removesuffix(FUSED) + part for part, _ in layout.parts]


def disagreement(declared: Declared, error: ValueError) -> list[str]:
    """What to warn of where config.json tells of a layout, and the tensors are not so."""
    known = family(dict(declared.settings))
    if known is None:
        return []
    return [f"config.json says {'='.join(known.says)}, but how q, k and v lie is not known: {error}"]
