"""The scale shapes that the consumer's layers take: NxD's want one value a tensor, or one a row.

A layout turns the rescaled pairs of a checkpoint into such pairs; modules named by ``dequantize`` become bfloat16.
What will be done with each pair is decided from the headers alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from ..codes.dequantize import dequantize, scale_values
from ..codes.requantize import Error, Tile, requantize, tiles
from ..codes.scales import is_e8m0
from ..errors import PlanError, ScaleError, listing
from ..host.memory import allocate, shaped
from ..host.parallel import run
from ..host.sharing import identity
from ..options import Options
from .pairs import Pair, Plan

_TRANSPOSED = ("fused_weight_scale", "fused_scale", "fused_dot_scale")
"""Conventions of Llama 4, whose stacked experts are [experts, in, out]; elsewhere they are [experts, out, in]."""


@dataclass(frozen=True)
class Layout:
    """What the layout step does, by weight.

    Attributes:
        requantized: pairs that go from block scales to row scales.
        dequantized: pairs that become bfloat16, without a scale.
        reshaped: shapes that scales take, by scale name.
    """

    requantized: tuple[Pair, ...] = ()
    dequantized: tuple[Pair, ...] = ()
    reshaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def raw(self) -> set[str]:
        """Weights that this step needs as the checkpoint has them, not rescaled."""
        return {pair.weight for pair in (*self.requantized, *self.dequantized)}


def within(layout: Layout, names: Collection[str]) -> Layout:
    """The part of a layout that concerns these tensors."""
    return Layout(
        tuple(p for p in layout.requantized if p.weight in names),
        tuple(p for p in layout.dequantized if p.weight in names),
        {name: shape for name, shape in layout.reshaped.items() if name in names},
    )


def module_of(weight: str) -> str:
    """The module that a weight belongs to: its name without ``.weight`` and its like."""
    for suffix in (".weight._data", "._weight_qdata", ".weight"):
        if weight.endswith(suffix):
            return weight.removesuffix(suffix)
    return weight


def plan_layout(plan: Plan, options: Options) -> Layout:
    """Decide from the headers what becomes of each pair.

    Raises:
        PlanError: pairs whose scales the layout cannot take, all of them at once.
    """
    problems: list[str] = []
    requantized: list[Pair] = []
    dequantized: list[Pair] = []
    reshaped: dict[str, tuple[int, ...]] = {}
    unused = set(options.dequantize)
    for pair in plan.pairs:
        matching = [p for p in options.dequantize if fnmatchcase(module_of(pair.weight), p)]
        unused.difference_update(matching)
        if matching:
            dequantized.append(pair)
            kind, shape = pair.granularity.kind, plan.tensors[pair.weight].shape
            if kind == "unknown" or (kind != "tensor" and len(shape) not in (2, 3)):
                problems.append(f"{pair.weight}: cannot be dequantized; {_unknown(plan, pair)}")
            continue
        if options.layout == "keep":
            continue
        try:
            wanted = _shape(plan, pair, options.layout)
        except ValueError as error:
            problems.append(f"{pair.weight}: {error}")
            continue
        if wanted is None:
            requantized.append(pair)
        elif reshaped.setdefault(pair.scale, wanted) != wanted:
            problems.append(f"{pair.scale}: belongs to several weights, which would need it in different shapes")
    reshaped = {n: s for n, s in reshaped.items() if s != plan.tensors[n].shape or _is_bytes(plan.tensors[n].dtype)}
    problems += [f"dequantize={pattern!r} {_no_match(plan, pattern)}" for pattern in sorted(unused)]
    shared = [g for g in plan.groups if len(g) > 1 and any(p in requantized or p in dequantized for p in g)]
    problems += [f"{g[0].scale}: belongs to {len(g)} weights, which cannot be laid out apart" for g in shared]
    if plan.fnuz and options.layout != "keep":
        problems += [
            f'{name}: is float8_e4m3fnuz, whose scales are not laid out; layout="keep", and shape them yourself'
            for name in plan.fnuz
        ]
    if problems:
        raise PlanError(plan.source, problems)
    return Layout(tuple(requantized), tuple(dequantized), reshaped)


def _is_bytes(dtype: str) -> bool:
    return dtype in ("uint8", "float8_e8m0fnu")


def _unknown(plan: Plan, pair: Pair) -> str:
    weight, scale = plan.tensors[pair.weight].shape, plan.tensors[pair.scale].shape
    return f"which part of a weight of shape {list(weight)} a scale of shape {list(scale)} covers is not known"


def _no_match(plan: Plan, pattern: str) -> str:
    others = [name for name in (*plan.unscaled, *plan.fnuz) if fnmatchcase(module_of(name), pattern)]
    if not others:
        return "matches no FP8 module"
    return f'matches only FP8 weights without a scale (unscaled="dequantize") or float8_e4m3fnuz: {others[0]}'


def _shape(plan: Plan, pair: Pair, layout: str) -> tuple[int, ...] | None:
    """The shape that a pair's scale takes, None for block -> row. ValueError says why there is none."""
    weight, scale = plan.tensors[pair.weight].shape, plan.tensors[pair.scale].shape
    kind, experts = pair.granularity.kind, pair.granularity.experts
    if layout == "per_tensor":
        if kind == "tensor" and not experts:
            return (1,)
        raise ValueError(
            f'has one scale per {pair.granularity}; layout="per_tensor" would lose it, "per_channel" keeps more '
            '(quantization_type="per_channel_symmetric" in NxD Inference)'
        )
    if len(weight) == 2:
        if kind in ("tensor", "row"):
            return (weight[0], 1)
        if kind == "block":
            return None
    elif len(weight) == 3:
        transposed = pair.convention in _TRANSPOSED
        rows = (weight[0], 1, weight[2]) if transposed else (weight[0], weight[1], 1)
        # "unknown" where a stack of square matrices leaves it open: the convention tells
        # only what is one value a row for sure: a grid of blocks may have as many values by chance
        shapes = {rows, (weight[0], max(rows[1:]))}
        if transposed:
            shapes.add((weight[0], weight[2], 1))
        right = kind in (("column", "unknown") if transposed else ("row", "unknown"))
        if kind == "tensor" or (right and scale in shapes):
            return rows
        if kind == "block" and experts and not transposed:
            return None
    if kind == "unknown":
        raise ValueError(f'{_unknown(plan, pair)}; layout="keep" leaves it as it is')
    raise ValueError(
        f"a scale of shape {list(scale)} (per {pair.granularity}) for a weight of shape {list(weight)} cannot be laid "
        'out per row; dequantize=[...] with its module\'s name, or layout="keep"'
    )


def check_layout(layout: Layout, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ScaleError for block scales that cannot become row scales, before anything is written."""
    bad, torn = [], []
    for pair in layout.requantized:
        values = scale_values(tensors[pair.scale])
        # a row's largest value may be 448 times its scale, and its new scale must be a float32
        good = torch.isfinite(values) & (values >= 0) & (values < torch.finfo(torch.float32).max / 4)
        if not bool(good.all()):
            bad.append(f"{plan.where(pair.scale)}: {int((~good).sum())} of {values.numel()}")
    for pair, twin in _twins(layout, tensors).items():
        if (pair in layout.dequantized) != (twin in layout.dequantized):
            torn.append(f"{plan.where(pair.weight)}: is one tensor with {twin.weight}; dequantize both or neither")
        elif not torch.equal(scale_values(tensors[pair.scale]), scale_values(tensors[twin.scale])):
            torn.append(f"{plan.where(pair.scale)}: differs from {twin.scale}, but their weights are one tensor")
    if torn:
        raise ScaleError(f"weights that are one tensor and should become two, {listing('pair', torn)}")
    if bad:
        raise ScaleError(f"block scales that are negative, not finite or too large, {listing('tensor', bad)}")


def apply_layout(layout: Layout, tensors: dict[str, torch.Tensor], threads: int, *, inplace: bool) -> dict[str, Error]:
    """Carry a layout out.

    Args:
        layout: what to do. ``check_layout`` comes first.
        tensors: the rescaled tensors; those in ``layout.raw`` and their scales as the checkpoint has them. The dict
            is changed: new tensors take the place of old ones, scales of dequantized weights go.
        threads: how many work at once.
        inplace: write requantized codes into the weights themselves.

    Returns:
        what requantizing cost, by weight. Tensors tied together (the same memory under two names) are laid out once.
    """
    twins = _twins(layout, tensors)
    for pair in layout.dequantized:
        if pair not in twins:
            tensors[pair.weight] = dequantize(tensors[pair.weight], tensors[pair.scale], pair.granularity, threads)
    parts = [(p, tile) for p in layout.requantized if p not in twins for tile in _tiles(p, tensors, inplace)]
    done: list[tuple[str, Error]] = []

    def work(part: tuple[Pair, Tile]) -> None:
        pair, tile = part
        done.append((pair.weight, requantize(tile)))

    run(parts, work, threads)
    for pair, twin in twins.items():
        tensors[pair.weight], tensors[pair.scale] = tensors[twin.weight], tensors[twin.scale]
    for pair in layout.dequantized:
        del tensors[pair.scale]
    for name, shape in layout.reshaped.items():
        scale = tensors[name].detach()
        value = scale_values(scale).float() if is_e8m0(scale) else scale
        tensors[name] = _expanded(value, shape)
    errors: dict[str, Error] = {}
    for name, error in done:
        errors[name] = errors.get(name, Error()) + error
    errors.update((p.weight, errors[twin.weight]) for p, twin in twins.items() if twin.weight in errors)
    return errors


def _expanded(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if scale.numel() == math.prod(shape):
        return scale.reshape(shape).clone()
    # one value for all, or one an expert
    leading = scale.reshape(-1, *[1] * (len(shape) - 1)) if scale.numel() > 1 else scale.reshape([1] * len(shape))
    return leading.expand(shape).contiguous()


def _twins(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> dict[Pair, Pair]:
    """Pairs whose weight is the very tensor of an earlier pair, and that pair."""
    known: dict[object, Pair] = {}
    twins = {}
    for pair in (*layout.requantized, *layout.dequantized):
        weight = tensors[pair.weight]
        first = known.setdefault(identity(weight), pair) if weight.numel() else pair
        if first is not pair:
            twins[pair] = first
    return twins


def _tiles(pair: Pair, tensors: dict[str, torch.Tensor], inplace: bool) -> list[Tile]:
    """Cut a weight for requantizing, and put the tensors that will hold the result in their places."""
    weight, block = tensors[pair.weight], pair.granularity.block
    assert block is not None
    rows, columns = weight.shape[-2:]
    grid = (-1, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    scales = scale_values(tensors[pair.scale]).reshape(grid)
    row_scales = torch.empty(weight.shape[:-1], dtype=torch.float32, device="cpu")
    source = weight.contiguous().view(torch.uint8)
    target = source
    if not (inplace and weight.is_contiguous()):
        target = shaped(allocate(weight.numel()), torch.uint8, tuple(weight.shape))
        tensors[pair.weight] = target.view(weight.dtype)
    tensors[pair.scale] = row_scales.unsqueeze(-1)
    matrices = (t.view(-1, rows, columns) for t in (source, target))
    parts = zip(*matrices, scales, row_scales.view(-1, rows), strict=True)
    return [tile for src, dst, part, new in parts for tile in tiles(src, dst, part, new, block)]
