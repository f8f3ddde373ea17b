"""What may pass, what changes, what is reported: the same for tensors read from files and for those in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ..codes import kernel
from ..codes.formats import Table
from ..codes.kernel import Counts, translate
from ..codes.scales import check_scale, rescaled
from ..errors import ScaleError, WeightError, listing
from ..host.parallel import pieces, run
from ..host.sharing import once_each
from ..options import Options
from ..plan.layout import Layout, apply_layout
from ..plan.pairs import Plan
from .report import Report, WeightReport

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


def check_weights(plan: Plan, counts: Mapping[str, Counts], options: Options) -> None:
    """Raise WeightError for NaN codes, and for unscaled weights that do not fit, unless the options let them pass."""
    if options.nan == "error":
        bad = [f"{plan.where(name)}: {seen.nan} NaN codes" for name, seen in counts.items() if seen.nan]
        if bad:
            raise WeightError(
                f"NaN codes in {listing('FP8 weight', bad)}\n"
                'The checkpoint is damaged or badly quantized; nan="keep" lets them through.'
            )
    if options.unscaled == "error":
        bad = [
            f"{plan.where(name)}: {counts[name].above} codes above 240"
            for name in plan.unscaled
            if name in counts and counts[name].above
        ]
        if bad:
            raise WeightError(
                f"no scale to make up for a rescale of {listing('float8_e4m3fn weight', bad)}\n"
                "Expected a tensor like X.weight_scale, X.weight_scale_inv or X.scale beside X.weight. "
                'unscaled="dequantize" returns them as bfloat16 (exact), unscaled="keep" as they are; a scale of '
                "another name: neuron_fp8_loader.conventions.register."
            )


def new_scales(
    plan: Plan, tensors: Tensors, convert: Collection[str], any_converted: bool, options: Options
) -> dict[str, torch.Tensor]:
    """The scales that change, with their new values.

    Args:
        plan, tensors: what there is; scales not among ``tensors`` are passed over.
        convert: names of the scales whose weights were rescaled.
        any_converted: was any weight of the checkpoint rescaled? Activation scales hang on that.

    Raises:
        ScaleError: a scale is not finite, or its new value does not exist in its dtype.
    """
    new: dict[str, torch.Tensor] = {}
    problems: list[str] = []

    def attempt(name: str, *, change: bool, reciprocal: bool = False) -> None:
        try:
            if options.nan == "error":
                check_scale(tensors[name], plan.where(name))
            if change:
                new[name] = rescaled(tensors[name], options.table, plan.where(name), reciprocal=reciprocal)
        except ScaleError as error:
            problems.append(str(error))

    for first, *_ in plan.groups:
        if first.scale in tensors:
            attempt(first.scale, change=first.scale in convert)
    if any_converted and options.activation_scales == "rescale":
        for activation in plan.activation_scales:
            if activation.name in tensors:
                attempt(activation.name, change=True, reciprocal=activation.reciprocal)
    if problems:
        raise ScaleError(f"cannot rescale {listing('scale', problems)}")
    return new


def dequantized(plan: Plan, tensors: Tensors, options: Options) -> dict[str, torch.Tensor]:
    """The unscaled weights as bfloat16, which holds every e4m3fn value exactly; none unless the options say so."""
    if options.unscaled != "dequantize":
        return {}
    return once_each(tensors, plan.unscaled, lambda t: t.to(torch.bfloat16))


def make_report(
    plan: Plan,
    options: Options,
    tensors: Tensors,
    counts: Mapping[str, Counts],
    convert: Collection[str],
    scales: Collection[str],
) -> Report:
    """A report without its seconds. ``convert`` names the rescaled weights, ``scales`` the scales that changed."""
    return Report(
        source=plan.source,
        method=options.method,
        tensors=len(tensors),
        nbytes=sum(plan.tensors[name].nbytes for name in tensors),
        weights=[
            WeightReport(name, plan.tensors[name].numel, seen, name in convert or name in plan.fnuz)
            for name, seen in counts.items()
        ],
        activation_scales=sum(a.name in scales for a in plan.activation_scales),
        dequantized=[name for name in plan.unscaled if name in tensors and options.unscaled == "dequantize"],
        kernel=kernel.active,
        threads=options.thread_count(),
    )


def laid_out_overflow(layout: Layout, counts: Mapping[str, Counts], options: Options) -> bool:
    """Does the layout step change a weight that the rescale would have changed? Activation scales hang on that."""
    seen = [counts[p.weight] for p in (*layout.requantized, *layout.dequantized) if p.weight in counts]
    return any(options.always or c.above for c in seen)


def finish_layout(layout: Layout, tensors: dict[str, Any], report: Report, *, inplace: bool) -> dict[str, Any]:
    """``tensors`` after the layout step, changed in place; the report learns what it cost."""
    errors = apply_layout(layout, tensors, report.threads, inplace=inplace)
    report.requantized = {name: error.sqnr for name, error in errors.items()}
    report.dequantized += [pair.weight for pair in layout.dequantized]
    return tensors
