"""Every published layout of FP8 (e4m3fn) checkpoints, as a table: tensors in, expected plan out.

A tensor is written ``"dtype shape"``: ``"fp8 256 448"``; a scale of no dimensions is ``"f32"``. ``pairs`` maps a
weight to its scale and the scale's granularity, ``activations`` lists what is multiplied beside the pairs, and all
else must come through byte for byte. ``number`` counts the layouts, with variants under the same number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import filled

TORCH = {
    "fp8": "float8_e4m3fn", "fnuz": "float8_e4m3fnuz", "e5m2": "float8_e5m2", "e8m0": "float8_e8m0fnu",
    "f32": "float32", "bf16": "bfloat16", "f16": "float16", "u8": "uint8", "i8": "int8", "i32": "int32",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    number: int
    title: str
    tensors: dict[str, str]
    pairs: dict[str, tuple[str, str]]
    convention: str = "weight_scale"
    activations: tuple[str, ...] = ()
    reciprocal: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    files: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    filename: str = "model.safetensors"
    declared: str = ""
    block: tuple[int, int] | None = None

    @property
    def id(self) -> str:
        return f"{self.number:02d} {self.title}".replace(" ", "-")


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    dtype, *shape = text.split()
    return TORCH[dtype], tuple(map(int, shape))


def made(tensors: dict[str, str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors, as a checkpoint might hold them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: filled(*parse(text), generator) for name, text in tensors.items()}


def _hf(section: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", **more, "quantization_config": section}


def _ct(strategy: str, **weights: Any) -> dict[str, Any]:
    spec = {"type": "float", "num_bits": 8, "strategy": strategy, **weights}
    return _hf(
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": spec}},
            "ignore": ["lm_head", "re:.*gate$"],
        }
    )


def _fp8(**more: Any) -> dict[str, Any]:
    return _hf({"quant_method": "fp8", "activation_scheme": "dynamic", **more})


_BLOCKS = _fp8(fmt="e4m3", weight_block_size=[128, 128])
_CT = "compressed-tensors float-quantized"
L = "model.layers.0"
Q, K, V, OUT = (f"{L}.self_attn.{x}_proj" for x in "qkvo")
DOWN = f"{L}.mlp.down_proj"
PLAIN = {f"{L}.input_layernorm.weight": "bf16 16", "lm_head.weight": "bf16 32 16"}
EXPERTS = f"{L}.mlp.experts"


ROWS: tuple[Row, ...] = (
    Row(1, "AutoFP8 per tensor, static, KV", {
            f"{L}.self_attn.qkv_proj.weight": "fp8 24 16", f"{L}.self_attn.qkv_proj.weight_scale": "f32",
            f"{L}.self_attn.qkv_proj.input_scale": "f32",
            f"{DOWN}.weight": "fp8 16 32", f"{DOWN}.weight_scale": "f32 1", f"{DOWN}.input_scale": "f32 1",
            f"{L}.self_attn.kv_scale": "f32", f"{L}.self_attn.k_scale": "f32", f"{L}.self_attn.v_scale": "f32",
            **PLAIN,
        },
        {f"{L}.self_attn.qkv_proj.weight": (f"{L}.self_attn.qkv_proj.weight_scale", "tensor"),
         f"{DOWN}.weight": (f"{DOWN}.weight_scale", "tensor")},
        activations=(f"{L}.self_attn.qkv_proj.input_scale", f"{DOWN}.input_scale", f"{L}.self_attn.kv_scale",
                     f"{L}.self_attn.k_scale", f"{L}.self_attn.v_scale"),
        unquantized=("lm_head",),
        config=_hf({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}),
        declared="fp8",
    ),
    Row(2, "DeepSeek V3 blocks, ragged", {
            f"{L}.self_attn.kv_a_proj_with_mqa.weight": "fp8 576 256",
            f"{L}.self_attn.kv_a_proj_with_mqa.weight_scale_inv": "f32 5 2",
            f"{EXPERTS}.0.gate_proj.weight": "fp8 256 448", f"{EXPERTS}.0.gate_proj.weight_scale_inv": "f32 2 4",
            f"{L}.mlp.gate.e_score_correction_bias": "f32 4", f"{L}.mlp.gate.weight": "bf16 4 16", **PLAIN,
        },
        {f"{L}.self_attn.kv_a_proj_with_mqa.weight":
            (f"{L}.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "block 128x128"),
         f"{EXPERTS}.0.gate_proj.weight": (f"{EXPERTS}.0.gate_proj.weight_scale_inv", "block 128x128")},
        convention="weight_scale_inv", unquantized=(f"{L}.mlp.gate", "lm_head"),
        config=_fp8(fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128]),
        declared="fp8 e4m3 ue8m0", block=(128, 128),
    ),
    Row(2, "Qwen3 blocks, bf16 scales", {
            f"{Q}.weight": "fp8 256 256", f"{Q}.weight_scale_inv": "bf16 2 2",
            f"{K}.weight": "fp8 64 256", f"{K}.weight_scale_inv": "bf16 1 2", **PLAIN,
        },
        {f"{Q}.weight": (f"{Q}.weight_scale_inv", "block 128x128"),
         f"{K}.weight": (f"{K}.weight_scale_inv", "block 128x128")},
        convention="weight_scale_inv", unquantized=("lm_head",), config=_BLOCKS,
        declared="fp8 e4m3", block=(128, 128),
    ),
    Row(3, "DeepSeek V4: e8m0 scales, fp4 experts", {
            "layers.0.attn.wo_a.weight": "fp8 256 128", "layers.0.attn.wo_a.scale": "e8m0 2 1",
            "layers.0.ffn.experts.0.w1.weight": "i8 16 64", "layers.0.ffn.experts.0.w1.scale": "e8m0 16 4",
            "mtp.0.e_proj.weight": "fp8 128 256", "mtp.0.e_proj.scale": "e8m0 1 2",
            "layers.0.hc_attn_scale": "f32 3", "layers.0.attn_norm.weight": "bf16 16",
        },
        {"layers.0.attn.wo_a.weight": ("layers.0.attn.wo_a.scale", "block 128x128"),
         "mtp.0.e_proj.weight": ("mtp.0.e_proj.scale", "block 128x128")},
        convention="scale",
        config=_fp8(fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128], expert_dtype="fp4"),
        declared="fp8 e4m3 ue8m0", block=(128, 128),
    ),
    Row(3, "DeepSeek V4.1: 32x32 blocks, FP8 embedding; V3 converted: fp32", {
            "layers.0.attn.wq_a.weight": "fp8 64 96", "layers.0.attn.wq_a.scale": "e8m0 2 3",
            "layers.0.attn.wkv.weight": "fp8 64 96", "layers.0.attn.wkv.scale": "f32 2 3",
            "engram.embed.weight": "fp8 96 64", "engram.embed.scale": "e8m0 3 2",
        },
        {"layers.0.attn.wq_a.weight": ("layers.0.attn.wq_a.scale", "MX group 32x32"),
         "layers.0.attn.wkv.weight": ("layers.0.attn.wkv.scale", "block 32x32"),
         "engram.embed.weight": ("engram.embed.scale", "MX group 32x32")},
        convention="scale", config=_fp8(scale_fmt="ue8m0", weight_block_size=[32, 32]),
        declared="fp8 ue8m0", block=(32, 32),
    ),
    Row(4, "transformers: fused experts, activation scales", {
            f"{EXPERTS}.gate_up_proj": "fp8 2 256 128", f"{EXPERTS}.gate_up_proj_scale_inv": "f32 2 2 1",
            f"{EXPERTS}.gate_up_proj_activation_scale": "f32 2",
            f"{EXPERTS}.down_proj": "fp8 2 128 256", f"{EXPERTS}.down_proj_scale_inv": "e8m0 2 1 2",
            f"{EXPERTS}.down_proj_activation_scale": "f32 2", **PLAIN,
        },
        {f"{EXPERTS}.gate_up_proj": (f"{EXPERTS}.gate_up_proj_scale_inv", "expert block 128x128"),
         f"{EXPERTS}.down_proj": (f"{EXPERTS}.down_proj_scale_inv", "expert block 128x128")},
        convention="fused_scale_inv",
        activations=(f"{EXPERTS}.gate_up_proj_activation_scale", f"{EXPERTS}.down_proj_activation_scale"),
        unquantized=("lm_head",), config=_fp8(weight_block_size=[128, 128], scale_fmt="float"),
        declared="fp8 float", block=(128, 128),
    ),
    Row(4, "transformers: scalar, [1,1] and activation_scale", {
            f"{Q}.weight": "fp8 16 16", f"{Q}.weight_scale_inv": "f32", f"{Q}.activation_scale": "f32",
            f"{K}.weight": "fp8 16 16", f"{K}.weight_scale_inv": "f32 1 1", f"{K}.activation_scale": "f32", **PLAIN,
        },
        {f"{Q}.weight": (f"{Q}.weight_scale_inv", "tensor"), f"{K}.weight": (f"{K}.weight_scale_inv", "tensor")},
        convention="weight_scale_inv", activations=(f"{Q}.activation_scale", f"{K}.activation_scale"),
        unquantized=("lm_head",), config=_fp8(weight_block_size=None), declared="fp8",
    ),
    Row(4, "transformers: FP8 embedding", {
            "model.embed_tokens.weight": "fp8 32 16", "model.embed_tokens.weight_scale": "f32 1", **PLAIN,
        },
        {"model.embed_tokens.weight": ("model.embed_tokens.weight_scale", "tensor")},
        unquantized=("lm_head",), config=_fp8(weight_block_size=None), declared="fp8",
    ),
    Row(5, "Ministral 3, static", {
            f"{Q}.weight": "fp8 16 16", f"{Q}.weight_scale_inv": "bf16", f"{Q}.activation_scale": "bf16",
            f"{EXPERTS}.gate_up_proj": "fp8 2 32 16", f"{EXPERTS}.gate_up_proj_scale_inv": "bf16",
            f"{EXPERTS}.gate_up_proj_activation_scale": "bf16", **PLAIN,
        },
        {f"{Q}.weight": (f"{Q}.weight_scale_inv", "tensor"),
         f"{EXPERTS}.gate_up_proj": (f"{EXPERTS}.gate_up_proj_scale_inv", "tensor")},
        convention="weight_scale_inv fused_scale_inv",
        activations=(f"{Q}.activation_scale", f"{EXPERTS}.gate_up_proj_activation_scale"),
        unquantized=("lm_head",),
        config=_hf({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
        declared="fp8",
    ),
    Row(6, "Mistral native", {
            "layers.0.attention.wq.weight": "fp8 32 16", "layers.0.attention.wq.qscale_weight": "f32 32",
            "layers.0.attention.wq.qscale_act": "f32",
            "layers.0.feed_forward.w1.weight": "fp8 32 16", "layers.0.feed_forward.w1.qscale_weight": "f32 32 1",
            "layers.0.experts.3.w1.weight": "fp8 32 16", "layers.0.experts.3.w1.qscale_weight": "f32",
            "layers.0.experts.3.w1.qscale_act": "f32", "eagle_linear.weight": "fp8 16 32",
            "eagle_linear.qscale_weight": "f32",
            "layers.0.attention.kv_fake_quantizer.qscale_act": "f32",
            "layers.0.attention.q_fake_quantizer.qscale_act": "f32",
            "output.weight": "bf16 32 16",
        },
        {"layers.0.attention.wq.weight": ("layers.0.attention.wq.qscale_weight", "row"),
         "layers.0.feed_forward.w1.weight": ("layers.0.feed_forward.w1.qscale_weight", "row"),
         "layers.0.experts.3.w1.weight": ("layers.0.experts.3.w1.qscale_weight", "tensor"),
         "eagle_linear.weight": ("eagle_linear.qscale_weight", "tensor")},
        convention="qscale_weight", filename="consolidated.safetensors",
        activations=("layers.0.attention.wq.qscale_act", "layers.0.experts.3.w1.qscale_act",
                     "layers.0.attention.kv_fake_quantizer.qscale_act",
                     "layers.0.attention.q_fake_quantizer.qscale_act"),
        unquantized=("output",),
        files={"params.json": {"dim": 16, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}},
        declared="mistral fp8_e4m3",
    ),
    Row(7, "FBGEMM", {
            f"{DOWN}.weight": "fp8 16 32", f"{DOWN}.weight_scale": "f32 16 1", f"{DOWN}.input_scale_ub": "f32 1",
            **PLAIN,
        },
        {f"{DOWN}.weight": (f"{DOWN}.weight_scale", "row")},
        unquantized=("lm_head",), config=_hf({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
        declared="fbgemm_fp8",
    ),
    Row(8, "FBGEMM Llama 4 experts", {
            f"{EXPERTS}.gate_up_proj": "fp8 2 16 24", f"{EXPERTS}.gate_up_proj_scale": "f32 2 1 24",
            f"{EXPERTS}.down_proj": "fp8 2 12 16", f"{EXPERTS}.down_proj_scale": "f32 2 16 1", **PLAIN,
        },
        {f"{EXPERTS}.gate_up_proj": (f"{EXPERTS}.gate_up_proj_scale", "expert column"),
         f"{EXPERTS}.down_proj": (f"{EXPERTS}.down_proj_scale", "expert column (scale stored transposed)")},
        convention="fused_scale", unquantized=("lm_head",), config=_hf({"quant_method": "fbgemm_fp8"}),
        declared="fbgemm_fp8",
    ),
    Row(8, "FBGEMM Llama 4 experts, square", {
            f"{EXPERTS}.down_proj": "fp8 2 16 16", f"{EXPERTS}.down_proj_scale": "f32 2 16 1",
        },
        {f"{EXPERTS}.down_proj": (f"{EXPERTS}.down_proj_scale", "unknown")},
        convention="fused_scale", config=_hf({"quant_method": "fbgemm_fp8"}), declared="fbgemm_fp8",
    ),
    Row(9, "compressed-tensors static, KV", {
            f"{K}.weight": "fp8 16 16", f"{K}.weight_scale": "bf16 1", f"{K}.input_scale": "bf16 1",
            f"{L}.self_attn.k_scale": "bf16 1", f"{L}.self_attn.v_scale": "bf16 1", **PLAIN,
        },
        {f"{K}.weight": (f"{K}.weight_scale", "tensor")},
        activations=(f"{K}.input_scale", f"{L}.self_attn.k_scale", f"{L}.self_attn.v_scale"),
        unquantized=("lm_head",), config=_ct("tensor"), declared=_CT,
    ),
    Row(9, "compressed-tensors static, old KV names", {
            f"{K}.weight": "fp8 16 16", f"{K}.weight_scale": "f32 1", f"{K}.output_scale": "f32 1",
            f"{V}.weight": "fp8 16 16", f"{V}.weight_scale": "f32 1", f"{V}.output_scale": "f32 1",
        },
        {f"{K}.weight": (f"{K}.weight_scale", "tensor"), f"{V}.weight": (f"{V}.weight_scale", "tensor")},
        activations=(f"{K}.output_scale", f"{V}.output_scale"), config=_ct("tensor"), declared=_CT,
    ),
    Row(10, "compressed-tensors per channel", {
            f"{EXPERTS}.0.up_proj.weight": "fp8 32 16", f"{EXPERTS}.0.up_proj.weight_scale": "bf16 32 1",
            f"{Q}.weight": "fp8 32 16", f"{Q}.weight_scale": "f32 32 1", f"{L}.mlp.gate.weight": "bf16 4 16",
        },
        {f"{EXPERTS}.0.up_proj.weight": (f"{EXPERTS}.0.up_proj.weight_scale", "row"),
         f"{Q}.weight": (f"{Q}.weight_scale", "row")},
        unquantized=(f"{L}.mlp.gate",), config=_ct("channel"), declared=_CT,
    ),
    Row(11, "compressed-tensors blocks, ragged", {
            f"{DOWN}.weight": "fp8 256 448", f"{DOWN}.weight_scale": "bf16 2 4", **PLAIN,
        },
        {f"{DOWN}.weight": (f"{DOWN}.weight_scale", "block 128x128")},
        unquantized=("lm_head",), config=_ct("block", block_structure=[128, 128]), declared=_CT, block=(128, 128),
    ),
    Row(12, "MXFP8, uint8", {
            f"{Q}.weight": "fp8 16 96", f"{Q}.weight_scale": "u8 16 3", **PLAIN,
        },
        {f"{Q}.weight": (f"{Q}.weight_scale", "MX group 1x32")},
        unquantized=("lm_head",),
        config=_hf({"quant_method": "modelopt", "quant_algo": "MXFP8"}), declared="modelopt MXFP8", block=(1, 32),
    ),
    Row(12, "MXFP8, compressed-tensors", {
            f"{Q}.weight": "fp8 16 96", f"{Q}.weight_scale": "u8 16 3", **PLAIN,
        },
        {f"{Q}.weight": (f"{Q}.weight_scale", "MX group 1x32")},
        unquantized=("lm_head",), config=_ct("group", group_size=32), declared=_CT, block=(1, 32),
    ),
    Row(12, "MXFP8, MiniMax-M3 names, e8m0, 32x32", {
            f"{Q}.weight": "fp8 16 96", f"{Q}.weight_scale_inv": "u8 16 3",
            f"{K}.weight": "fp8 64 96", f"{K}.weight_scale_inv": "e8m0 2 3",
            f"{V}.weight": "fp8 64 96", f"{V}.weight_scale_inv": "e8m0 64 3",
        },
        {f"{Q}.weight": (f"{Q}.weight_scale_inv", "MX group 1x32"),
         f"{K}.weight": (f"{K}.weight_scale_inv", "MX group 32x32"),
         f"{V}.weight": (f"{V}.weight_scale_inv", "MX group 1x32")},
        convention="weight_scale_inv", config=_fp8(scale_fmt="ue8m0"), declared="fp8 ue8m0",
    ),
    Row(13, "ModelOpt per tensor, KV", {
            f"{K}.weight": "fp8 16 16", f"{K}.weight_scale": "f32", f"{K}.input_scale": "f32",
            f"{K}.k_scale": "f32", f"{V}.v_scale": "f32",
            "backbone.layers.1.mixer.k_proj.k_scale": "f32", **PLAIN,
        },
        {f"{K}.weight": (f"{K}.weight_scale", "tensor")},
        activations=(f"{K}.input_scale", f"{K}.k_scale", f"{V}.v_scale", "backbone.layers.1.mixer.k_proj.k_scale"),
        unquantized=("lm_head",), config={"model_type": "llama"},
        files={"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {
            "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}},
        declared="modelopt FP8",
    ),
    Row(14, "ModelOpt per channel", {
            f"{Q}.weight": "fp8 32 16", f"{Q}.weight_scale": "f32 32",
            f"{OUT}.weight": "fp8 16 16", f"{OUT}.weight_scale": "f32 16", **PLAIN,
        },
        {f"{Q}.weight": (f"{Q}.weight_scale", "row"), f"{OUT}.weight": (f"{OUT}.weight_scale", "row")},
        unquantized=("lm_head",),
        config=_hf({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
        declared="modelopt FP8_PER_CHANNEL_PER_TOKEN",
    ),
    Row(15, "ModelOpt blocks, four dimensions, ragged", {
            f"{DOWN}.weight": "fp8 256 448", f"{DOWN}.weight_scale": "f32 2 1 4 1", **PLAIN,
        },
        {f"{DOWN}.weight": (f"{DOWN}.weight_scale", "block 128x128")},
        unquantized=("lm_head",), config=_hf({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}),
        declared="modelopt fp8_pb_wo", block=(128, 128),
    ),
    Row(15, "ModelOpt blocks, renamed", {
            f"{DOWN}.weight": "fp8 256 448", f"{DOWN}.weight_scale_inv": "f32 2 4", **PLAIN,
        },
        {f"{DOWN}.weight": (f"{DOWN}.weight_scale_inv", "block 128x128")},
        convention="weight_scale_inv", unquantized=("lm_head",),
        config=_hf({"quant_method": "modelopt", "quant_algo": "FP8_PB"}), declared="modelopt FP8_PB", block=(128, 128),
    ),
    Row(16, "ModelOpt Llama 4 experts", {
            f"{EXPERTS}.gate_up_proj": "fp8 2 16 24", f"{EXPERTS}.gate_up_proj_weight_scale": "f32",
            f"{EXPERTS}.gate_up_proj_input_scale": "f32",
            f"{EXPERTS}.down_proj": "fp8 2 12 16", f"{EXPERTS}.down_proj_weight_scale": "f32",
            f"{EXPERTS}.down_proj_input_scale": "f32",
        },
        {f"{EXPERTS}.gate_up_proj": (f"{EXPERTS}.gate_up_proj_weight_scale", "tensor"),
         f"{EXPERTS}.down_proj": (f"{EXPERTS}.down_proj_weight_scale", "tensor")},
        convention="fused_weight_scale",
        activations=(f"{EXPERTS}.gate_up_proj_input_scale", f"{EXPERTS}.down_proj_input_scale"),
        config=_hf({"quant_method": "modelopt", "quant_algo": "FP8"}), declared="modelopt FP8",
    ),
    Row(17, "ModelOpt mixed precision: FP8, MXFP8, NVFP4", {
            f"{Q}.weight": "fp8 16 32", f"{Q}.weight_scale": "f32", f"{Q}.input_scale": "f32",
            f"{K}.weight": "fp8 16 96", f"{K}.weight_scale": "u8 16 3",
            f"{DOWN}.weight": "u8 16 32", f"{DOWN}.weight_scale": "fp8 16 4", f"{DOWN}.weight_scale_2": "f32",
            f"{DOWN}.input_scale": "f32",
            f"{EXPERTS}.gate_up_proj": "u8 2 16 32", f"{EXPERTS}.gate_up_proj_weight_scale": "fp8 2 4 32",
            f"{EXPERTS}.gate_up_proj_weight_scale_2": "f32", f"{EXPERTS}.gate_up_proj_input_scale": "f32",
        },
        {f"{Q}.weight": (f"{Q}.weight_scale", "tensor"), f"{K}.weight": (f"{K}.weight_scale", "MX group 1x32")},
        activations=(f"{Q}.input_scale",),
        config=_hf({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            Q: {"quant_algo": "FP8"}, K: {"quant_algo": "MXFP8"}, DOWN: {"quant_algo": "NVFP4"}}}),
        declared="modelopt MIXED_PRECISION",
    ),
    Row(18, "Quark, KV", {
            f"{K}.weight": "fp8 32 16", f"{K}.weight_scale": "bf16", f"{K}.input_scale": "bf16",
            f"{K}.output_scale": "bf16", f"{V}.output_scale": "bf16", f"{Q}.output_scale": "bf16",
            f"{L}.self_attn.prob_output_scale": "bf16",
            f"{OUT}.weight": "fp8 32 16", f"{OUT}.weight_scale": "f32 32",
            f"{EXPERTS}.gate_up_proj.weight": "fp8 2 32 16", f"{EXPERTS}.gate_up_proj.weight_scale": "f32 2", **PLAIN,
        },
        {f"{K}.weight": (f"{K}.weight_scale", "tensor"), f"{OUT}.weight": (f"{OUT}.weight_scale", "row"),
         f"{EXPERTS}.gate_up_proj.weight": (f"{EXPERTS}.gate_up_proj.weight_scale", "expert")},
        activations=(f"{K}.input_scale", f"{K}.output_scale", f"{V}.output_scale", f"{Q}.output_scale",
                     f"{L}.self_attn.prob_output_scale"),
        unquantized=("lm_head",),
        config=_hf({"quant_method": "quark", "exclude": ["lm_head"],
                    "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}}),
        declared="quark fp8_e4m3",
    ),
    Row(19, "torchao", {
            f"{Q}._weight_qdata": "fp8 32 16", f"{Q}._weight_scale": "f32 32 1",
            f"{K}._weight_qdata": "fp8 32 16", f"{K}._weight_scale": "f32 1 1",
            f"{V}._weight_qdata": "i8 32 16", f"{V}._weight_scale": "f32 32 1",
            f"{OUT}._weight_qdata": "u8 32 16", f"{OUT}._weight_scale": "fp8 32 2", **PLAIN,
        },
        {f"{Q}._weight_qdata": (f"{Q}._weight_scale", "row"),
         f"{K}._weight_qdata": (f"{K}._weight_scale", "tensor")},
        convention="torchao", unquantized=("lm_head",),
        metadata={f"{Q}.weight": json.dumps({"_type": "Float8Tensor", "_data": {"block_size": [1, 16]}})},
        declared="torchao Float8Tensor",
    ),
    Row(20, "ComfyUI scaled fp8", {
            "blocks.0.attn.q.weight": "fp8 16 16", "blocks.0.attn.q.scale_weight": "f32",
            "blocks.0.attn.q.scale_input": "f32", "blocks.0.attn.k.weight": "e5m2 16 16",
            "blocks.0.attn.k.scale_weight": "f32", "blocks.0.attn.k.scale_input": "f32",
            "scaled_fp8": "fp8 2", "text_encoder.scaled_fp8": "fp8 0", "blocks.0.norm.scale": "f32 16",
        },
        {"blocks.0.attn.q.weight": ("blocks.0.attn.q.scale_weight", "tensor")},
        convention="scale_weight", activations=("blocks.0.attn.q.scale_input",),
    ),
    Row(21, "ComfyUI per layer: FP8, MXFP8, NVFP4, INT8", {
            "blocks.0.q.weight": "fp8 16 32", "blocks.0.q.weight_scale": "f32", "blocks.0.q.input_scale": "f32",
            "blocks.0.q.comfy_quant": "u8 27",
            "blocks.0.o.weight": "fp8 16 32", "blocks.0.o.weight_scale": "f32 16 1", "blocks.0.o.comfy_quant": "u8 27",
            "blocks.0.k.weight": "fp8 16 64", "blocks.0.k.weight_scale": "u8 16 2",
            "blocks.0.k.comfy_quant": "u8 27",
            "blocks.0.v.weight": "u8 16 32", "blocks.0.v.weight_scale": "fp8 16 4", "blocks.0.v.weight_scale_2": "f32",
            "blocks.0.v.input_scale": "f32", "blocks.0.v.comfy_quant": "u8 27",
            "blocks.0.w.weight": "i8 16 32", "blocks.0.w.weight_scale": "f32 16", "blocks.0.w.input_scale": "f32",
        },
        {"blocks.0.q.weight": ("blocks.0.q.weight_scale", "tensor"),
         "blocks.0.o.weight": ("blocks.0.o.weight_scale", "row"),
         "blocks.0.k.weight": ("blocks.0.k.weight_scale", "MX group 1x32")},
        activations=("blocks.0.q.input_scale",),
        metadata={"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {
            "blocks.0.q": {"format": "float8_e4m3fn"}, "blocks.0.v": {"format": "nvfp4"}}})},
        declared="comfy float8_e4m3fn nvfp4",
    ),
    Row(22, "auto-round, fp16 scales", {
            f"{Q}.weight": "fp8 32 16", f"{Q}.weight_scale": "f16 32 1", f"{Q}.act_scale": "f16 1",
            f"{K}.weight": "fp8 256 128", f"{K}.weight_scale_inv": "f16 2 1", f"{K}.input_scale": "f16 1",
        },
        {f"{Q}.weight": (f"{Q}.weight_scale", "row"), f"{K}.weight": (f"{K}.weight_scale_inv", "block 128x128")},
        convention="weight_scale weight_scale_inv", activations=(f"{Q}.act_scale", f"{K}.input_scale"),
        config=_hf({"quant_method": "auto-round", "data_type": "fp8", "bits": 8}), declared="auto-round fp8",
    ),
    Row(23, "quanto", {
            f"{Q}.weight._data": "fp8 32 16", f"{Q}.weight._scale": "f32 32 1",
            f"{Q}.input_scale": "f32", f"{Q}.output_scale": "f32",
            f"{K}.weight._data": "i8 32 16", f"{K}.weight._scale": "f32 32 1",
            f"{K}.input_scale": "f32", f"{K}.output_scale": "f32", **PLAIN,
        },
        {f"{Q}.weight._data": (f"{Q}.weight._scale", "row")},
        convention="quanto", activations=(f"{Q}.input_scale",), unquantized=("lm_head",),
        files={"quanto_qmap.json": {Q: {"weights": "qfloat8_e4m3fn", "activations": "none"}}},
        declared="quanto qfloat8_e4m3fn",
    ),
    Row(24, "Hunyuan", {
            f"{Q}.weight": "fp8 16 16", f"{Q}.weight_scale": "f32", f"{Q}.input_scale": "f32",
            f"{L}.self_attn.q.scale": "f32", f"{L}.self_attn.k_cache.scale": "f32",
            f"{L}.self_attn.v_cache.scale": "f32",
        },
        {f"{Q}.weight": (f"{Q}.weight_scale", "tensor")},
        activations=(f"{Q}.input_scale", f"{L}.self_attn.q.scale", f"{L}.self_attn.k_cache.scale",
                     f"{L}.self_attn.v_cache.scale"),
        config=_hf({"quant_method": "fp8", "activation_scheme": "static"}), declared="fp8",
    ),
    Row(25, "MiMo-V2: blocks tiled per chunk", {
            # four chunks of 320 rows, three blocks each: row i's scale is not i // 128
            f"{L}.self_attn.qkv_proj.weight": "fp8 1280 128",
            f"{L}.self_attn.qkv_proj.weight_scale_inv": "f32 12 1",
            # two chunks of 200 rows: the shape is that of plain blocks, the meaning is not
            "model.layers.1.self_attn.qkv_proj.weight": "fp8 400 128",
            "model.layers.1.self_attn.qkv_proj.weight_scale_inv": "f32 4 1",
            "model.layers.2.self_attn.qkv_proj.weight": "fp8 512 128",
            "model.layers.2.self_attn.qkv_proj.weight_scale_inv": "f32 4 1",
        },
        {f"{L}.self_attn.qkv_proj.weight": (f"{L}.self_attn.qkv_proj.weight_scale_inv", "unknown"),
         "model.layers.1.self_attn.qkv_proj.weight": ("model.layers.1.self_attn.qkv_proj.weight_scale_inv", "unknown"),
         "model.layers.2.self_attn.qkv_proj.weight":
            ("model.layers.2.self_attn.qkv_proj.weight_scale_inv", "block 128x128")},
        convention="weight_scale_inv", config=_BLOCKS, declared="fp8 e4m3", block=(128, 128),
    ),
    Row(26, "Granite, Step-3.5, DBRX: stacked experts", {
            f"{L}.block_sparse_moe.input_linear.weight": "fp8 2 24 16",
            f"{L}.block_sparse_moe.input_linear.weight_scale": "f32 2 24 1",
            f"{L}.moe.gate_proj.weight": "fp8 3 24 16", f"{L}.moe.gate_proj.weight_scale": "f32 3",
            f"{L}.moe.gate_proj.input_scale": "f32",
            f"{L}.moe.up_proj.weight": "fp8 3 24 16", f"{L}.moe.up_proj.weight_scale": "f32 3 1 1",
            "transformer.blocks.0.ffn.experts.mlp.w1": "fp8 48 16",
            "transformer.blocks.0.ffn.experts.mlp.w1_weight_scale": "f32 3",
        },
        {f"{L}.block_sparse_moe.input_linear.weight":
            (f"{L}.block_sparse_moe.input_linear.weight_scale", "expert row"),
         f"{L}.moe.gate_proj.weight": (f"{L}.moe.gate_proj.weight_scale", "expert"),
         f"{L}.moe.up_proj.weight": (f"{L}.moe.up_proj.weight_scale", "expert"),
         "transformer.blocks.0.ffn.experts.mlp.w1": ("transformer.blocks.0.ffn.experts.mlp.w1_weight_scale",
                                                     "unknown")},
        convention="weight_scale fused_weight_scale", activations=(f"{L}.moe.gate_proj.input_scale",),
        config=_fp8(), declared="fp8",
    ),
    Row(27, "NxD Inference", {
            "layers.0.self_attn.o_proj.weight": "fp8 16 16", "layers.0.self_attn.o_proj.scale": "f32 16 1",
            "layers.0.feed_forward.experts.gate_up_proj": "fp8 2 16 24",
            "layers.0.feed_forward.experts.gate_up_proj.scale": "f32 2 1 24",
            "layers.0.input_layernorm.weight": "bf16 16",
        },
        {"layers.0.self_attn.o_proj.weight": ("layers.0.self_attn.o_proj.scale", "row"),
         "layers.0.feed_forward.experts.gate_up_proj":
            ("layers.0.feed_forward.experts.gate_up_proj.scale", "expert column")},
        convention="scale fused_dot_scale",
        files={"modules_to_not_convert.json": {"modules_to_not_convert": ["lm_head"]}},
    ),
    Row(28, "Ling: FP8 and MXFP4 under one suffix", {
            f"{Q}.weight": "fp8 128 256", f"{Q}.weight_scale_inv": "f32 1 2",
            f"{EXPERTS}.0.up_proj.weight": "u8 16 32", f"{EXPERTS}.0.up_proj.weight_scale_inv": "u8 16 2",
            f"{EXPERTS}.1.up_proj.weight": "u8 16 32", f"{EXPERTS}.1.up_proj.weight_scale_inv": "e8m0 16 2", **PLAIN,
        },
        {f"{Q}.weight": (f"{Q}.weight_scale_inv", "block 128x128")},
        convention="weight_scale_inv", unquantized=("lm_head",),
        config=_fp8(routed_experts_quant_method="mxfp4", scale_fmt="ue8m0", weight_block_size=[128, 128]),
        declared="fp8 ue8m0", block=(128, 128),
    ),
    Row(29, "TensorRT-LLM", {
            "transformer.layers.0.attention.qkv.weight": "fp8 24 16",
            "transformer.layers.0.attention.qkv.weights_scaling_factor": "f32 1",
            "transformer.layers.0.attention.qkv.activation_scaling_factor": "f32 1",
            "transformer.layers.0.attention.kv_cache_scaling_factor": "f32 1",
            "transformer.layers.0.attention.kv_cache_rcp_scaling_factor": "f32 1",
            "transformer.ln_f.weight": "bf16 16",
        },
        {"transformer.layers.0.attention.qkv.weight":
            ("transformer.layers.0.attention.qkv.weights_scaling_factor", "tensor")},
        convention="weights_scaling_factor",
        activations=("transformer.layers.0.attention.qkv.activation_scaling_factor",
                     "transformer.layers.0.attention.kv_cache_scaling_factor"),
        reciprocal=("transformer.layers.0.attention.kv_cache_rcp_scaling_factor",),
        config={"architecture": "LlamaForCausalLM", "quantization": {"quant_algo": "FP8",
                                                                     "kv_cache_quant_algo": "FP8"}},
        filename="rank0.safetensors", declared="tensorrt-llm FP8",
    ),
)  # fmt: skip


_S = f"{L}.self_attn"
STATIC_SCALES: tuple[str, ...] = (
    # inputs of modules
    *(f"{Q}.{x}" for x in ("input_scale", "activation_scale", "qscale_act", "scale_input", "act_scale",
                           "activation_scaling_factor")),
    f"{EXPERTS}.gate_up_proj_input_scale", f"{EXPERTS}.gate_up_proj_activation_scale",
    # attention and KV cache
    *(f"{_S}.{x}_scale" for x in ("k", "v", "q", "prob", "kv")), "k_scale", f"{_S}.attn.k_scale",
    f"{Q}.output_scale", f"{K}.output_scale", f"{V}.output_scale", f"{_S}.prob_output_scale",
    f"{K}.k_scale", f"{V}.v_scale", f"{_S}.qkv_proj.k_scale", f"{_S}.qkqkv_proj.v_scale",
    "backbone.layers.1.mixer.k_proj.k_scale", "backbone.layers.1.mixer.v_proj.v_scale",
    f"{_S}.q_cache.scale", f"{_S}.k_cache.scale", f"{_S}.v_cache.scale", f"{_S}.q.scale",
    f"{_S}.k_cache_scale", f"{_S}.v_cache_scale",
    *(f"layers.0.attention.{x}_fake_quantizer.qscale_act" for x in ("q", "k", "v", "kv")),
    "transformer.layers.0.attention.kv_cache_scaling_factor",
)  # fmt: skip
"""Every published name of a static activation, attention or KV cache scale that multiplies."""

LEFT_ALONE: dict[str, str] = {
    # runtime bounds, zero points
    f"{Q}.input_scale_ub": "f32 1", f"{Q}.activation_scale_ub": "f32", f"{Q}.weight_zero_point": "i8 1",
    f"{K}.weight_zero_point": "fp8 1",
    f"{L}.self_attn.k_zero_point": "f32", f"{L}.self_attn.v_zero_point": "f32",
    # parameters of the model that are called scale
    "logit_scale": "f32", "model.logits_scale": "f32 1", "model.embed_scale": "bf16 1",
    "model.embed_scale_per_layer": "bf16 1", f"{L}.layer_scale": "bf16 16", f"{L}.attn_layer_scale": "bf16 16",
    f"{L}.ffn_layer_scale": "bf16 16", f"{L}.layer_scalar": "bf16 1", f"{L}.router.per_expert_scale": "bf16 4",
    f"{L}.hc_attn_scale": "f32 3", f"{L}.hc_ffn_scale": "f32 3", f"{L}.self_attn.q_l2_clip.scale": "f32",
    "norm.scale": "bf16 16", "block.0.attn.norm.scale": "bf16 16", f"{L}.rotary_emb.mscale": "f32",
    f"{L}.attn.q_norm.scale": "bf16 16", f"{L}.attn.norm.q.scale": "bf16 16",
    f"{L}.attn2.q_scale": "f32 16", f"{L}.attn2.k_scale": "f32 16",
    f"{Q}.pre_quant_scale": "bf16 16", f"{Q}.bias_scale": "f32", f"{Q}.weight_quantizer._scale": "f32",
    f"{Q}.input_quantizer._amax": "f32",
    # MXFP4: gpt-oss, Quark, compressed-tensors
    f"{EXPERTS}.gate_up_proj_blocks": "u8 2 32 16", f"{EXPERTS}.gate_up_proj_scales": "u8 2 32 1",
    f"{L}.mx.a.weight": "u8 16 16", f"{L}.mx.a.weight_scale": "u8 16 1", f"{L}.mx.a.input_scale": "f32",
    f"{L}.mx.b.weight_packed": "u8 16 16", f"{L}.mx.b.weight_scale": "u8 16 1",
    # NVFP4: its scales are e4m3fn, with global scales of their own that multiply (ModelOpt) or divide
    f"{L}.nv.a.weight_packed": "u8 16 32", f"{L}.nv.a.weight_scale": "fp8 16 4",
    f"{L}.nv.a.weight_global_scale": "f32 1", f"{L}.nv.a.input_global_scale": "f32 1",
    f"{L}.nv.b.weight": "u8 16 32", f"{L}.nv.b.weight_scale": "fp8 16 4",
    f"{L}.nv.b.weight_scale_2": "f32", f"{L}.nv.b.input_scale": "f32",
    f"{L}.nv.c_packed": "u8 2 16 32", f"{L}.nv.c_scale": "fp8 2 16 4", f"{L}.nv.c_global_scale": "f32 2",
    # INT8, W4AFP8, AWQ and GPTQ, bitnet, bitsandbytes
    f"{L}.i8.weight": "i8 16 16", f"{L}.i8.weight_scale": "f32 16 1", f"{L}.i8.input_scale": "f32",
    f"{L}.w4a8.weight_packed": "i32 16 4", f"{L}.w4a8.weight_scale": "bf16 16 1", f"{L}.w4a8.weight_shape": "i32 2",
    f"{L}.awq.qweight": "i32 16 4", f"{L}.awq.qzeros": "i32 1 4", f"{L}.awq.scales": "f16 1 16",
    f"{L}.awq.input_scale": "f32", f"{L}.bit.weight": "u8 4 16", f"{L}.bit.weight_scale": "bf16 1",
    f"{L}.bnb.weight": "u8 128 1", f"{L}.bnb.weight.absmax": "f32 4",
    # other FP8
    f"{L}.e5.weight": "e5m2 16 16", f"{L}.e5.weight_scale": "f32 1", f"{L}.e5.input_scale": "f32 1",
    "scaled_fp8": "fp8 2", "te.scaled_fp8": "fp8 0", f"{Q}.comfy_quant": "u8 27",
    # plain weights, whatever their name
    "lm_head.weight": "bf16 32 16", f"{L}.plain.weight": "bf16 16 16", f"{L}.plain.input_scale": "f32",
}  # fmt: skip
"""Tensors that end in "scale", or look like FP8, and must come through byte for byte even beside FP8 weights."""
