from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class QuantizationSpec:
    linear_scheme: str

    @classmethod
    def from_hf_quantization_config(cls, quantization_config):
        if not quantization_config:
            return None
        method = str(quantization_config.get("quant_method", "")).lower()
        if method == "compressed-tensors":
            return None
        if method != "modelopt":
            raise ValueError(f"Unsupported quantization_config.quant_method={method!r}.")
        inner = quantization_config.get("quantization")
        source = inner if isinstance(inner, dict) else quantization_config
        if str(source.get("quant_algo", "")).upper() != "FP8":
            raise ValueError("Llama3 currently only supports ModelOpt quant_algo='FP8'.")
        if str(source.get("kv_cache_quant_algo", "")).upper() != "FP8":
            raise ValueError("Llama3 currently requires ModelOpt kv_cache_quant_algo='FP8'.")
        if not any(fnmatch("lm_head", pattern) for pattern in source.get("exclude_modules") or []):
            raise ValueError("ModelOpt FP8 checkpoints for Llama3 must list 'lm_head' in exclude_modules.")
        return cls("fp8_static_per_tensor")


def resolve_attention_mlp_classes(quant_spec, layer_index):
    from . import model as bf16

    if quant_spec is None:
        return bf16.LlamaAttention, bf16.LlamaMLP
    from . import model_static_fp8 as fp8

    return fp8.LlamaAttention, fp8.LlamaMLP
