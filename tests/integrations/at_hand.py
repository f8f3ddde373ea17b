"""The real checkpoints at hand, and beside each its twin: the same weights, dequantized here, as float32."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.integrations import moe_checkpoints
from tests.support import CONTROLS, DATA, SHARED, TINY, e4m3fn, raw

FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A directory with one."""

    path: Path

    def __str__(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def family(self) -> str:
        name = self.path.name
        return "llama4" if "llama4" in name else "qwen3_moe" if "_moe" in name else "llama"

    @property
    def fp8(self) -> int:
        """How many FP8 weights the model that NxD builds has: seven projections a layer, or four and the experts."""
        return {"llama": 14, "qwen3_moe": 12, "llama4": 2}[self.family]

    @property
    def requantized(self) -> bool:
        """Are its blocks made rows? Groups of 32 are told apart by powers of two, and lose less."""
        return any(part in self.path.name for part in ("_block", "_pb_wo", "split_shards"))


_DIRECTORIES = [
    d for top in (SHARED, DATA) if top.is_dir() for d in sorted(top.iterdir()) if not d.name.startswith("_")
]
AT_HAND = [
    Checkpoint(d)
    for d in [*_DIRECTORIES, TINY]
    if d.is_dir() and d.name not in CONTROLS and any(d.glob("*.safetensors"))
]


def scale_of(name: str, tensors: Tensors) -> torch.Tensor:
    """The scale of an FP8 weight, by the names that producers have for it."""
    head, _, last = name.rpartition(".")
    names = [f"{name}_scale", f"{name}_scale_inv", f"{name}_weight_scale"]
    names += [f"{head}.scale_{last}", name.replace("_qdata", "_scale")]
    return next(tensors[n] for n in names if n in tensors)


def spread(scale: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """float64 of the shape of a weight [.., rows, columns]: each value over the block that it is for."""
    values = np.exp2(raw(scale).astype(np.float64) - 127) if scale.dtype == torch.uint8 else scale.double().numpy()
    if values.ndim == 4:
        values = values[:, 0, :, 0]
    if values.ndim == 1 and values.size > 1:
        values = values[:, None]
    values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
    for axis in (-2, -1):
        size, count = shape[axis], values.shape[axis]
        fits = [block for block in (1, 32, 128, size) if -(-size // block) == count]
        values = values.repeat(size if count == 1 else fits[0], axis).take(range(size), axis)
    return values


def dequantized(tensors: Tensors) -> Tensors:
    """float32 weights by the names of transformers, in the tests' own arithmetic."""
    done = {}
    for name, t in tensors.items():
        if t.dtype == FP8 and name != "scaled_fp8":
            exact = e4m3fn(t) * spread(scale_of(name, tensors), tuple(t.shape))
            done[name.replace("_weight_qdata", "weight")] = moe_checkpoints.to_odd(exact)
        elif "scale" not in name.rpartition(".")[2]:
            done[name] = t.float()
    return done


def one_by_one(tensors: Tensors) -> Tensors:
    """Stacks [experts, out, in], gate above up, as each expert's own projections."""
    done = {}
    for name, t in tensors.items():
        head, _, last = name.rpartition(".")
        if t.dim() < 3:
            done[name] = t
            continue
        for expert, matrix in enumerate(t):
            halves = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
            for own, part in halves if last == "gate_up_proj" else [(last, matrix)]:
                done[f"{head}.{expert}.{own}.weight"] = part.contiguous()
    return done


def whole_model(found: Checkpoint, directory: Path) -> tuple[Path, Path]:
    """A copy that NxD Inference can read, and its twin.

    What is added: the names that config.json had before transformers 5; to ComfyUI's file the config.json of the
    model that it was made of; to the one block of experts the rest of a model.
    """
    tensors = {n: t for file in sorted(found.path.glob("*.safetensors")) for n, t in load_file(file).items()}
    config: dict[str, Any] = {}
    if (found.path / "config.json").is_file():
        config = json.loads((found.path / "config.json").read_text())
    if found.family == "llama4":
        tensors, config = _around(tensors, config)
    elif not config:
        config = json.loads((TINY / "config.json").read_text())
        del config["quantization_config"]
    config |= {"rope_theta": 10000.0, "rope_scaling": None}
    plain = dequantized(tensors)
    if found.family == "qwen3_moe":
        config["num_experts"] = config["num_local_experts"]
        plain = one_by_one(plain)
    paths = directory / "fp8", directory / "twin"
    for path, what in zip(paths, (tensors, plain), strict=True):
        path.mkdir()
        if path.name == "fp8" and (found.path / "model.safetensors.index.json").is_file():
            for file in found.path.glob("model*.safetensors*"):
                (path / file.name).write_bytes(file.read_bytes())
        else:
            save_file(what, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
    return paths


def _around(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """A Llama 4 of one layer, all of it bfloat16 but for its experts."""
    inter = tensors["language_model.model.layers.0.feed_forward.experts.down_proj"].shape[1]
    family, rng = moe_checkpoints.FAMILIES["llama4"], np.random.default_rng(0)
    done = moe_checkpoints.plain(family, rng)
    for module, rows, columns in moe_checkpoints.matrices(family):
        if ".experts." not in module:
            if ".shared_expert." in module:
                rows, columns = (rows, inter) if module.endswith("down_proj") else (inter, columns)
            done[f"{module}.weight"] = torch.from_numpy(rng.standard_normal((rows, columns))).bfloat16()
    text = moe_checkpoints.config_of("llama4")
    text["text_config"] |= {"num_hidden_layers": 1, "intermediate_size": inter, "intermediate_size_mlp": inter}
    text["text_config"]["no_rope_layers"] = [1]
    return {n: t for n, t in done.items() if ".layers.1." not in n} | tensors, {**text, **config}
