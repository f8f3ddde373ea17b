"""The contributed ports of MiMo-V2.5 and -Pro on the real NxD Inference: published checkpoints, without their scripts,
with what ``neuron-fp8 config`` prints.

MIMO_SRC names the folder of a port that holds modeling_mimo_v2.py. Run by test_real_sources.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integrations.real_cases import H
from tests.integrations.real_config import pasted
from tests.mimo import Attention, Made, qkv, quantized
from tests.support import e4m3fn, ieee_e4m3, sqnr

HIDDEN, INTER, EXPERTS, VOCAB = 256, 256, 4, 512
FULL, WINDOW = Attention(8, 2), Attention(8, 4)
CONFIG: dict[str, Any] = {
    "model_type": "llama",  # a type that transformers has; the port reads the rest
    "architectures": ["MiMoV2ForCausalLM"],
    "attention_projection_layout": "fused_qkv",
    "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1],
    "num_attention_heads": FULL.queries,
    "num_key_value_heads": FULL.keys,
    "head_dim": FULL.rows,
    "v_head_dim": FULL.v_rows,
    "swa_num_attention_heads": WINDOW.queries,
    "swa_num_key_value_heads": WINDOW.keys,
    "swa_head_dim": WINDOW.rows,
    "swa_v_head_dim": WINDOW.v_rows,
    "swa_rope_theta": 1e4,
    "rope_theta": 5e6,
    "partial_rotary_factor": 0.334,
    "sliding_window": 16,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "attention_value_scale": 0.7,
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 8 * INTER,
    "dense_intermediate_size": 8 * INTER,
    "moe_intermediate_size": INTER,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "layernorm_epsilon": 1e-5,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}


def published() -> Made:
    """As the models are published: layer 0 dense with full attention, layer 1 of experts with a sliding window."""
    rng, made = np.random.default_rng(5), Made(config=CONFIG)

    def plain(name: str, *shape: int) -> None:
        made.tensors[name] = torch.from_numpy(rng.normal(size=shape) / shape[-1] ** 0.5).bfloat16()

    def blocks(module: str, rows: int, columns: int) -> None:
        codes, scale = quantized(rng.normal(size=(rows, columns)) * 2.0 ** rng.integers(-8, 0))
        made.tensors[f"{module}.weight"] = codes
        made.tensors[f"{module}.weight_scale_inv"] = torch.from_numpy(scale)
        made.values[f"{module}.weight"] = e4m3fn(codes) * scale.astype(np.float64).repeat(128, 0).repeat(128, 1)

    plain("model.embed_tokens.weight", VOCAB, HIDDEN)
    plain("lm_head.weight", VOCAB, HIDDEN)
    plain("model.norm.weight", HIDDEN)
    for n, attention in enumerate((FULL, WINDOW)):
        at = f"model.layers.{n}"
        qkv(made, f"{at}.self_attn", attention, FULL.keys, HIDDEN, rng)
        plain(f"{at}.self_attn.o_proj.weight", HIDDEN, attention.queries * attention.v_rows)
        plain(f"{at}.input_layernorm.weight", HIDDEN)
        plain(f"{at}.post_attention_layernorm.weight", HIDDEN)
        mlps = [(f"{at}.mlp", 8 * INTER)] if n == 0 else [(f"{at}.mlp.experts.{e}", INTER) for e in range(EXPERTS)]
        for mlp, inter in mlps:
            blocks(f"{mlp}.gate_proj", inter, HIDDEN)
            blocks(f"{mlp}.up_proj", inter, HIDDEN)
            blocks(f"{mlp}.down_proj", HIDDEN, inter)
    plain("model.layers.1.self_attn.attention_sink_bias", WINDOW.queries)
    plain("model.layers.1.mlp.gate.weight", EXPERTS, HIDDEN)
    made.tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.randn(EXPERTS)
    return made


def value(rank: dict[str, torch.Tensor], module: str) -> np.ndarray:
    """float64 weight x scale, read as IEEE."""
    weight, scale = rank[f"{module}.weight"], rank[f"{module}.scale"].double().numpy()
    assert weight.dtype == torch.float8_e4m3fn
    for axis, size in enumerate(weight.shape):
        scale = scale.repeat(size // scale.shape[axis], axis)
    return ieee_e4m3(weight) * scale


@pytest.mark.parametrize("kind", ["expert_wise", "blockwise"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_row_of_every_rank(tmp_path: Path, kind: str, tp: int) -> None:
    import families

    if os.environ["MIMO_SRC"] not in sys.path:
        sys.path.insert(0, os.environ["MIMO_SRC"])
    import modeling_mimo_v2  # type: ignore[import-not-found]

    H.install_stubs()
    made = published()
    path = made.write(tmp_path / "ckpt")
    cls = modeling_mimo_v2.NeuronMiMoV2ForCausalLM
    ranks = families.shards("mimo", path, tp, cls=cls, **pasted(path, "--tp", tp, "--experts", kind))

    def worst(got: np.ndarray, want: np.ndarray) -> float:
        assert got.shape == want.shape
        return min(sqnr(w, g) for w, g in zip(want, got, strict=True))

    for n, attention in enumerate((FULL, WINDOW)):
        for part in "qkv":
            module = f"layers.{n}.self_attn.{part}_proj"
            want = made.values[f"model.{module}.weight"]
            rows = attention.v_rows if part == "v" else attention.rows
            heads = want.reshape(-1, rows, HIDDEN)
            if part != "q" and tp > len(heads):  # the port repeats heads, one for each query
                heads = heads.repeat(attention.queries // len(heads), 0)
            got = np.concatenate([value(rank, module) for rank in ranks])
            assert worst(got, heads.reshape(-1, HIDDEN)) > 25, module
    least = 50 if kind == "blockwise" else 25
    for e in range(EXPERTS):
        one = f"model.layers.1.mlp.experts.{e}"
        mlp = "layers.1.mlp.expert_mlps.mlp_op"
        fused = [np.split(value(rank, f"{mlp}.gate_up_proj")[e], 2, axis=1) for rank in ranks]
        for half, name in enumerate(("gate_proj", "up_proj")):
            got = np.concatenate([halves[half] for halves in fused], axis=1).T
            assert worst(got, made.values[f"{one}.{name}.weight"]) > least
        down = np.concatenate([value(rank, f"{mlp}.down_proj")[e] for rank in ranks], axis=0).T
        assert worst(down, made.values[f"{one}.down_proj.weight"]) > least
