"""What may pass and what scales become: the same for every driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..codes.formats import Table
from ..codes.kernel import Counts, translate
from ..codes.scales import check_floats, check_scale, rescaled
from ..errors import ScaleError, WeightError, listing
from ..host.grain import GRAIN
from ..host.parallel import pieces, run
from ..plan import Recipe, Step, Verdict

Tensors = Mapping[str, torch.Tensor]


def count_codes(flat: Tensors, tables: Mapping[str, Table], threads: int) -> dict[str, Counts]:
    """What each weight holds, by its own table; ``flat`` is the weights' bytes, uint8 [nbytes]. Nothing is written."""
    jobs = [(name, *part) for name, data in flat.items() for part in pieces(data.numel())]
    seen: list[tuple[str, Counts]] = []

    def work(job: tuple[str, int, int]) -> None:
        name, start, end = job
        seen.append((name, translate(flat[name][start:end], None, tables[name])))

    run(jobs, work, threads)
    return add_up(flat, seen)


def add_up(names: Iterable[str], seen: Iterable[tuple[str, Counts]]) -> dict[str, Counts]:
    """The counts of each name's pieces, together; a name without pieces has none."""
    counts = dict.fromkeys(names, Counts())
    for name, part in seen:
        counts[name] = counts[name] + part
    return counts


def check_weights(recipe: Recipe, counts: Mapping[str, Counts]) -> None:
    """Raise WeightError for NaN codes, and for unscaled weights that do not fit, unless the options let them pass."""
    plan, what = recipe.plan, recipe.what
    if what.nan == "error":
        bad = [f"{plan.where(name)}: {seen.nan} NaN codes" for name, seen in counts.items() if seen.nan]
        if bad:
            raise WeightError(
                f"NaN codes in {listing('FP8 weight', bad)}\n"
                'The checkpoint is damaged or badly quantized; nan="keep" lets them through.'
            )
    if what.unscaled == "error":
        bad = [
            f"{plan.where(name)}: {seen.above} codes above 240"
            for name, seen in counts.items()
            if seen.above and is_unscaled(recipe.steps[name])
        ]
        if bad:
            raise WeightError(
                f"no scale to make up for a rescale of {listing('float8_e4m3fn weight', bad)}\n"
                "Expected a tensor like X.weight_scale, X.weight_scale_inv or X.scale beside X.weight. "
                'unscaled="dequantize" returns them as bfloat16 (exact), unscaled="keep" as they are; a scale of '
                "another name: neuron_fp8_loader.conventions.register."
            )


def is_unscaled(step: Step) -> bool:
    """Is it an e4m3fn weight without a scale?"""
    return step.role == "weight" and step.pair is None and step.action != "translate"


def new_scales(recipe: Recipe, tensors: Tensors, verdict: Verdict) -> dict[str, torch.Tensor]:
    """The scales that change, with their new values in their own shapes.

    Args:
        recipe: what becomes of them.
        tensors: what there is; scales not among them are passed over.
        verdict: which weights are translated.

    Raises:
        ScaleError: a scale is not finite, or its new value does not exist in its dtype. All of them at once.
    """
    new: dict[str, torch.Tensor] = {}
    problems: dict[str, str] = {}
    batches: dict[object, list[Step]] = {}
    sizes: dict[object, int] = {}

    def settle(steps: list[Step]) -> None:
        """Together, and one by one where something is wrong with one of them."""
        if len(steps) > 1:
            try:
                new.update(_together(recipe, steps, tensors, verdict))
                return
            except ScaleError:
                pass
        for step in steps:
            try:
                made = _scale(recipe, step, tensors[step.name], verdict, recipe.plan.where(step.name))
            except ScaleError as error:
                problems[step.name] = str(error)
            else:
                new.update({} if made is None else {step.name: made})

    for step in recipe.steps.values():
        scale = tensors.get(step.name) if step.role in ("scale", "activation scale") else None
        if scale is None:
            continue
        count = scale.numel()
        if type(scale) is not torch.Tensor or scale.dtype not in _FLOATS or count > GRAIN // 8:
            settle([step])
            continue
        kind = (scale.dtype, step.action, step.action == "scale" and verdict.applies(step), step.reciprocal)
        if sizes.get(kind, 0) + count > GRAIN:
            settle(batches.pop(kind))
            sizes[kind] = 0
        batches.setdefault(kind, []).append(step)
        sizes[kind] = sizes.get(kind, 0) + count
    for steps in batches.values():
        settle(steps)
    if problems:
        in_order = [problems[name] for name in recipe.steps if name in problems]
        raise ScaleError(f"cannot rescale {listing('scale', in_order)}")
    return new


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _scale(recipe: Recipe, step: Step, scale: torch.Tensor, verdict: Verdict, where: str) -> torch.Tensor | None:
    """The new value of a scale, or None where it stays. Raises ScaleError as ``new_scales``."""
    if recipe.what.nan == "error":
        check_scale(scale, where)
        if step.action == "drop":
            check_floats(scale, where)
    if step.action == "scale" and verdict.applies(step):
        return rescaled(scale, recipe.table, where, reciprocal=step.reciprocal)
    return None


def _together(recipe: Recipe, steps: list[Step], tensors: Tensors, verdict: Verdict) -> dict[str, torch.Tensor]:
    """The new values of small scales of one kind, at the price of one: a checkpoint may have 50,000 of a number each.

    Raises:
        ScaleError: one of them, at least, is not as it should be.
    """
    given = [tensors[step.name] for step in steps]
    made = _scale(recipe, steps[0], torch.cat([s if s.dim() == 1 else s.reshape(-1) for s in given]), verdict, "")
    if made is None:
        return {}
    parts = made.split([scale.numel() for scale in given])
    # each in memory of its own, as whoever saves or frees them expects
    return {
        step.name: part.clone() if scale.dim() == 1 else part.view(scale.shape).clone()
        for step, part, scale in zip(steps, parts, given, strict=True)
    }


def laid_out_overflow(recipe: Recipe, counts: Mapping[str, Counts]) -> bool:
    """Does any weight that is requantized or dequantized not fit +-240? Activation scales hang on that, too."""
    seen = [counts[s.name] for s in recipe.scaled_weights if s.action != "translate" and s.name in counts]
    return any(recipe.what.always or c.above for c in seen)
