"""Tiny mixtures of experts in the names of several families and in the forms of several producers, and their twins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.integrations.moe_models import MODELS, Model
from tests.integrations.rival import scripted
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
    "llama4": {
        "intermediate_size": INTER,
        "intermediate_size_mlp": INTER,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1] * LAYERS,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": False,
        "attention_chunk_size": 8192,
        "head_dim": HEAD,
        "attn_temperature_tuning": False,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
}
SCALES = {"channel": "weight_scale", "tensor": "weight_scale", "block": "weight_scale_inv", "mx": "weight_scale"}


@dataclass(frozen=True)
class Family:
    """How a family names its modules: experts are gate, up, down."""

    block: str
    experts: tuple[str, str, str]
    router: str = "gate"
    root: str = "model"
    head: str = "lm_head"
    shared: tuple[str, ...] = ()
    qk_norm: bool = False


FAMILIES = {
    "qwen3_moe": Family("mlp", ("gate_proj", "up_proj", "down_proj"), qk_norm=True),
    "mixtral": Family("block_sparse_moe", ("w1", "w3", "w2")),
    "llama4": Family(
        "feed_forward",
        ("gate_proj", "up_proj", "down_proj"),
        "router",
        "language_model.model",
        "language_model.lm_head",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


def quantized(
    rng: np.random.Generator, form: str, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(FP8 weight up to 448, its scale, weight x scale ``to_odd``); magnitudes differ by 2^10 between scale values."""
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
    return codes, scale, to_odd(e4m3fn(codes) * whole)


def to_odd(values: np.ndarray) -> torch.Tensor:
    """float32 of float64 values: of the two beside a value, the one whose last bit is set. Rounded to bfloat16 after
    this, it is what the value itself is rounded to."""
    near = values.astype(np.float32)
    below = np.where(np.abs(near.astype(np.float64)) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    bits = below.view(np.uint32) | (near.astype(np.float64) != values)
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def matrices(family: Family) -> Iterator[tuple[str, int, int]]:
    """(module, out, in) of every quantized linear layer, experts one by one."""
    sizes = ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER))
    for layer in range(LAYERS):
        head = f"{family.root}.layers.{layer}"
        yield from ((f"{head}.self_attn.{p}_proj", HIDDEN, HIDDEN) for p in "qkvo")
        places = [f"{head}.{family.block}.experts.{expert}" for expert in range(EXPERTS)]
        for place in places:
            yield from ((f"{place}.{p}", *size) for p, size in zip(family.experts, sizes, strict=True))
        place = f"{head}.{family.block}.shared_expert"
        yield from ((f"{place}.{p}", *size) for p, size in zip(family.shared, sizes, strict=False))


def plain(family: Family, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """What is never quantized: embeddings, norms, routers."""

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).bfloat16()

    tensors = {f"{family.root}.embed_tokens.weight": random(VOCAB, HIDDEN)}
    tensors |= {f"{family.head}.weight": random(VOCAB, HIDDEN), f"{family.root}.norm.weight": random(HIDDEN)}
    for layer in range(LAYERS):
        head = f"{family.root}.layers.{layer}"
        tensors[f"{head}.input_layernorm.weight"] = random(HIDDEN)
        tensors[f"{head}.post_attention_layernorm.weight"] = random(HIDDEN)
        tensors[f"{head}.{family.block}.{family.router}.weight"] = random(EXPERTS, HIDDEN)
        if family.qk_norm:
            tensors[f"{head}.self_attn.q_norm.weight"] = random(HEAD)
            tensors[f"{head}.self_attn.k_norm.weight"] = random(HEAD)
    return tensors


def stacked(tensors: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """Llama 4's form: experts [experts, in, out], gate and up side by side; ``X_scale``."""
    done = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(LAYERS):
        place = f"{family.root}.layers.{layer}.{family.block}.experts"
        for end, new in (("weight", ""), ("weight_scale", "_scale"), ("weight_scale_inv", "_scale")):
            gate, up, down = ([tensors.get(f"{place}.{e}.{p}.{end}") for e in range(EXPERTS)] for p in family.experts)
            if gate[0] is None:
                continue
            both = [torch.cat([_raw(g), _raw(u)]) for g, u in zip(gate, up, strict=True)]
            for name, parts in (("gate_up_proj", both), ("down_proj", [_raw(d) for d in down])):
                whole = torch.stack([part.T for part in parts]).contiguous()
                done[f"{place}.{name}{new}"] = whole.view(torch.float8_e4m3fn) if whole.dtype == torch.uint8 else whole
    return done


def out_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' form, which Qwen3.5's conversion takes: experts [experts, out, in], gate above up."""
    done = {name: t for name, t in tensors.items() if ".experts." not in name}
    for place in dict.fromkeys(name.partition(".experts.")[0] + ".experts" for name in tensors.keys() - done.keys()):
        gate, up, down = (
            torch.stack([tensors[f"{place}.{e}.{p}.weight"] for e in range(EXPERTS)])
            for p in ("gate_proj", "up_proj", "down_proj")
        )
        done |= {f"{place}.gate_up_proj": torch.cat([gate, up], dim=1), f"{place}.down_proj": down}
    return done


def _raw(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def of_model(model: Model, form: str, rng: np.random.Generator) -> tuple[dict[str, torch.Tensor], ...]:
    """(tensors, float32 twins)."""
    first, twin = {}, {}
    for name, shape in model.plain.items():
        first[name] = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).bfloat16()
        twin[name] = first[name].float()
    for module, (rows, columns) in model.matrices.items():
        weight, scale, exact = quantized(rng, form, rows, columns)
        if module in model.flat:  # a parameter, as DBRX's: its scale is beside it
            first |= {module: weight, f"{module}_weight_scale": scale}
            twin[module] = exact
        else:
            first |= {f"{module}.weight": weight, f"{module}.{SCALES[form]}": scale}
            twin[f"{module}.weight"] = exact
    return first, twin


def _save(directory: Path, contents: Sequence[dict[str, torch.Tensor]], config: dict[str, Any]) -> tuple[Path, Path]:
    paths = directory / "fp8", directory / "twin"
    for path, tensors in zip(paths, contents, strict=True):
        path.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
        if config["model_type"] == "minimax_m2":  # its port converts nothing where there is no index
            index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def write(
    directory: Path, name: str, form: str, *, stack: bool = False, seed: int = 0, rival: str | None = None
) -> tuple[Path, Path]:
    """Write a checkpoint and its float32 twin (Llama 4's: experts stacked). Returns their directories.

    With ``rival``, a type of the experts' layers, the twin has what a hand-written script makes of the weights.
    """
    rng = np.random.default_rng(seed)
    if name in MODELS:
        model = MODELS[name]()
        if form == "block":
            model.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        first, twin = of_model(model, form, rng)
        twin = scripted(first, twin, form, rival) if rival else twin
        return _save(directory, (first, out_first(twin) if name == "qwen3_5_moe" else twin), model.config)
    name = name.removesuffix("_contrib")
    family = FAMILIES[name]
    first = plain(family, rng)
    twin = {name: t.float() for name, t in first.items()}
    for module, rows, columns in matrices(family):
        weight, scale, exact = quantized(rng, form, rows, columns)
        first |= {f"{module}.weight": weight, f"{module}.{SCALES[form]}": scale}
        twin[f"{module}.weight"] = exact
    twin = scripted(first, twin, form, rival) if rival else twin
    twin = stacked(twin, family) if name == "llama4" else twin
    return _save(directory, (stacked(first, family) if stack else first, twin), config_of(name))


def config_of(name: str) -> dict[str, Any]:
    """config.json of a family of ``FAMILIES``; Llama 4's text model is within another."""
    config = {**_COMMON, **CONFIGS[name], "model_type": name}
    if name == "llama4":
        return {"model_type": name, "text_config": config, "pad_token_id": 0, "vocab_size": VOCAB}
    return config
