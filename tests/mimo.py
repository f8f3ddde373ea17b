"""Tiny checkpoints with MiMo-V2.5's fused qkv, made of q, k and v that are known beforehand.

A tensor parallel rank of the producer holds some heads of q, of k and of v, one below the other, and quantizes that
matrix in blocks of 128x128, the last one cut short. The ranks' weights, and their scales, lie end to end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from tests.support import e4m3fn, fp8

BLOCK = 128


@dataclass
class Attention:
    """Heads of q and of kv, and their rows."""

    queries: int
    keys: int
    rows: int = 96
    v_rows: int = 64


FULL, WINDOW = Attention(8, 2), Attention(8, 4)
"""Of two ranks: 4 x 96 + 96 + 64 = 544 rows, which is 4.25 blocks, and 4 x 96 + 192 + 128 = 704, 5.5 blocks."""


@dataclass
class Made:
    """A checkpoint and what it means.

    Attributes:
        tensors: as on disk.
        config: config.json.
        values: float64 [rows, hidden] by the name of each projection's weight, as a GPU reads it.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        safetensors.torch.save_file(self.tensors, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(self.config))
        return directory


def quantized(matrix: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Codes and float32 scales, block by block."""
    codes = np.zeros(matrix.shape, np.float64)
    scales = np.zeros([-(-n // BLOCK) for n in matrix.shape], np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = np.abs(matrix[at]).max() / 448
            codes[at] = matrix[at] / scales[i, j]
    return fp8(np.clip(codes, -448, 448)), scales


def qkv(made: Made, prefix: str, attention: Attention, ranks: int, hidden: int, rng: np.random.Generator) -> None:
    """One layer's attention."""
    parts = {"q_proj": (attention.queries, attention.rows), "k_proj": (attention.keys, attention.rows)}
    parts["v_proj"] = (attention.keys, attention.v_rows)
    # each head has a size of its own, so that a head in another's place is seen
    heads = {
        part: [rng.normal(size=(rows, hidden)) * 2.0 ** rng.integers(-8, 0) for _ in range(count)]
        for part, (count, rows) in parts.items()
    }
    weights, scales = [], []
    read: dict[str, list[np.ndarray]] = {part: [] for part in parts}
    for rank in range(ranks):
        mine = {part: heads[part][rank * n // ranks : (rank + 1) * n // ranks] for part, (n, _) in parts.items()}
        codes, scale = quantized(np.concatenate([head for part in mine.values() for head in part]))
        weights.append(codes)
        scales.append(scale)
        spread = scale.astype(np.float64).repeat(BLOCK, 0)[: len(codes)].repeat(BLOCK, 1)[:, :hidden]
        back, row = e4m3fn(codes) * spread, 0
        for part, own in mine.items():
            height = sum(map(len, own))
            read[part].append(back[row : row + height])
            row += height
    made.tensors[f"{prefix}.qkv_proj.weight"] = torch.cat([w.view(torch.uint8) for w in weights]).view(
        torch.float8_e4m3fn
    )
    made.tensors[f"{prefix}.qkv_proj.weight_scale_inv"] = torch.from_numpy(np.concatenate(scales))
    for part, rows in read.items():
        made.values[f"{prefix}.{part}.weight"] = np.concatenate(rows)
        # the checkpoint is what its producer had, to the precision of FP8
        assert np.allclose(np.concatenate(rows), np.concatenate(heads[part]), rtol=0.07, atol=0.1)


def checkpoint(ranks: int = 2, hidden: int = 192, pattern: tuple[int, ...] = (0, 1), seed: int = 0) -> Made:
    """Layers as ``pattern`` says (1: sliding window), and one for multi-token prediction."""
    rng, made = np.random.default_rng(seed), Made()
    layers = {f"model.layers.{n}": WINDOW if kind else FULL for n, kind in enumerate(pattern)}
    for prefix, attention in {**layers, "model.mtp.layers.0": WINDOW}.items():
        qkv(made, f"{prefix}.self_attn", attention, ranks, hidden, rng)
        made.tensors[f"{prefix}.self_attn.o_proj.weight"] = torch.randn(
            hidden, attention.queries * attention.v_rows, dtype=torch.bfloat16
        )
    made.config = {
        "architectures": ["MiMoV2ForCausalLM"],
        "attention_projection_layout": "fused_qkv",
        "hybrid_layer_pattern": list(pattern),
        "num_attention_heads": FULL.queries,
        "num_key_value_heads": ranks,
        "head_dim": FULL.rows,
        "v_head_dim": FULL.v_rows,
        "swa_num_attention_heads": WINDOW.queries,
        "swa_num_key_value_heads": WINDOW.keys,
        "swa_head_dim": WINDOW.rows,
        "swa_v_head_dim": WINDOW.v_rows,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
    }
    return made
