"""What a checkpoint is that holds no FP8 weights, and whether a Neuron stack loads it without this package.

What stacks load is read from their sources: NxD Inference's ``QuantizedDtype`` (int8 and FP8) and its GPT-OSS model
(``models/gpt_oss``, MXFP4), SDK 2.29; the registry of the vLLM Neuron plugin, 0.24.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Plan

_PLAIN = frozenset(("bfloat16", "float16", "float32", "float64"))


@dataclass(frozen=True)
class Other:
    """A checkpoint without FP8 weights.

    Attributes:
        name: what it is.
        loads: does the stack load it as it is? None where that is not known.
        advice: what to do.
    """

    name: str
    loads: bool | None
    advice: str

    def __str__(self) -> str:
        return f"{self.name}; {self.advice}"


def other_kind(plan: Plan, stack: str, model_type: str | None = None) -> Other | None:
    """What a checkpoint without FP8 weights is, by its tensors first and by what its config declares second.

    Args:
        plan: of the checkpoint.
        stack: ``"nxd"`` or ``"vllm-neuron"``.
        model_type: as config.json has it.

    Returns:
        None where there are FP8 weights.
    """
    if plan.fp8_weights:
        return None
    stack_name = "the vLLM Neuron plugin" if stack == "vllm-neuron" else "NxD Inference"
    flag = "fp8_rescale" if stack == "nxd" else "the flag"
    name = _name(plan)
    if name == "MXFP4" and model_type == "gpt_oss":
        return Other(name, True, f"{stack_name} loads GPT-OSS by itself, without {flag}")
    if name == "int8" and stack == "nxd":
        return Other(
            name,
            True,
            'NxD Inference has int8 layers: quantized=True, quantization_dtype="int8", for weights X.weight [out, in] '
            "with X.weight_scale [out, 1] or [1]; fp8_rescale is not needed",
        )
    if name == "plain":
        dtypes = sorted({plan.tensors[n].dtype for n in plan.tensors} & _PLAIN)
        return Other(f"not quantized ({', '.join(dtypes)})", True, f"{stack_name} loads it as it is, without {flag}")
    if name == "unknown":
        what = f"declared as {plan.declared.method}" if plan.declared.method else "of a kind that is not known"
        return Other(f"no FP8 weights, {what}", None, f"whether {stack_name} loads it cannot be told from here")
    return Other(
        name,
        False,
        f"{stack_name} does not load it, and it is not this package's: take the model's FP8 or bfloat16 checkpoint",
    )


def _name(plan: Plan) -> str:
    method = plan.declared.method.lower()
    tensors = plan.tensors
    dtypes = {info.dtype for info in tensors.values()}

    def any_name(*endings: str, dtype: str = "") -> bool:
        return any(n.endswith(endings) and (not dtype or info.dtype == dtype) for n, info in tensors.items())

    if any_name(".qweight"):
        return "AWQ (packed int4)" if method.startswith("awq") else "GPTQ (packed integers)"
    if any_name(".absmax", ".quant_map", ".SCB") or any(".quant_state." in n for n in tensors):
        return "bitsandbytes"
    if any_name(".weight_packed", dtype="int32"):
        return "compressed-tensors int4 (packed)"
    if plan.untouched_fp8 and "uint8" in dtypes:
        return "NVFP4 (packed float4; its float8_e4m3fn tensors are scales)"
    packed = any_name("_blocks", "_packed", ".weight", dtype="uint8")
    if packed and (any_name("_scales", "_scale", dtype="uint8") or "float8_e8m0fnu" in dtypes):
        return "MXFP4"
    if "float8_e5m2" in dtypes:
        return "float8_e5m2"
    if any_name(".weight", dtype="int8"):
        return "int8"
    return "plain" if dtypes and dtypes <= _PLAIN | {"int64", "bool"} else "unknown"
