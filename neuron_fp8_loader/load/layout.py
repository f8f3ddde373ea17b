"""Carries a layout out: block scales to row scales, weights to bfloat16, scales into the shapes of their layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from ..codes.dequantize import dequantize, scale_values, values
from ..codes.kernel import place
from ..codes.requantize import Fidelity, requantize, tiles
from ..errors import ScaleError, listing
from ..host.collector import uncollected
from ..host.grain import copied, count, mapped
from ..host.memory import allocate, shaped
from ..host.parallel import run
from ..host.sharing import identity, once_each
from ..plan import Pair, Recipe, Step

Tensors = Mapping[str, torch.Tensor]

# a row's largest value may be 448 times its scale, and its new scale must be a float32
_LIMIT = torch.finfo(torch.float32).max / 4


def check_layout(recipe: Recipe, tensors: Tensors) -> None:
    """Raise ScaleError for block scales that cannot become row scales, before anything is written."""
    bad, torn = [], []
    where = recipe.plan.where
    for pair in _pairs(recipe, "requantize"):
        scales = scale_values(tensors[pair.scale])
        wrong = count(lambda part: ~((part >= 0) & (part < _LIMIT)), scales)
        if wrong:
            bad.append(f"{where(pair.scale)}: {wrong} of {scales.numel()}")
    for pair, twin in _twins(recipe, tensors).items():
        if recipe.steps[pair.weight].action != recipe.steps[twin.weight].action:
            torn.append(f"{where(pair.weight)}: is one tensor with {twin.weight}; dequantize both or neither")
        elif not torch.equal(scale_values(tensors[pair.scale]), scale_values(tensors[twin.scale])):
            torn.append(f"{where(pair.scale)}: differs from {twin.scale}, but their weights are one tensor")
    if torn:
        raise ScaleError(f"weights that are one tensor and should become two, {listing('pair', torn)}")
    if bad:
        raise ScaleError(f"block scales that are negative, not finite or too large, {listing('tensor', bad)}")


@dataclass
class Prepared:
    """A layout with all its memory at hand, of which only ``carry_out`` writes into tensors that were given.

    Attributes:
        made: the tensors that take the place of others, by name. Requantized ones are filled by ``carry_out``.
        fidelity: what requantizing cost, by weight, once carried out.
    """

    made: dict[str, torch.Tensor] = field(default_factory=dict)
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    parts: list[tuple[str, Callable[[], Fidelity]]] = field(default_factory=list)
    twins: dict[Pair, Pair] = field(default_factory=dict)

    def carry_out(self, threads: int) -> dict[str, torch.Tensor]:
        """Requantize; gives ``made``. Tensors tied together (one tensor under two names) are laid out once."""
        done: list[tuple[str, Fidelity]] = []

        def work(part: tuple[str, Callable[[], Fidelity]]) -> None:
            name, carry = part
            done.append((name, carry()))

        run(self.parts, work, threads)
        for name, cost in done:
            self.fidelity[name] = self.fidelity.get(name, Fidelity()) + cost
        for pair, twin in self.twins.items():
            if twin.weight in self.fidelity:
                self.fidelity[pair.weight] = self.fidelity[twin.weight]
        return self.made


def prepare_layout(
    recipe: Recipe, tensors: Tensors, scales: Tensors, threads: int, *, inplace: bool = False
) -> Prepared:
    """Do all of a layout that writes into none of ``tensors``. ``check_layout`` comes first.

    Args:
        recipe: what to do; a weight and its scale must both be in it where they are laid out.
        tensors: as the checkpoint has them. Weights that are translated may be translated already.
        scales: the scales that were rescaled.
        threads: how many work at once.
        inplace: requantized codes will be written into the weights themselves.
    """
    twins = _twins(recipe, tensors)
    done = Prepared(twins=twins)
    for pair in _pairs(recipe, "dequantize"):
        if pair not in twins:
            scale = tensors[pair.scale]
            done.made[pair.weight] = dequantize(tensors[pair.weight], scale, pair.granularity, threads)
    done.made |= _without_scale(recipe, tensors)
    with uncollected():
        for pair in _pairs(recipe, "requantize"):
            if pair not in twins:
                done.parts += [(pair.weight, part) for part in _parts(pair, tensors, done.made, inplace)]
    for pair, twin in twins.items():
        for name, other in ((pair.weight, twin.weight), (pair.scale, twin.scale)):
            if other in done.made:
                done.made[name] = done.made[other]
            elif inplace and name == pair.weight:
                done.made[name] = tensors[other]
    for step in recipe.doing("scale", role="scale"):
        if step.name in tensors and _reshaped(step, tensors[step.name]):
            scale = scales.get(step.name, tensors[step.name]).detach()
            value = as_float32(scale, recipe.plan.where(step.name)) if step.dtype == "float32" else scale
            done.made[step.name] = _expanded(value, step.shape)
    return done


def _pairs(recipe: Recipe, action: str) -> Iterator[Pair]:
    return (s.pair for s in recipe.weights if s.action == action and s.pair is not None)


def _without_scale(recipe: Recipe, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Weights that have no scale, as bfloat16, which holds every e4m3fn value exactly."""
    names = [s.name for s in recipe.weights if s.action == "dequantize" and s.pair is None]
    return once_each(tensors, names, values)


def as_float32(scale: torch.Tensor, where: str) -> torch.Tensor:
    """A scale of any dtype as float32. Raises ScaleError where a float64 one has no such value."""
    if scale.dtype == torch.float32:
        return scale
    exact = scale_values(scale)

    def lost(part: torch.Tensor) -> torch.Tensor:
        rounded = part.float()
        return (rounded.isfinite() != part.isfinite()) | ((rounded == 0) & (part != 0))

    if count(lost, exact):
        raise ScaleError(
            f"{where}: holds values that float32 does not have; a scale this large or small is not plausible"
        )
    return mapped(torch.Tensor.float, exact, torch.float32)


def _reshaped(step: Step, tensor: torch.Tensor) -> bool:
    return tuple(tensor.shape) != step.shape or str(tensor.dtype) != f"torch.{step.dtype}"


def _expanded(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if scale.numel() == math.prod(shape):
        return copied(scale.reshape(shape))
    # one value for all, or one an expert
    leading = scale.reshape(-1, *[1] * (len(shape) - 1)) if scale.numel() > 1 else scale.reshape([1] * len(shape))
    return copied(leading.expand(shape))


def _twins(recipe: Recipe, tensors: Tensors) -> dict[Pair, Pair]:
    """Pairs whose weight is the very tensor of an earlier pair, and that pair."""
    known: dict[object, Pair] = {}
    twins = {}
    for pair in (*_pairs(recipe, "requantize"), *_pairs(recipe, "dequantize")):
        if pair.weight not in tensors:  # where scales alone are checked
            continue
        weight = tensors[pair.weight]
        first = known.setdefault(identity(weight), pair) if weight.numel() else pair
        if first is not pair:
            twins[pair] = first
    return twins


def _parts(pair: Pair, tensors: Tensors, made: dict[str, torch.Tensor], inplace: bool) -> list[Callable[[], Fidelity]]:
    """Cut a weight for requantizing, and put the tensors that will hold the result into ``made``."""
    weight, block = tensors[pair.weight], pair.granularity.block
    assert block is not None
    rows, columns = pair.granularity.apart(tuple(weight.shape))[1][-2:]
    grid = (-1, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    scales = scale_values(tensors[pair.scale]).reshape(grid)
    turned = pair.transposed and weight.dim() == 3  # its rows are columns
    outputs = (len(weight), columns) if turned else weight.shape[:-1]
    row_scales = torch.empty(outputs, dtype=torch.float32, device="cpu")
    source = weight.contiguous().view(torch.uint8)
    target = source
    if not (inplace and weight.is_contiguous()):
        target = shaped(allocate(weight.numel()), torch.uint8, tuple(weight.shape))
        made[pair.weight] = target.view(weight.dtype)
    made[pair.scale] = row_scales.unsqueeze(1 if turned else -1)
    matrices = (t.view(-1, rows, columns) for t in (source, target))
    parts = zip(*matrices, scales, row_scales.view(-1, columns if turned else rows), strict=True)
    if turned:
        return [partial(_turned, src, dst, part, new, block) for src, dst, part, new in parts]
    return [partial(requantize, tile) for src, dst, part, new in parts for tile in tiles(src, dst, part, new, block)]


def _turned(
    src: torch.Tensor, dst: torch.Tensor, scales: torch.Tensor, row_scales: torch.Tensor, block: tuple[int, int]
) -> Fidelity:
    """Requantize a matrix [in, out] to one scale an output, by way of a copy that lies as others do."""
    rows, columns = src.shape
    codes = shaped(allocate(src.numel()), torch.uint8, (columns, rows))
    place(src, codes)
    cost = Fidelity()
    for tile in tiles(codes, codes, scales.T.contiguous(), row_scales, (block[1], block[0])):
        cost += requantize(tile)
    place(codes, dst)
    return cost
