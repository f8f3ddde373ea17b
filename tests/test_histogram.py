"""``kernel.histogram`` against numpy, on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuron_fp8_loader import kernel


@pytest.mark.parametrize("path", kernel.paths())
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 1000, 4097])
def test_histogram(monkeypatch: pytest.MonkeyPatch, path: str, size: int) -> None:
    monkeypatch.setattr(kernel, "active", path)
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    for seen in (data, np.full(size, 0x80, np.uint8), data[1:]):
        got = kernel.histogram(torch.from_numpy(seen.copy()))
        assert got.dtype == torch.int64
        assert got.tolist() == np.bincount(seen, minlength=256).tolist()


def test_histogram_takes_bytes_only() -> None:
    for wrong in (torch.zeros(4), torch.zeros(4, 4, dtype=torch.uint8).t()[:, :2]):
        with pytest.raises(ValueError, match="contiguous uint8"):
            kernel.histogram(wrong)
