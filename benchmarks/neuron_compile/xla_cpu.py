"""XLA for the CPU, through JAX, with weights in ``float8_e4m3``: an independent compiler's reading of the bytes.

``F8E4M3`` is the HLO type that the Neuron compiler's flag maps F8E4M3FN to. JAX takes its meaning from ml_dtypes.
"""

from __future__ import annotations

import importlib.util
import re
import time
from importlib import metadata
from typing import Any

import numpy as np
import torch

from ..llama import LINEARS, Shape, rotary
from .backend import Missing, Outcome, timed_runs
from .model import Case, Tensors


class XlaCpu:
    """JAX's ``jit`` on the CPU."""

    name = "xla-cpu"
    tolerance = 1e-3
    exact = True

    def require(self) -> None:
        if importlib.util.find_spec("jax") is None:
            raise Missing("jax is not installed: pip install jax")

    def versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("jax", "jaxlib", "ml_dtypes")}

    def reference(self, case: Case) -> torch.Tensor:
        """By the same compiler, the weights typed F8E4M3FN; it must agree with torch's reading too."""
        logits = self._run(case, case.raw, "float8_e4m3fn").logits
        plain = case.reference()
        tolerance = 1e-3 if case.dtype == torch.float32 else 0.05
        if not float((logits - plain).abs().max() / plain.abs().max()) < tolerance:
            raise AssertionError("XLA and torch disagree on the e4m3fn model itself")
        return logits

    def run(self, case: Case, tensors: Tensors) -> Outcome:
        return self._run(case, tensors, "float8_e4m3")

    def _run(self, case: Case, tensors: Tensors, fp8: str) -> Outcome:
        import jax
        import jax.numpy as jnp

        cpu = jax.devices("cpu")[0]
        dtype = jnp.dtype(str(case.dtype).removeprefix("torch."))
        with jax.default_device(cpu):
            weights = {name: jnp.asarray(_array(t, fp8)) for name, t in tensors.items()}
            ids = jnp.asarray(case.ids[0].numpy().astype(np.int32))
            begin = time.perf_counter()
            # the weights are arguments: as constants they could be folded by another evaluator
            lowered = jax.jit(lambda w, i: forward(case.shape, w, i, dtype)).lower(weights, ids)
            compiled = lowered.compile()
            compile_s = time.perf_counter() - begin
            logits = compiled(weights, ids)
            seconds = timed_runs(lambda: compiled(weights, ids).block_until_ready(), 5)
        types = sorted(set(re.findall(r"\bf8e\w+(?=\[)", compiled.as_text() or "")))
        return Outcome(torch.from_numpy(np.array(logits)), compile_s, seconds, {"hlo_types": types})


def _array(tensor: torch.Tensor, fp8: str) -> np.ndarray:
    import ml_dtypes

    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.contiguous().view(torch.uint8).numpy().view(getattr(ml_dtypes, fp8))
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def forward(shape: Shape, weights: dict[str, Any], ids: Any, dtype: Any) -> Any:
    """The model of ``llama.py`` in JAX: ids [tokens] in, float32 logits [tokens, vocabulary] out."""
    import jax
    import jax.numpy as jnp

    tokens, dim = ids.shape[0], shape.head_dim
    cos, sin = (jnp.asarray(t.numpy()).astype(dtype) for t in rotary(shape, tokens))
    mask = jnp.triu(jnp.full((tokens, tokens), -1e9, dtype=jnp.float32), 1)

    def linear(x: Any, name: str) -> Any:
        weight = weights[name + ".weight"].astype(dtype)
        if name + ".weight_scale" in weights:
            weight = weight * weights[name + ".weight_scale"].astype(dtype)
        return x @ weight.T

    def norm(x: Any, name: str) -> Any:
        wide = x.astype(jnp.float32)
        scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + shape.rms_norm_eps)
        return scaled.astype(dtype) * weights[name + ".weight"].astype(dtype)

    def heads(x: Any) -> Any:
        return x.reshape(tokens, -1, dim).transpose(1, 0, 2)

    def rotate(x: Any) -> Any:
        first, second = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-second, first], axis=-1) * sin

    x = weights["model.embed_tokens.weight"].astype(dtype)[ids]
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        names = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), (prefix + n for n in LINEARS), strict=True))
        y = norm(x, prefix + "input_layernorm")
        q, k, v = (heads(linear(y, names[part])) for part in ("q", "k", "v"))
        groups = shape.num_attention_heads // shape.num_key_value_heads
        k, v = (jnp.repeat(t, groups, axis=0) for t in (rotate(k), v))
        scores = (rotate(q) @ k.transpose(0, 2, 1)).astype(jnp.float32) / dim**0.5 + mask
        mixed = (jax.nn.softmax(scores, axis=-1).astype(dtype) @ v).transpose(1, 0, 2).reshape(tokens, -1)
        x = x + linear(mixed, names["o"])
        y = norm(x, prefix + "post_attention_layernorm")
        x = x + linear(jax.nn.silu(linear(y, names["gate"])) * linear(y, names["up"]), names["down"])
    return linear(norm(x, "model.norm"), "lm_head").astype(jnp.float32)
