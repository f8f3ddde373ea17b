"""A slice of an FP8 weight as bfloat16, against the plain slice of its bytes: what the vLLM Neuron path costs."""

from __future__ import annotations

import json
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import safetensors
import safetensors.torch
import torch

from neuron_fp8_loader import plan_checkpoint
from neuron_fp8_loader.load.bf16 import read_bfloat16

from .common import WrongAnswer, interleaved, out_option, table, write

KINDS = ("tensor", "row", "128x128", "MX")
CONTENDERS = ("fp8", "bf16", "cast", "ours")
"""The bytes as they are (1 byte out a weight), a bfloat16 checkpoint's slice (2 bytes), the bytes cast without their
scales (2 bytes; what the plugin does without the flag), and value x scale (2 bytes)."""


def make(directory: Path, rows: int, columns: int) -> None:
    """One checkpoint a kind, and one in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = {
        "tensor": torch.tensor(0.01),
        "row": torch.rand(rows, 1, generator=draw) + 0.01,
        "128x128": torch.rand(-(-rows // 128), -(-columns // 128), generator=draw) + 0.01,
        "MX": torch.randint(115, 125, (rows, columns // 32), dtype=torch.uint8, generator=draw),
    }
    for kind, scale in scales.items():
        (directory / kind).mkdir()
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]} if kind == "128x128" else {}
        (directory / kind / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
        tensors = {"x.weight": codes.view(torch.float8_e4m3fn), "x.weight_scale": scale}
        safetensors.torch.save_file(tensors, directory / kind / "model.safetensors")
    safetensors.torch.save_file({"x.weight": codes.to(torch.bfloat16)}, directory / "bf16.safetensors")


def reader(directory: Path, kind: str, contender: str) -> Callable[[Any], torch.Tensor]:
    """What gives one contiguous slice, in memory of its own. The file is open, as the plugin has it."""
    file = directory / "bf16.safetensors" if contender == "bf16" else directory / kind / "model.safetensors"
    file.read_bytes()  # into the page cache
    opened = safetensors.safe_open(file, framework="pt", device="cpu")
    weight = opened.get_slice("x.weight")
    if contender == "ours":
        plan = plan_checkpoint(directory / kind)
        (pair,) = plan.pairs
        scale = opened.get_slice(pair.scale)
        return lambda index: read_bfloat16(plan, pair, weight, scale, index)
    if contender == "cast":
        return lambda index: weight[index].to(torch.bfloat16)
    return lambda index: weight[index].clone(memory_format=torch.contiguous_format)


def _child(pipe: Any, directory: Path, kind: str, contender: str, index: Any, check: bool) -> None:
    torch.set_num_threads(1)  # as the plugin's workers do
    read = reader(directory, kind, contender)
    wall, cpu = time.perf_counter(), time.process_time()
    got = read(index)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    right = True
    if check and contender == "ours":
        right = torch.equal(got, _reference(directory, kind)[index])
    pipe.send((*seconds, right))


def _reference(directory: Path, kind: str) -> torch.Tensor:
    tensors = safetensors.torch.load_file(directory / kind / "model.safetensors")
    codes, scale = tensors["x.weight"].float(), tensors["x.weight_scale"]
    wide = torch.exp2(scale.double() - 127) if kind == "MX" else scale.double()
    if wide.dim() == 2:
        for dim, repeat in enumerate({"MX": (1, 32), "128x128": (128, 128)}.get(kind, (1, 1))):
            wide = wide.repeat_interleave(repeat, dim)
        wide = wide[: codes.shape[0], : codes.shape[1]]
    exact = codes.double() * wide
    bits = exact.view(torch.int64)  # all normal: round what bfloat16 has no room for to nearest, ties to even
    return ((bits + (1 << 44) - 1 + (bits >> 45 & 1)) >> 45 << 45).view(torch.float64).to(torch.bfloat16)


def apart(directory: Path, kind: str, contender: str, index: Any, check: bool) -> tuple[float, float]:
    """(seconds, CPU seconds) of one slice in a fresh process."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.common", "neuron_fp8_loader.load.bf16", "safetensors.torch"])
    parent, child = context.Pipe()
    process = context.Process(target=_child, args=(child, directory, kind, contender, index, check))
    process.start()
    child.close()
    seconds, cpu, right = parent.recv()
    process.join()
    if not right:
        raise WrongAnswer(f"{kind} {index}: not value x scale rounded once")
    return float(seconds), float(cpu)


@click.command(context_settings={"show_default": True})
@click.option("--rows", default=4096)
@click.option("--columns", default=14336)
@click.option("--tp", "degrees", type=int, multiple=True, default=(1, 2, 4, 8))
@click.option("--repeats", default=7)
@out_option
def main(rows: int, columns: int, degrees: tuple[int, ...], repeats: int, out: Path) -> None:
    """Slices as tensor-parallel ranks read them, each in a fresh process, in turns; page cache warm, one thread."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make(directory, rows, columns)
        for kind in KINDS:
            for way in ("rows", "columns"):
                for tp in degrees:
                    part = slice(-(-(rows if way == "rows" else columns) // tp) * (tp - 1), None)
                    index = (part, slice(None)) if way == "rows" else (slice(None), part)
                    apart(directory, kind, "ours", index, True)
                    each = {c: partial(apart, directory, kind, c, index, False) for c in CONTENDERS}
                    runs = interleaved(each, repeats)
                    results[f"{kind}, {way}, tp {tp}"] = {
                        c: {
                            "median_s": statistics.median(s for s, _ in r),
                            "cpu_s": statistics.median(x for _, x in r),
                        }
                        for c, r in runs.items()
                    }
    shown = [
        [case, *(f"{1e3 * r[c]['median_s']:.1f} ({1e3 * r[c]['cpu_s']:.1f})" for c in CONTENDERS),
         *(f"{r[c]['cpu_s'] / r['ours']['cpu_s']:.2f}" for c in CONTENDERS[:3])]
        for case, r in results.items()
    ]  # fmt: skip
    table(
        f"A slice of {rows}x{columns}, ms (CPU ms)",
        ["slice", "FP8 bytes", "bf16 checkpoint", "cast, no scales", "ours", "x FP8", "x bf16", "x cast"],
        shown,
        "x: how many times as fast as the rival ours is, by CPU time. FP8 bytes: 1 byte out a weight; the others: 2.",
    )
    write(out, "slices", {"rows": rows, "columns": columns, "tp": list(degrees), "repeats": repeats}, results)


if __name__ == "__main__":
    main()
