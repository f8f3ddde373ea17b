"""bfloat16 from codes and scales, on every path, against exact rational arithmetic and ml_dtypes."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_fp8_loader import ScaleError, kernel
from neuron_fp8_loader.codes.dequantize import dequantize, dequantize_into, dequantize_slice, scale_values
from neuron_fp8_loader.codes.granularity import Granularity

CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
EVERY_BFLOAT16 = np.arange(0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
paths = pytest.mark.parametrize("path", kernel.paths())


def nearest(values: np.ndarray) -> np.ndarray:
    """Bits of the bfloat16 nearest to float64 values (exact products), ties to even: by search among all of them."""
    magnitude = np.abs(values)
    above = np.searchsorted(EVERY_BFLOAT16, magnitude).clip(1, 0x7F7F)
    lower, upper = EVERY_BFLOAT16[above - 1], EVERY_BFLOAT16[above]
    down, up = magnitude - lower, upper - magnitude
    bits = np.where((down < up) | ((down == up) & (above % 2 == 1)), above - 1, above)
    bits[magnitude >= (2.0 - 2.0**-8) * 2.0**127] = 0x7F80
    bits[np.isnan(values)] = 0x7FC0
    return bits.astype(np.uint16) | (np.signbit(values).astype(np.uint16) << 15)


def products(codes: torch.Tensor, factor: np.ndarray) -> np.ndarray:
    """float64, exact: 4 bits times 24."""
    raw = codes.view(torch.uint8).numpy()
    with np.errstate(invalid="ignore"):
        magnitude = (raw & 0x7F).view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.abs(factor)
    return np.copysign(magnitude, np.where((raw >= 0x80) ^ np.signbit(factor), -1.0, 1.0))


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def expand(scale: torch.Tensor, block: tuple[int, int], offset: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(o, o + n) // min(b, 2**40) for o, n, b in zip(offset, shape, block, strict=True))
    return scale.numpy().astype(np.float64)[rows][:, columns]


def test_the_oracle_rounds_as_fractions_do() -> None:
    rng = np.random.default_rng(0)
    values = np.exp2(rng.uniform(-140, 128, 300)) * rng.choice([1, -1], 300)
    for value, got in zip(values, nearest(values), strict=True):
        have = Fraction(float(np.uint16(got).view(ml_dtypes.bfloat16))) if got & 0x7F80 != 0x7F80 else None
        if have is not None:
            for other in (int(got) - 1, int(got) + 1):
                if other & 0x7F80 != 0x7F80 and (got & 0x7FFF):
                    near = Fraction(float(np.uint16(other).view(ml_dtypes.bfloat16)))
                    assert abs(Fraction(value) - have) <= abs(Fraction(value) - near)


SPECIAL = [1.0, 0.0, -0.0, -1.5, 1e-3, 2.0**-117, 2.0**-118, 2.0**-126, 2.0**-140, 1e-45, 2.0**118, 2.0**119]
SPECIAL += [3.4028234663852886e38, 7.6e35, float("inf"), -float("inf"), float("nan"), 1.9999999, 1.0000001]


@paths
@pytest.mark.parametrize("value", SPECIAL)
def test_every_code_under_special_scales(monkeypatch: pytest.MonkeyPatch, path: str, value: float) -> None:
    monkeypatch.setattr(kernel, "active", path)
    scale = torch.tensor([[value]])
    got = dequantize_slice(CODES.view(1, 256), scale, (1, 256))
    np.testing.assert_array_equal(bits(got), nearest(products(CODES.view(1, 256), scale.double().numpy())))


@paths
def test_every_code_under_many_scales(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Significands that make ties and near ties in float32, of all exponents and both signs."""
    monkeypatch.setattr(kernel, "active", path)
    rng = np.random.default_rng(1)
    count = 1500
    patterns = rng.integers(0, 2**32, count, dtype=np.uint32)
    midpoints = (rng.integers(128, 256, count) * 2 + 1) * 2.0**-8  # halfway between two bfloat16
    close = (midpoints / rng.integers(1, 16, count)).astype(np.float32).view(np.uint32)
    close = close + rng.integers(-1, 2, count).astype(np.uint32)
    scale = torch.from_numpy(np.concatenate([patterns, close]).view(np.float32))[:, None]
    codes = CODES.repeat(len(scale), 1)
    got = dequantize_slice(codes, scale, (1, 256))
    wanted = nearest(products(codes, scale.double().numpy()))
    np.testing.assert_array_equal(bits(got), wanted)
    with np.errstate(invalid="ignore", over="ignore"):
        twice = codes.view(torch.float8_e4m3fn).float() * scale
    assert (bits(twice.bfloat16())[count:] != wanted[count:]).any()  # so the test can tell one rounding from two


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 300),
    block=st.sampled_from([(1, 1), (1, 32), (8, 64), (5, 7), (128, 128), (3, 2**40), (2**70, 16)]),
    where=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    powers=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_rectangle(
    rows: int, columns: int, block: tuple[int, int], where: tuple[float, float], powers: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    offset = (int(where[0] * min(block[0], 200)), int(where[1] * min(block[1], 200)))
    grid = [-(-(o + n) // b) for o, n, b in zip(offset, (rows, columns), block, strict=True)]
    scale = torch.from_numpy(np.exp2(rng.integers(-20, 3, grid)) * (1 if powers else rng.uniform(1, 2, grid))).float()
    whole = torch.from_numpy(rng.integers(0, 256, (rows, columns + 9), dtype=np.uint8))
    codes = whole[:, 4 : 4 + columns]  # rows that are apart
    around = torch.full((rows, columns + 6), 7.0, dtype=torch.bfloat16)
    wanted = nearest(products(codes, expand(scale, block, offset, (rows, columns))))
    before = kernel.active
    try:
        for path in kernel.paths():
            kernel.active = path
            got = dequantize_slice(codes.contiguous().view(torch.float8_e4m3fn), scale, block, offset)
            np.testing.assert_array_equal(bits(got), wanted)
            into = around.clone()
            middle = into[:, 3:-3]
            assert dequantize_slice(codes, scale, block, offset, out=middle) is middle
            np.testing.assert_array_equal(bits(into[:, 3:-3]), wanted)
            assert (into[:, :3] == 7).all()
            assert (into[:, -3:] == 7).all()
    finally:
        kernel.active = before


@paths
@pytest.mark.parametrize("width", [16, 32, 48, 64, 128])
def test_groups_along_a_row(monkeypatch: pytest.MonkeyPatch, path: str, width: int) -> None:
    """As in MX, with groups of zeros, of subnormal and of infinite products, and of another sign, among the others."""
    monkeypatch.setattr(kernel, "active", path)
    rng = np.random.default_rng(width)
    rows, across = 6, 17000 // width  # more groups than have their lifts at hand
    scale = np.exp2(rng.integers(-117, 118, (rows, across)).astype(np.float64))
    odd = [2.0**-127, 2.0**-118, 2.0**-117, 2.0**117, 2.0**118, 2.0**127, -1.0, 0.0, -0.0, np.nan, np.inf, 1.5, 3.0]
    scale[1] = np.where(rng.random(across) < 0.3, rng.choice(odd, across), scale[1])
    scale[2] = rng.choice([2.0**-127, 1.0], across)
    scale[3] = rng.choice(odd, across)
    scale[4], scale[5] = 1.25 * scale[4], rng.uniform(1, 2, across)
    factors = torch.from_numpy(scale.astype(np.float32))
    for left, columns in ((0, across * width), (0, across * width - 5), (width - 16, width + 3), (3, 200), (15, 1)):
        groups = -(-(left + columns) // width)
        codes = torch.from_numpy(rng.integers(0, 256, (rows, columns), dtype=np.uint8))
        got = dequantize_slice(codes, factors[:, :groups], (1, width), (0, left))
        factor = expand(factors, (1, width), (0, left), (rows, columns))
        np.testing.assert_array_equal(bits(got), nearest(products(codes, factor)), err_msg=f"{left}, {columns}")


@paths
@pytest.mark.parametrize("width", [16, 32, 64, 100])
def test_one_nan_code_in_any_place_of_a_row_of_groups_is_seen(
    monkeypatch: pytest.MonkeyPatch, path: str, width: int
) -> None:
    monkeypatch.setattr(kernel, "active", path)
    codes = torch.full((1, 211), 0x7E, dtype=torch.uint8)
    out, scale = torch.empty(1, 211, dtype=torch.bfloat16), torch.ones(1, -(-211 // width))
    assert not dequantize_into(out, codes, scale, (1, width), (0, 0))
    for place in range(211):
        bad = codes.clone()
        bad[0, place] = 0xFF if place % 2 else 0x7F
        assert dequantize_into(out, bad, scale, (1, width), (0, 0))
        assert out.isnan().sum() == 1
        assert bool(out[0, place].isnan())


@paths
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("e8m0", [False, True])
@pytest.mark.parametrize(
    ("kind", "block", "grid"),
    [
        ("tensor", None, (1, 1)),
        ("row", None, (300, 1)),
        ("column", None, (1, 5000)),
        ("block", (128, 128), (3, 40)),
        ("block", (1, 32), (300, 157)),
        ("block", (2**70, 2 * 10**9), (1, 1)),
    ],
)
def test_whole_weights(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    threads: int,
    e8m0: bool,
    kind: str,
    block: tuple[int, int] | None,
    grid: tuple[int, int],
) -> None:
    monkeypatch.setattr(kernel, "active", path)
    weight, scale, wanted = stacked(e8m0, block, grid)
    got = dequantize(weight.view(torch.float8_e4m3fn), scale, Granularity(kind, block, experts=True), threads)
    for k in range(2):
        np.testing.assert_array_equal(bits(got[k]), wanted[k])


@lru_cache(maxsize=1)  # paths and threads have it in common
def stacked(
    e8m0: bool, block: tuple[int, int] | None, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Two matrices of codes, their scales, and the bits of their products."""
    rng = np.random.default_rng(2)
    weight = torch.from_numpy(rng.integers(0, 256, (2, 300, 5000), dtype=np.uint8))
    if e8m0:
        scale = torch.from_numpy(rng.integers(90, 160, (2, *grid)).astype(np.uint8))
        values = np.exp2(scale.numpy().astype(np.float64) - 127)
    else:
        scale = torch.from_numpy(rng.uniform(0.001, 1, (2, *grid)).astype(np.float32))
        values = scale.double().numpy()
    height, width = (min(a, b) for a, b in zip(block or (300 // grid[0], 5000 // grid[1]), (300, 5000), strict=True))
    factors = (np.repeat(np.repeat(v, height, axis=0), width, axis=1)[:300, :5000] for v in values)
    return weight, scale, [nearest(products(codes, factor)) for codes, factor in zip(weight, factors, strict=True)]


def test_wrong_arguments() -> None:
    codes, scale = torch.zeros(4, 6, dtype=torch.uint8), torch.ones(2, 3)
    dequantize_slice(codes, scale, (2, 2))
    for wrong in (scale[:1], scale.double(), torch.ones(2, 4), torch.ones(6)):
        with pytest.raises(ScaleError, match=r"needs scales float32 \[2, 3\]"):
            dequantize_slice(codes, wrong, (2, 2))
    for block, offset in (((0, 2), (0, 0)), ((2, -1), (0, 0)), ((2, 2), (2, 0)), ((2, 2), (0, -1))):
        with pytest.raises(ValueError, match="a block is from 1 up"):
            dequantize_slice(codes, scale, block, offset)
    for bad in (codes.float(), codes.view(-1), codes[None]):
        with pytest.raises(ValueError, match=r"codes: expected"):
            dequantize_slice(bad, scale, (2, 2))
    for bad in (torch.zeros(4, 6), torch.zeros(4, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"out: expected"):
            dequantize_slice(codes, scale, (2, 2), out=bad)
    if kernel.active != "torch":
        with pytest.raises(ValueError, match=r"contiguous rows"):
            dequantize_slice(torch.zeros(6, 4, dtype=torch.uint8).t(), scale, (2, 2))


def test_scale_values_of_e8m0() -> None:
    got = scale_values(CODES.view(16, 16).t())
    wanted = CODES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).reshape(16, 16).T
    np.testing.assert_array_equal(got.numpy(), wanted)
