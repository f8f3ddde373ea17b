"""``python -m benchmarks.many``: loading 100,000 small tensors, where names cost more than bytes."""

from __future__ import annotations

from pathlib import Path

import click

from .common import console, machine, machine_line, out_option, write
from .contenders import OURS, REFERENCE
from .load import add_versus_ours, checkpoint, compare, show, summary

SIDE = 32
IN_A_MODULE = 3  # a weight, its scale, a norm


@click.command(context_settings={"show_default": True})
@click.option("--tensors", type=click.IntRange(3), default=100_000, help="Weights of [32, 32], scales, and norms.")
@click.option("--shards", type=click.IntRange(1), default=20, help="Files that they are spread over.")
@click.option("--repeats", type=click.IntRange(1), default=5, help="Rounds, page cache warm.")
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="Where the checkpoint is made.")
@out_option
def main(tensors: int, shards: int, repeats: int, directory: Path | None, out: Path) -> None:
    """Load a checkpoint of very many tensors, beside safetensors' own loader, each in fresh processes."""
    nbytes = tensors // IN_A_MODULE * SIDE * SIDE
    with checkpoint(directory, nbytes, shards=shards, side=SIDE, scale="tensor") as made:
        runs = compare(made, [REFERENCE, OURS], "warm", repeats, None)
    results = summary(made, runs)
    add_versus_ours(results, runs)
    show(f"{len(made.crc['raw']):,} tensors in {shards} files", results)
    write(out, "many", {"tensors": tensors, "shards": shards, "side": SIDE, "repeats": repeats}, results)
    console.print(machine_line(machine()), style="dim")


if __name__ == "__main__":
    main()
