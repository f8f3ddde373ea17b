"""Mixtures of experts made up in the names and shapes that producers write, and what NxD's layers must read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from support import e4m3fn, expand, ieee_e4m3, random_codes, scale_values

NAMES = {"proj": ("gate_proj", "up_proj", "down_proj"), "w": ("w1", "w3", "w2")}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is written: the ends of names, what a scale covers, its dtype and its shape for one value."""

    weight: str = ".weight"
    scale: str = ".weight_scale"
    covers: str = "row"
    dtype: torch.dtype = torch.float32
    names: str = "proj"
    block: int = 128


def scale_shape(kind: Kind, shape: tuple[int, int]) -> tuple[int, ...]:
    blocks = tuple(-(-n // kind.block) for n in shape)
    return {"row": (shape[0], 1), "flat": (shape[0],), "tensor": (), "one": (1,), "block": blocks}[kind.covers]


def scales(shape: tuple[int, ...], dtype: torch.dtype, rng: np.random.Generator) -> torch.Tensor:
    if dtype == torch.uint8 or "e8m0" in str(dtype):
        return torch.from_numpy(rng.integers(110, 124, shape, dtype=np.uint8)).view(dtype)
    return torch.from_numpy(np.asarray(rng.uniform(1e-4, 1e-3, shape), dtype=np.float32)).to(dtype)


def per_expert(
    kind: Kind,
    experts: int,
    inner: int,
    hidden: int,
    *,
    block: str = "model.layers.0.mlp",
    seed: int = 0,
    top: int = 0x7E,
) -> Tensors:
    """Weights [out, in] and scales of each expert, in the order of their numbers as text, as files have them."""
    rng = np.random.default_rng(seed)
    out: Tensors = {}
    for expert in sorted(range(experts), key=str):
        for part, name in enumerate(NAMES[kind.names]):
            shape = (hidden, inner) if part == 2 else (inner, hidden)
            module = f"{block}.experts.{expert}.{name}"
            out[module + kind.weight] = random_codes(shape, seed * 1000 + expert * 3 + part, top=top)
            out[module + kind.scale] = scales(scale_shape(kind, shape), kind.dtype, rng)
    return out


def values_of(tensors: Mapping[str, torch.Tensor], kind: Kind, module: str) -> np.ndarray:
    """float64 [out, in]: what a GPU makes of one expert's projection."""
    weight, scale = tensors[module + kind.weight], scale_values(tensors[module + kind.scale])
    return e4m3fn(weight) * expand(scale, tuple(weight.shape))


def read_fused(state: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    """float64 [experts, in, out]: what a device makes of a fused weight and its scale, which it broadcasts or, being
    blocks, repeats."""
    weight, scale = ieee_e4m3(state[f"{name}.weight"]), state[f"{name}.scale"]
    assert state[f"{name}.weight"].dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    values = scale.double().numpy()
    if values.shape[1:] != (1, weight.shape[2]):
        for axis in (1, 2):
            values = values.repeat(weight.shape[axis] // values.shape[axis], axis)
    return weight * values


def apart(state: Mapping[str, torch.Tensor], block: str = "model.layers.0.mlp") -> list[list[np.ndarray]]:
    """What a device reads, taken apart again: for each expert gate, up and down, each [out, in]."""
    gate_up = read_fused(state, f"{block}.expert_mlps.mlp_op.gate_up_proj")
    down = read_fused(state, f"{block}.expert_mlps.mlp_op.down_proj")
    half = gate_up.shape[2] // 2
    return [[g[:, :half].T, g[:, half:].T, d.T] for g, d in zip(gate_up, down, strict=True)]
