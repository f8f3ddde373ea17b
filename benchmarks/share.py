"""``python -m benchmarks.share``: what Python does of a load, and where that ends it on many cores."""

from __future__ import annotations

import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click

from neuron_fp8_loader.checkpoint import Checkpoint, Decision, WeightJob, open_checkpoint, runs
from neuron_fp8_loader.codes.formats import HALF
from neuron_fp8_loader.codes.kernel import SEGMENT

from .common import Size, console, table
from .made import make


def free_read(
    handle: int,
    offset: int,
    done: int,
    piece: int,
    segments: array[int],
    tables: Any,
    cells: Any,
    direct: bool = False,
) -> tuple[int, int]:
    """In place of ``read_segments``: everything is done at once, and costs nothing."""
    return sum(segments[1::SEGMENT]), 0


def share(checkpoint: Checkpoint, threads: int, repeats: int) -> float:
    """CPU microseconds a MiB, the least of some loads, of all that holds the GIL: opening files, making tensors,
    cutting runs, calling native code and adding up what it counted."""
    infos = checkpoint.selected_tensors()
    weights = [info.name for info in infos if info.dtype == "float8_e4m3fn"]
    spent = []
    for _ in range(repeats):
        jobs = {name: WeightJob(HALF, Decision()) for name in weights}
        begin = time.process_time()
        checkpoint.source.read(infos, jobs, threads)
        spent.append(time.process_time() - begin)
    return min(spent) * 1e6 / (sum(info.nbytes for info in infos) / 2**20)


def measure(directory: Path, thread_counts: Sequence[int], repeats: int) -> dict[str, float]:
    """``share`` by number of threads."""
    checkpoint = open_checkpoint(directory)
    with mock.patch.object(runs, "read_segments", free_read):
        return {str(threads): share(checkpoint, threads, repeats) for threads in thread_counts}


@click.command(context_settings={"show_default": True})
@click.option("--size", type=Size(), default="1GiB", help="Bytes of FP8 weights.")
@click.option("--repeats", type=click.IntRange(1), default=7, help="Rounds.")
def main(size: int, repeats: int) -> None:
    """Load a checkpoint with native reads that cost nothing: what is left holds the GIL, and no two threads do it at
    once. So one second of it is all that a host of any size can pay in a second, which caps its speed."""
    with tempfile.TemporaryDirectory(prefix="neuron-fp8-bench-") as directory:
        found = measure(make(Path(directory) / "checkpoint", size).directory, (1, 2, 4, 8, 16), repeats)
    rows = [[threads, f"{spent:.2f}", f"{2**20 / spent / 1e3:.0f}"] for threads, spent in found.items()]
    table("Python's share of a load", ("threads", "microseconds a MiB", "cap, GB/s"), rows)
    console.print("[dim]native reads cost nothing here[/dim]")


if __name__ == "__main__":
    main()
