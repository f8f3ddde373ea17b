"""``neuron-fp8 config``."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import (
    FINDING,
    Command,
    as_given,
    checkpoint_argument,
    choice,
    echo,
    experts_option,
    json_option,
    one_line,
    print_json,
    shell,
    stack_option,
    threads_option,
)

if TYPE_CHECKING:
    from ..tools.settings import PluginSettings, Settings

# inference_demo has no options for these; this hands them to its NeuronConfig
_NO_OPTION = (
    "fp8_rescale",
    "quantization_block_axis",
    "quantization_block_size",
    "moe_fused_nki_kernel_enabled",
)
_LAUNCH = """\
import argparse, neuron_fp8_loader
from neuronx_distributed_inference import inference_demo as demo
neuron_fp8_loader.enable()
create = demo.create_neuron_config
demo.create_neuron_config = lambda model, args: create(model, argparse.Namespace(**vars(args), {more}))
demo.main()"""

DEMO_MODELS = ("llama", "mistral", "mixtral", "dbrx", "qwen2", "qwen3", "qwen3_moe", "gemma3")
"""The model types that ``inference_demo`` runs (Neuron SDK 2.29)."""

_MODULES_FILE = "modules_to_not_convert.json"


@click.command(cls=Command)
@checkpoint_argument
@stack_option
@click.option("--tp", "tp_degree", type=click.IntRange(min=1), help="Tensor parallel degree.")
@click.option("--moe-tp", "moe_tp_degree", type=click.IntRange(min=1), help="Ranks that share each expert.")
@click.option("--moe-ep", "moe_ep_degree", type=click.IntRange(min=1), help="Groups of ranks, each with its experts.")
@choice("method")
@experts_option("experts")
@click.option(
    "--modules-file", metavar="FILE", help="Write modules_to_not_convert to FILE, as inference_demo reads it."
)
@click.option("--headers-only", is_flag=True, help="Read no weights: at once, and blind to what is wrong in them.")
@threads_option
@json_option
@click.pass_context
def config(
    ctx: click.Context,
    ckpt: str,
    stack: str,
    tp_degree: int | None,
    moe_tp_degree: int | None,
    moe_ep_degree: int | None,
    method: str,
    experts: str | None,
    modules_file: str | None,
    headers_only: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """What to tell NxD Inference, vLLM and inference_demo about CKPT, made from its headers.

    The weights are read to see whether the load will go through. Exits with 1, and says why, if it would be refused,
    as `inspect` says, or if CKPT holds no FP8 weights.

    \b
    Example:
      neuron-fp8 config ./Llama-3.1-8B-FP8 --tp 8
      neuron-fp8 config ./Qwen3-235B-A22B-FP8 --tp 64 --moe-ep 16
      neuron-fp8 config ./Qwen3-8B-FP8 --for vllm-neuron
    """
    from ..tools.settings import plugin_settings_for, settings_for
    from ..tools.shards import Target, beside

    if stack == "vllm-neuron":
        other: dict[str, Any] = {"--modules-file": modules_file, "--experts": experts}
        other |= {"--moe-tp": moe_tp_degree, "--moe-ep": moe_ep_degree}
        for option in (name for name, value in other.items() if value):
            raise click.UsageError(f"{option} is for NxD Inference, which --for vllm-neuron does without")
        plugin = plugin_settings_for(ckpt, tp_degree=tp_degree, method=method)
        if plugin.fp8:
            _refuse(ctx, stack, headers_only, {"method": method, "threads": threads})
        if as_json:
            print_json("config", {"checkpoint": ckpt, "for": stack, **asdict(plugin)})
        else:
            echo(_plugin_text(plugin, method))
        if not plugin.fp8:
            ctx.exit(FINDING)
        return
    settings = settings_for(
        ckpt,
        tp_degree=tp_degree,
        method=method,
        experts=experts,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
    )
    if settings.fp8:
        _refuse(ctx, stack, headers_only, {"method": method, "threads": threads}, experts)
    if modules_file and settings.fp8:
        names = settings.neuron_config["modules_to_not_convert"]
        target = Path(modules_file)
        with beside(Target(target.parent, Path(target.name))) as file:
            file.write((json.dumps({"modules_to_not_convert": names}, indent=2) + "\n").encode())
    demo = inference_demo_arguments(settings, modules_file or _MODULES_FILE)
    if as_json:
        print_json(
            "config",
            {
                "checkpoint": ckpt,
                "fp8": settings.fp8,
                "neuron_config": settings.neuron_config,
                "environment": settings.environment,
                "additional_config": {"override_neuron_config": settings.neuron_config},
                "inference_demo": demo,
                "layout": settings.layout,
                "notes": list(settings.notes),
            },
        )
    else:
        echo(_text(settings, demo, modules_file))
    if not settings.fp8:
        ctx.exit(FINDING)


def _refuse(
    ctx: click.Context, stack: str, headers_only: bool, given: dict[str, Any], experts: str | None = None
) -> None:
    """End with the reasons for which ``inspect`` says that the load would be refused, if there are any."""
    from ..checkpoint import open_checkpoint
    from ..tools.scan import scan
    from ..tools.stacks import aim_for

    checkpoint = open_checkpoint(ctx.params["ckpt"])
    aim = aim_for(checkpoint, stack, given, experts)
    refusals = aim.refusals
    if not headers_only:
        refusals = scan(checkpoint, aim.recipe, aim.options, aim.refusals).refusals
    if not refusals:
        return
    texts = [as_given(text) for text in refusals]
    if ctx.params["as_json"]:
        print_json("config", {"checkpoint": ctx.params["ckpt"], "for": stack, "fp8": True, "refusals": texts})
    for text in texts:
        click.echo(f"neuron-fp8: a load for {aim.label} would be refused: {one_line(text)}", err=True)
    ctx.exit(FINDING)


def inference_demo_arguments(settings: Settings, modules_file: str) -> list[str]:
    """The arguments of ``inference_demo`` that say the same as the keyword arguments, as far as it has options.

    Empty where it does not run the model's type.
    """
    values = settings.neuron_config
    if not settings.fp8 or settings.model_type not in (None, *DEMO_MODELS):
        return []
    path = str(values["quantized_checkpoints_path"])
    arguments = ["--model-type", settings.model_type or "MODEL_TYPE", "--task-type", "causal-lm", "run"]
    arguments += ["--model-path", path, "--compiled-model-path", "compiled"]
    if "tp_degree" in values:
        arguments += ["--tp-degree", str(values["tp_degree"])]
    for name in ("moe_tp_degree", "moe_ep_degree", "batch_size"):
        if name in values:
            arguments += [f"--{name.replace('_', '-')}", str(values[name])]
    arguments += ["--quantized", "--quantized-checkpoints-path", path]
    arguments += ["--quantization-dtype", values["quantization_dtype"]]
    arguments += ["--quantization-type", values["quantization_type"]]
    if values["modules_to_not_convert"]:
        arguments += ["--modules-to-not-convert-file", modules_file]
    return [*arguments, "--prompt", "Hello"]  # it wants one


def _text(settings: Settings, demo: list[str], modules_file: str | None) -> str:
    if not settings.fp8:
        return "\n".join(settings.notes)
    values = settings.neuron_config
    lines = ["# environment: in the shell that starts Python or vLLM"]
    lines += [f"export {name}={value}" for name, value in settings.environment.items()]
    lines += ["", "# Python", "import neuron_fp8_loader", "neuron_fp8_loader.enable()", "NeuronConfig("]
    lines += [f"    {name}={_python(value)}," for name, value in values.items()]
    lines += ["    # ... and what you pass otherwise", ")"]
    override = json.dumps({"override_neuron_config": values})
    lines += ["", "# vLLM", f"vllm serve {shell(str(values['quantized_checkpoints_path']))} \\"]
    if "tp_degree" in values:
        lines += [f"    --tensor-parallel-size {values['tp_degree']} \\"]
    if "batch_size" in values:
        lines += [f"    --max-num-seqs {values['batch_size']} \\"]
    lines += [f"    --additional-config {shell(override)}"]
    if demo:
        lines += _launcher(values, demo, modules_file)
    lines += ["", f"# scales: {settings.layout}"]
    lines += [f"# note: {note}" for note in settings.notes]
    return "\n".join(lines)


def _launcher(values: dict[str, Any], demo: list[str], modules_file: str | None) -> list[str]:
    lines = ["", "# inference_demo, which has no option of its own for the flag"]
    if "--modules-to-not-convert-file" in demo and not modules_file:
        lines += [f"# ({_MODULES_FILE}: neuron-fp8 config CKPT --modules-file {_MODULES_FILE})"]
    launch = _LAUNCH.format(more=", ".join(f"{name}={values[name]!r}" for name in _NO_OPTION if name in values))
    return [*lines, f"python -c {shlex.quote(launch)} \\", f"    {' '.join(_words(demo))}"]


def _plugin_text(settings: PluginSettings, method: str) -> str:
    if not settings.fp8:
        return "\n".join(settings.notes)
    command = " ".join(map(shell, settings.command))
    export = " ".join(f"{name}={value}" for name, value in settings.environment.items())
    if method != "half":
        command = f"{export} {command}"  # the name alone stands for half
    lines = ["# vLLM Neuron plugin without NxD Inference", command]
    lines += ["", "# the same, where the command line cannot be changed", f"export {export}"]
    lines += ["", f"# weights: {settings.design}"]
    lines += [f"# note: {note}" for note in settings.notes]
    return "\n".join(lines)


def _words(arguments: list[str]) -> list[str]:
    """Quoted for a shell, a line for each option."""
    words: list[str] = []
    for argument in arguments:
        starts = argument.startswith("--") or argument == "run"
        words.append(("\\\n    " if starts and words else "") + shell(argument))
    return words


def _python(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + "".join(f"        {item!r},\n" for item in value) + "    ]"
    return repr(value)
