"""``python -m benchmarks.threads``: a load by 1 to 16 threads, and what Python's share of it means for many cores."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import click

from .common import Size, console, in_units, interleaved, machine, machine_line, out_option, table, write
from .contenders import LIMIT, OURS
from .load import checkpoint, compare
from .share import measure

HOST = 192  # cores of a trn2.48xlarge
HOST_THREADS = 32  # what a load takes there by default


def projection(cpu_s: float, nbytes: int, share: float) -> dict[str, float]:
    """What a host of many cores would ask for, if its cores were as fast as these, and what Python lets it have.

    Args:
        cpu_s: of a load by as many threads as there are cores here.
        nbytes: that it loads.
        share: microseconds a MiB that hold the GIL.

    Returns:
        GB/s: of one thread while it has a core to itself; of 32 of them; and the most that the GIL leaves.
    """
    one = nbytes / cpu_s / 1e9
    return {"one": one, "asked": HOST_THREADS * one, "cap": 2**20 / share / 1e3}


def summary(runs: Mapping[str, Sequence[Any]], nbytes: int) -> dict[str, float]:
    """Medians of rounds: seconds and CPU seconds of ours, and our time and CPU time against the limit's."""
    ours, limit = ([done[name][0] for done in runs[""]] for name in (OURS, LIMIT))
    pairs = list(zip(ours, limit, strict=True))
    return {
        "median_s": statistics.median(run.seconds for run in ours),
        "gb_per_s": nbytes / statistics.median(run.seconds for run in ours) / 1e9,
        "cpu_s": statistics.median(run.cpu for run in ours),
        "limit": statistics.median(theirs.seconds / own.seconds for own, theirs in pairs),
        "cpu_limit": statistics.median(own.cpu / theirs.cpu for own, theirs in pairs),
    }


@click.command(context_settings={"show_default": True})
@click.option("--size", type=Size(), default="1GiB", help="Bytes of FP8 weights.")
@click.option("--repeats", type=click.IntRange(1), default=5, help="Rounds.")
@click.option("--thread-counts", type=int, multiple=True, default=[1, 2, 4, 8, 16], help="Each a row.")
@out_option
def main(size: int, repeats: int, thread_counts: Sequence[int], out: Any) -> None:
    """Load a checkpoint by 1, 2, 4, 8 and 16 threads, each in a fresh process, page cache warm, beside plain preadv by
    as many threads (the limit). More threads than cores should cost nothing: their CPU seconds tell.

    Then the arithmetic for a host of 192 cores: what its 32 threads would ask for, at the speed of one thread here,
    and what is left by what holds the GIL (`python -m benchmarks.share`).
    """
    results: dict[str, Any] = {"threads": {}}
    with checkpoint(None, size) as made:
        loads = {str(n): partial(compare, made, [OURS, LIMIT], "warm", 1, n) for n in thread_counts}
        for count, done in interleaved(loads, repeats).items():
            results["threads"][count] = summary({"": done}, made.nbytes)
        results["share"] = measure(made.directory, thread_counts, repeats)
        cores = os.cpu_count() or 1
        nearest = min(results["threads"], key=lambda count: abs(int(count) - cores))
        cpu, share = results["threads"][nearest]["cpu_s"], max(results["share"].values())
        results["projection"] = projection(cpu, made.nbytes, share)
    rows = [
        [count, f"{r['median_s']:.2f}", f"{r['gb_per_s']:.2f}", f"{r['cpu_s']:.2f}", f"{r['limit']:.2f}",
         f"{r['cpu_limit']:.2f}", f"{results['share'][count]:.1f}"]
        for count, r in results["threads"].items()
    ]  # fmt: skip
    columns = ("threads", "s", "GB/s", "CPU s", "speed / limit", "CPU / limit", "Python, us a MiB")
    table(f"{in_units(size)}, page cache warm, {repeats} rounds", columns, rows)
    found = results["projection"]
    console.print(
        f"{HOST} cores: {HOST_THREADS} threads x {found['one']:.1f} GB/s = {found['asked']:.0f} GB/s asked for; "
        f"Python's share ends it at 1 MiB / {share:.1f} us = {found['cap']:.0f} GB/s"
    )
    write(out, "threads", {"size": size, "repeats": repeats}, results)
    console.print(machine_line(machine()), style="dim")


if __name__ == "__main__":
    main()
