"""Block scales to row scales, against float64 and brute force."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import e4m3fn, fp8, raw, shared, sqnr

from neuron_fp8_loader import ScaleError, kernel, rescale_state_dict
from neuron_fp8_loader.checkpoint import describe
from neuron_fp8_loader.codes.granularity import Granularity
from neuron_fp8_loader.codes.requantize import best_mantissas, requantize, tiles
from neuron_fp8_loader.load.layout import prepare_layout
from neuron_fp8_loader.load.state_dict import rescale_by
from neuron_fp8_loader.options import Options
from neuron_fp8_loader.plan import Pair, Plan, make_plan, make_recipe

FITTING = np.arange(0x78, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def expand(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    grid = scale.double().numpy()
    return np.repeat(np.repeat(grid, block[0], axis=0), block[1], axis=1)[: shape[0], : shape[1]]


def per_row(weight: torch.Tensor, scale: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    out = rescale_state_dict({"a.weight": weight, "a.weight_scale": scale}, layout="per_channel", **options)
    return out["a.weight"], out["a.weight_scale"]


def blocks(rng: np.random.Generator, rows: int, columns: int, block: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Gaussian weights, quantized per block to +-448."""
    grid = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    scale = torch.from_numpy(rng.uniform(0.5, 2.0, grid) * 1e-3).float()
    values = rng.normal(size=(rows, columns)) * 100
    return fp8(np.clip(values, -448, 448)), scale


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    block=st.sampled_from([(8, 8), (16, 16), (5, 7), (1, 16), (32, 32)]),
    powers=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_value_is_rounded_once(rows: int, columns: int, block: tuple[int, int], powers: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    exponents = rng.integers(-12, 4, grid)
    scale = torch.from_numpy(np.exp2(exponents) * (1 if powers else rng.uniform(1, 2, grid))).float()
    # the block size of a small grid would be a guess, so name it

    pair = Pair("a.weight", "a.weight_scale", "weight_scale", Granularity("block", block))
    tensors = {"a.weight": weight, "a.weight_scale": scale}
    lay_out(pair, tensors)
    new, row_scale = tensors["a.weight"], tensors["a.weight_scale"]

    assert new.dtype == torch.float8_e4m3fn
    assert row_scale.dtype == torch.float32
    assert row_scale.shape == (rows, 1)
    assert int((raw(new) & 0x7F).max()) <= 0x77
    values = e4m3fn(weight) * expand(scale, block, (rows, columns))
    wanted = np.abs(values) / row_scale.double().numpy()
    got = np.abs(e4m3fn(new))
    nearest = np.abs(wanted[..., None] - FITTING).min(axis=-1)
    np.testing.assert_array_equal(np.abs(wanted - got), nearest)
    np.testing.assert_array_equal(raw(new) & 0x80, codes & 0x80)
    if powers:  # exact, but for underflow; or else the public formula loses less by it
        exact = np.frexp(row_scale.numpy()[:, 0])[0] == 0.5
        normal = (wanted >= 2.0**-6) & exact[:, None]
        np.testing.assert_array_equal(got[normal], wanted[normal])
        assert exact[(wanted >= 2.0**-5).all(axis=1)].all()


def lay_out(pair: Pair, tensors: dict[str, torch.Tensor]) -> None:
    plan = Plan("test", {name: describe(name, t) for name, t in tensors.items()}, pairs=(pair,))
    prepared = prepare_layout(make_recipe(plan, Options(layout="per_channel")), tensors, {}, 2)
    tensors.update(prepared.carry_out(2))


def test_error_reported_is_the_error_made() -> None:

    weight, scale = blocks(np.random.default_rng(0), 300, 513, (128, 128))
    sd = {"a.weight": weight, "a.weight_scale_inv": scale}
    plan = make_plan({n: describe(n, t) for n, t in sd.items()}, "test")
    out, report = rescale_by(sd, make_recipe(plan, what := Options(layout="per_channel")), what, inplace=False)
    before = e4m3fn(weight) * expand(scale, (128, 128), (300, 513))
    after = e4m3fn(out["a.weight"]) * out["a.weight_scale_inv"].double().numpy()
    assert report.requantized["a.weight"] == pytest.approx(sqnr(before, after), abs=0.01)
    assert f"SQNR worst {report.requantized['a.weight']:.1f} dB" in report.summary()


def public_formula(values: np.ndarray) -> np.ndarray:
    """What the public preprocess scripts do: row amax / 240 as float32, divide, cast. A row of zeros stays one."""
    scale = (np.abs(values).max(axis=1, keepdims=True) / 240).astype(np.float32).astype(np.float64)
    scale[scale == 0] = 1
    return (values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def drawn(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    if kind == "student":
        return rng.standard_t(3, shape)
    if kind == "uniform":
        return rng.uniform(-1, 1, shape)
    values = rng.normal(size=shape)
    if kind == "outliers":
        values[:, rng.integers(shape[1])] *= 50
        values[rng.integers(shape[0])] *= 100
    if kind == "few":  # most rows hold one value, some none
        values *= rng.uniform(size=shape) < 1 / shape[1]
    return values


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(["normal", "student", "uniform", "outliers", "few", "codes"]),
    rows=st.integers(1, 50),
    columns=st.integers(1, 150),
    block=st.sampled_from([(1, 128), (8, 8), (16, 16), (5, 7), (1, 16), (32, 32), (128, 128), (3, 2**40)]),
    scales=st.sampled_from(["amax", "any", "e8m0", "some zero"]),
    seed=st.integers(0, 2**31),
)
def test_no_row_is_worse_than_by_the_public_formula(
    kind: str, rows: int, columns: int, block: tuple[int, int], scales: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    height, width = min(block[0], rows), min(block[1], columns)
    grid = math.ceil(rows / height), math.ceil(columns / width)
    values = drawn(kind, rng, (rows, columns))
    if scales == "amax":
        padded = np.zeros((grid[0] * height, grid[1] * width))
        padded[:rows, :columns] = np.abs(values)
        factor = padded.reshape(grid[0], height, grid[1], width).max(axis=(1, 3)) / 448
        factor[factor == 0] = 1
    else:
        factor = np.exp2(rng.integers(-9, 3, grid)) * (1 if scales == "e8m0" else rng.uniform(1, 2, grid))
    scale = torch.from_numpy(factor).float()
    spread = expand(scale, (height, width), (rows, columns))
    if kind == "codes":
        raw_codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
        raw_codes[raw_codes & 0x7F == 0x7F] = 0
        weight = torch.from_numpy(raw_codes).view(torch.float8_e4m3fn)
    else:
        weight = fp8(np.clip(values / spread, -448, 448))
    if scales == "some zero":
        scale[rng.uniform(size=grid) < 0.3] = 0
    values = e4m3fn(weight) * expand(scale, (height, width), (rows, columns))
    pair = Pair("a.weight", "a.weight_scale", "weight_scale", Granularity("block", block))
    theirs = np.square(values - public_formula(values)).sum(axis=1)
    results = []
    before = kernel.active
    try:
        for path in kernel.paths():
            kernel.active = path
            tensors = {"a.weight": weight, "a.weight_scale": scale}
            lay_out(pair, tensors)
            results.append((tensors["a.weight"], tensors["a.weight_scale"]))
    finally:
        kernel.active = before
    new, row_scale = results[0]
    assert (row_scale > 0).all()
    assert int((raw(new) & 0x7F).max()) <= 0x77
    ours = np.square(values - e4m3fn(new) * row_scale.double().numpy()).sum(axis=1)
    # what float64 itself loses where both are exact
    assert (ours <= theirs * (1 + 1e-9) + 1e-28 * np.square(values).sum(axis=1)).all()
    for other, other_scale in results[1:]:
        assert torch.equal(other_scale, row_scale)
        np.testing.assert_array_equal(raw(other), raw(new))


@pytest.mark.parametrize("name", ["hf_fp8_block", "ct_fp8_block"])
def test_no_row_of_a_real_checkpoint_is_worse(name: str) -> None:
    tensors = load_every(shared(name))
    weights = [n for n in tensors if tensors[n].dtype == torch.float8_e4m3fn]
    assert weights
    for weight in weights:
        scale = next(n for n in tensors if n.startswith(weight) and n != weight)
        out = rescale_state_dict({weight: tensors[weight], scale: tensors[scale]}, layout="per_channel")
        values = e4m3fn(tensors[weight]) * expand(tensors[scale], (128, 128), tuple(tensors[weight].shape))
        theirs = np.square(values - public_formula(values)).sum(axis=1)
        ours = np.square(values - e4m3fn(out[weight]) * out[scale].double().numpy()).sum(axis=1)
        assert (ours <= theirs * (1 + 1e-9)).all()


def load_every(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: t for file in files for name, t in safetensors.torch.load_file(file).items()}


def test_powers_of_two_are_exact_and_stay_powers_of_two() -> None:
    weight, _ = blocks(np.random.default_rng(2), 256, 512, (128, 128))
    scale = torch.tensor([[2.0**-9, 2.0**-8, 2.0**-10, 2.0**-9], [2.0**-8] * 4])
    new, row_scale = per_row(weight, scale)
    assert (np.frexp(row_scale.numpy())[0] == 0.5).all()
    before = e4m3fn(weight) * expand(scale, (128, 128), (256, 512))
    assert sqnr(before, e4m3fn(new) * row_scale.double().numpy()) >= 100


def test_one_block_a_row_is_exact_but_for_underflow() -> None:
    weight, scale = blocks(np.random.default_rng(3), 256, 128, (128, 128))
    new, row_scale = per_row(weight, scale)
    before = e4m3fn(weight) * expand(scale, (128, 128), (256, 128))
    assert sqnr(before, e4m3fn(new) * row_scale.double().numpy()) >= 100


def test_zero_blocks_and_zero_rows() -> None:
    weight, scale = blocks(np.random.default_rng(4), 256, 256, (128, 128))
    weight.view(torch.uint8)[7] = 0
    scale[1, 0] = 0
    new, row_scale = per_row(weight, scale)
    assert torch.isfinite(row_scale).all()
    assert (row_scale > 0).all()
    assert not e4m3fn(new)[7].any()
    assert not e4m3fn(new)[128:, :128].any()
    _, all_zero = per_row(weight, torch.zeros_like(scale))
    assert (all_zero == 1).all()


@pytest.mark.parametrize("bad", [-1.0, 3e38])
def test_implausible_scales_are_refused_before_anything_is_written(bad: float) -> None:
    weight, scale = blocks(np.random.default_rng(5), 256, 256, (128, 128))
    other, other_scale = weight.clone(), torch.ones(1)
    scale[0, 1] = bad
    sd = {"a.weight": weight, "a.weight_scale": scale, "b.weight": other, "b.weight_scale": other_scale}
    before = {name: raw(t).copy() for name, t in sd.items()}
    with pytest.raises(ScaleError, match=r"a\.weight_scale: 1 of 4"):
        rescale_state_dict(sd, layout="per_channel", inplace=True)
    for name, t in sd.items():
        np.testing.assert_array_equal(raw(t), before[name])


def test_all_paths_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = blocks(np.random.default_rng(6), 200, 333, (128, 128))
    weight.view(torch.uint8)[3, 5] = 0x7F
    results = []
    for path in kernel.paths():
        monkeypatch.setattr(kernel, "active", path)
        results.append(per_row(weight, scale, nan="keep"))
    for new, row_scale in results[1:]:
        np.testing.assert_array_equal(raw(new), raw(results[0][0]))
        assert torch.equal(row_scale, results[0][1])
    assert raw(results[0][0])[3, 5] == 0x7F


def test_mantissas() -> None:
    assert best_mantissas(torch.tensor([[0.5, 4.0, 0.0]], dtype=torch.float64)).tolist() == [1.0]
    # one dominant block: its own mantissa makes it exact
    dominant = torch.tensor([[1.375, 1e-6, 1e-6]], dtype=torch.float64)
    assert best_mantissas(dominant).tolist() == [1.375]
    many = torch.rand(64, 64, dtype=torch.float64) + 0.1
    got = best_mantissas(many)
    assert ((got >= 1) & (got < 2)).all()
    assert torch.equal(got.float().double(), got)


@pytest.mark.parametrize("empty", [1, 4, 7])
def test_empty_blocks_have_no_say(empty: int) -> None:
    """Padding with the default scale of 1 beside real scales: still no worse than the public formula."""
    weight, scale = blocks(np.random.default_rng(7), 256, 1024, (128, 128))
    weight.view(torch.uint8)[:, : empty * 128] = 0
    scale[:, :empty] = 1.0
    values = e4m3fn(weight) * expand(scale, (128, 128), (256, 1024))
    new, row_scale = per_row(weight, scale)
    assert sqnr(values, e4m3fn(new) * row_scale.double().numpy()) >= sqnr(values, public_formula(values))


def test_scales_forty_orders_apart_are_reported() -> None:
    weight, _ = blocks(np.random.default_rng(8), 128, 256, (128, 128))
    weight.view(torch.uint8)[:, :128] = 0
    sd = {"a.weight": weight, "a.weight_scale": torch.tensor([[1e20, 1e-20]])}
    plan = make_plan({n: describe(n, t) for n, t in sd.items()}, "test")
    _, report = rescale_by(sd, make_recipe(plan, what := Options(layout="per_channel")), what, inplace=False)
    assert report.requantized["a.weight"] > 100
    assert "1 of 1 FP8 weights block -> row" in report.summary()


def test_tied_weights_are_both_reported() -> None:
    weight, scale = blocks(np.random.default_rng(9), 128, 256, (128, 128))
    sd = {"a.weight": weight, "a.weight_scale": scale, "b.weight": weight, "b.weight_scale": scale}
    plan = make_plan({n: describe(n, t) for n, t in sd.items()}, "test")
    _, report = rescale_by(sd, make_recipe(plan, what := Options(layout="per_channel")), what, inplace=False)
    assert set(report.requantized) == {"a.weight", "b.weight"}


@pytest.mark.parametrize("across", [1, 2, 31, 64, 65, 300])
def test_mantissas_in_c_are_those_by_torch(monkeypatch: pytest.MonkeyPatch, across: int) -> None:
    if kernel.active == "torch":
        pytest.skip("native only")
    generator = torch.Generator().manual_seed(across)
    scales = torch.rand(400, across, generator=generator, dtype=torch.float64) + 0.01
    scales[100:200] = scales[100:200].bfloat16().double()
    scales[200:250] = torch.exp2(torch.randint(-30, 30, (50, across), generator=generator).double())
    scales[250:] *= torch.exp(9 * torch.randn(150, across, generator=generator))
    scales[300:] *= torch.rand(100, across, generator=generator) < 0.7
    native = best_mantissas(scales)
    monkeypatch.setattr(kernel, "active", "torch")
    assert torch.equal(native, best_mantissas(scales))


def test_mantissas_of_many_rows_are_those_of_each() -> None:
    scales = torch.rand(300, 200, dtype=torch.float64) + 0.1
    together = best_mantissas(scales)
    assert torch.equal(together, torch.cat([best_mantissas(row[None]) for row in scales]))


@pytest.mark.parametrize("sigma", [300, 100, 3, 0.05, 0.004])
@pytest.mark.parametrize("scales", ["float", "powers", "wide", "one"])
@pytest.mark.parametrize("columns", [1000, 6000])
def test_estimating_chooses_as_measuring_does(
    monkeypatch: pytest.MonkeyPatch, sigma: float, scales: str, columns: int
) -> None:
    """Vector code estimates which scale is better, and measures in doubt: bytes as where all rows are measured."""
    rng = np.random.default_rng(int(sigma * 1000) + columns)
    rows, block = 96, (16, 128)
    weight = fp8(np.clip(rng.normal(size=(rows, columns)) * sigma, -448, 448)).view(torch.uint8)
    grid = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    drawn = {
        "float": rng.uniform(1e-4, 2e-3, grid),
        "powers": np.exp2(rng.integers(-12, -4, grid)),
        "wide": np.exp2(rng.uniform(-60, 20, grid)),
        "one": np.full(grid, 1.3e-3),
    }[scales]
    made = {}
    for path in kernel.paths():
        monkeypatch.setattr(kernel, "active", path)
        new, row_scales = torch.empty_like(weight), torch.empty(rows)
        cost = [requantize(tile) for tile in tiles(weight, new, torch.from_numpy(drawn), row_scales, block)]
        made[path] = new, row_scales, sum(f.signal for f in cost), sum(f.noise for f in cost)
    new, row_scales, signal, noise = made["torch"]
    for path, got in made.items():
        assert torch.equal(got[0], new), path
        assert torch.equal(got[1], row_scales), path
        assert got[2] == pytest.approx(signal, rel=1e-3)  # 0.005 dB
        assert got[3] == pytest.approx(noise, rel=1e-3)
