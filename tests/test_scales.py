"""Scales: every dtype that one may have, and the values that cannot be doubled."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from support import CODES, blob, raw

from neuron_fp8_loader.codes.formats import HALF, RATIO
from neuron_fp8_loader.codes.scales import E8M0, check_scale, is_e8m0, rescaled
from neuron_fp8_loader.errors import ScaleError

WHERE = "some.safetensors: a.weight_scale"
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (6,), (6, 1), (2, 3), (2, 1, 3, 1)]
E8M0_DTYPES = [torch.uint8, *([E8M0] if E8M0 else [])]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_floats_double_exactly(dtype, shape):
    scale = torch.rand(shape, dtype=torch.float64).mul(1e-3).to(dtype)
    before = blob(scale)
    new = rescaled(scale, HALF, WHERE)
    assert new.dtype == dtype
    assert new.shape == scale.shape
    assert torch.equal(new.double(), scale.double() * 2)
    assert blob(scale) == before


def test_half_doubles_every_finite_bf16_and_fp16():
    for dtype, numpy_dtype in ((torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)):
        patterns = np.arange(65536, dtype=np.uint32).astype(np.uint16)
        with np.errstate(invalid="ignore"):  # signalling nans
            values = patterns.view(numpy_dtype).astype(np.float64)
            fits = np.isfinite(values) & (np.abs(values) * 2 <= float(torch.finfo(dtype).max))
        scale = torch.from_numpy(patterns[fits].view(np.int16)).view(dtype)
        np.testing.assert_array_equal(rescaled(scale, HALF, WHERE).double().numpy(), values[fits] * 2)


def test_ratio_is_the_recipe_in_float32():
    scale = torch.rand(1000) * 1e-3
    expected = scale.numpy() * np.float32(448 / 240)
    np.testing.assert_array_equal(rescaled(scale, RATIO, WHERE).numpy(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_reciprocals_are_divided(dtype):
    scale = torch.tensor([4.0, 0.5, 1000.0], dtype=dtype)
    assert rescaled(scale, HALF, WHERE, reciprocal=True).tolist() == [2.0, 0.25, 500.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_is_an_error(dtype, sign):
    limit = torch.finfo(dtype).max
    fits = torch.tensor([1.0, sign * limit / 2], dtype=dtype)
    assert torch.isfinite(rescaled(fits, HALF, WHERE)).all()
    with pytest.raises(ScaleError, match=r"some\.safetensors: a\.weight_scale: 1 of 2 values overflow"):
        rescaled(torch.tensor([1.0, sign * limit], dtype=dtype), HALF, WHERE)


def test_fp16_overflows_above_32752():
    assert rescaled(torch.tensor([32752.0], dtype=torch.float16), HALF, WHERE).item() == 65504.0
    with pytest.raises(ScaleError, match="overflow"):
        rescaled(torch.tensor([32768.0], dtype=torch.float16), HALF, WHERE)


def test_what_is_not_finite_already_does_not_count_as_overflow():
    odd = torch.tensor([float("inf"), float("nan"), 1.0])
    assert rescaled(odd, HALF, WHERE)[2] == 2
    with pytest.raises(ScaleError, match="2 of 3 scale values are not finite"):
        check_scale(odd, WHERE)


@pytest.mark.parametrize("dtype", E8M0_DTYPES, ids=str)
@pytest.mark.parametrize("byte", range(256))
def test_e8m0_all_bytes(dtype, byte):
    scale = torch.tensor([byte], dtype=torch.uint8).view(dtype)
    assert is_e8m0(scale)
    if byte >= 254:
        with pytest.raises(ScaleError, match=r"a\.weight_scale: 1 of 1 e8m0 scale bytes are 254"):
            rescaled(scale, HALF, WHERE)
        return
    new = rescaled(scale, HALF, WHERE)
    assert new.dtype == dtype
    before, after = (float(raw(s).view(ml_dtypes.float8_e8m0fnu)[0]) for s in (scale, new))
    assert after == 2 * before


@pytest.mark.parametrize("dtype", E8M0_DTYPES, ids=str)
def test_e8m0_of_any_layout(dtype):
    grid = torch.from_numpy(CODES[:240].copy()).view(dtype).view(12, 20)
    for view in (grid, grid.t(), grid[::2, 1:], grid[3, 4], grid[:0]):
        new = rescaled(view, HALF, WHERE)
        assert new.shape == view.shape
        np.testing.assert_array_equal(raw(new), raw(view) + 1)


@pytest.mark.parametrize("dtype", E8M0_DTYPES, ids=str)
def test_ratio_has_no_e8m0_value(dtype):
    with pytest.raises(ScaleError, match='use method="half"'):
        rescaled(torch.tensor([127], dtype=torch.uint8).view(dtype), RATIO, WHERE)


@pytest.mark.parametrize("dtype", E8M0_DTYPES, ids=str)
def test_e8m0_nan_is_not_finite(dtype):
    check_scale(torch.tensor([0, 254], dtype=torch.uint8).view(dtype), WHERE)
    with pytest.raises(ScaleError, match="1 of 2 scale values"):
        check_scale(torch.tensor([0, 255], dtype=torch.uint8).view(dtype), WHERE)


@pytest.mark.parametrize("dtype", FLOATS)
def test_expanded_scales(dtype):
    scale = torch.tensor([3.0], dtype=dtype).expand(5, 1)
    new = rescaled(scale, HALF, WHERE)
    assert new.shape == (5, 1)
    assert new.tolist() == [[6.0]] * 5
    assert scale[0, 0] == 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_reciprocal_that_underflows_is_an_error(dtype):
    """Halved to 0 it would be an infinite scale on the device; among the subnormals it loses bits first."""
    smallest = torch.finfo(dtype).smallest_normal
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    normal = torch.tensor([1.0, 2 * smallest], dtype=dtype)
    assert rescaled(normal, HALF, WHERE, reciprocal=True).tolist() == [0.5, smallest]
    for bad in (least, -least, 3 * least):
        with pytest.raises(ScaleError, match=r"some\.safetensors: a\.weight_scale: 1 of 2 values underflow"):
            rescaled(torch.tensor([1.0, bad], dtype=dtype), HALF, WHERE, reciprocal=True)
    assert rescaled(torch.tensor([least, 0.0], dtype=dtype), HALF, WHERE).tolist() == [2 * least, 0.0]
    assert rescaled(torch.zeros(1, dtype=dtype), HALF, WHERE, reciprocal=True).tolist() == [0.0]


def test_a_reciprocal_whose_scale_is_infinite_is_an_error():
    assert rescaled(torch.tensor([2.0**-126]), HALF, WHERE, reciprocal=True).item() == 2.0**-127
    with pytest.raises(ScaleError, match="1 of 1 values underflow"):
        rescaled(torch.tensor([2.0**-127]), HALF, WHERE, reciprocal=True)  # 2^-128: 1 / it is 2^128


def test_ratio_among_the_subnormals_is_an_error():
    with pytest.raises(ScaleError, match="1 of 1 values underflow"):
        rescaled(torch.tensor([2.0**-149]), RATIO, WHERE)


@pytest.mark.parametrize("dtype", [*FLOATS, *E8M0_DTYPES], ids=str)
def test_more_scales_than_torch_does_at_once(dtype):
    if dtype in FLOATS:
        scale = torch.rand(300, 257, dtype=torch.float64).add(0.5).to(dtype)
    else:
        scale = torch.randint(0, 254, (300, 257), dtype=torch.uint8).view(dtype)
    for view in (scale, scale.t(), scale[:, ::2], scale[:, :1].expand(300, 200)):
        new = rescaled(view, HALF, WHERE)
        assert new.is_contiguous()
        if dtype in FLOATS:
            assert torch.equal(new.double(), view.double() * 2)
        else:
            np.testing.assert_array_equal(raw(new), raw(view) + 1)
