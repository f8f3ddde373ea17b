"""Tiny checkpoints of families whose layers differ: latent attention, linear attention, DBRX's flat experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HIDDEN, INTER, EXPERTS, LAYERS, HEADS, HEAD, VOCAB = 256, 256, 4, 2, 4, 64, 128
_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
_MLP = (("gate_proj", INTER, HIDDEN), ("up_proj", INTER, HIDDEN), ("down_proj", HIDDEN, INTER))


@dataclass
class Model:
    """A model's tensors by their names in a checkpoint.

    Attributes:
        config: what config.json says.
        matrices: module -> (out, in), of linear layers that are FP8; DBRX's experts too, all of a layer one below
            another.
        plain: tensor -> shape, of what is never quantized.
        flat: modules whose rows are the rows of all experts, (rows of one, do they lie input before output?)
    """

    config: dict[str, Any]
    matrices: dict[str, tuple[int, int]] = field(default_factory=dict)
    plain: dict[str, tuple[int, ...]] = field(default_factory=dict)
    flat: dict[str, tuple[int, bool]] = field(default_factory=dict)

    def mlp(self, at: str) -> None:
        self.matrices |= {f"{at}.{name}": (out, wide) for name, out, wide in _MLP}

    def around(self, root: str) -> None:
        self.plain |= {f"{root}.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
        self.plain[f"{root}.norm.weight"] = (HIDDEN,)

    def norms(self, at: str) -> None:
        self.plain |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}


def _latent(model: Model, at: str) -> None:
    """Attention of DeepSeek-V3: kv_a_proj_with_mqa's last block is cut short, as it is in the real model."""
    q_rank, kv_rank, nope, rope, value = (model.config[n] for n in _RANKS)
    model.matrices |= {
        f"{at}.q_a_proj": (q_rank, HIDDEN),
        f"{at}.q_b_proj": (HEADS * (nope + rope), q_rank),
        f"{at}.kv_a_proj_with_mqa": (kv_rank + rope, HIDDEN),
        f"{at}.kv_b_proj": (HEADS * (nope + value), kv_rank),
        f"{at}.o_proj": (HIDDEN, HEADS * value),
    }
    model.plain |= {f"{at}.q_a_layernorm.weight": (q_rank,), f"{at}.kv_a_layernorm.weight": (kv_rank,)}


_RANKS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def deepseek_v3(model_type: str = "deepseek_v3", **more: Any) -> Model:
    """One dense layer, then one with experts."""
    ranks = dict(zip(_RANKS, (256, 128, 64, 64, 64), strict=True))
    config = {**_COMMON, **ranks, "model_type": model_type, "num_hidden_layers": LAYERS, "n_routed_experts": EXPERTS}
    config |= {"intermediate_size": INTER, "moe_intermediate_size": INTER, "n_shared_experts": 1, "n_group": 2}
    config |= {"topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "attention_dropout": 0.0}
    config |= {"norm_topk_prob": True, "scoring_func": "sigmoid", "quantization_config": None, **more}
    model = Model(config)
    model.around("model")
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        model.norms(at)
        _latent(model, f"{at}.self_attn")
        if layer == 0:
            model.mlp(f"{at}.mlp")
            continue
        for expert in range(EXPERTS):
            model.mlp(f"{at}.mlp.experts.{expert}")
        model.mlp(f"{at}.mlp.shared_experts")
        model.plain |= {
            f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN),
            f"{at}.mlp.gate.e_score_correction_bias": (EXPERTS,),
        }
    return model


def glm_moe_dsa() -> Model:
    """GLM-5: DeepSeek-V3 with an indexer, which is switched off, and one more layer, which predicts and is dropped."""
    model = deepseek_v3("glm_moe_dsa", dsa_enabled=False, num_local_experts=EXPERTS, index_n_heads=2)
    at = f"model.layers.{LAYERS}"
    model.norms(at)
    _latent(model, f"{at}.self_attn")
    model.plain |= {f"{at}.eh_proj.weight": (HIDDEN, 2 * HIDDEN), f"{at}.enorm.weight": (HIDDEN,)}
    for layer in (0, 1):
        place = f"model.layers.{layer}.self_attn.indexer"
        model.matrices |= {f"{place}.wq_b": (256, 256), f"{place}.wk": (128, HIDDEN)}
        model.plain |= {f"{place}.weights_proj.weight": (2, HIDDEN), f"{place}.k_norm.weight": (128,)}
    return model


def qwen3_5_moe() -> Model:
    """A layer of linear attention, then one of full attention, whose q_proj holds the output's gates too."""
    config = {**_COMMON, "model_type": "qwen3_5_moe_text", "num_hidden_layers": 4, "head_dim": HEAD}
    config |= {"num_experts": EXPERTS, "moe_intermediate_size": INTER, "shared_expert_intermediate_size": INTER}
    config |= {"linear_num_value_heads": HEADS, "linear_num_key_heads": HEADS, "linear_key_head_dim": HEAD}
    config |= {"linear_value_head_dim": HEAD, "linear_conv_kernel_dim": 4, "intermediate_size": INTER}
    config["partial_rotary_factor"] = 1.0
    config["layer_types"] = ["linear_attention", "full_attention"] * 2
    model, wide = Model(config), HEADS * HEAD
    root = "model.language_model"
    model.around(root)
    for layer in range(4):
        at = f"{root}.layers.{layer}"
        model.norms(at)
        if layer % 2 == 0:
            model.matrices |= {f"{at}.linear_attn.in_proj_qkv": (3 * wide, HIDDEN)}
            model.matrices |= {
                f"{at}.linear_attn.in_proj_z": (wide, HIDDEN),
                f"{at}.linear_attn.out_proj": (HIDDEN, wide),
            }
            model.plain |= {f"{at}.linear_attn.in_proj_{n}.weight": (HEADS, HIDDEN) for n in "ab"}
            model.plain |= {f"{at}.linear_attn.{n}": (HEADS,) for n in ("A_log", "dt_bias")}
            model.plain |= {
                f"{at}.linear_attn.conv1d.weight": (3 * wide, 1, 4),
                f"{at}.linear_attn.norm.weight": (HEAD,),
            }
        else:
            sizes = {"q_proj": 2 * wide, "k_proj": wide, "v_proj": wide}
            model.matrices |= {f"{at}.self_attn.{n}": (size, HIDDEN) for n, size in sizes.items()}
            model.matrices[f"{at}.self_attn.o_proj"] = (HIDDEN, wide)
            model.plain |= {f"{at}.self_attn.{n}_norm.weight": (HEAD,) for n in "qk"}
        for expert in range(EXPERTS):
            model.mlp(f"{at}.mlp.experts.{expert}")
        model.mlp(f"{at}.mlp.shared_expert")
        model.plain |= {f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN), f"{at}.mlp.shared_expert_gate.weight": (1, HIDDEN)}
    return model


def minimax_m2() -> Model:
    """Attention with norms of all heads at once; a bias of the router beside it."""
    config = {
        **_COMMON,
        "model_type": "minimax_m2",
        "num_hidden_layers": LAYERS,
        "head_dim": HEAD,
        "use_qk_norm": True,
    }
    config |= {"intermediate_size": INTER, "num_local_experts": EXPERTS, "rotary_dim": HEAD // 2}
    config |= {"num_key_value_heads": HEADS // 2, "scoring_func": "sigmoid", "use_routing_bias": True}
    model, wide = Model(config), HEADS * HEAD
    model.around("model")
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        model.norms(at)
        sizes = {"q_proj": (wide, HIDDEN), "k_proj": (wide // 2, HIDDEN), "v_proj": (wide // 2, HIDDEN)}
        model.matrices |= {f"{at}.self_attn.{n}": size for n, size in (sizes | {"o_proj": (HIDDEN, wide)}).items()}
        model.plain |= {f"{at}.self_attn.q_norm.weight": (wide,), f"{at}.self_attn.k_norm.weight": (wide // 2,)}
        block = f"{at}.block_sparse_moe"
        for expert in range(EXPERTS):
            names = zip(("w1", "w3", "w2"), _MLP, strict=True)
            model.matrices |= {f"{block}.experts.{expert}.{n}": size for n, (_, *size) in names}
        model.plain |= {f"{block}.gate.weight": (EXPERTS, HIDDEN), f"{block}.e_score_correction_bias": (EXPERTS,)}
    return model


def dbrx() -> Model:
    """Experts [experts x inter, hidden] in three parameters, w2 input before output; queries, keys, values in one."""
    ffn = {"ffn_hidden_size": INTER, "moe_num_experts": EXPERTS, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}
    attn = {"kv_n_heads": HEADS, "clip_qkv": 8, "rope_theta": 10000.0, "model_type": ""}
    config = {"model_type": "dbrx", "d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 256}
    config |= {
        "vocab_size": VOCAB,
        "emb_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    model = Model({**config, "attn_config": attn, "ffn_config": {**ffn, "model_type": ""}})
    model.plain |= {"transformer.wte.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    model.plain["transformer.norm_f.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        at = f"transformer.blocks.{layer}"
        model.matrices |= {f"{at}.norm_attn_norm.attn.Wqkv": (3 * HIDDEN, HIDDEN)}
        model.matrices |= {f"{at}.norm_attn_norm.attn.out_proj": (HIDDEN, HIDDEN)}
        model.plain |= {f"{at}.norm_attn_norm.norm_{n}.weight": (HIDDEN,) for n in (1, 2)}
        model.plain[f"{at}.ffn.router.layer.weight"] = (EXPERTS, HIDDEN)
        for name in ("w1", "v1", "w2"):
            place = f"{at}.ffn.experts.mlp.{name}"
            model.matrices[place] = (EXPERTS * INTER, HIDDEN)
            model.flat[place] = (INTER, name == "w2")
    return model


MODELS = {f.__name__: f for f in (deepseek_v3, glm_moe_dsa, qwen3_5_moe, minimax_m2, dbrx)}
