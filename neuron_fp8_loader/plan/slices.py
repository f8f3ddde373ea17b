"""Slices: what a caller wants of each tensor, as regions; scales are cut as their weights are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from operator import index
from typing import Any

from ..errors import OptionError, listing
from .recipe import Recipe
from .region import Region, scale_region, whole

Cut = tuple[int, int, int]
"""(dim, start, stop): of dimension ``dim``, what lies from ``start`` up to ``stop``; all other dimensions whole."""

Slices = Mapping[str, Cut | None] | Callable[[str, tuple[int, ...]], Cut | None]
"""What ``load_state_dict(slices=...)`` takes.

Either a mapping, from a tensor's name or a shell pattern of names to a cut, or a function of a tensor's name and
shape. None leaves a tensor whole. In a mapping a name counts before patterns, and patterns count in their order.
"""


def regions(recipe: Recipe, slices: Slices) -> dict[str, Region]:
    """The region of every tensor that comes out, in the checkpoint's order.

    Args:
        recipe: what becomes of the whole checkpoint.
        slices: the cuts. The scale of an FP8 weight follows its weight: patterns pass it over, and a function is not
            asked for it.

    Raises:
        OptionError: cuts that cannot be made, names and patterns of nothing; all of them at once.
    """
    plan = recipe.plan
    problems: list[str] = []
    ask = _asking(recipe, slices, problems)
    found: dict[str, Region] = {}
    for name in recipe.steps:
        if name in plan.by_scale:
            continue
        shape = plan.tensors[name].shape
        found[name] = whole(shape)
        cut = ask(name, shape)
        if cut is None:
            continue
        try:
            found[name] = _region(cut, shape)
        except ValueError as error:
            problems.append(f"{name} {list(shape)}: {error}")
    for scale, pairs in plan.by_scale.items():
        if recipe.steps[scale].action == "drop":
            continue
        try:
            parts = {scale_region(recipe, pair, found[pair.weight]) for pair in pairs}
        except ValueError as error:
            weight = pairs[0].weight
            parts = {whole(recipe.steps[scale].shape)}
            if any(found[pair.weight] != whole(plan.tensors[pair.weight].shape) for pair in pairs):
                problems.append(f"{weight} {list(plan.tensors[weight].shape)}: {error}")
        if len(parts) > 1:
            names = ", ".join(pair.weight for pair in pairs)
            problems.append(f"{scale} {list(plan.tensors[scale].shape)}: is the scale of {names}; cut them alike")
        found[scale] = parts.pop()
    if problems:
        raise OptionError(f"{plan.source}: slices= cannot be taken, {listing('problem', problems)}")
    return {name: found[name] for name in recipe.steps if name in found}


def _asking(recipe: Recipe, slices: Slices, problems: list[str]) -> Callable[[str, tuple[int, ...]], Any]:
    """What to call for the cut of a tensor. A mapping's keys are all looked up here."""
    if not isinstance(slices, Mapping):
        if not callable(slices):
            raise OptionError(
                f"slices={slices!r}: expected a mapping of names or patterns to (dim, start, stop), or a function of "
                "name and shape that gives one, or None"
            )
        return slices
    plan = recipe.plan
    cuts: dict[str, Any] = {}
    for key, cut in slices.items():
        if key in plan.by_scale:
            weight = plan.by_scale[key][0].weight
            problems.append(f"{key} {list(plan.tensors[key].shape)}: is the scale of {weight}, and is cut with it")
        elif key in plan.tensors:
            cuts[key] = cut
    for key, cut in slices.items():
        if key in plan.tensors:
            continue
        matching = [name for name in plan.tensors if name not in plan.by_scale and fnmatchcase(name, str(key))]
        if not matching:
            problems.append(f"{key!r}: no tensor of that name, and none that it matches")
        for name in matching:
            cuts.setdefault(name, cut)
    return lambda name, shape: cuts.get(name)


def _region(cut: Any, shape: tuple[int, ...]) -> Region:
    try:
        dim, start, stop = (index(value) for value in cut)
    except (TypeError, ValueError):
        raise ValueError(f"{cut!r}: expected (dim, start, stop), three whole numbers; there are no steps") from None
    if not 0 <= dim < len(shape):
        raise ValueError(f"{cut!r}: dimension {dim} is not one of its {len(shape)}, which count from 0")
    if not 0 <= start < stop <= shape[dim]:
        why = "is empty" if start == stop else f"does not lie within 0:{shape[dim]}"
        raise ValueError(f"{cut!r}: {start}:{stop} of dimension {dim} {why}")
    region = list(whole(shape))
    region[dim] = (start, stop)
    return tuple(region)
