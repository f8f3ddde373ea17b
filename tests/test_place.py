"""Placing a matrix transposed: every byte where numpy puts it, and none beside."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from neuron_fp8_loader.codes import kernel

WIDE = 512  # columns of the larger matrix, a multiple of a cache line


@pytest.mark.parametrize("path", kernel.paths())
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (63, 65), (128, 192), (192, 1), (1, 192), (130, 70), (256, 64)])
def test_every_byte_is_where_numpy_puts_it(path: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "active", path)
    rows, columns = shape
    source = np.random.default_rng(rows * columns).integers(0, 256, shape, dtype=np.uint8)
    # whole cache lines of the target are written another way than parts of them
    for left, gap in itertools.product((0, 64, 1, 16, 63), (0, 1, 32)):
        target = torch.full((columns + 2, WIDE + gap), 0xAB, dtype=torch.uint8)
        expected = target.numpy().copy()
        expected[1:-1, left : left + rows] = source.T
        kernel.place(torch.from_numpy(source), target[1:-1, left : left + rows])
        np.testing.assert_array_equal(target.numpy(), expected)
