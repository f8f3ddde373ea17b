"""What may pass and what scales become: the same for every driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..codes.formats import Table
from ..codes.kernel import Counts, translate
from ..codes.scales import check_scale, rescaled
from ..errors import ScaleError, WeightError, listing
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
    problems: list[str] = []
    for step in recipe.steps.values():
        if step.role not in ("scale", "activation scale") or step.name not in tensors:
            continue
        where = recipe.plan.where(step.name)
        try:
            if recipe.what.nan == "error":
                check_scale(tensors[step.name], where)
            if step.action == "scale" and verdict.applies(step):
                new[step.name] = rescaled(tensors[step.name], recipe.table, where, reciprocal=step.reciprocal)
        except ScaleError as error:
            problems.append(str(error))
    if problems:
        raise ScaleError(f"cannot rescale {listing('scale', problems)}")
    return new


def laid_out_overflow(recipe: Recipe, counts: Mapping[str, Counts]) -> bool:
    """Does any weight that is requantized or dequantized not fit +-240? Activation scales hang on that, too."""
    seen = [counts[s.name] for s in recipe.scaled_weights if s.action != "translate" and s.name in counts]
    return any(recipe.what.always or c.above for c in seen)
