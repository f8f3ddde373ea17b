"""``python -m benchmarks.experts``: experts stacked as NxD's fused layers take them, beside other ways there."""

from __future__ import annotations

import multiprocessing as mp
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file

import neuron_fp8_loader

from . import pagecache
from .common import Size, WrongAnswer, console, in_units, interleaved, machine, machine_line, out_option, table, write

BLOCK = 128
PARTS = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Made:
    """A mixture: each of ``layers`` has ``experts`` of gate and up [inner, hidden] and down [hidden, inner]."""

    directory: Path
    files: tuple[Path, ...]
    layers: int
    experts: int
    scale: str
    nbytes: int


def make(directory: Path, nbytes: int, scale: str, experts: int = 128, inner: int = 768, hidden: int = 2048) -> Made:
    """Write about ``nbytes`` of experts, a layer a shard, with a float32 scale a ``"row"`` or 128x128 ``"block"``."""
    rng = np.random.default_rng(0)
    of_one = 3 * inner * hidden
    experts = max(1, min(experts, nbytes // of_one))
    layers = max(1, round(nbytes / (experts * of_one)))
    values = np.clip(rng.standard_normal(of_one, dtype=np.float32) * 110, -448, 448)
    codes = np.concatenate([values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)] * 2)
    directory.mkdir(parents=True)
    files = []
    for layer in range(layers):
        tensors: Tensors = {}
        for expert in range(experts):
            for number, part in enumerate(PARTS):
                shape = (hidden, inner) if part == "down_proj" else (inner, hidden)
                start = (layer * 7919 + expert * 104729 + number * 15485863) % of_one  # no two weights alike
                own = np.array(codes[start : start + inner * hidden]).reshape(shape)
                grid = (shape[0], 1) if scale == "row" else tuple(-(-n // BLOCK) for n in shape)
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                tensors[name] = torch.from_numpy(own).view(torch.float8_e4m3fn)
                factor = torch.from_numpy(rng.uniform(1e-4, 3e-4, grid).astype(np.float32))
                tensors[name + ("_scale" if scale == "row" else "_scale_inv")] = factor
        files.append(directory / f"model-{layer + 1:05d}-of-{layers:05d}.safetensors")
        save_file(tensors, files[-1], metadata={"format": "pt"})
    total = sum(file.stat().st_size for file in files)
    return Made(directory, tuple(files), layers, experts, scale, total)


# -- the ways to get there ------------------------------------------------------------------------------------------


def _ours(layout: str, experts: str, made: Made, output: Path) -> Tensors:
    out: Tensors = {}
    for file in made.files:
        out |= neuron_fp8_loader.load_state_dict(file, layout=layout, experts=experts, progress=False)
    return out


def _plain(made: Made, output: Path) -> Tensors:
    # without the clone nothing is read
    return {name: tensor.clone() for file in made.files for name, tensor in load_file(file).items()}


def _stacked(each: Callable[[int, str], tuple[torch.Tensor, torch.Tensor]], made: Made) -> Tensors:
    """Stack the experts of a layer as the models' own conversions do: a new tensor, filled with transposed ones."""
    out: Tensors = {}
    for layer in range(made.layers):
        for fused, parts in (("gate_up_proj", PARTS[:2]), ("down_proj", PARTS[2:])):
            pairs = [
                [each(e, f"model.layers.{layer}.mlp.experts.{e}.{p}") for p in parts] for e in range(made.experts)
            ]
            for end, which in (("weight", 0), ("scale", 1)):
                one = [torch.cat([pair[which].view(pair[which].dtype) for pair in expert]) for expert in pairs]
                name = f"model.layers.{layer}.mlp.expert_mlps.mlp_op.{fused}.{end}"
                out[name] = torch.stack([t.t().contiguous() for t in one])
    return out


def _python_stacking(layout: str, made: Made, output: Path) -> Tensors:
    loaded = _ours(layout, "keep", made, output)
    end = "_scale" if made.scale == "row" else "_scale_inv"

    def each(_: int, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        return loaded.pop(f"{module}.weight"), loaded.pop(f"{module}.weight{end}")

    return _stacked(each, made)


def _script(layout: str, made: Made, output: Path) -> Tensors:
    """What the hand-written scripts do, one expert at a time, and then write the result: blocks kept are multiplied by
    240/448 in float32 and cast; for one scale a row, blocks are dequantized to bfloat16, then divided by the row's
    largest value / 240."""
    loaded: Tensors = {}
    for file in made.files:
        loaded |= load_file(file)
    end = "_scale" if made.scale == "row" else "_scale_inv"

    def each(_: int, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight, scale = loaded[f"{module}.weight"], loaded[f"{module}.weight{end}"]
        if layout == "keep" or made.scale == "row":
            return (weight.float() * (240 / 448)).to(torch.float8_e4m3fn), scale * (448 / 240)
        values = weight.float()
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                values[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scale[i, j]
        values = values.bfloat16().float()
        rows = values.abs().amax(dim=1, keepdim=True) / 240
        return (values / rows).clamp(-240, 240).to(torch.float8_e4m3fn), rows

    out = _stacked(each, made)
    save_file(out, output / "model.safetensors")
    return out


OURS, LOADER, PLAIN, STACKING, SCRIPT = (
    'experts="fused"', "load_state_dict", "load_file + clone", "load_state_dict, Python stacking", "script",
)  # fmt: skip


def contenders(layout: str) -> dict[str, Callable[[Made, Path], Tensors]]:
    """The ways, by name; the first reads the same bytes and stacks nothing."""
    return {
        PLAIN: _plain,
        LOADER: partial(_ours, "keep", "keep"),
        OURS: partial(_ours, layout, "fused"),
        STACKING: partial(_python_stacking, layout),
        SCRIPT: partial(_script, layout),
    }


def worst(made: Made, result: Mapping[str, torch.Tensor]) -> float:
    """The least SQNR, dB, over some experts of what a device reads, against the checkpoint in float64 (ml_dtypes)."""
    least = float("inf")
    end = "_scale" if made.scale == "row" else "_scale_inv"
    for layer, expert in {(0, 0), (made.layers - 1, made.experts - 1), (made.layers // 2, made.experts // 3)}:
        with safetensors.safe_open(str(made.files[layer]), framework="pt") as file:
            for number, part in enumerate(PARTS):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                want = _values(file.get_tensor(name), file.get_tensor(name + end), ml_dtypes.float8_e4m3fn)
                fused = "down_proj" if number == 2 else "gate_up_proj"
                weight, scale = (
                    result[f"model.layers.{layer}.mlp.expert_mlps.mlp_op.{fused}.{e}"][expert]
                    for e in ("weight", "scale")
                )
                got = _values(weight, scale, ml_dtypes.float8_e4m3).T
                got = got if number == 2 else got[number * len(want) : (number + 1) * len(want)]
                noise = float(np.square(got - want).sum())
                least = min(least, float("inf") if noise == 0 else 10 * np.log10(float(np.square(want).sum()) / noise))
    return least


def _values(weight: torch.Tensor, scale: torch.Tensor, dtype: Any) -> np.ndarray:
    values = weight.contiguous().view(torch.uint8).numpy().view(dtype).astype(np.float64)
    wide = scale.double().numpy()
    for axis in (0, 1):
        wide = wide.repeat(values.shape[axis] // wide.shape[axis], axis)
    return np.asarray(values * wide)


# -- running them ---------------------------------------------------------------------------------------------------


def _child(pipe: Connection, name: str, layout: str, made: Made, output: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    result = contenders(layout)[name](made, output)
    seconds = time.perf_counter() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    pipe.send((seconds, peak, float("inf") if name in (PLAIN, LOADER) else worst(made, result)))


def run_apart(name: str, layout: str, made: Made) -> tuple[float, int, float]:
    """(seconds, bytes by which the resident set grew at its peak, dB) of one run in a fresh process, page cache warm.

    Raises:
        WrongAnswer: it failed, or is further from the checkpoint than its layout must be.
    """
    pagecache.warm(made.files)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.contenders"])
    parent, child = context.Pipe()
    with tempfile.TemporaryDirectory(dir=made.directory) as output:
        process = context.Process(target=_child, args=(child, name, layout, made, Path(output)), daemon=True)
        process.start()
        child.close()
        try:
            seconds, peak, decibels = parent.recv()
        except EOFError as error:
            raise WrongAnswer(f"{name} failed; its message is above") from error
        finally:
            process.join()
    exact = name != SCRIPT and (layout == "keep" or made.scale == "row")
    if not decibels > (100 if exact else 20):
        raise WrongAnswer(f"{name}: {decibels:.1f} dB from the checkpoint")
    return seconds, peak, decibels


def compare(made: Made, layout: str, names: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Median seconds, growth, and times the plain load of each, in turns."""
    runs = interleaved({name: partial(run_apart, name, layout, made) for name in names}, repeats)
    plain = [run[0] for run in runs[PLAIN]]
    return {
        name: {
            "median_s": statistics.median(run[0] for run in done),
            "runs_s": [run[0] for run in done],
            "times_plain": statistics.median(run[0] / p for run, p in zip(done, plain, strict=True)),
            "peak": max(run[1] for run in done),
            "peak_over_size": max(run[1] for run in done) / made.nbytes,
            "sqnr_db": None if name in (PLAIN, LOADER) else min(run[2] for run in done),
        }
        for name, done in runs.items()
    }


@click.command(context_settings={"show_default": True})
@click.option("--size", type=Size(), default="2GiB", help="Bytes of FP8 experts.")
@click.option("--script-size", type=Size(), default="128MiB", help="The same for the script, which is slow.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Rounds.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="Where the checkpoint is made (and removed again); default: the system's temporary directory.",
)
@out_option  # fmt: skip
def main(size: int, script_size: int, repeats: int, directory: Path | None, out: Path) -> None:
    """Load a mixture of experts (128 a layer, 768x2048), made on the fly, with its experts stacked.

    Contenders: safetensors' load_file with clone() so that every byte is read, which stacks nothing and rescales
    nothing; load_state_dict, which rescales; experts="fused"; load_state_dict and then torch.stack of transposed
    experts, as the models' own conversions do; and the way of the hand-written scripts, files written included. Each
    in a fresh process, page cache warm; every answer is read as a device does and held against the checkpoint.
    """
    results: dict[str, Any] = {}
    for scale, layout in (("row", "per_channel"), ("block", "keep"), ("block", "per_channel")):
        for nbytes, names in ((size, [PLAIN, LOADER, OURS, STACKING]), (script_size, [PLAIN, OURS, SCRIPT])):
            with tempfile.TemporaryDirectory(prefix="neuron-fp8-bench-", dir=directory) as path:
                made = make(Path(path) / "checkpoint", nbytes, scale)
                found = compare(made, layout, names, repeats)
            key = f"{scale} scales, layout {layout}, {in_units(made.nbytes)}"
            results[key] = {"nbytes": made.nbytes, "experts": made.experts, "layers": made.layers, "contenders": found}
            rows = [
                [
                    name,
                    f"{r['median_s']:.3f}",
                    f"{r['times_plain']:.2f}",
                    in_units(r["peak"]),
                    f"{r['peak_over_size']:.2f}",
                    "-" if r["sqnr_db"] is None else f"{r['sqnr_db']:.0f}",
                ]
                for name, r in found.items()
            ]
            table(key, ("", "median s", "times plain", "peak RSS", "RSS / size", "dB"), rows)
    write(out, "experts", {"size": size, "script_size": script_size, "repeats": repeats}, results)
    console.print(machine_line(machine()), style="dim")


if __name__ == "__main__":
    main()
