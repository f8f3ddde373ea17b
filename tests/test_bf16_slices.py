"""FP8 weights read as bfloat16 a part at a time, against float64 products rounded once by ml_dtypes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from oracle import bf16_bits, bf16_reference, granularity_of, to_bf16
from support import REAL, codes, e4m3fn, random_codes, save, shared

from neuron_fp8_loader import PlanError, ScaleError, WeightError, plan_checkpoint
from neuron_fp8_loader.codes.dequantize import dequantize_into
from neuron_fp8_loader.load.bf16 import read_bfloat16, unscaled_bfloat16
from neuron_fp8_loader.load.index import selectors
from neuron_fp8_loader.plan import Plan


class Opened:
    """A checkpoint of one pair, read as slices."""

    def __init__(self, path: Path, weight: torch.Tensor, scale: torch.Tensor, name: str = "x") -> None:
        self.weight, self.scale = weight, scale
        self.file = save(path / "model.safetensors", {f"{name}.weight": weight, f"{name}.weight_scale": scale})
        self.plan = plan_checkpoint(path)
        (self.pair,) = self.plan.pairs
        self.handle = safetensors.safe_open(self.file, "pt")

    def __getitem__(self, index: Any) -> torch.Tensor:
        slices = (self.handle.get_slice(name) for name in (self.pair.weight, self.pair.scale))
        return read_bfloat16(self.plan, self.pair, *slices, index)


def some_scale(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    if dtype in (torch.uint8, getattr(torch, "float8_e8m0fnu", None)):
        return torch.from_numpy(rng.integers(100, 140, shape, dtype=np.uint8)).view(dtype)
    return torch.from_numpy(np.asarray(rng.uniform(1e-5, 1, shape), dtype=np.float32)).to(dtype)


INDICES = [
    slice(None), ..., (), (slice(3, 200), slice(100, 333)), (slice(None), slice(129, 131)), (slice(127, 129),),
    5, -1, (slice(None), 130), (7, slice(1, 400, 3)), (slice(2, 300, 2), ...), (..., slice(250, 257)),
    ([0, 255, 3], slice(None)), (slice(10, 140), [300, 5, 5]), slice(0, 0), (slice(250, 999), slice(300, 9999)),
    (3, 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((), torch.float32),
        ((1,), torch.bfloat16),
        ((257,), torch.float32),
        ((257, 1), torch.bfloat16),
        ((1, 401), torch.float32),
        ((3, 4), torch.float32),
        *(((3, 4), dtype) for dtype in [getattr(torch, "float8_e8m0fnu", None)] if dtype),  # torch 2.7 or newer
        ((3, 1, 4, 1), torch.float32),
        ((257, 13), torch.uint8),
        ((5, 7), torch.float16),
    ],
    ids=str,
)
def test_every_index_of_a_matrix(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """257 x 401: ragged in blocks of 128, 64 and 32."""
    opened = Opened(tmp_path, random_codes((257, 401)), some_scale(shape, dtype))
    whole = bf16_reference(opened.weight, opened.scale, str(opened.pair.granularity).replace("MX group", "block"))
    for index in INDICES:
        np.testing.assert_array_equal(bf16_bits(opened[index]), whole[index], err_msg=str(index))


def test_every_byte_of_a_scale_in_e8m0(tmp_path: Path) -> None:
    """0 is 2^-127, a subnormal float32; 246 is the largest power of which 448 times is a bfloat16."""
    raw = torch.arange(247, dtype=torch.uint8).repeat(200, 1)  # more than torch gets at a time
    opened = Opened(tmp_path, random_codes((200, 247 * 32)), raw)
    whole = bf16_reference(opened.weight, opened.scale, "block 1x32")
    np.testing.assert_array_equal(bf16_bits(opened[:]), whole)
    for byte in (247, 254, 255):
        raw[199, 246] = byte
        (tmp_path / str(byte)).mkdir()
        opened = Opened(tmp_path / str(byte), opened.weight, raw)
        opened[:199]
        with pytest.raises(ScaleError, match="not finite" if byte == 255 else "not plausible"):
            opened[199]


EXPERTS = [
    slice(None), ..., 2, (1, slice(3, 70), slice(60, 130)), (slice(1, 3), slice(65, 66), ...),
    (slice(None), slice(32, 64), slice(64, 128)), ([3, 0], slice(5, 9)), (slice(2, 4), slice(None), 129), (0, 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    "shape", [(1,), (4,), (4, 1, 1), (4, 70, 1), (4, 1, 130), (4, 2, 3), (4, 70), (4, 3, 5)], ids=str
)
def test_every_index_of_stacked_experts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    opened = Opened(tmp_path, random_codes((4, 70, 130)), some_scale(shape))
    kind = str(opened.pair.granularity)
    whole = bf16_reference(opened.weight, opened.scale, kind)
    for index in EXPERTS:
        np.testing.assert_array_equal(bf16_bits(opened[index]), whole[index], err_msg=f"{kind} {index}")


def test_four_dimensions_and_one(tmp_path: Path) -> None:
    for shape, index in (((2, 3, 4, 5), (1, slice(1, 3), ..., 2)), ((9,), slice(2, 5))):
        opened = Opened(tmp_path, random_codes(shape), some_scale((1,)))
        whole = bf16_reference(opened.weight, opened.scale, "tensor")
        np.testing.assert_array_equal(bf16_bits(opened[index]), whole[index])
        np.testing.assert_array_equal(bf16_bits(opened[:]), whole)


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name: str) -> None:
    """Every FP8 weight of every checkpoint at hand, whole and cut across its blocks."""
    plan = plan_checkpoint(shared(name))
    for pair in plan.pairs:
        weight, scale = (_tensor(plan, tensor) for tensor in (pair.weight, pair.scale))
        whole = bf16_reference(weight, scale, granularity_of(pair))
        lazy = [_slice(plan, tensor) for tensor in (pair.weight, pair.scale)]
        np.testing.assert_array_equal(bf16_bits(read_bfloat16(plan, pair, *lazy, ...)), whole, err_msg=pair.weight)
        for part in (slice(None, 40), slice(40, 200)):
            for index in ((..., part, slice(None)), (..., part)):
                got = bf16_bits(read_bfloat16(plan, pair, *lazy, index))
                np.testing.assert_array_equal(got, whole[index], err_msg=pair.weight)


def _slice(plan: Plan, name: str) -> Any:
    return safetensors.safe_open(plan.tensors[name].file, "pt").get_slice(name)


def _tensor(plan: Plan, name: str) -> torch.Tensor:
    return safetensors.safe_open(plan.tensors[name].file, "pt").get_tensor(name)


def test_the_product_is_rounded_once(tmp_path: Path) -> None:
    """Products that lie by less than a float32 step beside the middle of two bfloat16 values, either side of it."""
    value = 1.875  # 15/8: times 24 bits it is 28 bits, which float32 rounds
    found = []
    for base in (1.00390625, 1.01171875, 1.51953125):  # halfway between two bfloat16 values
        for sign in (-1, 1):
            scale = np.float32(base / value)
            while (Fraction(float(scale)) * Fraction(value) - Fraction(base)) * sign <= 0:
                scale = np.nextafter(scale, np.float32(np.inf * sign))
            found.append(scale)
    scale = torch.from_numpy(np.array(found, dtype=np.float32).reshape(-1, 1))
    code = np.array([value], dtype=np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)[0]
    opened = Opened(tmp_path, codes(np.full((len(found), 2), code)), scale)
    exact = value * scale.double().numpy()
    assert (torch.from_numpy(exact).float().bfloat16().view(torch.int16).numpy() != to_bf16(exact)).any()
    np.testing.assert_array_equal(bf16_bits(opened[:])[:, :1], to_bf16(exact))


def test_our_rounding_of_the_bf16_reference() -> None:
    """The integers above, against ml_dtypes where float32 holds the value, down to the smallest bfloat16 values."""
    rng = np.random.default_rng(0)
    exact = np.concatenate([rng.standard_normal(2000), rng.standard_normal(2000) * 2.0**-130, [0.0, -0.0, 2.0**-133]])
    exact = exact.astype(np.float32)
    np.testing.assert_array_equal(to_bf16(exact.astype(np.float64)), exact.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_what_is_damaged_is_an_error(tmp_path: Path) -> None:
    weight = random_codes((4, 8))
    weight.view(torch.uint8)[3, 5] = 0xFF
    opened = Opened(tmp_path, weight, some_scale((4, 1)))
    assert opened[:3].isfinite().all()
    with pytest.raises(WeightError, match=r"x\.weight: 1 NaN codes"):
        opened[2:]
    opened = Opened(tmp_path, random_codes((4, 8)), torch.tensor([[1.0], [torch.nan], [2.0], [3e37]]))
    assert opened[2:3].isfinite().all()
    for part, text in ((slice(0, 2), "not finite"), (slice(3, 4), "beyond bfloat16")):
        with pytest.raises(ScaleError, match=rf"x\.weight_scale.*{text}"):
            opened[part]
    opened = Opened(tmp_path, random_codes((6, 8)), some_scale((5, 1)))
    with pytest.raises(PlanError, match=r"x\.weight: cannot be read as bfloat16.*\[6, 8\].*\[5, 1\]"):
        opened[:]


def test_without_a_scale(tmp_path: Path) -> None:
    weight = random_codes((6, 8))
    file = save(tmp_path / "model.safetensors", {"x.weight": weight})
    plan, lazy = plan_checkpoint(tmp_path), safetensors.safe_open(file, "pt").get_slice("x.weight")
    np.testing.assert_array_equal(unscaled_bfloat16(plan, "x.weight", lazy, 2).double(), e4m3fn(weight)[2])


def test_indices_that_are_none() -> None:
    assert selectors(slice(None), ()) == []
    for index in (None, torch.ones(3), True, [True, False], ([0], [1]), "a"):
        with pytest.raises(TypeError):
            selectors(index, (3, 3))
    for index in (3, -4, [0, 3], (0, 0, 0), (..., ...), slice(None, None, -1)):
        with pytest.raises(IndexError):
            selectors(index, (3, 3))


class Watched:
    """A lazy tensor that takes down which rows were read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.rows = tensor, list[int]()

    def __getitem__(self, index: Any) -> torch.Tensor:
        part = index[-2] if len(index) > 1 else index[0]
        self.rows += range(*part.indices(self.tensor.shape[-2]))
        return self.tensor[index]


@pytest.mark.parametrize(
    ("rows", "read"),
    [
        ([0, 256, 3], [0, 256, 3]),
        ([5, 6, 7, 5, 130, 131], [5, 6, 7, 5, 130, 131]),
        (-1, [256]),
        (slice(20, 90, 60), [*range(20, 81)]),
    ],
)
def test_only_what_is_asked_for_is_read(tmp_path: Path, rows: Any, read: list[int]) -> None:
    opened = Opened(tmp_path, random_codes((257, 401)), some_scale((3, 4)))
    whole = bf16_reference(opened.weight, opened.scale, "block 128x128")
    watched = Watched(opened.weight)
    got = read_bfloat16(opened.plan, opened.pair, watched, opened.scale, (rows, slice(100, 301)))
    np.testing.assert_array_equal(bf16_bits(got), whole[rows, 100:301])
    assert watched.rows == read


@pytest.mark.parametrize(
    "index", [(slice(None), slice(None, None, 2)), (slice(None), [4000, 0]), slice(None, None, 16)]
)
def test_what_lies_apart_takes_little_memory(tmp_path: Path, index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the result, a few rows: 32767 values at most."""
    from neuron_fp8_loader.load import index as module

    opened = Opened(tmp_path, random_codes((512, 4001)), some_scale((512, 1)))
    taken: list[int] = []
    fresh = module.allocate
    monkeypatch.setattr(module, "allocate", lambda nbytes: taken.append(nbytes) or fresh(nbytes))
    got = opened[index]
    whole = bf16_reference(opened.weight, opened.scale, "row")
    np.testing.assert_array_equal(bf16_bits(got), whole[index])
    assert taken[0] == 2 * got.numel()
    assert max(taken[1:]) < 1 << 16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [0.7, 2.0**-126, 3e-40])
def test_other_fp8_dtypes_by_their_own_values(dtype: torch.dtype, scale: float) -> None:
    """All codes, by ml_dtypes; and what is not finite is seen."""
    raw = torch.arange(256, dtype=torch.uint8).view(8, 32)
    exact = raw.numpy().view(getattr(ml_dtypes, str(dtype).removeprefix("torch."))).astype(np.float64)
    factor = torch.tensor([[scale]], dtype=torch.float32)
    out = torch.empty(8, 32, dtype=torch.bfloat16)
    assert dequantize_into(out, raw.view(dtype), factor, (8, 32), (0, 0))
    fine = np.isfinite(exact)
    np.testing.assert_array_equal(bf16_bits(out)[fine], to_bf16(exact * factor.double().item())[fine])
    assert not out[torch.from_numpy(~fine)].isfinite().any()
    assert not dequantize_into(out[:1], raw[:1].view(dtype), factor, (8, 32), (0, 0))


def test_powers_of_two_side_by_side() -> None:
    """Neighbouring scales of one significand share a table; zero, NaN, and ends of groups shorter than a vector."""
    rng = np.random.default_rng(3)
    raw = torch.from_numpy(rng.integers(0, 256, (4, 300), dtype=np.uint8))
    raw[0, :64:5] = 0
    raw[0, 1:64:5] = 0x80
    for significand in (1.0, -1.3):
        scale = torch.from_numpy((significand * 2.0 ** rng.integers(-120, 110, (4, 24))).astype(np.float32))
        out = torch.empty(4, 300, dtype=torch.bfloat16)
        assert dequantize_into(out, raw, scale, (1, 13), (0, 5))
        wide = scale.double().repeat_interleave(13, 1)[:, 5:305].numpy()
        exact = e4m3fn(raw).reshape(4, 300) * wide
        fine = ~np.isnan(exact)
        np.testing.assert_array_equal(bf16_bits(out)[fine], to_bf16(exact)[fine])
        assert out[torch.from_numpy(~fine)].isnan().all()
