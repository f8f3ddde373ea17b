"""Small FP8 checkpoints in the forms in which NxD Inference reads them, and the device's reading of what it got."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.support import e4m3fn, fp8, ieee_e4m3

LAYERS = [f"model.layers.{n}.{m}" for n in range(2) for m in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]


def state_dict(seed: int = 0, *, plain: tuple[str, ...] = (), layers: list[str] = LAYERS) -> dict[str, torch.Tensor]:
    """HF names: FP8 weights [16, 32] up to 448 with scales [16, 1], bf16 for the modules named ``plain``."""
    rng = np.random.default_rng(seed)

    def bf16(rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32)).bfloat16()

    tensors = {"model.embed_tokens.weight": bf16(8, 32), "lm_head.weight": bf16(8, 32)}
    for name in layers:
        if any(part in name for part in plain):
            tensors[f"{name}.weight"] = bf16(16, 32)
            continue
        values = rng.uniform(-448, 448, (16, 32)).astype(np.float32)
        values[:, 0] = 448
        tensors[f"{name}.weight"] = fp8(values)
        tensors[f"{name}.weight_scale"] = torch.from_numpy(rng.uniform(1e-3, 1e-2, (16, 1)).astype(np.float32))
    return tensors


FORMS = (
    "single",
    "sharded",
    "diffusers",
    "sharded diffusers",
    "bin",
    "sharded bin",
)


def write(directory: Path, tensors: Mapping[str, torch.Tensor], form: str = "single") -> str:
    """Write a checkpoint; in the sharded forms every weight lies apart from its scale. Returns the path."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model" if "diffusers" in form else "pytorch_model" if "bin" in form else "model"
    ext = ".bin" if "bin" in form else ".safetensors"

    def put(name: str, part: dict[str, torch.Tensor]) -> None:
        if ext == ".bin":
            torch.save(part, directory / name)
        else:
            save_file(part, directory / name)

    if "sharded" not in form:
        put(f"{stem}{ext}", dict(tensors))
        return str(directory)
    names = [f"{stem}-0000{n}-of-00002{ext}" for n in (1, 2)]
    where = {name: names[name.endswith("scale")] for name in tensors}
    for file in names:
        put(file, {name: t for name, t in tensors.items() if where[name] == file})
    (directory / f"{stem}{ext}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return str(directory)


def product(tensors: Mapping[str, torch.Tensor], weight: str, scale: str, *, device: bool) -> np.ndarray:
    """float64 weight x scale, read as a Neuron device reads the bytes or as a GPU does."""
    read = ieee_e4m3 if device else e4m3fn
    return read(tensors[weight]) * tensors[scale].double().numpy()


def same_for_the_device(
    loaded: Mapping[str, torch.Tensor], original: Mapping[str, torch.Tensor], prefix: str = "", exact: bool = False
) -> bool:
    """Is every weight x scale, as the device reads it, what it was to a GPU, up to one rounding of ``half``?

    Halving rounds only values below 2^-6, by up to 2^-10; the scales have doubled by then.
    """
    for name, tensor in original.items():
        if tensor.dtype == torch.float8_e4m3fn:
            new = prefix + name.removeprefix("model.")
            got = product(loaded, new, new.removesuffix("weight") + "scale", device=True)
            want = product(original, name, name + "_scale", device=False)
            step = np.abs(original[name + "_scale"].double().numpy()) * (0 if exact else 2.0**-9)
            if not np.all(np.abs(got - want) <= step):
                return False
    return True
