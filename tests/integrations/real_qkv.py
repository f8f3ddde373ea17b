"""MiMo-V2.5's interleaved qkv on the real NxD Inference: a Llama whose attention is stored so, by one flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integrations.real_cases import ON, H, logits
from tests.integrations.real_layouts import close
from tests.mimo import Attention, Made, qkv

LAYERS, HIDDEN, INTER, VOCAB = 2, 256, 512, 512
ATTENTION = Attention(queries=4, keys=2, rows=80, v_rows=80)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": ATTENTION.queries,
    "num_key_value_heads": ATTENTION.keys,
    "head_dim": ATTENTION.rows,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def llama(directory: Path) -> tuple[Path, torch.Tensor]:
    """The checkpoint, and the logits of transformers' Llama on the q, k and v that it was made of."""
    rng, made = np.random.default_rng(3), Made()

    def plain(name: str, *shape: int) -> None:
        width = shape[-1] if len(shape) > 1 else 1
        values = rng.normal(size=shape) / width**0.5 if len(shape) > 1 else np.ones(shape)
        made.tensors[f"{name}.weight"] = torch.from_numpy(values).bfloat16()

    plain("model.embed_tokens", VOCAB, HIDDEN)
    plain("model.norm", HIDDEN)
    plain("lm_head", VOCAB, HIDDEN)
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        qkv(made, f"{at}.self_attn", ATTENTION, 2, HIDDEN, rng)
        plain(f"{at}.self_attn.o_proj", HIDDEN, ATTENTION.queries * ATTENTION.v_rows)
        plain(f"{at}.mlp.gate_proj", INTER, HIDDEN)
        plain(f"{at}.mlp.up_proj", INTER, HIDDEN)
        plain(f"{at}.mlp.down_proj", HIDDEN, INTER)
        plain(f"{at}.input_layernorm", HIDDEN)
        plain(f"{at}.post_attention_layernorm", HIDDEN)
    made.config = {
        **LLAMA,
        "architectures": ["MiMoV2ForCausalLM"],
        "attention_projection_layout": "fused_qkv",
        "hybrid_layer_pattern": [0] * LAYERS,
        "v_head_dim": ATTENTION.v_rows,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).float().eval()
    weights = {name: t.float() for name, t in made.tensors.items() if "qkv_proj" not in name}
    model.load_state_dict(weights | {name: torch.from_numpy(v).float() for name, v in made.values.items()})
    ids = torch.cat([H.prompt(VOCAB), torch.tensor([[5]])], 1)
    with torch.no_grad():
        expected: torch.Tensor = model(ids).logits[0, -2:].float()
    return made.write(directory), expected


@pytest.mark.parametrize("fused", [False, True])
def test_queries_keys_and_values_are_those_of_their_heads(tmp_path: Path, fused: bool) -> None:
    path, expected = llama(tmp_path / "ckpt")
    over = {"quantization_type": "per_channel_symmetric", "fused_qkv": fused, **ON}
    close(logits(path, ieee=True, **over), expected, requantized=True)


def test_the_layers_are_quantized_or_dequantized_as_one(tmp_path: Path) -> None:
    path, expected = llama(tmp_path / "ckpt")
    app = H.build_app(path, quantization_type="per_channel_symmetric", **ON)
    on = H.run_logits(H.load_on_cpu(app), ieee=True)
    assert {name.rpartition(".")[2] for name in H.quantized_layers(app)} == {"q_proj", "k_proj", "v_proj"}
    flag = {"dequantize": ["*.qkv_proj"]}
    floats = logits(path, ieee=True, quantization_type="per_channel_symmetric", **{**ON, "fp8_rescale": flag})
    plain = logits(path, ieee=True, **{**ON, "quantized": False})
    for other in (floats, plain):
        assert torch.equal(other, plain)
        close(other, expected, requantized=True)  # rounded to bfloat16, which costs less
    assert not torch.equal(on, plain)


def test_the_wrong_numbers_are_refused(tmp_path: Path) -> None:
    from neuron_fp8_loader import Fp8LoaderError

    path, _ = llama(tmp_path / "ckpt")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "v_head_dim": 64}))
    with pytest.raises(Fp8LoaderError, match="not known"):
        logits(path, ieee=True, quantization_type="per_channel_symmetric", **ON)
