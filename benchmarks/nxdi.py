"""``python -m benchmarks.nxdi``: what the flag costs the real NxD Inference, against a copy converted before."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

import neuron_fp8_loader
from neuron_fp8_loader.tools.export import prepare_export

from . import nxdi_experts
from .common import WrongAnswer, console, interleaved, out_option, summarize, table, write

HARNESS = "NEURON_FP8_NXDI_HARNESS"
NEEDED = ("NXD_SRC", "NXDI_SRC", HARNESS)


def missing() -> str:
    """Why it cannot run here; empty where it can."""
    unset = [name for name in NEEDED if not os.environ.get(name)]
    return f"the real sources are not here: set {', '.join(unset)}" if unset else ""


def measure(harness: Any, fp8: Path, copy: Path, step: str, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of one step, flag on on ``fp8`` and flag off on ``copy``, in turns."""

    def contender(path: Path, **flags: Any) -> Callable[[], tuple[float, float]]:
        def once() -> tuple[float, float]:
            app = harness.build_app(path, **flags)
            with tempfile.TemporaryDirectory(dir=path.parent) as out:
                begin, used = time.perf_counter(), time.process_time()
                if step == "get_state_dict":
                    made = type(app).get_state_dict(str(path), app.config)
                    spent = time.perf_counter() - begin, time.process_time() - used
                    check(made)
                else:
                    harness.shard_on_cpu(app, out)
                    spent = time.perf_counter() - begin, time.process_time() - used
            return spent

        return once

    on = contender(fp8, fp8_rescale=True, modules_to_not_convert=None)
    return interleaved({ON: on, OFF: contender(copy)}, repeats)


def check(state_dict: dict[str, torch.Tensor]) -> None:
    """Raise WrongAnswer unless there are e4m3fn weights and all of them fit +-240."""
    weights = [t for t in state_dict.values() if t.dtype == torch.float8_e4m3fn]
    large = sum(int(((t.view(torch.uint8) & 0x7F) > 0x77).sum()) for t in weights)
    if not weights or large:
        raise WrongAnswer(f"{len(weights)} FP8 weights, {large} codes above 240")


ON, OFF = "flag on", "flag off, converted copy"


def line(results: dict[str, Any], nbytes: int) -> str:
    """A row of the README's table: the whole way to sharded weights on disk, medians, and by how much the flag is
    longer, in time and in CPU time."""
    on, off = (results["shard_checkpoint"][name] for name in (ON, OFF))
    return (
        f"| NxD Inference's `shard_checkpoint` of {nbytes / 2**30:.1f} GiB, flag on against off on a converted copy "
        f"| **{on['median_s']:.2f} s against {off['median_s']:.2f} s**, CPU {on['cpu_s'] / off['cpu_s']:.2f} x |"
    )


def experts(layers: int, repeats: int, out: Path) -> None:
    """The table "Experts under the flag" of docs/performance.md."""
    with tempfile.TemporaryDirectory(prefix="neuron-fp8-bench-") as directory:
        made = nxdi_experts.make_model(Path(directory) / "checkpoint", layers)
        results = nxdi_experts.compare(made, os.environ[HARNESS], repeats)
    span = nxdi_experts.span
    rows = [
        [name, span(r["runs_s"], 2), span(r["cpu_s"], 2), f"{span(r['peak_over_size'], 2)} x"]
        for name, r in results.items()
    ]
    size = f"{layers} layers of {nxdi_experts.EXPERTS} experts, {made.nbytes / 2**30:.2f} GiB"
    table(f"Qwen3-MoE, {size}", ("", "s", "CPU s", "peak memory / size"), rows)
    write(out, "nxdi_experts", {"layers": layers, "repeats": repeats}, results)


LAYERS = {"llama": 20, "qwen3_moe": 14}


@click.command(context_settings={"show_default": True})
@click.option(
    "--model", type=click.Choice(list(LAYERS)), default="llama", help="qwen3_moe: experts, in fresh processes."
)
@click.option(
    "--layers", type=click.IntRange(1), help="Some 50 MiB each (qwen3_moe: 72).", show_default="20; qwen3_moe: 14"
)
@click.option("--hidden", type=click.IntRange(256), default=2048, help="A multiple of 256.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Rounds.")
@out_option
def main(model: str, layers: int | None, hidden: int, repeats: int, out: Path) -> None:
    """Time get_state_dict and shard_checkpoint of the real NxD Inference on a Llama of some 1 GiB.

    Wants NXD_SRC and NXDI_SRC, checkouts of neuronx-distributed and neuronx-distributed-inference, and
    NEURON_FP8_NXDI_HARNESS, the folder of a harness.py that makes them importable without Neuron's closed packages and
    has make_tiny_checkpoint, build_app and shard_on_cpu.

    Without the flag get_state_dict maps the files and reads nothing; with it every byte is read and rescaled. What
    both have to do in the end is in shard_checkpoint, which calls it, pays for the pages that were mapped, and writes
    each rank's part; it is timed with what maps these files again. The page cache is warm: the checkpoints have just
    been written. Wants 5 GiB of disk, and 4 of memory.

    With --model qwen3_moe: CPU seconds and peak memory of get_state_dict under the flag, on 16 experts a layer of
    768x2048 with a scale a row, beside load_file with clone(), which stacks nothing, and experts="fused"; set
    OMP_NUM_THREADS=1 for one thread of torch's. The harness's folder needs a families.py with build. Wants 1.1 GiB of
    disk, and 3 of memory.
    """
    layers = layers or LAYERS[model]
    if missing():
        console.print(f"[yellow]left out: {missing()}[/yellow]")
        return
    if model == "qwen3_moe":
        experts(layers, repeats, out)
        return
    sys.path.insert(0, os.environ[HARNESS])
    neuron_fp8_loader.enable()
    harness = importlib.import_module("harness")
    harness.install_stubs()
    harness.quiet()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="neuron-fp8-bench-") as directory:
        fp8, copy = Path(directory) / "fp8", Path(directory) / "copy"
        shape = {"hidden": hidden, "intermediate": 4 * hidden, "heads": 16, "kv_heads": 4}
        harness.make_tiny_checkpoint(fp8, layers=layers, **shape)
        prepare_export(fp8, copy).run()
        nbytes = sum(file.stat().st_size for file in fp8.glob("*.safetensors"))
        for step in ("get_state_dict", "shard_checkpoint"):
            runs = measure(harness, fp8, copy, step, repeats)
            reference = [seconds for seconds, _ in runs[OFF]]
            results[step] = {
                name: summarize([s for s, _ in done], nbytes, reference) | {"cpu_s": min(c for _, c in done)}
                for name, done in runs.items()
            }
            rows = [
                [name, f"{r['median_s']:.3f}", f"{r['min_s']:.3f}", f"{r['cpu_s']:.3f}", f"{1 / r['speedup']:.2f}"]
                for name, r in results[step].items()
            ]
            table(f"{step}, {nbytes / 2**30:.2f} GiB", ("", "median s", "least s", "CPU s", "time / copy"), rows)
    console.print("[dim]least CPU s; a line for the README:[/dim]")
    click.echo(line(results, nbytes))
    write(out, "nxdi", {"layers": layers, "hidden": hidden, "repeats": repeats}, results)


if __name__ == "__main__":
    main()
