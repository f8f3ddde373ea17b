"""What several test files need: paths, checkpoints made on the fly, and readings of FP8 that are not ours."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-llama-fp8"
SHARED = Path(os.environ.get("NEURON_FP8_SHARED", ROOT.parent / "shared")) / "checkpoints"


DATA = ROOT / "tests" / "data"
"""Some of the collection, cut small, in this repository; ``tests/data/README.md`` says how."""


def _places() -> dict[str, Path]:
    if SHARED.is_dir():
        return {d.name: d for d in sorted(SHARED.iterdir()) if d.is_dir() and not d.name.startswith("_")}
    here = {d.name: d for d in DATA.iterdir() if (d / "config.json").is_file()}
    return dict(sorted({**here, "ct_fp8_dynamic": TINY}.items()))  # the same bytes


_REAL = _places()
REAL = list(_REAL)
"""The real checkpoints at hand: the shared collection, or where that is absent what the repository holds of it."""


CONTROLS = ("ct_int8_w8a8", "ct_nvfp4")
"""Those that hold no FP8 weights."""


def shared(name: str) -> Path:
    """A real checkpoint; skips the test where it is not at hand."""
    if name not in _REAL:
        pytest.skip(f"no shared checkpoint {name}")
    return _REAL[name]


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bytes as numpy uint8, in its shape where elements are bytes."""
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def e4m3fn(tensor: torch.Tensor) -> np.ndarray:
    """float64 values as a GPU reads them (ml_dtypes)."""
    return raw(tensor).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def ieee_e4m3(tensor: torch.Tensor) -> np.ndarray:
    """float64 values as a Neuron device reads them (ml_dtypes)."""
    return raw(tensor).view(ml_dtypes.float8_e4m3).astype(np.float64)


def fp8(values: np.ndarray) -> torch.Tensor:
    """float8_e4m3fn from float values, rounded by ml_dtypes."""
    codes = np.asarray(values, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(codes)).view(torch.float8_e4m3fn)


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantization noise, dB."""
    noise = float(np.square(reference - other).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float(np.square(reference).sum()) / noise)


# -- checkpoints made on the fly ------------------------------------------------------------------------------

CODES = np.arange(256, dtype=np.uint8)


def codes(values: object) -> torch.Tensor:
    """float8_e4m3fn from bytes."""
    return torch.from_numpy(np.array(values, dtype=np.uint8)).view(torch.float8_e4m3fn)


def random_codes(
    shape: tuple[int, ...], seed: int = 0, *, top: int = 0x7E, dtype: torch.dtype = torch.float8_e4m3fn
) -> torch.Tensor:
    """An FP8 tensor of random codes of both signs, none of a magnitude above ``top`` (0x7e: 448; 0x77: 240)."""
    rng = np.random.default_rng(seed)
    magnitude = rng.integers(0, top + 1, shape, dtype=np.uint8)
    drawn = np.asarray(magnitude | (rng.integers(0, 2, shape, dtype=np.uint8) << 7), dtype=np.uint8)
    return torch.from_numpy(drawn).view(dtype)


def blob(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, of any dtype and shape."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same dtype, shape and bytes: NaN equals NaN, -0 does not equal 0."""
    return one.dtype == other.dtype and one.shape == other.shape and blob(one) == blob(other)


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """One safetensors file; returns its path."""
    safetensors.torch.save_file(tensors, path, metadata)
    return path


E8M0_OR_ITS_BYTES = (
    torch.uint8,
    pytest.param(
        getattr(torch, "float8_e8m0fnu", None),
        marks=pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="e8m0 needs torch 2.7 or newer"),
        id="e8m0",
    ),
)
"""For ``parametrize``: the two dtypes that hold power-of-two scales, of which torch 2.5 and 2.6 have one."""


def can_save(dtype: torch.dtype) -> bool:
    """Can this safetensors write it? Not every version knows every FP8 dtype."""
    try:
        safetensors.torch.save({"x": torch.zeros(2, dtype=torch.uint8).view(dtype)})
    except (KeyError, ValueError):
        return False
    return True


def save_shards(
    directory: Path,
    *shards: dict[str, torch.Tensor],
    stem: str = "model",
    index: bool = True,
    ext: str = ".safetensors",
) -> list[Path]:
    """Numbered shards, with an index if ``index``; returns their paths."""
    files = [directory / f"{stem}-{i:05d}-of-{len(shards):05d}{ext}" for i in range(1, len(shards) + 1)]
    for file, tensors in zip(files, shards, strict=True):
        if ext == ".bin":
            torch.save(tensors, file)
        else:
            save(file, tensors)
    if index:
        weight_map = {name: file.name for file, tensors in zip(files, shards, strict=True) for name in tensors}
        write_index(directory / f"{stem}{ext}.index.json", weight_map)
    return files


def write_index(file: Path, weight_map: dict[str, str]) -> Path:
    file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return file


def header(content: object, data: bytes = b"\0" * 24) -> bytes:
    """A safetensors file with this header, right or wrong."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file, to tell that none was written to."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir()) if f.is_file()}


def expand(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale of any published layout ([], [1], [out], [out, 1], blocks, 4-D blocks) over a 2-D weight."""
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(1, 1), shape)
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0]
    if scale.ndim == 1:
        scale = scale[:, None]
    for axis in (0, 1):
        times = next(b for b in (1, 128, 64, 32, 16, shape[axis]) if -(-shape[axis] // b) == scale.shape[axis])
        scale = np.repeat(scale, times, axis)
    return scale[: shape[0], : shape[1]]


def scale_values(scale: torch.Tensor) -> np.ndarray:
    """A scale's values as float64; e8m0 (or uint8) by ml_dtypes."""
    if scale.element_size() == 1:
        return raw(scale).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return scale.double().numpy()


def _halved_codes() -> np.ndarray:
    values = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    half = (values / 2).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(values), CODES, half)


_HALVED = _halved_codes()


def halved(tensor: torch.Tensor) -> torch.Tensor:
    """What `half` has to make of an FP8 tensor, by ml_dtypes; a new, contiguous tensor."""
    return torch.from_numpy(np.array(_HALVED[raw(tensor)], dtype=np.uint8)).view(torch.float8_e4m3fn)


# -- state dicts ----------------------------------------------------------------------------------------------


def frozen(tensors: dict) -> dict:
    """Copies with memory of their own, as a record of what was there."""
    return {n: t.detach().clone() if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}


def unchanged(tensors: dict, before: dict) -> None:
    """Assert that the tensors hold what they held, in the same order."""
    assert list(tensors) == list(before)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert blob(tensors[name]) == blob(value), name
