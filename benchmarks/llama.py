"""A small Llama in plain torch, with Hugging Face's tensor names: what the model checks and compiles run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Read = Callable[[torch.Tensor], torch.Tensor]
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, as its ``config.json`` names them."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_hidden_layers: int = 2
    vocab_size: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def of(cls, directory: Path) -> Shape:
        """From a checkpoint's ``config.json``. Raises ValueError for a model that this file does not compute."""
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        known: dict[str, Any] = {name: config[name] for name in asdict(cls()) if name in config}
        known["rope_theta"] = float((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
        shape = cls(**known)
        if config.get("model_type") != "llama" or config.get("head_dim", shape.head_dim) != shape.head_dim:
            raise ValueError(f"{directory}: not a plain Llama")
        return shape

    def linear(self, name: str) -> tuple[int, int]:
        """(out, in) of one of ``LINEARS``."""
        keys = self.num_key_value_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, hidden),
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
        }[name.rpartition(".")[2]]  # fmt: skip

    def config(self) -> dict[str, Any]:
        """A ``config.json`` for Hugging Face and NxD Inference."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(self), "head_dim": self.head_dim,
            "hidden_act": "silu", "max_position_embeddings": 2048, "tie_word_embeddings": False,
            "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            },
        }  # fmt: skip


def random_llama(shape: Shape, seed: int = 0, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """bfloat16 tensors of a random Llama. ``gain`` scales the last layer: larger means surer predictions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {
        "model.embed_tokens.weight": normal(shape.vocab_size, shape.hidden_size),
        "model.norm.weight": torch.ones(shape.hidden_size),
        "lm_head.weight": normal(shape.vocab_size, shape.hidden_size) * gain / shape.hidden_size**0.5,
    }
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = 1 + 0.1 * normal(shape.hidden_size)
        tensors[prefix + "post_attention_layernorm.weight"] = 1 + 0.1 * normal(shape.hidden_size)
        for name in LINEARS:
            out, inp = shape.linear(name)
            tensors[f"{prefix}{name}.weight"] = normal(out, inp) / inp**0.5
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


class Linear(nn.Module):
    """A linear layer whose weight may be FP8 with one scale a row, dequantized when it is used."""

    weight: torch.Tensor
    scale: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype, read: Read | None
    ) -> None:
        super().__init__()
        self.dtype, self.read = dtype, read
        self.register_buffer("weight", weight if scale is not None else weight.to(dtype))
        self.register_buffer("scale", None if scale is None else scale.float().view(-1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.scale is not None:
            weight = (self.read(weight) if self.read else weight).to(self.dtype) * self.scale.to(self.dtype)
        return nn.functional.linear(x, weight)


class Norm(nn.Module):
    """RMS norm, computed in float32."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Block(nn.Module):
    """One decoder layer: attention with rotary positions, and the gated MLP."""

    def __init__(self, shape: Shape, make: Callable[[str], Linear], norm: Callable[[str], Norm]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (make(name) for name in LINEARS)
        self.before, self.after = norm("input_layernorm"), norm("post_attention_layernorm")

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        q, k, v = (self._split(part(y)) for part in (self.q, self.k, self.v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        groups = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)).float() / self.dim**0.5 + mask
        mixed = torch.softmax(scores, dim=-1).to(x.dtype) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        y = self.after(x)
        result: torch.Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return result

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.dim).transpose(1, 2)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Llama(nn.Module):
    """Token ids [batch, tokens] in, float32 logits [batch, tokens, vocabulary] out.

    Args:
        shape: its sizes.
        tensors: names as Hugging Face has them. Linear weights may be float8_e4m3fn beside ``weight_scale`` of one
            value a row ([out, 1] or [out]).
        tokens: the one sequence length that it is for, so that its shapes are static.
        dtype: what it computes in.
        read: how the bytes of an FP8 weight become values; None: as torch casts float8_e4m3fn.
    """

    embedding: torch.Tensor

    def __init__(
        self, shape: Shape, tensors: Mapping[str, torch.Tensor], tokens: int,
        dtype: torch.dtype = torch.float32, read: Read | None = None,
    ) -> None:  # fmt: skip
        super().__init__()

        def linear(name: str) -> Linear:
            weight = tensors[name + ".weight"]
            scale = tensors[name + ".weight_scale"] if weight.dtype == torch.float8_e4m3fn else None
            return Linear(weight, scale, dtype, read)

        self.blocks = nn.ModuleList()
        for layer in range(shape.num_hidden_layers):
            prefix = f"model.layers.{layer}."

            def norm(name: str, prefix: str = prefix) -> Norm:
                return Norm(tensors[f"{prefix}{name}.weight"], shape.rms_norm_eps, dtype)

            self.blocks.append(Block(shape, lambda name, prefix=prefix: linear(prefix + name), norm))  # type: ignore[misc]
        self.norm = Norm(tensors["model.norm.weight"], shape.rms_norm_eps, dtype)
        self.head = linear("lm_head")
        self.register_buffer("embedding", tensors["model.embed_tokens.weight"].to(dtype))
        cos, sin = rotary(shape, tokens)
        self.register_buffer("cos", cos.to(dtype))
        self.register_buffer("sin", sin.to(dtype))
        # finite, so that only the weights can bring inf and nan
        self.register_buffer("mask", torch.full((tokens, tokens), -1e9).triu(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.embedding(ids, self.embedding)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, self.mask)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits.float()


def rotary(shape: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [tokens, head_dim]."""
    frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency[None, :]
    both = torch.cat([angle, angle], dim=-1)
    return both.cos().float(), both.sin().float()


def prompt(shape: Shape, tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 [batch, tokens]."""
    return torch.randint(3, shape.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))
