"""``python -m benchmarks.fidelity``: what each way to fit +-240 costs, in weights and in logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file

from neuron_fp8_loader import neuron_view
from neuron_fp8_loader.codes import formats

from . import score as scoring
from . import sources
from .common import WrongAnswer, console, finite, machine, machine_line, out_option, table, write
from .fidelity_plot import draw
from .layout import BLOCK
from .llama import LINEARS, Llama, Shape, prompt, random_llama

Read = Callable[[torch.Tensor], torch.Tensor]


def by_code() -> dict[str, list[float | None]]:
    """Relative error of each positive e4m3fn code 0x01..0x7e under ``half``, ``ratio`` and clamping."""
    codes = torch.arange(1, 0x7F, dtype=torch.uint8)
    before = codes.view(torch.float8_e4m3fn).double()
    found = {}
    for name, out, factor in (
        ("half", torch.tensor(list(formats.HALF.out))[codes.int()], 2.0),
        ("ratio", torch.tensor(list(formats.RATIO.out))[codes.int()], 448 / 240),
        ("clamp to 240", codes.clamp_max(0x77), 1.0),
    ):
        after = out.to(torch.uint8).view(torch.float8_e4m3fn).double() * factor
        error = ((after - before).abs() / before).tolist()
        found[name] = [0.0 if e < 1e-12 else finite(e) for e in error]
    return found


def logits(shape: Shape, tokens: int, batch: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """KL divergence and top-1 agreement of a small Llama's next-token distributions.

    Its linears are quantized with one scale a row; every way to fit +-240 is applied to all of them, and read with
    subnormals kept and with subnormals taken for zero. Against the checkpoint read as e4m3fn, and against bf16.
    """
    tensors = random_llama(shape, seed, gain=6.0)
    names = [f"model.layers.{n}.{name}.weight" for n in range(shape.num_hidden_layers) for name in LINEARS]
    ids = prompt(shape, tokens, batch)

    def run(convert: Callable[[str], torch.Tensor] | None) -> torch.Tensor:
        own = tensors if convert is None else tensors | {name: convert(name) for name in names}
        with torch.no_grad():
            result: torch.Tensor = Llama(shape, own, tokens)(ids)
        return result.double().log_softmax(-1).view(-1, shape.vocab_size)

    original = run(None)
    weights = {name: sources.per_row(tensors[name]) for name in names}
    blocks = {name: sources.per_block(tensors[name]) for name in names}
    checkpoint = run(lambda name: weights[name].codes.float() * weights[name].spread)
    block_checkpoint = run(lambda name: blocks[name].codes.float() * blocks[name].spread)

    def judged(made: dict[str, scoring.Converted], read: Read, reference: torch.Tensor) -> dict[str, Any]:
        seen = run(lambda name: read(made[name][0]) * made[name][1])
        if not bool(torch.isfinite(seen).all()):
            return {"finite": False, "nan": int(seen.isnan().any(-1).sum()), "positions": seen.shape[0]}
        return {"finite": True, "positions": seen.shape[0]} | {
            f"{what}_{which}": value
            for which, target in (("checkpoint", reference), ("original", original))
            for what, value in (("kl", divergence(target, seen)), ("top_1", agreement(target, seen)))
        }

    found: dict[str, dict[str, Any]] = {}
    for label, methods, pool, reference in (
        ("", scoring.METHODS, weights, checkpoint),
        ("blocks: ", scoring.layouts(), blocks, block_checkpoint),
    ):
        for method, convert in methods.items():
            made = {name: convert(weight) for name, weight in pool.items()}
            found[label + method] = judged(made, lambda codes: codes.float(), reference)
            found[label + method]["flushed"] = judged(made, scoring.flushed, reference)
    made = {name: scoring.unchanged(weight) for name, weight in weights.items()}
    found["without the loader"] = judged(made, neuron_view, checkpoint)
    return found


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence in nats, of log probabilities [positions, vocabulary]."""
    return max(0.0, float((reference.exp() * (reference - other)).sum(-1).mean()))


def agreement(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Share of positions with the same most probable token."""
    return float((reference.argmax(-1) == other.argmax(-1)).double().mean())


def check(results: dict[str, Any]) -> None:
    """Raise WrongAnswer where the package's own method is not what its documentation says."""
    for source, methods in results["rows"].items():
        half = methods["half"]
        if half["sqnr_db"] is not None and half["sqnr_db"] < 90:
            raise WrongAnswer(f"{source}: half is {half['sqnr_db']:.1f} dB from the checkpoint")
    for source, methods in results["blocks"].items():
        own = methods.get("block -> row, neuron_fp8_loader")
        public = methods["block -> row, public scripts"]["sqnr_db"]
        if own and own["sqnr_db"] is not None and public is not None and own["sqnr_db"] < public - 0.1:
            raise WrongAnswer(f"{source}: block -> row is {own['sqnr_db']:.1f} dB, the public scripts {public:.1f} dB")
    if not results["logits"]["half"]["finite"] or results["logits"]["without the loader"]["finite"]:
        raise WrongAnswer("logits: half must be finite, and no loader must not")


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def _rows(results: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    return [
        [
            f"{source}: {method}", f"{r['changed'] * 100:.3f}", _db(r["sqnr_db"]), f"{r['largest_relative']:.3f}",
            f"{r['largest_of_row']:.1e}", _db(r["sqnr_original_db"]), f"{r['original_largest_of_row']:.1e}",
            _db(r["sqnr_flushed_db"]), _db(r["sqnr_original_flushed_db"]),
        ]
        for source, methods in results.items() for method, r in methods.items()
    ]  # fmt: skip


def show(results: dict[str, Any]) -> None:
    columns = ["", "changed %", "dB", "worst", "of row", "dB orig.", "of row", "dB flushed", "dB orig. flushed"]
    caption = (
        "dB: SQNR against the checkpoint, and against the bf16 original; worst: largest error relative to the weight "
        "itself, and to its row's largest; flushed: were the device to take subnormals for zero, which is not known."
    )
    table("weights, one scale as in the checkpoint", columns, _rows(results["rows"]), caption)
    table("weights, 128 x 128 blocks to one scale a row", columns, _rows(results["blocks"]))
    rows = []
    for method, r in results["logits"].items():
        if not r["finite"]:
            rows.append([method, f"{r['nan']} of {r['positions']} nan", "-", "-", "-", "-"])
            continue
        low = r.get("flushed", {})
        rows.append(
            [method, f"{r['kl_checkpoint']:.1e}", f"{r['top_1_checkpoint'] * 100:.1f}", f"{r['kl_original']:.1e}",
             f"{r['top_1_original'] * 100:.1f}", f"{low['kl_original']:.1e}" if low.get("finite") else "-"]
        )  # fmt: skip
    columns = ["", "KL checkpoint", "top-1 %", "KL original", "top-1 %", "KL original, flushed"]
    table("logits of a small Llama: KL divergence (nats) and top-1 agreement", columns, rows)


@click.command(context_settings={"show_default": True})
@click.option("--side", type=click.IntRange(128), default=1024, help="Random weights are [side, side].")
@click.option("--hidden", type=click.IntRange(64), default=256, help="Hidden size of the Llama; a multiple of 64.")
@click.option("--layers", type=click.IntRange(1), default=4, help="Layers of the Llama.")
@click.option("--tokens", type=click.IntRange(1), default=128, help="Tokens of a prompt; eight prompts.")
@click.option(
    "--checkpoints",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Directory of checkpoints with a _base directory of their bf16 originals; default: "
    "$NEURON_FP8_SHARED/checkpoints, or shared/checkpoints beside the repository, if there.",
)
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="One FP8 checkpoint of your own; needs --base.",
)
@click.option(
    "--base",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="The .safetensors file of its original, with the same names.",
)
@out_option  # fmt: skip
def main(
    side: int, hidden: int, layers: int, tokens: int, checkpoints: Path | None,
    checkpoint: Path | None, base: Path | None, out: Path,
) -> None:  # fmt: skip
    """What "half", "ratio", clamping to 240, and taking block scales to one scale a row do to the numbers.

    Over random weights of several distributions, and over real checkpoints whose bf16 originals are there: the share
    of weights whose value changes, signal to quantization noise (SQNR) and largest errors, against the checkpoint
    and against the original. Then the logits of a small random Llama: KL divergence and top-1 agreement.

    It is not known whether a Neuron device takes FP8 subnormals for zero, so both readings are shown. All numbers are
    float64 arithmetic on what the package returns. A picture goes beside the JSON.
    """
    if bool(checkpoint) != bool(base):
        raise click.UsageError("--checkpoint and --base go together")
    if hidden % 64:
        raise click.BadParameter(f"{hidden} is no multiple of 64", param_hint="--hidden")
    results: dict[str, Any] = {"rows": {}, "blocks": {}, "codes": by_code()}
    for name, original in sources.distributions(side).items():
        results["rows"][name] = scoring.score([sources.per_row(original)], scoring.METHODS)
        for label, powers in (("", False), (", scales 2^n", True)):
            weight = sources.per_block(original, powers)
            results["blocks"][name + label] = scoring.score([weight], scoring.layouts())
    directory = checkpoints or sources.shared_checkpoints()
    found = dict(sources.real(directory)) if directory.is_dir() else {}
    if checkpoint and base:
        found[checkpoint.name] = sources.beside(checkpoint, load_file(base))
    if not found:
        console.print(
            f"no real checkpoints with originals under {directory.name}: random weights only", style="yellow"
        )
    for name, weights in found.items():
        results["rows"][name] = scoring.score(weights, scoring.METHODS)
        blocks = [weight for weight in weights if weight.block == (BLOCK, BLOCK)]
        if blocks:
            results["blocks"][name] = scoring.score(blocks, scoring.layouts())
    results["real"] = list(found)
    shape = Shape(
        hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=hidden // 64,
        num_key_value_heads=1 if hidden % 128 else hidden // 128, num_hidden_layers=layers,
    )  # fmt: skip
    results["logits"] = logits(shape, tokens, 8)
    check(results)
    show(results)
    settings = {"side": side, "hidden": hidden, "layers": layers, "tokens": tokens}
    path = write(out, "fidelity", settings, results)
    draw(path)
    console.print(machine_line(machine()), style="dim")


if __name__ == "__main__":
    main()
