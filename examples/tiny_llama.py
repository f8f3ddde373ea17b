"""A Llama forward in plain torch, on a state dict of Hugging Face names: what the demo runs on the CPU.

FP8 weights are read through ``read``, a function from float8_e4m3fn to float32: ``torch.Tensor.float`` for the GPU's
reading of the bytes, ``neuron_fp8_loader.neuron_view`` for the reading of a trn1, inf2 or trn2 device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

Reading = Callable[[torch.Tensor], torch.Tensor]


def logits(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], ids: torch.Tensor, read: Reading
) -> torch.Tensor:
    """Logits of a prompt.

    Args:
        state_dict: Llama weights; FP8 ones with a ``.weight_scale`` of one value, or one a row.
        config: the checkpoint's config.json.
        ids: int64 [tokens].
        read: how FP8 bytes are read.

    Returns:
        float32 [tokens, vocabulary].
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    eps = config["rms_norm_eps"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = state_dict[f"{name}.weight"]
        if weight.dtype == torch.float8_e4m3fn:
            return x @ (read(weight) * state_dict[f"{name}.weight_scale"].float()).T
        return x @ weight.float().T

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], state_dict[f"{name}.weight"].float(), eps)

    x = state_dict["model.embed_tokens.weight"][ids].float()
    cos, sin = _rotary(len(ids), size, _rope_theta(config))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(h, f"{at}.self_attn.{name}_proj").view(len(ids), -1, size).transpose(0, 1) for name in "qkv")
        q, k = (t * cos + _rotated(t) * sin for t in (q, k))
        k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(len(ids), -1)
        x = x + linear(attended, f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        gate = silu(linear(h, f"{at}.mlp.gate_proj"))
        x = x + linear(gate * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    x = norm(x, "model.norm")
    head = "lm_head" if "lm_head.weight" in state_dict else "model.embed_tokens"
    return linear(x, head)


def _rope_theta(config: Mapping[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or parameters.get("rope_theta") or 10000.0)


def _rotary(tokens: int, size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = theta ** (-torch.arange(0, size, 2).float() / size)
    angle = torch.outer(torch.arange(tokens).float(), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def _rotated(t: torch.Tensor) -> torch.Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
