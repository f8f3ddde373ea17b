"""Placing a matrix transposed among the columns of another, on every path, against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_fp8_loader import kernel
from neuron_fp8_loader.codes.kernel import place

try:
    from neuron_fp8_loader.codes import _kernel
except ImportError:
    _kernel = None


@pytest.fixture(params=kernel.paths())
def path(request, monkeypatch):
    monkeypatch.setattr(kernel, "active", request.param)
    return request.param


def check(rows: int, columns: int, before: int = 0, after: int = 0, dtype: torch.dtype = torch.uint8) -> None:
    source = np.random.default_rng(rows * 1009 + columns).integers(0, 256, (rows, columns), dtype=np.uint8)
    whole = np.full((columns, before + rows + after), 0xA5, dtype=np.uint8)
    expected = whole.copy()
    expected[:, before : before + rows] = np.transpose(source)
    given, target = torch.from_numpy(source.copy()).to(dtype), torch.from_numpy(whole).to(dtype)
    place(given, target[:, before : before + rows])
    np.testing.assert_array_equal(target.to(torch.uint8).numpy(), expected)  # what lies beside it too
    np.testing.assert_array_equal(given.to(torch.uint8).numpy(), source)


@pytest.mark.parametrize("columns", [0, 1, 15, 16, 63, 64, 65, 129, 192])
def test_every_edge_of_a_tile(path, columns):
    for rows in (0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 200):
        check(rows, columns)
        check(rows, columns, before=3, after=5)


@pytest.mark.parametrize("shape", [(64, 64), (63, 65), (128, 192), (192, 1), (1, 192), (130, 70), (256, 64)])
def test_whole_cache_lines_of_the_target(path, shape):
    """They are written another way than parts of them."""
    rows, columns = shape
    source = np.random.default_rng(rows * columns).integers(0, 256, shape, dtype=np.uint8)
    for left, width in itertools.product((0, 64, 1, 16, 63), (512, 513, 544)):
        target = torch.full((columns + 2, width), 0xAB, dtype=torch.uint8)
        expected = target.numpy().copy()
        expected[1:-1, left : left + rows] = source.T
        place(torch.from_numpy(source), target[1:-1, left : left + rows])
        np.testing.assert_array_equal(target.numpy(), expected)


@given(st.integers(0, 150), st.integers(0, 150), st.integers(0, 70), st.integers(0, 70))
def test_any_shape(rows, columns, before, after):
    check(rows, columns, before, after)


def test_wider_elements(path):
    check(70, 33, 2, 1, torch.int16)
    check(70, 33, 2, 1, torch.bfloat16)  # whole numbers up to 256 are exact


def test_what_does_not_fit_is_refused(path):
    source = torch.zeros(4, 6, dtype=torch.uint8)
    for wrong in (torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(6, 4), torch.zeros(4, 6, dtype=torch.uint8).t()):
        with pytest.raises(ValueError, match="place takes"):
            place(source, wrong)
    with pytest.raises(ValueError, match="place takes"):
        place(torch.zeros(6, 4, dtype=torch.uint8).t(), torch.zeros(6, 4, dtype=torch.uint8))
