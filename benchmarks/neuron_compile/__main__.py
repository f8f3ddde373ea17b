"""``python -m benchmarks.neuron_compile``: compile a small FP8 Llama with and without the loader, and run it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from ..common import console, machine, machine_line, out_option, table, write
from ..llama import Shape
from . import neuron, nxdi
from .backend import Backend, Missing
from .check import check
from .emulate import Emulate
from .model import make_case
from .neuron import Neuron
from .nxdi import NxdInference
from .xla_cpu import XlaCpu

BACKENDS = ("neuron", "xla-cpu", "emulate")


def chosen(names: tuple[str, ...], compile_only: bool, target: str | None) -> list[Backend]:
    """The backends to run.

    Those that were asked for must run: Missing is raised where one cannot. Without a wish, what the machine has.
    """
    found: list[Backend] = []
    if "neuron" in names or (not names and neuron.devices()):
        found.append(Neuron(compile_only, target))
        if nxdi.installed() and not compile_only:
            found.append(NxdInference())
    if "xla-cpu" in names:
        found.append(XlaCpu())
    if "emulate" in names:
        found.append(Emulate())
    if not names:
        found += [XlaCpu(), Emulate()]
    runnable = []
    for backend in found:
        try:
            backend.require()
        except Missing as missing:
            if names or not isinstance(backend, XlaCpu):
                raise
            console.print(f"left out: {backend.name}: {missing}", style="dim", markup=False)
        else:
            runnable.append(backend)
    return runnable


def _describe(seen: dict[str, Any]) -> str:
    if "refused" in seen:
        return f"refused by the runtime: {seen['refused']}"
    if "finite" not in seen:
        return "compiled, not run"
    if not seen["finite"]:
        return f"{seen['nan']} nan, {seen['inf']} inf of {seen['outputs']}"
    return "equal" if seen["equal"] else f"finite, largest error {seen['largest_error']:.1e}"


def show(entries: list[dict[str, Any]]) -> None:
    rows = []
    for entry in entries:
        seen = entry["with"]
        speed = f"{seen['tokens_per_s']:.0f}" if seen["tokens_per_s"] else "-"
        rows.append([entry["backend"], entry["dtype"], _describe(entry["without"]), _describe(seen),
                     f"{seen['compile_s']:.1f}", speed])  # fmt: skip
    columns = ["backend", "dtype", "without the loader", "with it", "compile s", "tokens/s"]
    table("two-layer Llama with FP8 linears: logits against the e4m3fn reading", columns, rows)
    for entry in entries:
        what = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        more = "; ".join(f"{key} {value}" for key, value in entry["details"].items())
        console.print(f"{entry['backend']}: {what}{'; ' + more if more else ''}", style="dim", markup=False)
        if entry["without"].get("finite"):
            console.print(
                f"{entry['backend']}: finite without the loader too. trn3 reads e4m3fn natively; on trn1, inf2 and "
                "trn2 this would mean that the compiler or the runtime has changed.", style="yellow", markup=False,
            )  # fmt: skip


@click.command(context_settings={"show_default": True})
@click.option(
    "--backend",
    "names",
    type=click.Choice(BACKENDS),
    multiple=True,
    help="Run this one (repeatable) and fail if it cannot; default: what the machine has.",
)
@click.option("--method", type=click.Choice(["half", "ratio"]), default="half", help="How the loader rescales.")
@click.option(
    "--codes",
    type=click.Choice(["exact", "all"]),
    default="exact",
    help="exact: no odd subnormal codes in the weights, so that outputs must be equal; all: as they come.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="What the model computes in; auto: bfloat16 on Neuron, float32 elsewhere.",
)
@click.option("--hidden", type=click.IntRange(64), default=256, help="Hidden size; a multiple of 64.")
@click.option("--layers", type=click.IntRange(1), default=2, help="Decoder layers.")
@click.option("--tokens", type=click.IntRange(1), default=64, help="Tokens in the prompt.")
@click.option("--compile-only", is_flag=True, help="neuron: compile on a host without a device, and run nothing.")
@click.option(
    "--target",
    type=click.Choice(["trn1", "inf2", "trn2", "trn3"]),
    default=None,
    help="neuron: what to compile for; default: this host.",
)
@out_option  # fmt: skip
def main(
    names: tuple[str, ...], method: str, codes: str, dtype: str, hidden: int, layers: int, tokens: int,
    compile_only: bool, target: str | None, out: Path,
) -> None:  # fmt: skip
    """Compile a small Llama with FP8 linears, run it with and without the loader, and check what comes out.

    The model is plain torch: float8_e4m3fn weights beside one float32 scale a row, dequantized when they are used.
    Its weights are written as a checkpoint and read back twice, by safetensors and by this loader. Logits are compared
    with the same model whose FP8 bytes are read as e4m3fn, as a GPU does.

    Backends: "neuron" compiles with the Neuron compiler and runs on the device (torch_neuronx.trace, or torch.compile
    where only TorchNeuron is installed) and, where NxD Inference is installed, once more by its own compile and load
    with the flag fp8_rescale. "xla-cpu" is JAX's XLA with weights in F8E4M3, the HLO type that the Neuron compiler's
    flag means: another compiler's reading of the same bytes. "emulate" is torch with the loader's own reading.

    Exit code: 0 if the loaded model's outputs are finite and right; 1 if not; 2 if a backend that was asked for (or a
    Neuron device that is there) cannot be used. It never falls back to another one.
    """
    if hidden % 64:
        raise click.BadParameter(f"{hidden} is no multiple of 64", param_hint="--hidden")
    if compile_only and not names:
        names = ("neuron",)
    try:
        backends = chosen(names, compile_only, target)
    except Missing as missing:
        click.echo(f"Error: {missing}", err=True)
        sys.exit(2)
    shape = Shape(
        hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=hidden // 64,
        num_key_value_heads=1 if hidden % 128 else hidden // 128, num_hidden_layers=layers,
    )  # fmt: skip
    entries = []
    with tempfile.TemporaryDirectory(prefix="neuron-fp8-llama-") as directory:
        for number, backend in enumerate(backends):
            is_neuron = isinstance(backend, (Neuron, NxdInference))
            compute = ("bfloat16" if is_neuron else "float32") if dtype == "auto" else dtype
            case = make_case(
                Path(directory) / str(number), shape, tokens, getattr(torch, compute), method, codes == "exact"
            )
            entries.append(check(backend, case))
    show(entries)
    settings = {"hidden": hidden, "layers": layers, "tokens": tokens, "codes": codes, "compile_only": compile_only}
    write(out, "neuron_compile", settings, {"backends": entries})
    console.print(machine_line(machine()), style="dim")
    wrong = [problem for entry in entries for problem in entry["problems"]]
    for problem in wrong:
        click.echo(f"Error: {problem}", err=True)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
