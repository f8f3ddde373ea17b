"""``neuron-fp8 inspect``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..host.units import size
from .console import (
    FINDING,
    Command,
    as_given,
    checkpoint_argument,
    console,
    echo,
    facts,
    json_option,
    load_options,
    one_line,
    percent,
    print_json,
    say,
    table,
    threads_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoint import Checkpoint
    from ..plan import Pair, Plan
    from ..tools.others import Other
    from ..tools.scan import Scan
    from ..tools.stacks import Aim


@click.command(cls=Command)
@checkpoint_argument
@click.option(
    "--headers-only",
    is_flag=True,
    help="Read no weights: at once, for any size; also of a repository on the Hub, without a download.",
)
@click.option(
    "--top", type=click.IntRange(min=0), default=10, show_default=True, help="How many of the worst to list."
)
@click.option("--plot", metavar="FILE", help="Draw where the overflow sits to FILE.png or FILE.html (extra 'plot').")
@load_options
@threads_option
@json_option
@click.pass_context
def inspect(
    ctx: click.Context,
    /,
    ckpt: str,
    headers_only: bool,
    top: int,
    plot: str | None,
    threads: int | None,
    as_json: bool,
    stack: str,
    experts_as: str | None,
    **load: Any,
) -> None:
    """What is in CKPT, what Neuron would read, and what the load that `neuron-fp8 config` prints would do.

    Exits with 1 if that load would be refused, or if CKPT is of a kind that the stack does not load. The options of a
    load tell which one is meant.

    \b
    Example:
      neuron-fp8 inspect ./Llama-3.1-8B-FP8 --plot overflow.html
    """
    from ..checkpoint import open_checkpoint
    from ..tools.others import other_kind
    from ..tools.scan import scan
    from ..tools.settings import config_in
    from ..tools.stacks import aim_for

    if plot:
        from ..tools.plot import check_plot

        check_plot(plot)
        if headers_only:
            raise click.UsageError("--plot needs the weights; leave out --headers-only")
    checkpoint = open_checkpoint(ckpt, headers_only=headers_only)
    aim = aim_for(checkpoint, stack, {**load, "threads": threads}, experts_as)
    plan = aim.recipe.plan
    other = other_kind(plan, stack, config_in(checkpoint.directory).get("model_type"))
    found = None if headers_only else scan(checkpoint, aim.recipe, aim.options, aim.refusals)
    if plot and found and found.weights:
        from ..tools.plot import write_plot

        write_plot(found, plot, aim.label)
    if as_json:
        print_json("inspect", as_data(ckpt, checkpoint, aim, other, found))
    else:
        _show(console(), ckpt, checkpoint, aim, other, found, top)
        if plot and found:
            echo(f"\nplot: {plot if found.weights else 'no FP8 weights, nothing to draw'}")
    if (found.refusals if found else aim.refusals) or (other and other.loads is False):
        ctx.exit(FINDING)


def as_data(ckpt: str, checkpoint: Checkpoint, aim: Aim, other: Other | None, found: Scan | None) -> dict[str, Any]:
    """The JSON of the command."""
    from ..tools.settings import nxd_layout

    plan = aim.recipe.plan
    quantization_type, layout = nxd_layout(plan, aim.experts)
    rescaled = frozenset(found.rescaled) if found else frozenset()
    data: dict[str, Any] = {
        "checkpoint": ckpt,
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "declared": plan.declared.method,
        "warnings": list(plan.warnings),
        "dtypes": _dtypes(checkpoint),
        "conventions": [
            {"convention": name, "granularity": granularity, "scale_dtype": dtype, "weights": count}
            for (name, granularity, dtype), count in _kinds(plan).items()
        ],
        "unscaled": list(plan.unscaled),
        "fnuz": list(plan.other_formats),
        "activation_scales": [a.name for a in plan.activation_scales],
        "untouched_fp8": list(plan.untouched_fp8),
        "unquantized": list(plan.unquantized),
        "other": None if other is None else asdict(other),
        "nxd": {"quantization_type": quantization_type, "layout": layout},
        "for": aim.stack,
        "refusals": [as_given(text) for text in (found.refusals if found else aim.refusals)],
        "pairs": [_pair(plan, pair, found, rescaled) for pair in plan.pairs],
        "codes": None,
        "load": None,
    }
    if found:
        before, after = found.histograms()
        data["codes"] = {
            "total": found.numel,
            "as_inf": found.as_inf,
            "as_nan": found.as_nan,
            "nan": found.nan,
            "weights": len(found.weights),
            "weights_above": len(found.worst()),
            "weights_that_fit": sum(not w.above for w in found.weights.values()),
            "histogram": before,
            "histogram_after": after,
        }
        data["load"] = {
            "method": found.recipe.what.method,
            "rescaled": len(found.rescaled),
            "requantized": len(found.requantized),
            "dequantized": len(found.dequantized),
            "layout": found.recipe.what.layout,
            "rounded_codes": found.rounded,
            "predicted_sqnr_db": found.sqnr_db,
            "least_sqnr_db": found.least[1] if found.least else None,
            "refusals": [as_given(text) for text in found.refusals],
        }
    return data


def _pair(plan: Plan, pair: Pair, found: Scan | None, rescaled: Collection[str]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "weight": pair.weight,
        "scale": pair.scale,
        "convention": pair.convention,
        "granularity": str(pair.granularity),
        "shape": list(plan.tensors[pair.weight].shape),
        "scale_shape": list(plan.tensors[pair.scale].shape),
        "scale_dtype": plan.tensors[pair.scale].dtype,
    }
    codes = found.weights.get(pair.weight) if found else None
    if codes and found:
        data |= {
            "codes": codes.numel,
            "as_inf": codes.as_inf,
            "as_nan": codes.as_nan,
            "nan": codes.nan,
            "rescaled": pair.weight in rescaled,
            "predicted_sqnr_db": found.predicted[pair.weight].sqnr if pair.weight in found.predicted else None,
        }
    return data


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for info in checkpoint.tensors.values():
        entry = found.setdefault(info.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _kinds(plan: Plan) -> dict[tuple[str, str, str], int]:
    kinds = Counter((p.convention, str(p.granularity), plan.tensors[p.scale].dtype) for p in plan.pairs)
    return dict(kinds.most_common())


def _show(
    out: Console, ckpt: str, checkpoint: Checkpoint, aim: Aim, other: Other | None, found: Scan | None, top: int
) -> None:
    plan = aim.recipe.plan
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    files = f"{len(checkpoint.files)} file{'' if len(checkpoint.files) == 1 else 's'}"
    lines = [
        ("checkpoint", f"{ckpt}: {len(checkpoint.tensors)} tensors, {size(total)}, {files}"),
        ("declared", f"{plan.declared.method} ({plan.declared.source})" if plan.declared.method else "nothing"),
        (
            "dtypes",
            ", ".join(f"{d} {size(n['bytes'])} ({n['tensors']})" for d, n in _dtypes(checkpoint).items()),
        ),
    ]
    for (name, granularity, dtype), count in _kinds(plan).items():
        lines.append(("pairs", f"{count} FP8 weights with {name}, {dtype} per {granularity}"))
    for names, what in (
        (plan.unscaled, "FP8 weights without a scale"),
        (plan.other_formats, "weights of another FP8 format, converted by a table of their own"),
        (plan.untouched_fp8, "e4m3fn tensors that are no weights, left alone"),
        (plan.activation_scales, "static activation and KV scales"),
    ):
        if names:
            lines.append(("also", f"{len(names)} {what}"))
    if other is not None:
        lines += [("FP8", "no FP8 weights"), ("what it is", str(other))]
    if plan.unquantized:
        lines.append(("unquantized", _some(list(plan.unquantized))))
    lines += _aim(aim)
    if found is None:
        lines += [("refused", as_given(one_line(text))) for text in aim.refusals]
    lines += [("warning", text) for text in plan.warnings]
    say(out, facts(lines))
    if found and found.weights:
        _show_codes(out, found, top)
        say(out, "", f"A load for {aim.label} would", facts(_load(found)))


def _aim(aim: Aim) -> list[tuple[str, str]]:
    """What the stack takes, in words."""
    from ..tools.settings import nxd_layout

    plan = aim.recipe.plan
    if aim.design is not None:
        return [("for vLLM", str(aim.design))]
    if not plan.pairs:
        return []
    return [("for NxD", ": ".join(nxd_layout(plan, aim.experts)))]


def _show_codes(out: Console, found: Scan, top: int) -> None:
    above, worst = found.as_inf + found.as_nan, found.worst()
    weights = len(found.weights)
    lines = [
        ("as inf", f"{found.as_inf} codes ({percent(found.as_inf, found.numel)}): 256 to a GPU"),
        ("as nan", f"{found.as_nan} codes ({percent(found.as_nan, found.numel)}): 288 to 448 to a GPU"),
        ("together", f"{above} of {found.numel} codes, in {len(worst)} of {weights} weights"),
        ("NaN codes", f"{found.nan}{' (to a GPU too: the checkpoint is damaged)' if found.nan else ''}"),
        ("fit already", f"{weights - len(worst)} weights"),
    ]
    say(out, "", "Neuron (trn1, inf2, trn2) would read", facts(lines))
    if worst and top:
        modules = {pair.weight: pair.module for pair in found.plan.pairs}
        rows = [
            (modules.get(w.name, w.name), str(w.above), percent(w.above, w.numel), str(w.as_inf), str(w.as_nan))
            for w in worst[:top]
        ]
        heading = "worst modules" if len(worst) <= top else f"worst {top} of {len(worst)} modules"
        say(out, "", table([heading, ">above 240", ">share", ">inf", ">nan"], rows))


def _load(found: Scan) -> list[tuple[str, str]]:
    """What the load would do."""
    if found.refusals:
        return [("refuse", as_given(one_line(text))) for text in found.refusals]
    weights, rescaled = len(found.weights), len(found.rescaled)
    lines = []
    if rescaled:
        lossy = sum(found.weights[name].counts.lossy for name in found.rescaled)
        share = percent(lossy, sum(found.weights[name].numel for name in found.rescaled))
        done = (
            f"{rescaled} of {weights} weights ({found.recipe.what.method}); {lossy} codes would be rounded ({share})"
        )
        lines.append(("rescale", done))
    if found.requantized:
        count = sum(found.weights[name].numel for name in found.requantized)
        what = f"{len(found.requantized)} of {weights} weights from block scales to row scales"
        lines.append(("requantize", f"{what}; at most {count} codes would be rounded once more"))
    if found.dequantized:
        lines.append(("dequantize", f"{len(found.dequantized)} of {weights} weights, to bfloat16"))
    if not lines:
        return [("rescale", "nothing: all fits already")]
    activations = found.plan.activation_scales
    if (
        activations
        and len(found.dequantized) < weights
        and found.verdict.any
        and found.recipe.what.activation_scales == "rescale"
    ):
        lines.append(("", f"{len(activations)} static activation and KV scales with them"))
    return [*lines, ("predicted", _predicted(found))]


def _predicted(found: Scan) -> str:
    if not math.isfinite(found.sqnr_db):
        return "no loss: every value stays what it is"
    least = found.least
    worst = f"; least {least[1]:.1f} dB, {least[0]}" if least else ""
    return f"SQNR {found.sqnr_db:.1f} dB{worst} (measure it: neuron-fp8 verify)"


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} module{'' if len(names) == 1 else 's'}: {', '.join(names[:most])}{more}"
