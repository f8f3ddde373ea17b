"""The published conventions, as data.

The dtype of the weight decides that it *is* an FP8 weight; these names only say where its scale lies. All of them
dequantize by multiplying, ``weight_scale_inv`` too: "inv" is a name there, not a reciprocal (DeepSeek-V3,
README_WEIGHTS.md).
"""

from __future__ import annotations

from .convention import Convention

PUBLISHED: tuple[Convention, ...] = (
    Convention(
        "weight_scale",
        "{}.weight",
        "{}.weight_scale",
        "compressed-tensors, llm-compressor, NVIDIA ModelOpt, AMD Quark, FBGEMM, AutoFP8, vLLM, auto-round, ComfyUI",
    ),
    Convention(
        "weight_scale_inv",
        "{}.weight",
        "{}.weight_scale_inv",
        "DeepSeek, Qwen, Kimi, MiniMax, GLM, MiMo, Ling, transformers fine-grained FP8, Ministral, auto-round",
    ),
    Convention("scale", "{}.weight", "{}.scale", "DeepSeek inference code, DeepSeek V4, NxD Inference"),
    Convention("qscale_weight", "{}.weight", "{}.qscale_weight", "Mistral (params.json)"),
    Convention("scale_weight", "{}.weight", "{}.scale_weight", "ComfyUI scaled fp8"),
    Convention("weights_scaling_factor", "{}.weight", "{}.weights_scaling_factor", "TensorRT-LLM"),
    Convention("torchao", "{}._weight_qdata", "{}._weight_scale", "torchao Float8Tensor"),
    Convention("quanto", "{}.weight._data", "{}.weight._scale", "optimum-quanto qfloat8"),
    Convention("quanto_weight", "{}.weight", "{}.weight._scale", "optimum-quanto qfloat8"),
    # fused experts: parameters without a module of their own
    Convention("fused_scale_inv", "{}", "{}_scale_inv", "transformers fine-grained FP8 (fused experts)"),
    Convention(
        "fused_weight_scale", "{}", "{}_weight_scale", "ModelOpt Llama 4, DBRX (fused experts)", transposed=True
    ),
    Convention(
        "fused_scale", "{}", "{}_scale", "FBGEMM Llama 4 (fused experts)", transposed=True, scale_transposed=True
    ),
    Convention("fused_scales", "{}", "{}_scales", "fused experts"),
    Convention("fused_dot_weight_scale", "{}", "{}.weight_scale", "fused experts"),
    Convention("fused_dot_scale", "{}", "{}.scale", "NxD Inference (fused experts)", transposed=True),
)
"""In the order in which they are tried."""
