"""What several test files need: paths, checkpoints made on the fly, and readings of FP8 that are not ours."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-llama-fp8"
SHARED = Path(os.environ.get("NEURON_FP8_SHARED", ROOT.parent / "shared")) / "checkpoints"


def shared(name: str) -> Path:
    """A real checkpoint of the shared collection; skips the test where the collection is absent."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"no shared checkpoint {name}")
    return SHARED / name


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
    """Signal to quantisation noise, dB."""
    noise = float(np.square(reference - other).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float(np.square(reference).sum()) / noise)
