"""``python -m benchmarks.kernel``: how fast FP8 codes are translated, against memcpy and the other ways."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import neuron_fp8_loader
from neuron_fp8_loader import kernel
from neuron_fp8_loader.codes.formats import METHODS, Table
from neuron_fp8_loader.host.parallel import pieces, run

from . import layout
from .common import (
    Size,
    WrongAnswer,
    console,
    finite,
    in_units,
    interleaved,
    machine,
    machine_line,
    out_option,
    summarize,
    table,
    timed,
    write,
)
from .made import expected_tables

MEMCPY = "memcpy"
Work = Callable[[torch.Tensor, torch.Tensor], object]
_BATCH = 1 << 24  # bytes that one timing in cache handles: enough for the clock


@contextmanager
def live(path: str) -> Iterator[None]:
    """Use one kernel path."""
    before, kernel.active = kernel.active, path
    try:
        yield
    finally:
        kernel.active = before


def codes(nbytes: int, seed: int = 0) -> torch.Tensor:
    """uint8 [nbytes]: normal weights as e4m3fn codes, the largest 448, no NaN."""
    values = np.random.default_rng(seed).standard_normal(min(nbytes, 1 << 22), dtype=np.float32)
    scaled = torch.from_numpy(values * np.float32(448 / np.abs(values).max())).clamp(-448, 448)
    few = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return few.repeat(-(-nbytes // few.numel()))[:nbytes].clone()


def in_pieces(src: torch.Tensor, dst: torch.Tensor, work: Work, n: int) -> None:
    """Share a buffer among ``n`` threads in the pieces that the reader uses."""
    run([(src[a:b], dst[a:b]) for a, b in pieces(src.numel())], lambda part: _drop(work(*part)), n)


def _drop(_: object) -> None:
    return None


def _repeat(src: torch.Tensor, dst: torch.Tensor, work: Work, threads: int, times: int) -> None:
    for _ in range(times):
        if threads == 1:
            work(src, dst)
        else:
            in_pieces(src, dst, work, threads)


def memcpy(src: torch.Tensor, dst: torch.Tensor) -> None:
    ctypes.memmove(dst.data_ptr(), src.data_ptr(), src.numel())


def bytes_translate(method: Table) -> Work:
    # what plain Python has; the copy into dst is what a loader would need too
    def work(src: torch.Tensor, dst: torch.Tensor) -> None:
        translated = src.numpy().tobytes().translate(method.out)
        dst.copy_(torch.from_numpy(np.frombuffer(translated, dtype=np.uint8).copy()))

    return work


def recipe(src: torch.Tensor, dst: torch.Tensor) -> None:
    """The recipe of Neuron's README: a bf16 division, and a cast."""
    dst.copy_((src.view(torch.float8_e4m3fn).bfloat16() / (448 / 240)).to(torch.float8_e4m3fn).view(torch.uint8))


def _check(name: str, dst: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(dst, expected):
        raise WrongAnswer(f"{name}: {int((dst != expected).sum())} of {dst.numel()} bytes are wrong")


def _translator(method: Table) -> Work:
    def work(src: torch.Tensor, dst: torch.Tensor) -> object:
        return kernel.translate(src, dst, method)

    return work


def measure(nbytes: int, threads: int, repeats: int, slow: bool) -> dict[str, dict[str, Any]]:
    """GB/s of every path and method on one buffer.

    Args:
        nbytes: its length; small ones stay in cache and are gone over often enough for the clock.
        threads: how many share it.
        repeats: rounds.
        slow: also the ways that are ten times slower.
    """
    src, rounds = codes(nbytes), max(1, _BATCH // nbytes)
    dst = torch.empty_like(src)
    answers = {name: torch.from_numpy(t)[src.int()] for name, t in expected_tables().items()}
    contenders: dict[str, Callable[[], float]] = {}

    def add(name: str, gives: str, work: Work, path: str, times: int) -> None:
        def contender() -> float:
            dst.zero_()
            with live(path):
                seconds = timed(lambda: _repeat(src, dst, work, threads, times))
            _check(name, dst, answers[gives])
            return seconds / times

        contenders[name] = contender

    add(MEMCPY, "raw", memcpy, kernel.active, rounds)
    for path in kernel.paths():
        if path == "torch" and not slow and path != kernel.active:
            continue
        for method in METHODS.values():
            add(
                f"{path}, {method.name}",
                method.name,
                _translator(method),
                path,
                rounds if path != "torch" else 1,
            )
    if slow:
        add("bytes.translate", "half", bytes_translate(METHODS["half"]), kernel.active, 1)
        add("README recipe", "ratio", recipe, kernel.active, 1)
    intra = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads under test are ours
    try:
        runs = interleaved(contenders, repeats)
    finally:
        torch.set_num_threads(intra)
    return {name: summarize(seconds, nbytes, runs[MEMCPY]) for name, seconds in runs.items()}


def measure_layout(side: int, repeats: int) -> dict[str, Any]:
    """The layout step, block to row, on a weight of [side, side]: against the plain rescale and public scripts."""
    weight = codes(side * side).view(torch.float8_e4m3fn).view(side, side)
    blocks = -(-side // layout.BLOCK)
    scale = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e-4
    names = ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight_scale_inv")
    state = dict(zip(names, (weight, scale), strict=True))
    true = weight.float() * layout.spread(scale, (side, side))
    plain, rival, own = "rescale, half", "public scripts, block -> row", "neuron_fp8_loader, block -> row"
    contenders: dict[str, Callable[[], float]] = {
        plain: lambda: timed(lambda: neuron_fp8_loader.rescale_state_dict(state)),
        rival: lambda: timed(lambda: layout.public_scripts(weight, scale)),
    }
    steps: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
        rival: layout.public_scripts
    }
    if layout.has_layout():
        contenders[own] = lambda: timed(lambda: layout.ours(weight, scale))
        steps[own] = layout.ours
    quality = {}
    for name, step in steps.items():
        new_weight, new_scale = step(weight, scale)
        if int((new_weight.view(torch.uint8) & 0x7F).max()) > 0x77 or new_scale.numel() != side:
            raise WrongAnswer(f"{name}: does not fit +-240, or its scale is not one a row: {list(new_scale.shape)}")
        quality[name] = layout.sqnr(true, new_weight.float() * new_scale.view(side, 1))
        if not quality[name] > 20:
            raise WrongAnswer(f"{name}: {quality[name]:.1f} dB against the checkpoint")
    half = neuron_fp8_loader.rescale_state_dict(state)
    quality[plain] = layout.sqnr(true, half[names[0]].float() * layout.spread(half[names[1]], (side, side)))
    runs = interleaved(contenders, repeats)
    return {
        name: summarize(seconds, side * side, runs[rival]) | {"sqnr_db": finite(quality[name])}
        for name, seconds in runs.items()
    }


def _show(title: str, results: dict[str, dict[str, Any]], against: str) -> None:
    rows = []
    for name, r in results.items():
        low, high = r["nbytes"] / r["max_s"] / 1e9, r["nbytes"] / r["min_s"] / 1e9
        quality = f"{r['sqnr_db']:.1f}" if r.get("sqnr_db") else ""
        rows.append([name, f"{r['gb_per_s']:.3g}", f"{low:.3g}-{high:.3g}", f"{r['speedup']:.2f}", quality])
    columns = ["", "GB/s", "range", f"x {against}", "SQNR dB"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    table(title, columns, rows)


@click.command(context_settings={"show_default": True})
@click.option("--cache-size", type=Size(), default="256KiB", help="Buffer that stays in cache (source and target).")
@click.option("--memory-size", type=Size(), default="256MiB", help="Buffer that does not fit any cache.")
@click.option("--side", type=click.IntRange(128), default=4096, help="Weight of [side, side] for the layout step.")
@click.option(
    "--threads", type=click.IntRange(1), default=None, help="For the second run from memory; default: cores."
)
@click.option("--repeats", type=click.IntRange(1), default=7, help="Rounds.")
@click.option("--slow/--no-slow", default=True, help="Also the torch path, bytes.translate and the README recipe.")
@out_option
def main(
    cache_size: int, memory_size: int, side: int, threads: int | None, repeats: int, slow: bool, out: Path
) -> None:
    """Translate FP8 codes by every kernel path and both methods: in cache, from memory, and with all threads.

    GB/s counts source bytes once, as for memcpy, which is the reference: the kernel reads and writes as much, and
    counts codes besides. Every result is compared with a table from ml_dtypes' arithmetic. A path that gives
    less than memcpy "from memory" cannot keep up with the page cache.

    The layout step (block scales to one scale a row) is measured against the way of the public preprocess scripts:
    a float32 copy, a Python loop over the blocks, a division by each row's largest value / 240, a cast.
    """
    cores = threads or int(machine()["cores"] or 1)
    results: dict[str, Any] = {}
    places = (("cache", cache_size, 1), ("memory", memory_size, 1), ("memory_threads", memory_size, cores))
    for place, nbytes, count in places:
        results[place] = {"threads": count, "paths": measure(nbytes, count, repeats, slow)}
        where = "in cache" if place == "cache" else "from memory"
        title = f"translate, {where}: {in_units(nbytes)}, {count} thread{'s' if count > 1 else ''}, {repeats} rounds"
        _show(title, results[place]["paths"], MEMCPY)
    results["layout"] = measure_layout(side, max(1, min(repeats, 5)))
    if not layout.has_layout():
        console.print("[yellow]this version has no layout step; the rival alone is measured[/yellow]")
    _show(f"layout step: one weight [{side}, {side}], 128 x 128 blocks", results["layout"], "public scripts")
    settings = {"cache_size": cache_size, "memory_size": memory_size, "side": side, "repeats": repeats}
    write(out, "kernel", settings, results)
    console.print(machine_line(machine()), style="dim")


if __name__ == "__main__":
    main()
