"""Which of the two happens to a checkpoint: the plugin's static FP8 layers keep it, or it is read as bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...codes.device import needs_rescale
from ...options import Options
from ...plan import Plan
from .names import spellings

STATIC_ARCHITECTURES = ("LlamaForCausalLM",)
"""Those of the plugin's registry that have static FP8 layers: one scale a tensor for weights, and for inputs."""

MODULES = tuple(f"self_attn.{m}_proj" for m in "qkvo") + tuple(f"mlp.{m}_proj" for m in ("gate", "up", "down"))
"""What these layers hold in FP8, all of it or nothing."""

# What the plugin's parser takes (its model/llama3/quantization.py), which only some of ModelOpt's own files are. It
# says nothing of the KV cache's dtype, which is vLLM's --kv-cache-dtype.
PRESENTED: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "kv_cache_quant_algo": "FP8",
    "exclude_modules": ["lm_head"],
}


@dataclass(frozen=True)
class Design:
    """What happens to a checkpoint.

    Attributes:
        kept: do the plugin's static FP8 layers take the weights as FP8? Otherwise they are read as bfloat16.
        why: in words, for the log and the command line.
    """

    kept: bool
    why: str

    def __str__(self) -> str:
        return self.why


def design_for(
    architecture: str, plan: Plan | None, config: Mapping[str, Any] | None, options: Options, platform: str | None
) -> Design | None:
    """What happens to a checkpoint; None where it holds no FP8 weights.

    Args:
        architecture: as ``config.json`` names it.
        plan: from its headers; None where its files are not at hand, so that its config has to tell.
        config: its ``quantization_config``.
        options: of the flag.
        platform: "trn2", "trn3", ...; None where it is not known.
    """
    if plan is None:
        declared = declares(config)
        if declared is None:
            return None
        reason = "" if declared == "static" else "its config declares no static scales, one a tensor"
    else:
        if not plan.fp8_weights and not any(info.dtype == "float8_e5m2" for info in plan.tensors.values()):
            return None
        reason = _not_static(plan)
    if options.dequantize:
        reason = "the flag asks for it"
    elif architecture not in STATIC_ARCHITECTURES:
        reason = f"the plugin has no static FP8 layers for {architecture or 'its architecture'}"
    if reason:
        return Design(False, f"read as bfloat16, value x scale ({reason})")
    if not needs_rescale(platform):
        return Design(True, f"kept FP8 in the plugin's static layers; {platform} reads e4m3fn as it is")
    return Design(True, f"kept FP8 in the plugin's static layers, rescaled by {options.method}")


def _not_static(plan: Plan) -> str:
    """Why the static layers cannot take the checkpoint; "" where they can."""
    pairs = {pair.module: pair for pair in plan.pairs}
    inputs = {scale.name for scale in plan.activation_scales if scale.kind == "input"}
    layers = {
        name.split(".self_attn.")[0] for name in plan.tensors if ".self_attn." in name and name.endswith(".weight")
    }
    for layer in sorted(layers):
        for module in (f"{layer}.{m}" for m in MODULES):
            if module not in pairs:
                return f"{module} is not float8_e4m3fn"
            if pairs[module].granularity.kind != "tensor" or pairs[module].granularity.experts:
                return f"{module} has one scale per {pairs[module].granularity}"
            scale = f"{module}.input_scale"
            if scale not in inputs and not any(name in inputs for name, _ in spellings(scale)):
                return f"{module} has no input scale: activations are to be quantized as they come"
    return "" if layers else "no layer of it has the names of a Llama"


def declares(config: Mapping[str, Any] | None) -> str | None:
    """What a ``quantization_config`` promises: ``"static"`` FP8 with one scale a tensor for weights and inputs, other
    ``"fp8"`` weights, or None."""
    if not isinstance(config, Mapping):
        return None
    method = str(config.get("quant_method", "")).lower().replace("_", "-")
    if method == "modelopt":
        inner = config.get("quantization")
        algo = str((inner if isinstance(inner, Mapping) else config).get("quant_algo", "")).upper()
        return "static" if algo == "FP8" else "fp8" if "FP8" in algo and not algo.startswith("W4") else None
    if method in ("fp8", "fbgemm-fp8"):
        static = config.get("activation_scheme") == "static" and not config.get("weight_block_size")
        return "static" if static and method == "fp8" else "fp8"
    if method == "compressed-tensors":
        groups = config.get("config_groups")
        found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
        return _declared([(g.get("weights"), g.get("input_activations")) for g in found], "strategy", "tensor")
    if method == "quark":
        group = config.get("global_quant_config")
        found = [group] if isinstance(group, Mapping) else []
        return _declared([(g.get("weight"), g.get("input_tensors")) for g in found], "qscheme", "per_tensor")
    return "fp8" if method in ("torchao", "auto-round", "quanto") and "float8" in str(config).lower() else None


def _declared(groups: list[tuple[Any, Any]], key: str, tensor: str) -> str | None:
    weights = [w for w, _ in groups if isinstance(w, Mapping) and _is_fp8(w)]
    inputs = [i for w, i in groups if isinstance(w, Mapping) and _is_fp8(w)]
    if not weights:
        return None
    static = all(
        isinstance(spec, Mapping) and spec.get(key) == tensor and not (spec.get("dynamic") or spec.get("is_dynamic"))
        for spec in (*weights, *inputs)
    )
    return "static" if static and len(weights) == len(groups) else "fp8"


def _is_fp8(weights: Mapping[str, Any]) -> bool:
    by_type = weights.get("type") == "float" and weights.get("num_bits") == 8
    return by_type or str(weights.get("dtype", "")).startswith("fp8_e4m3")
