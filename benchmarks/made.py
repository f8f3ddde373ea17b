"""FP8 checkpoints made on the fly, with checksums of what a correct load gives."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

from neuron_fp8_loader.conventions import Convention, conventions

VARIANTS = ("raw", "half", "ratio")
BLOCK = 128


@dataclass(frozen=True)
class Made:
    """A checkpoint and what is in it.

    Attributes:
        directory: holds it; a path to give to ``load_state_dict``.
        files: its shards.
        pairs: (weight, scale) names.
        nbytes: bytes of tensor data.
        crc: of each variant ("raw", "half", "ratio") the crc32 of each tensor's bytes.
    """

    directory: Path
    files: tuple[Path, ...]
    pairs: tuple[tuple[str, str], ...]
    nbytes: int
    crc: dict[str, dict[str, int]] = field(repr=False)


def convention_names() -> list[str]:
    return [rule.name for rule in conventions()]


def expected_tables() -> dict[str, np.ndarray]:
    """Of each variant the 256 bytes that the codes become: ml_dtypes' arithmetic, not the package's tables."""
    fp8, bf16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(fp8).astype(np.float32)
    ratio = (values.astype(bf16).astype(np.float32) / np.float32(448 / 240)).astype(bf16)
    return {
        "raw": codes,
        "half": (values / 2).astype(fp8).view(np.uint8),
        "ratio": ratio.astype(fp8).view(np.uint8),
    }


def make(
    directory: Path,
    nbytes: int,
    *,
    shards: int = 1,
    convention: str = "weight_scale",
    scale: str = "row",
    side: int | None = None,
    seed: int = 0,
) -> Made:
    """Write a checkpoint of about ``nbytes`` of FP8 weights, as a Hugging Face directory.

    Args:
        directory: where; made if it is not there.
        nbytes: bytes of weights.
        shards: files to spread them over.
        convention: the name of a registered convention.
        scale: ``"row"`` [out, 1], ``"tensor"`` [] or ``"block"`` [out/128, in/128], float32.
        side: rows and columns of each weight; None for the largest power of two up to 4096 that gives four of them.
        seed: of the random weights.
    """
    (rule,) = [r for r in conventions() if r.name == convention]
    if side is None:
        side = 4096
        while side > 16 and side * side * 4 > nbytes:
            side //= 2
    count = max(1, round(nbytes / side**2))
    rng = np.random.default_rng(seed)
    codes = _quantized(rng.standard_normal((side, side), dtype=np.float32))
    tables = expected_tables()
    factors = {"raw": np.float32(1), "half": np.float32(2), "ratio": np.float32(448 / 240)}
    crc: dict[str, dict[str, int]] = {variant: {} for variant in VARIANTS}
    files: list[Path] = []
    pairs: list[tuple[str, str]] = []
    weight_map: dict[str, str] = {}
    total = 0
    directory.mkdir(parents=True, exist_ok=True)
    shards = min(shards, count)
    for number, members in enumerate(np.array_split(np.arange(count), shards)):
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for index in members.tolist():
            weight, scale_name = _names(rule, index)
            pairs.append((weight, scale_name))
            # rolled: no two weights alike, at the cost of a copy
            own = np.roll(codes.reshape(-1), 7919 * index)
            values = (rng.random(_scale_shape(side, scale), dtype=np.float32) + np.float32(0.5)) / np.float32(448)
            norm = rng.standard_normal(side, dtype=np.float32).astype(ml_dtypes.bfloat16)
            norm_name = f"model.layers.{index}.input_layernorm.weight"
            tensors[weight] = torch.from_numpy(own.reshape(side, side)).view(torch.float8_e4m3fn)
            tensors[scale_name] = torch.from_numpy(np.asarray(values))
            tensors[norm_name] = torch.from_numpy(norm.view(np.int16)).view(torch.bfloat16)
            for variant in VARIANTS:
                crc[variant][weight] = zlib.crc32(np.take(tables[variant], own).data)
                crc[variant][scale_name] = zlib.crc32(np.ascontiguousarray(values * factors[variant]).data)
                crc[variant][norm_name] = zlib.crc32(norm.view(np.uint8).data)
        save_file(tensors, directory / name, metadata={"format": "pt"})
        files.append(directory / name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return Made(directory, tuple(files), tuple(pairs), total, crc)


def _names(rule: Convention, index: int) -> tuple[str, str]:
    # a template that is the bare prefix means fused experts, whose parameters have names of their own
    module = f"model.layers.{index}.mlp.{'experts.down_proj' if rule.weight == '{}' else 'down_proj'}"
    return rule.weight.format(module), rule.scale.format(module)


def _scale_shape(side: int, scale: str) -> tuple[int, ...]:
    blocks = -(-side // BLOCK)
    return {"row": (side, 1), "tensor": (), "block": (blocks, blocks)}[scale]


def _quantized(values: np.ndarray) -> np.ndarray:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(448)
    # the division may end a hair above 448, which the cast takes for NaN
    return np.asarray((values / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
