"""``python -m benchmarks``: the benchmarks that fit a laptop, one after the other, in under ten minutes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.markdown import Markdown

from .common import RESULTS, console
from .readme_table import NEEDED, load_results, render

SUITE = ("load", "kernel", "plan", "fidelity", "neuron_compile")
QUICK = {
    "load": ["--size=8MiB", "--repeats=1", "--cold-repeats=1", "--script-size=1MiB", "--script-repeats=1",
             "--layout-size=4MiB", "--sizes=2MiB", "--sizes=4MiB", "--thread-counts=1", "--thread-counts=2"],
    "kernel": ["--memory-size=1MiB", "--cache-size=64KiB", "--side=256", "--repeats=1"],
    "plan": ["--tensors=500", "--shards=3", "--repeats=1"],
    "fidelity": ["--side=128", "--hidden=64", "--layers=1", "--tokens=16"],
    "neuron_compile": ["--hidden=64", "--layers=1", "--tokens=8"],
}  # fmt: skip


def available() -> list[str]:
    """The benchmarks of the suite that are there."""
    return [name for name in SUITE if importlib.util.find_spec(f"benchmarks.{name}")]


@click.command(context_settings={"show_default": True})
@click.option("--only", type=click.Choice(SUITE), multiple=True, help="Run this one (repeatable); default: all.")
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that everything runs; the figures mean nothing.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=None,
              show_default="benchmarks/results; with --quick benchmarks/results/quick",
              help="Directory of the JSON and the pictures.")  # fmt: skip
def main(only: tuple[str, ...], quick: bool, out: Path | None) -> None:
    """Run the benchmarks, each in a process of its own, and print the tables of docs/performance.md.

    Wants a quiet machine, about 8 GB of memory, and 5 GB of disk in the temporary directory (TMPDIR moves it); takes
    some eight minutes on two cores. `python -m benchmarks.NAME --help` explains each one; benchmarks/README.md tells
    how to run the compile check on trn1, inf2 and trn2.

    Exit code: that of the first benchmark that failed (a wrong answer fails too).
    """
    out = out or (RESULTS / "quick" if quick else RESULTS)
    failed = 0
    begin = time.monotonic()
    for name in available():
        if only and name not in only:
            continue
        options = QUICK.get(name, []) if quick else []
        console.rule(f"python -m benchmarks.{name} {' '.join(options)}", align="left")
        # where the package lies is where the children must look for it
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, f"--out={out.resolve()}"]
        done = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, check=False)
        failed = failed or done.returncode
    console.rule(f"{time.monotonic() - begin:.0f} s", align="left")
    if all((out / f"{name}.json").is_file() for name in NEEDED):
        text = render(load_results(out))
        console.print(Markdown(text)) if console.is_terminal else click.echo(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
