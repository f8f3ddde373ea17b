"""``python -m benchmarks.load``: seconds, GB/s and peak memory of loading a checkpoint."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from . import pagecache
from .apart import Run, run_apart
from .common import Size, console, in_units, interleaved, machine, machine_line, out_option, summarize, table, write
from .contenders import CONTENDERS, LAYOUT, OURS, REFERENCE, SCRIPT, Job
from .load_plot import draw
from .made import Made, convention_names, make

GROWING = (OURS, REFERENCE, "load_file, pread")


@contextmanager
def checkpoint(directory: Path | None, nbytes: int, **how: Any) -> Iterator[Made]:
    """A checkpoint that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="neuron-fp8-bench-", dir=directory) as path:
        yield make(Path(path) / "checkpoint", nbytes, **how)


def compare(made: Made, names: Sequence[str], state: str, repeats: int, threads: int | None) -> dict[str, list[Run]]:
    """Load ``made`` with each contender in turn, ``repeats`` times, page cache ``"warm"`` or ``"dropped"``."""

    def contender(name: str) -> Run:
        (pagecache.drop if state == "dropped" else pagecache.warm)(made.files)
        output = made.directory.parent / "written" if name == SCRIPT else None
        return run_apart(name, Job(made, threads, output))

    return interleaved({name: partial(contender, name) for name in names}, repeats)


def summary(made: Made, runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Of each contender times, speed against ``load_file + clone``, and memory against the size of the tensors."""
    reference = [run.seconds for run in runs[REFERENCE]] if REFERENCE in runs else None
    found = {}
    for name, done in runs.items():
        anonymous = [run.peak_anonymous for run in done if run.peak_anonymous is not None]
        found[name] = summarize([run.seconds for run in done], made.nbytes, reference) | {
            "cpu_s": statistics.median(run.cpu for run in done),
            "peak": max(run.peak for run in done),
            "peak_anonymous": max(anonymous) if anonymous else None,
            "peak_over_size": max(run.peak for run in done) / made.nbytes,
            "written": max(run.written for run in done),
        }
    return found


def add_versus_ours(results: dict[str, dict[str, Any]], runs: dict[str, list[Run]]) -> None:
    """How many times as long each contender takes, round by round."""
    for name, entry in results.items():
        pairs = zip(runs[name], runs[OURS], strict=True)
        entry["times_ours"] = statistics.median(theirs.seconds / own.seconds for theirs, own in pairs)


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, r in results.items():
        anonymous = "" if r["peak_anonymous"] is None else in_units(r["peak_anonymous"])
        rows.append(
            [
                name,
                f"{r['median_s']:.3f}",
                f"{r['min_s']:.3f}-{r['max_s']:.3f}",
                f"{r['gb_per_s']:.3f}",
                f"{r['cpu_s']:.3f}",
                f"{r['times_ours']:.2f}",
                in_units(r["peak"]),
                anonymous,
                f"{r['peak_over_size']:.2f}",
                in_units(r["written"]) if r["written"] else "-",
            ]
        )
    columns = (
        "",
        "median s",
        "range",
        "GB/s",
        "CPU s",
        "time / ours",
        "peak RSS",
        "anonymous",
        "RSS / size",
        "written",
    )
    table(title, columns, rows)


def _growth(directory: Path | None, sizes: Sequence[int], repeats: int, how: dict[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in GROWING if not CONTENDERS[name].missing]
    points = []
    for nbytes in sizes:
        with checkpoint(directory, nbytes, **how) as made:
            runs = compare(made, names, "warm", repeats, None)
            points.append({"nbytes": made.nbytes, "contenders": summary(made, runs)})
    return points


def _threads(made: Made, counts: Sequence[int], states: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    points = []
    for state in states:
        loads = {str(n): partial(compare, made, [OURS], state, 1, n) for n in counts}
        runs = {n: [done[OURS][0] for done in rounds] for n, rounds in interleaved(loads, repeats).items()}
        for count in counts:
            entry = summarize([run.seconds for run in runs[str(count)]], made.nbytes)
            points.append({"threads": count, "state": state, **entry})
    return points


@click.command(context_settings={"show_default": True})
@click.option("--size", type=Size(), default="1GiB", help="Bytes of FP8 weights in the checkpoint.")
@click.option("--shards", type=click.IntRange(1), default=1, help="Files that it is spread over.")
@click.option(
    "--convention", type=click.Choice(convention_names()), default="weight_scale", help="Names of the scales."
)
@click.option("--scale", type=click.Choice(["row", "tensor", "block"]), default="row", help="What one scale covers.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Rounds, page cache warm.")
@click.option(
    "--cold-repeats", type=click.IntRange(0), default=2, help="Rounds, page cache dropped; 0 leaves them out."
)
@click.option(
    "--script-size", type=Size(), default="128MiB", help="Checkpoint for the whole README script, which is slow."
)
@click.option("--script-repeats", type=click.IntRange(0), default=1, help="Rounds with it; 0 leaves it out.")
@click.option("--layout-size", type=Size(), default="512MiB", help="Checkpoint in blocks, for block -> row.")
@click.option("--threads", type=click.IntRange(1), default=None, help="Threads of this loader; default as installed.")
@click.option("--growth/--no-growth", default=True, help="Also measure how time grows with size and with threads.")
@click.option("--sizes", type=Size(), multiple=True, default=["256MiB", "512MiB", "1GiB"], help="For --growth.")
@click.option("--thread-counts", type=int, multiple=True, default=[1, 2, 4, 8, 16], help="For --growth.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="Where the checkpoint is made (and removed again); default: the system's temporary directory.",
)
@out_option  # fmt: skip
def main(
    size: int,
    shards: int,
    convention: str,
    scale: str,
    repeats: int,
    cold_repeats: int,
    script_size: int,
    script_repeats: int,
    layout_size: int,
    threads: int | None,
    growth: bool,
    sizes: Sequence[int],
    thread_counts: Sequence[int],
    directory: Path | None,
    out: Path,
) -> None:
    """Load a checkpoint, made on the fly, in every way there is; side by side, in turns, each in a fresh process.

    Contenders: this loader; its reader with nothing to translate; plain preadv into populated memory by as many
    threads, which is the least that a load takes with small pages; safetensors' load_file, with clone() so that every
    byte is read, and with its pread backend; runai-model-streamer where installed; the recipe of Neuron's README done
    in memory; and that README's whole script, files written included, on a smaller checkpoint because it is slow.
    Every result is checked, byte for byte, by checksums from ml_dtypes' arithmetic. load_file and the streamer leave
    the weights as they are: that is what reading alone costs. Then a checkpoint in blocks of 128 x 128, as it is and
    to one scale a row, which no checksum can know: all of its weights must fit, and one be what it was to 25 dB.

    "time / ours" is the median over rounds of the time against this loader's in the same round. "peak RSS" is how far
    the resident set grew, mapped pages of files included, which the system can take back; "anonymous" is without them.
    Needs disk for the largest --sizes, and memory for twice that.
    """
    how = {"shards": shards, "convention": convention, "scale": scale}
    states = ["warm"] + (["dropped"] if cold_repeats and pagecache.can_drop() else [])
    if cold_repeats and not pagecache.can_drop():
        console.print("[yellow]this system cannot drop a file from the page cache: warm only[/yellow]")
    for contender in CONTENDERS.values():
        if contender.missing:
            console.print(f"[dim]left out: {contender.name}: {contender.missing}[/dim]")
    names = [c.name for c in CONTENDERS.values() if not c.missing and c.name not in (SCRIPT, LAYOUT)]
    results: dict[str, Any] = {"left_out": {c.name: c.missing for c in CONTENDERS.values() if c.missing}}

    with checkpoint(directory, size, **how) as made:
        results["nbytes"] = made.nbytes
        for state in states:
            rounds = repeats if state == "warm" else cold_repeats
            # the recipe computes for seconds whatever the cache holds
            chosen = [n for n in names if state == "warm" or n != "README recipe in memory"]
            if state == "dropped":
                pagecache.drop(made.files)
                results["still_cached_after_drop"] = pagecache.cached(made.files)
            runs = compare(made, chosen, state, rounds, threads)
            results[state] = summary(made, runs)
            add_versus_ours(results[state], runs)
            title = f"{in_units(made.nbytes)}, {shards} shard(s), page cache {state}, {rounds} rounds"
            show(title, results[state])
        if growth:
            results["threads"] = _threads(made, thread_counts, states, max(1, min(repeats, 3)))
    with checkpoint(directory, layout_size, shards=shards, convention="weight_scale_inv", scale="block") as made:
        runs = compare(made, [OURS, LAYOUT], "warm", max(3, repeats) if repeats > 1 else 1, threads)
        results["layout"] = summary(made, runs)
        add_versus_ours(results["layout"], runs)
        show(f"{in_units(made.nbytes)} in blocks of 128 x 128, page cache warm", results["layout"])
    if script_repeats:
        with checkpoint(directory, script_size, **how) as made:
            runs = compare(made, [OURS, REFERENCE, SCRIPT], "warm", script_repeats, threads)
            results["script"] = summary(made, runs)
            add_versus_ours(results["script"], runs)
            show(f"{in_units(made.nbytes)}, with the whole README script, page cache warm", results["script"])
    if growth:
        results["growth"] = _growth(directory, sizes, max(1, min(repeats, 3)), how)
    settings = {
        "size": size, "script_size": script_size, "repeats": repeats, "cold_repeats": cold_repeats,
        "script_repeats": script_repeats, "layout_size": layout_size, "threads": threads, "sizes": list(sizes), **how,
    }  # fmt: skip
    path = write(out, "load", settings, results)
    draw(path)
    console.print(machine_line(machine()), style="dim")


if __name__ == "__main__":
    main()
