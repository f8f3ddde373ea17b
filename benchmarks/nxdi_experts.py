"""Experts under the flag: ``get_state_dict`` of the real Qwen3-MoE, for ``benchmarks.nxdi --model qwen3_moe``."""

from __future__ import annotations

import importlib
import json
import multiprocessing as mp
import os
import resource
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import neuron_fp8_loader

from . import pagecache
from .common import WrongAnswer, interleaved
from .experts import Made, Tensors, make, worst

EXPERTS, INNER, HIDDEN, HEADS, HEAD, VOCAB = 16, 768, 2048, 4, 64, 256
PLAIN, UNDER_THE_FLAG, FUSED = "load_file + clone", "get_state_dict under the flag", 'load_state_dict(experts="fused")'
CONTENDERS = (PLAIN, UNDER_THE_FLAG, FUSED)


def make_model(directory: Path, layers: int, experts: int = EXPERTS, inner: int = INNER, hidden: int = HIDDEN) -> Made:
    """Write a Qwen3-MoE with a scale a row: what is not experts is small, and in a shard of its own."""
    made = make(directory, layers * experts * 3 * inner * hidden, "row", experts, inner, hidden)
    rng = np.random.default_rng(1)
    rest: Tensors = {
        "model.embed_tokens.weight": _bf16(rng, VOCAB, hidden),
        "model.norm.weight": _bf16(rng, hidden),
        "lm_head.weight": _bf16(rng, VOCAB, hidden),
    }
    for layer in range(made.layers):
        at = f"model.layers.{layer}"
        rest |= {f"{at}.{n}_layernorm.weight": _bf16(rng, hidden) for n in ("input", "post_attention")}
        rest |= {f"{at}.self_attn.{n}_norm.weight": _bf16(rng, HEAD) for n in "qk"}
        rest[f"{at}.mlp.gate.weight"] = _bf16(rng, made.experts, hidden)
        shapes = {**dict.fromkeys("qkv", (HEADS * HEAD, hidden)), "o": (hidden, HEADS * HEAD)}
        for name, shape in shapes.items():
            values = np.clip(rng.standard_normal(shape, dtype=np.float32) * 110, -448, 448)
            rest[f"{at}.self_attn.{name}_proj.weight"] = torch.from_numpy(values).to(torch.float8_e4m3fn)
            rest[f"{at}.self_attn.{name}_proj.weight_scale"] = torch.full((shape[0], 1), 2e-4)
    save_file(rest, directory / "model-rest.safetensors", metadata={"format": "pt"})
    files = (*made.files, directory / "model-rest.safetensors")
    weight_map = {name: file.name for file in files for name in load_file(file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(_config(made.layers, made.experts, inner, hidden)))
    return made


def _bf16(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).bfloat16()


def _config(layers: int, experts: int, inner: int, hidden: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 2 * inner,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    }


def _ready(name: str, made: Made, harness: str) -> Any:
    """What is imported and built before the clock starts."""
    if name != UNDER_THE_FLAG:
        return None
    sys.path.insert(0, harness)
    neuron_fp8_loader.enable()
    families = importlib.import_module("families")
    kind = {"quantization_type": "expert_wise_per_channel_symmetric", "torch_dtype": "bfloat16"}
    return families.build("qwen3_moe", made.directory, fp8_rescale=True, **kind)


def _run(name: str, made: Made, app: Any) -> Tensors:
    if name == PLAIN:
        files = sorted(made.directory.glob("*.safetensors"))
        return {n: tensor.clone() for file in files for n, tensor in load_file(file).items()}
    if name == FUSED:
        return neuron_fp8_loader.load_state_dict(made.directory, layout="per_channel", experts="fused", progress=False)
    found: Tensors = type(app).get_state_dict(str(made.directory), app.config)
    return found


def _child(pipe: Connection, name: str, made: Made, harness: str) -> None:
    app = _ready(name, made, harness)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, used = time.perf_counter(), time.process_time()
    result = _run(name, made, app)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - used
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    named = {n if n.startswith("model.") else f"model.{n}": t for n, t in result.items()}
    pipe.send((seconds, cpu, peak, float("inf") if name == PLAIN else worst(made, named)))


def run_apart(name: str, made: Made, harness: str) -> tuple[float, float, int]:
    """(seconds, CPU seconds, bytes by which the resident set grew at its peak) in a fresh process, page cache warm.

    Raises:
        WrongAnswer: it failed, or its experts are not the checkpoint's as a device reads them.
    """
    pagecache.warm(tuple(made.directory.glob("*.safetensors")))
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.contenders"])
    parent, child = context.Pipe()
    process = context.Process(target=_child, args=(child, name, made, harness), daemon=True)
    process.start()
    child.close()
    try:
        seconds, cpu, peak, decibels = parent.recv()
    except EOFError as error:
        raise WrongAnswer(f"{name} failed; its message is above") from error
    finally:
        process.join()
    if not decibels > 100:
        raise WrongAnswer(f"{name}: {decibels:.1f} dB from the checkpoint")
    return seconds, cpu, peak


def compare(made: Made, harness: str, repeats: int, names: tuple[str, ...] = CONTENDERS) -> dict[str, dict[str, Any]]:
    """Of each, in turns: seconds, CPU seconds and peaks of all rounds."""
    runs = interleaved({name: partial(run_apart, name, made, harness) for name in names}, repeats)
    total = sum(file.stat().st_size for file in made.directory.glob("*.safetensors"))
    return {
        name: {
            "runs_s": [seconds for seconds, _, _ in done],
            "cpu_s": [cpu for _, cpu, _ in done],
            "peak_over_size": [peak / total for _, _, peak in done],
            "environment": {
                n: os.environ[n] for n in ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_") if n in os.environ
            },
        }
        for name, done in runs.items()
    }


def span(values: list[float], digits: int) -> str:
    """``0.70-0.74``, or one number where they are alike."""
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least}-{most}"
