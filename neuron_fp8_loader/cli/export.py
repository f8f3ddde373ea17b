"""``neuron-fp8 export``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ..host.units import size
from .console import (
    Command,
    checkpoint_argument,
    console,
    echo,
    facts,
    json_option,
    load_options,
    print_json,
    say,
    shell,
    threads_option,
)

if TYPE_CHECKING:
    from ..tools.export import Export


@click.command(cls=Command)
@checkpoint_argument
@click.argument("out", type=click.Path())
@click.option("--dry-run", is_flag=True, help="Only say what would be written, and how much disk it takes.")
@load_options
@threads_option
@json_option
def export(ckpt: str, out: str, dry_run: bool, threads: int | None, as_json: bool, stack: str, **load: Any) -> None:
    """Write a converted copy of CKPT to OUT, for those who need one.

    The copy is what the stack's layers take: --for nxd, one scale a row or a tensor beside each weight, named
    X.weight_scale; --for vllm-neuron, bfloat16. Its config.json says so. --layout keep leaves names and shapes as they
    are. Same shards, configs and index carried over, in bounded memory. Every file is written beside and
    renamed, the index last; run the same command again to resume. OUT must be new, empty, or an export of the same.

    \b
    Example:
      neuron-fp8 export ./Llama-3.1-8B-FP8 ./Llama-3.1-8B-FP8-neuron
    """
    from ..tools.export import prepare_export

    made = prepare_export(ckpt, out, stack=stack, threads=threads, **load)
    finished, resumed = made.finished, len(made.done)
    if not as_json:
        _announce(made, finished)
    if not dry_run:
        made.run()
    if as_json:
        print_json("export", as_data(ckpt, made, dry_run=dry_run, resumed=resumed, already=finished))
    elif not dry_run and not finished:
        _conclude(made, ckpt, out, load)


def _conclude(made: Export, ckpt: str, out: str, load: Mapping[str, Any]) -> None:
    """What was done, and what to do with it."""
    done = [(made.rescaled, f"rescaled ({made.options.method})")]
    for action, what in (("requantize", "requantized from blocks to rows"), ("dequantize", "dequantized to bfloat16")):
        done.append((sum(step.action == action for step in made.recipe.weights), what))
    (first, what), *rest = [entry for entry in done if entry[0]] or done[:1]
    more = "".join(f", {count} {also}" for count, also in rest)
    echo(f"done: {first} of {len(made.recipe.plan.fp8_weights)} FP8 weights {what}{more}")
    echo(f"check it: neuron-fp8 verify {shell(out)} --against {shell(ckpt)}")
    echo(_use(made, load))


def _use(made: Export, load: Mapping[str, Any]) -> str:
    from ..tools.settings import settings_for

    if made.form.free and made.stack == "nxd":
        settings = settings_for(made.out)
        values = {name: value for name, value in settings.neuron_config.items() if name != "fp8_rescale"}
        keywords = ", ".join(f"{name}={value!r}" for name, value in values.items())
        variables = " ".join(f"{name}={value}" for name, value in settings.environment.items())
        if settings.fp8:
            return f"use it, without this package:\n  export {variables}\n  NeuronConfig({keywords})"
    if made.form.free:
        return "use it, without this package, as any bfloat16 checkpoint"
    if load.get("layout") == "keep":
        return "use it as the original: names and shapes are the same, and the flag still brings them into the stack's"
    return "use it with fp8_rescale, as the original: without, NxD Inference leaves the scales of experts behind"


def _files(count: int) -> str:
    return f"{count} other file{'' if count == 1 else 's'}"


def as_data(ckpt: str, made: Export, *, dry_run: bool, resumed: int, already: bool) -> dict[str, Any]:
    """The JSON of the command."""
    return {
        "checkpoint": ckpt,
        "out": str(made.out),
        "for": made.stack or None,
        "free": made.form.free,
        "dry_run": dry_run,
        "finished": made.finished,
        "already_finished": already,
        "shards": [str(file.relative_to(made.base)) for file in made.checkpoint.files],
        "shards_resumed": resumed,
        "carried_over": [str(other) for other in made.others],
        "bytes": made.needed,
        "method": made.options.method,
        "fp8_weights": len(made.recipe.plan.pairs),
        "rescaled": made.rescaled if made.state else None,
    }


def _announce(made: Export, finished: bool) -> None:
    if finished:
        echo(f"{made.out}: is finished already")
        return
    shards = len(made.checkpoint.files)
    lines = [
        ("to write", f"{shards - len(made.done)} of {shards} shards and {_files(len(made.others))} to {made.out}"),
        ("disk", f"{size(made.needed)} needed, {size(made.free)} free"),
    ]
    if made.done:
        lines.append(("resuming", f"{len(made.done)} shards are there already"))
    say(console(), facts(lines))
