"""What to tell NxD Inference, ``inference_demo`` and vLLM, with either Neuron plugin, about a checkpoint.

Made from headers alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import open_checkpoint
from ..checkpoint.regular import LONGEST_CONFIG, read_json
from ..codes.formats import METHODS
from ..errors import CheckpointError, OptionError
from ..integrations.flag import BLOCKWISE
from ..integrations.modules import with_bias
from ..integrations.names import modules_to_not_convert
from ..integrations.vllm_neuron.design import design_for
from ..integrations.vllm_neuron.flag import ENV, QUANTIZATION, target
from ..options import Options
from ..plan import Plan, plan_for
from ..plan.qkv import unfused
from .expert_types import EXPERTS, ExpertType, dequantized_experts, expert_type, flag_value
from .heads import heads_of, pads_mlp
from .moe_settings import moe_settings
from .others import other_kind

ENVIRONMENT = {"XLA_HANDLE_SPECIAL_SCALAR": "1", "UNSAFE_FP8FNCAST": "1"}
"""What the Neuron runtime must find set for FP8; only NxD Inference's own demo sets it by itself."""

QUANTIZATION_DTYPE = "f8e4m3"
"""The one spelling for which NxD Inference gives the compiler ``--experimental-unsafe-fp8e4m3fn-as-fp8e4m3``."""

_NO_CONFIG = "there is no config.json that can be read here, and the stack needs the model's"
_BIASED = "NxD quantizes no such layer, so they are loaded as bfloat16"
_PADDED = (
    "one scale a tensor, which the flag expands exactly to one an output row: NxD pads weights at this degree, and "
    "cannot pad a scale of one value"
)


@dataclass(frozen=True)
class Settings:
    """How to run a checkpoint on Neuron.

    Attributes:
        neuron_config: keyword arguments for ``NeuronConfig``.
        environment: variables to export.
        layout: what becomes of the scales on the way to NxD's layers, in words.
        notes: what else to know.
        model_type: as config.json has it and ``inference_demo`` takes it; None where it does not tell.
        fp8: does the checkpoint hold FP8 weights at all?
    """

    neuron_config: dict[str, Any]
    environment: dict[str, str]
    layout: str
    notes: tuple[str, ...]
    model_type: str | None
    fp8: bool


def settings_for(
    path: str | os.PathLike[str],
    *,
    tp_degree: int | None = None,
    method: str = "half",
    experts: str | None = None,
    moe_tp_degree: int | None = None,
    moe_ep_degree: int | None = None,
) -> Settings:
    """Settings for a checkpoint.

    Args:
        path: a directory, a ``.safetensors`` file or an index; NxD Inference is given its directory.
        tp_degree: tensor parallel degree, left out of the result where None.
        method: ``"half"`` or ``"ratio"``.
        experts: ``"expert_wise"`` (one scale an output row of each expert; the default) or ``"blockwise"``.
        moe_tp_degree, moe_ep_degree: how the ranks share experts; one follows from the other and ``tp_degree``.

    Raises:
        CheckpointError, PlanError: as ``plan_checkpoint``; OptionError: a degree below 1, or one at which NxD cannot
            shard the heads; degrees for experts that NxD cannot do; an unknown method, ``experts`` that this
            checkpoint does not have.
    """
    if method not in METHODS:
        raise OptionError(f"method={method!r}: expected {' or '.join(map(repr, METHODS))}")
    if tp_degree is not None and tp_degree < 1:
        raise OptionError(f"tp_degree={tp_degree}: expected a whole number from 1 up")
    checkpoint = open_checkpoint(path)
    plan = plan_for(checkpoint)
    directory = checkpoint.directory.resolve()
    fp8 = bool(plan.fp8_weights)
    chosen = expert_type(plan, experts)
    quantization_type, layout = nxd_layout(plan, chosen)
    notes = _notes(plan)
    other = other_kind(plan, "nxd", _model_type(directory))
    if other is not None:
        notes.append(f"no FP8 weights: {other}")
    config = config_in(directory)
    notes += [_NO_CONFIG] if fp8 and not config else []
    biased = set(with_bias(plan))
    if biased:
        notes.append(f"{len(biased)} FP8 projections of queries, keys and values have a bias: {_BIASED}")
    heads = heads_of(config)
    if tp_degree is not None and fp8:
        notes += filter(None, [heads.what_happens(tp_degree, plan.source)] if heads else [])
        pads = (heads is not None and heads.pads_scales(tp_degree)) or pads_mlp(plan, tp_degree)
        if pads and quantization_type == "per_tensor_symmetric":
            quantization_type, layout = "per_channel_symmetric", _PADDED
    neuron_config: dict[str, Any] = {} if tp_degree is None else {"tp_degree": tp_degree}
    shares, more = moe_settings(
        plan, tp_degree, moe_tp_degree, moe_ep_degree, blockwise=quantization_type == BLOCKWISE
    )
    neuron_config |= shares
    floats = dequantized_experts(plan) if chosen and chosen.floats else set()
    floats |= {pair.weight for pair in plan.pairs if pair.module in biased}
    if fp8:
        neuron_config |= {
            "quantized": True,
            "quantized_checkpoints_path": str(directory),
            "quantization_dtype": QUANTIZATION_DTYPE,
            "quantization_type": quantization_type,
            **(chosen.blocks if chosen else {}),
            "modules_to_not_convert": modules_to_not_convert(unfused(plan), floats),
            "fp8_rescale": flag_value(method, floats=bool(chosen and chosen.floats)),
        }
    return Settings(
        neuron_config, dict(ENVIRONMENT) if fp8 else {}, layout, (*notes, *more), _model_type(directory), fp8
    )


@dataclass(frozen=True)
class PluginSettings:
    """How to run a checkpoint with the vLLM Neuron plugin that does without NxD Inference.

    Attributes:
        command: of ``vllm serve``.
        environment: the variable that does the same where the command line cannot be changed.
        kept: do the weights stay FP8? Otherwise they are read as bfloat16.
        design: what happens to the weights, in words.
        notes: what else to know.
        fp8: does the checkpoint hold FP8 weights at all?
    """

    command: list[str]
    environment: dict[str, str]
    kept: bool
    design: str
    notes: tuple[str, ...]
    fp8: bool


def plugin_settings_for(
    path: str | os.PathLike[str], *, tp_degree: int | None = None, method: str = "half"
) -> PluginSettings:
    """Settings for the vLLM Neuron plugin; arguments and errors as for ``settings_for``.

    ``tp_degree`` is handed on to vLLM; a note says where it does not divide the attention heads, of which the
    plugin's models (0.24) give each rank as many, and pad none.
    """
    checkpoint = open_checkpoint(path)
    plan = plan_for(checkpoint)
    directory = (checkpoint.index.parent if checkpoint.index else checkpoint.directory).resolve()
    config = config_in(directory)
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    platform = target()
    design = design_for(
        architecture, plan, config.get("quantization_config"), Options.of({"method": method}), platform
    )
    notes = list(plan.warnings)
    if design is None:
        other = other_kind(plan, "vllm-neuron", _model_type(directory))
        return PluginSettings([], {}, False, "", (*notes, f"no FP8 weights: {other}"), False)
    command = ["vllm", "serve", str(directory), "--quantization", QUANTIZATION]
    if tp_degree is not None:
        command += ["--tensor-parallel-size", str(tp_degree)]
        heads = heads_of(config)
        if heads is not None and heads.attention % tp_degree:
            notes.append(
                f"--tensor-parallel-size {tp_degree} does not divide the model's {heads.attention} attention heads, "
                "which the plugin shares out evenly, without padding"
            )
    if any(scale.kind == "kv" for scale in plan.activation_scales):
        notes.append("the KV cache scales are read where --kv-cache-dtype fp8 asks for an FP8 cache")
    notes += [] if config else [_NO_CONFIG]
    if not design.kept:
        notes.append("as bfloat16, weights take twice the memory that they take as FP8")
    if plan.unscaled:
        notes.append(
            f"{len(plan.unscaled)} FP8 weights have no scale, which stops the load; {ENV}="
            '\'{"unscaled": "dequantize"}\' takes their values as they are'
        )
    environment = {ENV: "1" if method == "half" else method}
    return PluginSettings(command, environment, design.kept, str(design), tuple(notes), True)


def nxd_layout(plan: Plan, experts: ExpertType | None) -> tuple[str, str]:
    """The ``quantization_type`` for a checkpoint, and what its scales must become for it, in words.

    ``experts`` is what ``expert_type`` gives for it. NxD's layers take one scale a tensor ([1]) or one an output row
    ([out, 1]); anything else is brought into the second form while loading.
    """
    if not plan.pairs:
        return "per_channel_symmetric", "no scales: NxD's quantized layers need none of them changed"
    if experts is not None:
        return experts.kind, experts.layout
    kinds = {pair.granularity.kind for pair in plan.pairs}
    stacks = any(pair.granularity.experts or EXPERTS.search(pair.weight) for pair in plan.pairs)
    shapes = {plan.tensors[pair.scale].shape for pair in plan.pairs if pair.granularity.kind == "row"}
    if kinds == {"tensor"} and not stacks:
        return "per_tensor_symmetric", (
            "one scale a tensor, which NxD takes as [1]; with fused_qkv=True use per_channel_symmetric, to which the "
            "flag expands them exactly"
        )
    if "block" in kinds:
        sizes = sorted({"x".join(map(str, p.granularity.block)) for p in plan.pairs if p.granularity.block})
        return "per_channel_symmetric", (
            f"block scales ({', '.join(sizes)}), of which NxD's layers take none: the flag requantizes them to one "
            "scale an output row while loading"
        )
    if "unknown" in kinds:
        return "per_channel_symmetric", (
            "scales of a layout that is not known; NxD's layers take one an output row, and may refuse them"
        )
    if kinds == {"row"} and not stacks and all(len(shape) == 2 for shape in shapes):
        return "per_channel_symmetric", "one scale an output row [out, 1], as NxD takes it"
    return "per_channel_symmetric", (
        "one scale an output row is what NxD takes; the flag expands and reshapes the checkpoint's to that, exactly"
    )


def _notes(plan: Plan) -> list[str]:
    notes = list(plan.warnings)
    kinds = {a.kind for a in plan.activation_scales}
    if "input" in kinds:
        notes.append(
            "static activation scales are doubled with the weights; NxD reads them only with "
            "activation_quantization_type set"
        )
    if "kv" in kinds:
        notes.append("KV cache scales are doubled with the weights; NxD Inference does not map them to its cache")
    if plan.unscaled:
        notes.append(
            f"{len(plan.unscaled)} FP8 weights have no scale; if they do not fit, the load stops, unless fp8_rescale="
            '{"unscaled": "dequantize"} makes them bf16'
        )
    return notes


def _model_type(directory: Path) -> str | None:
    found = config_in(directory).get("model_type")
    return found if isinstance(found, str) else None


def config_in(directory: Path) -> dict[str, Any]:
    """config.json; empty where there is none that can be read."""
    try:
        found = read_json(directory / "config.json", LONGEST_CONFIG)
    except (OSError, CheckpointError):
        return {}
    return found if isinstance(found, dict) else {}
