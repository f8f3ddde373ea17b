"""``python -m benchmarks.plan``: how long it takes to plan a checkpoint of 100,000 tensors in 160 shards."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from neuron_fp8_loader.checkpoint import open_checkpoint
from neuron_fp8_loader.integrations.keys import nxd_names, renamed
from neuron_fp8_loader.integrations.names import modules_to_not_convert
from neuron_fp8_loader.options import What
from neuron_fp8_loader.plan import plan_for, recipe_for

from .common import RESULTS, console, machine, machine_line, write

PHASES = (
    "open: index and headers",
    "plan: pairs and cross-checks",
    "recipe: scales by rows",
    "names for NxD's layers",
    "summary",
    "the same for each shard, one by one",
)
HIDDEN, MLP = 7168, 2048
SHAPES = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (32768, 512),
    "o_proj": (HIDDEN, 16384),
    "gate_proj": (MLP, HIDDEN),
    "up_proj": (MLP, HIDDEN),
    "down_proj": (HIDDEN, MLP),
}
"""Of DeepSeek-V3, whose config.json gives them."""
_BYTES = {"F8_E4M3": 1, "F32": 4, "BF16": 2}


def names(count: int, model: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of ``count`` tensors, called as in DeepSeek-V3: 256 experts a layer, block scales."""

    def pair(module: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        rows, columns = SHAPES[module.rpartition(".")[2]]
        yield f"{module}.weight", "F8_E4M3", (rows, columns)
        yield f"{module}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))

    def endless() -> Iterator[tuple[str, str, tuple[int, ...]]]:
        layer = 0
        while True:
            root = f"{model}.layers.{layer}"
            yield f"{root}.input_layernorm.weight", "BF16", (HIDDEN,)
            for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
                yield from pair(f"{root}.self_attn.{part}")
            yield f"{root}.mlp.gate.weight", "BF16", (256, HIDDEN)
            yield f"{root}.mlp.gate.e_score_correction_bias", "F32", (256,)
            for expert in range(256):
                for part in ("gate_proj", "up_proj", "down_proj"):
                    yield from pair(f"{root}.mlp.experts.{expert}.{part}")
            layer += 1

    source = endless()
    for _ in range(count):
        yield next(source)


def make(directory: Path, tensors: int, shards: int, model: str) -> int:
    """Write the shards (real headers, data left as holes in the files) and the index; returns the number of pairs.

    Weights and scales are dealt to the shards in turn, so that many a pair lies in two of them.
    """
    headers: list[dict[str, Any]] = [{"__metadata__": {"format": "pt"}} for _ in range(shards)]
    ends = [0] * shards
    weight_map: dict[str, str] = {}
    files = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    there: set[str] = set()
    for position, (name, dtype, shape) in enumerate(names(tensors, model)):
        shard = position * shards // tensors if position % 10 else position % shards
        start, ends[shard] = ends[shard], ends[shard] + math.prod(shape) * _BYTES[dtype]
        headers[shard][name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, ends[shard]]}
        weight_map[name] = files[shard]
        there.add(name)
    for file, header, end in zip(files, headers, ends, strict=True):
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": sum(ends)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(name.endswith(".weight_scale_inv") for name in there)


def run(directory: Path, tensors: int, pairs: int) -> list[float]:
    """Plan once; seconds of each phase. Raises ClickException where the plan is wrong: its time would mean nothing."""
    marks = [time.perf_counter()]
    checkpoint = open_checkpoint(directory)
    marks.append(time.perf_counter())
    plan = plan_for(checkpoint)
    marks.append(time.perf_counter())
    recipe = recipe_for(checkpoint, What(layout="per_channel"))
    marks.append(time.perf_counter())
    named = renamed(dict.fromkeys(plan.tensors), nxd_names(plan), plan.source)
    listed = modules_to_not_convert(plan)
    marks.append(time.perf_counter())
    plan.summary()
    marks.append(time.perf_counter())
    for file in checkpoint.files:  # what `load_file` does beside its reads
        shard = open_checkpoint(file)
        recipe_for(shard, What()).within(info.name for info in shard.selected_tensors())
    marks.append(time.perf_counter())
    wrong = [p for p in plan.pairs if p.scale != p.weight + "_scale_inv"]
    wrong += [
        p for p in plan.pairs if recipe.steps[p.weight].action != "requantize" or f"{p.module}.scale" not in named
    ]
    if listed:
        raise click.ClickException(f"the names are wrong: {listed} should not be listed")
    spare = len(plan.unscaled) + len(plan.activation_scales) + len(plan.warnings)
    if len(plan.tensors) != tensors or len(plan.pairs) != pairs or wrong or spare > 1:
        raise click.ClickException(f"the plan is wrong: {len(plan.pairs)} pairs for {pairs}, {len(wrong)} mismatched")
    return [after - before for before, after in itertools.pairwise(marks)]


@click.command(context_settings={"show_default": True})
@click.option("--tensors", type=click.IntRange(min=4), default=100_000, help="Tensors in the index.")
@click.option("--shards", type=click.IntRange(min=1), default=160, help="Files that they are dealt to.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Times that the plan is made.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
              show_default="benchmarks/results", help="Directory of plan.json.")  # fmt: skip
def main(tensors: int, shards: int, repeats: int, out: Path) -> None:
    """Make a checkpoint index like DeepSeek's on the fly, plan it from index and headers, and say what took how long.

    No weight data is read, so the files have holes for it; every plan is checked. Files are in the page cache.
    """
    with tempfile.TemporaryDirectory() as temporary:
        runs = []
        for number in range(repeats):
            # other names in another place, so that nothing can be remembered from the run before
            directory = Path(temporary) / f"run{number}"
            directory.mkdir()
            pairs = make(directory, tensors, shards, f"model{number}")
            time.sleep(2.5)  # younger files are looked at again at every turn, for they may still change
            runs.append(run(directory, tensors, pairs))
    totals = [sum(phases) for phases in runs]
    middle = statistics.median(totals)
    shown = Table(title=f"{tensors} tensors in {shards} shards, {pairs} FP8 pairs, median of {repeats}")
    shown.add_column("phase")
    shown.add_column("seconds", justify="right")
    shown.add_column("tensors/s", justify="right")
    medians = [statistics.median(phases[i] for phases in runs) for i in range(len(PHASES))]
    for phase, seconds in zip((*PHASES, "together"), (*medians, middle), strict=True):
        shown.add_row(phase, f"{seconds:.3f}", f"{tensors / seconds:,.0f}")
    console.print(shown)
    console.print(machine_line(machine()), style="dim")
    settings = {"tensors": tensors, "shards": shards, "repeats": repeats}
    results = {
        "pairs": pairs,
        "tensors_per_s": tensors / middle,
        "median_s": middle,
        "phases_median_s": dict(zip(PHASES, medians, strict=True)),
        "runs_s": totals,
    }
    write(out, "plan", settings, results)


if __name__ == "__main__":
    main()
