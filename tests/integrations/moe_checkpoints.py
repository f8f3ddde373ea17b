"""Tiny mixtures of experts in the names of several families and in the forms of several producers, and their twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.support import e4m3fn, fp8

HIDDEN, INTER, EXPERTS, LAYERS, HEADS, HEAD, VOCAB = 256, 256, 4, 2, 4, 64, 128
FORMS = ("channel", "tensor", "block", "mx")

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": HEAD,
        "intermediate_size": 2 * INTER,
        "moe_intermediate_size": INTER,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": INTER,
        "num_local_experts": EXPERTS,
        "sliding_window": None,
    },
}
PROJECTIONS = {  # gate, up, down
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
}
SCALES = {"channel": "weight_scale", "tensor": "weight_scale", "block": "weight_scale_inv", "mx": "weight_scale"}


def quantized(
    rng: np.random.Generator, form: str, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(FP8 weight up to 448, its scale, float32 weight x scale); magnitudes differ by 2^10 between scale values."""
    codes = fp8(rng.uniform(-448, 448, (rows, columns)).astype(np.float32))
    height, width = {"channel": (1, columns), "tensor": (rows, columns), "block": (128, 128), "mx": (1, 32)}[form]
    grid = (-(-rows // height), -(-columns // width))
    if form == "mx":
        exponents = rng.integers(110, 120, grid).astype(np.uint8)
        scale, values = torch.from_numpy(exponents), np.exp2(exponents.astype(np.float64) - 127)
    else:
        own = np.exp2(rng.uniform(-17, -7 if form != "block" else -15, grid)).astype(np.float32)
        scale, values = torch.from_numpy(own), own.astype(np.float64)
        if form == "tensor":
            scale = scale.reshape(())
    whole = values.repeat(height, 0)[:rows].repeat(width, 1)[:, :columns]
    return codes, scale, torch.from_numpy(e4m3fn(codes) * whole).float()


def matrices(family: str) -> list[tuple[str, int, int]]:
    """(module, out, in) of every quantized linear layer."""
    block, (gate, up, down) = PROJECTIONS[family]
    found = []
    for layer in range(LAYERS):
        head = f"model.layers.{layer}"
        found += [(f"{head}.self_attn.{p}_proj", HIDDEN, HIDDEN) for p in "qkvo"]
        for expert in range(EXPERTS):
            place = f"{head}.{block}.experts.{expert}"
            found += [(f"{place}.{gate}", INTER, HIDDEN), (f"{place}.{up}", INTER, HIDDEN)]
            found += [(f"{place}.{down}", HIDDEN, INTER)]
    return found


def plain(family: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """What is never quantized: embeddings, norms, routers."""

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).bfloat16()

    tensors = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "lm_head.weight": random(VOCAB, HIDDEN)}
    tensors["model.norm.weight"] = random(HIDDEN)
    block = PROJECTIONS[family][0]
    for layer in range(LAYERS):
        head = f"model.layers.{layer}"
        tensors[f"{head}.input_layernorm.weight"] = random(HIDDEN)
        tensors[f"{head}.post_attention_layernorm.weight"] = random(HIDDEN)
        tensors[f"{head}.{block}.gate.weight"] = random(EXPERTS, HIDDEN)
        if family == "qwen3_moe":
            tensors[f"{head}.self_attn.q_norm.weight"] = random(HEAD)
            tensors[f"{head}.self_attn.k_norm.weight"] = random(HEAD)
    return tensors


def write(directory: Path, family: str, form: str, seed: int = 0) -> tuple[Path, Path]:
    """Write a checkpoint and its float32 twin. Returns their directories."""
    rng = np.random.default_rng(seed)
    first = plain(family, rng)
    twin = {name: t.float() for name, t in first.items()}
    for module, rows, columns in matrices(family):
        weight, scale, exact = quantized(rng, form, rows, columns)
        first |= {f"{module}.weight": weight, f"{module}.{SCALES[form]}": scale}
        twin[f"{module}.weight"] = exact
    paths = directory / "fp8", directory / "twin"
    for path, tensors in zip(paths, (first, twin), strict=True):
        path.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
        config = {**_COMMON, **CONFIGS[family], "model_type": family}
        (path / "config.json").write_text(json.dumps(config))
    return paths
