"""The tables, all 256 codes: against the bits, against ml_dtypes, against the recipe in Neuron's README."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from support import CODES, codes

from neuron_fp8_loader import OptionError, neuron_view
from neuron_fp8_loader.codes.formats import FNUZ, HALF, METHODS, NEURON_VALUES, RATIO, Table


def bits_to_value(byte: int, *, bias: int = 7) -> float:
    """sign, exponent, mantissa -> value, without the special codes."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = math.ldexp(mantissa, 1 - bias - 3) if exponent == 0 else math.ldexp(8 + mantissa, exponent - bias - 3)
    return -value if byte & 0x80 else value


def nearest_code(value: float) -> int:
    """The e4m3fn byte nearest to a value of at most 448, ties to the even mantissa, found by trying all."""
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    candidates = range(0x7F)
    best = min(candidates, key=lambda m: (abs(bits_to_value(m) - abs(value)), m & 1))
    return sign | best


def halved(byte: int) -> int:
    """Half a code, by its bits: one off the exponent, or a shift to the right, rounded to even."""
    sign, code = byte & 0x80, byte & 0x7F
    if code == 0x7F:
        return byte
    if code >= 0x10:
        return sign | code - 8
    down, rest = code >> 1, code & 1
    return sign | (down + (rest & down & 1))


@pytest.mark.parametrize("byte", range(256))
def test_half_is_one_off_the_exponent(byte):
    assert HALF.out[byte] == halved(byte)
    if byte & 0x7F != 0x7F:
        assert HALF.out[byte] == nearest_code(bits_to_value(byte) / 2)


@pytest.mark.parametrize("byte", range(256))
def test_half_loses_the_odd_codes_below_0x10_only(byte):
    code = byte & 0x7F
    assert bool(HALF.lossy[byte]) == (code < 0x10 and code & 1 == 1)


def test_half_in_ml_dtypes():
    before = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = (before / 2).astype(ml_dtypes.float8_e4m3fn)
    finite = ~np.isnan(before)
    np.testing.assert_array_equal(np.frombuffer(HALF.out, np.uint8)[finite], expected.view(np.uint8)[finite])


def test_ratio_is_the_readme_recipe_byte_for_byte():
    weight = codes(CODES)
    recipe = (weight.bfloat16() / (448 / 240)).to(torch.float8_e4m3fn)
    number = CODES & 0x7F != 0x7F
    out = np.frombuffer(RATIO.out, np.uint8)
    np.testing.assert_array_equal(out[number], recipe.view(torch.uint8).numpy()[number])
    # the sign that the recipe gives a nan depends on the host's vector unit; here it is kept
    np.testing.assert_array_equal(out[~number], CODES[~number])


def test_ratio_in_ml_dtypes():
    # the same steps with another library's bf16 and FP8: a division in float32 rounded to bf16, then the cast
    before = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    quotient = (before / np.float32(448 / 240)).astype(ml_dtypes.bfloat16)
    expected = quotient.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    finite = ~np.isnan(before)
    np.testing.assert_array_equal(np.frombuffer(RATIO.out, np.uint8)[finite], expected[finite])
    assert sum(not flag for flag in RATIO.lossy[1:0x7F]) == 14  # exact positive codes


@pytest.mark.parametrize(("table", "largest"), [(HALF, 224.0), (RATIO, 240.0), (FNUZ, 240.0)])
def test_every_code_comes_out_finite_on_the_device(table, largest):
    source = ml_dtypes.float8_e4m3fnuz if table is FNUZ else ml_dtypes.float8_e4m3fn
    was_nan = np.isnan(CODES.view(source).astype(np.float64))
    on_device = np.frombuffer(table.out, np.uint8).view(ml_dtypes.float8_e4m3).astype(np.float64)
    assert np.isfinite(on_device[~was_nan]).all()
    assert np.abs(on_device[~was_nan]).max() == largest
    assert np.isnan(on_device[was_nan]).all()


@pytest.mark.parametrize("table", [HALF, RATIO, FNUZ], ids=lambda t: t.name)
def test_lossy_tells_whether_the_product_changes(table):
    source = ml_dtypes.float8_e4m3fnuz if table is FNUZ else ml_dtypes.float8_e4m3fn
    before = CODES.view(source).astype(np.float64)
    after = np.frombuffer(table.out, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64) * table.scale_factor
    expected = (before != after) & ~np.isnan(before)
    np.testing.assert_array_equal(np.frombuffer(table.lossy, np.uint8).astype(bool), expected)


@pytest.mark.parametrize("byte", range(256))
def test_fnuz_keeps_the_value(byte):
    if byte == 0x80:  # the one nan of fnuz
        assert FNUZ.out[byte] & 0x7F == 0x7F
        return
    value = bits_to_value(byte, bias=8)
    assert value == float(np.uint8(byte).view(ml_dtypes.float8_e4m3fnuz))
    assert FNUZ.out[byte] == nearest_code(value)
    assert bool(FNUZ.lossy[byte]) == (bits_to_value(FNUZ.out[byte]) != value)


@pytest.mark.parametrize("table", [HALF, RATIO], ids=lambda t: t.name)
def test_symmetric_form_says_the_same(table: Table):
    assert len(table.symmetric) == 128
    for byte in range(256):
        entry = table.symmetric[byte & 0x7F]
        assert (byte & 0x80) | (entry & 0x7F) == table.out[byte]
        assert bool(entry & 0x80) == bool(table.lossy[byte])


def test_fnuz_has_no_symmetric_form():
    assert FNUZ.symmetric == b""  # its 0x80 is a nan, not -0: the kernel must not carry the sign over


def test_factors():
    assert {name: table.scale_factor for name, table in METHODS.items()} == {"half": 2.0, "ratio": 448 / 240}
    assert FNUZ.scale_factor == 1.0


def test_neuron_view_reads_every_byte_as_ieee_e4m3():
    expected = CODES.view(ml_dtypes.float8_e4m3).astype(np.float32)
    np.testing.assert_array_equal(neuron_view(codes(CODES)).numpy(), expected)
    np.testing.assert_array_equal(NEURON_VALUES.numpy(), expected)
    assert math.copysign(1, neuron_view(codes([0x80]))[0]) == -1
    assert neuron_view(codes([0x78, 0xF8])).tolist() == [math.inf, -math.inf]


def test_neuron_view_takes_any_shape():
    weight = codes(np.arange(24).reshape(2, 3, 4))
    for view in (weight, weight.transpose(0, 2), weight[:, ::2], weight[0, 0, 0], weight[:0]):
        seen = neuron_view(view)
        assert seen.dtype == torch.float32
        assert torch.equal(seen, view.float())
    assert torch.equal(neuron_view(weight.view(torch.uint8)), weight.float())
    with torch.device("meta"):
        assert neuron_view(weight).device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_neuron_view_refuses_other_dtypes(dtype):
    with pytest.raises(OptionError, match="float8_e4m3fn"):
        neuron_view(torch.zeros(2).to(dtype))
