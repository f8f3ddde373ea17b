"""``neuron-fp8 verify``."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .console import (
    FINDING,
    Command,
    as_given,
    checkpoint_argument,
    console,
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

    from ..tools.compare import WeightCheck
    from ..tools.verification import Verification


@click.command(cls=Command)
@checkpoint_argument
@click.option("--against", metavar="ORIGINAL", help="CKPT is a converted copy; compare it with what it was made from.")
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, help="How many weights to list.")
@load_options
@threads_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    ckpt: str,
    against: str | None,
    top: int,
    threads: int | None,
    as_json: bool,
    stack: str,
    **load: Any,
) -> None:
    """Load CKPT into memory as the stack would and check every value; or check a converted copy.

    The arithmetic is not the loader's own: float64, and ml_dtypes' reading of the bytes. No code may be above 0x77,
    and every value must be what it was or what rounding to the nearest code makes of it. Memory: a few tensors.
    Exits with 1 if something is wrong, or if there are no FP8 weights to check. Needs the extra 'verify'.

    \b
    Examples:
      neuron-fp8 verify ./Llama-3.1-8B-FP8
      neuron-fp8 verify ./converted --against ./Llama-3.1-8B-FP8
    """
    from ..tools.against import compare_checkpoints
    from ..tools.verify import verify_checkpoint

    if against is None:
        result = verify_checkpoint(ckpt, stack=stack, threads=threads, **load)
    else:
        result = compare_checkpoints(ckpt, against, threads=threads)
    if as_json:
        print_json("verify", as_data(result))
    else:
        _show(console(), result, top, nothing_in(ckpt, stack) if not result.weights else "")
    if not _fine(result):
        ctx.exit(FINDING)


def nothing_in(ckpt: str, stack: str) -> str:
    """What a checkpoint without FP8 weights is, in words."""
    from ..checkpoint import open_checkpoint
    from ..plan import plan_for
    from ..tools.others import other_kind
    from ..tools.settings import config_in

    checkpoint = open_checkpoint(ckpt)
    return str(other_kind(plan_for(checkpoint), stack, config_in(checkpoint.directory).get("model_type")) or "")


def _fine(result: Verification) -> bool:
    return result.ok and bool(result.weights)


def as_data(result: Verification) -> dict[str, Any]:
    """The JSON of the command."""
    return {
        "checkpoint": result.source,
        "against": result.against or None,
        "for": result.stack or None,
        "ok": _fine(result),
        "values": result.numel,
        "changed": result.changed,
        "sqnr_db": result.sqnr_db,
        "factors": [{"factor": factor, "weights": count} for factor, count in result.factors.items()],
        "activation_factors": list(result.activation_factors) if result.activation_factors else None,
        "identical_tensors": result.identical,
        "problems": [as_given(text) for text in result.problems],
        "notes": result.notes,
        "weights": [{**asdict(weight), "sqnr_db": weight.sqnr_db} for weight in result.weights],
    }


def _show(out: Console, result: Verification, top: int, nothing: str) -> None:
    from ..tools.stacks import STACKS

    bad = [weight for weight in result.weights if weight.problem]
    count = len(result.weights)
    what = (
        f"{result.source} against {result.against}"
        if result.against
        else f"{result.source}, loaded for {STACKS[result.stack]}"
    )
    if nothing and result.ok:
        say(out, f"{what}: nothing to verify: no FP8 weights; {nothing}")
        return
    lines = [
        ("checked", f"{what}: {count} FP8 weights, {result.numel} values; {result.identical} other tensors"),
        ("factor", "; ".join(f"{_factor(f)}: {n} weights" for f, n in result.factors.items()) or "-"),
    ]
    if result.activation_factors:
        least, most = result.activation_factors
        lines.append(("activations", f"scales times {least:.5g}" + (f" to {most:.5g}" if most != least else "")))
    above = sum(weight.above for weight in result.weights)
    lines += [
        ("above 240", f"{above} codes"),
        ("changed", f"{result.changed} values ({percent(result.changed, result.numel)})"),
        ("off", f"{sum(w.off for w in result.weights)} values by more than one rounding"),
        ("SQNR", _db(result.sqnr_db) + _least(result.worst)),
    ]
    lines += [("note", text) for text in result.notes]
    lines += [("PROBLEM", as_given(one_line(text))) for text in result.problems]
    say(out, facts(lines))
    if bad and top:
        rows = [(weight.name, weight.problem) for weight in bad[:top]]
        heading = "weight" if len(bad) <= top else f"{top} of {len(bad)} weights"
        say(out, "", table([heading, "problem"], rows))
    if result.ok:
        rounding = "" if result.sqnr_db == math.inf else f", to one rounding ({_db(result.sqnr_db)} over all)"
        verdict = f"fine: every value is what it was{rounding}, and Neuron can read all of them"
    else:
        verdict = f"not fine: {len(bad)} of {count} weights, {len(result.problems)} other problems"
    say(out, "", verdict)


def _factor(factor: float | None) -> str:
    if factor is None:
        return "scales of another layout, or none"
    return f"scale x {factor:.6g}" + (" (448/240)" if math.isclose(factor, 448 / 240) else "")


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _least(worst: WeightCheck | None) -> str:
    if worst is None or worst.sqnr_db == math.inf:
        return ""
    return f"; least {_db(worst.sqnr_db)}, {worst.name}"
