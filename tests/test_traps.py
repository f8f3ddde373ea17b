"""The traps of FP8 checkpoints, one by one.

All nineteen can occur on the way to a Neuron device, but for three halves of one: rescaling NVFP4's own scales (1: the
device has no NVFP4 path, so they are left alone, together with the global scales that would divide), -0 read as NaN
(6: only fnuz does that; a Neuron device reads 0x80 as -0), and ROCm's rewrite of 0x80 to 0, which would be wrong here.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from convention_rows import made
from hypothesis import given
from hypothesis import strategies as st
from oracle import expanded, values
from safetensors.torch import save_file
from support import E8M0_OR_ITS_BYTES, e4m3fn, fp8, ieee_e4m3, raw, shared, sqnr

import neuron_fp8_loader
from neuron_fp8_loader import (
    PlanError,
    ScaleError,
    WeightError,
    load_checkpoint,
    load_file,
    load_state_dict,
    plan_checkpoint,
    rescale_state_dict,
    safe_open,
)
from neuron_fp8_loader.codes.granularity import granularity
from neuron_fp8_loader.tools.scan import scan_checkpoint

Tensors = dict[str, torch.Tensor]


def codes(*magnitudes: int) -> torch.Tensor:
    return torch.tensor(magnitudes, dtype=torch.uint8).view(torch.float8_e4m3fn)


def written(directory: Path, tensors: Tensors, file: str = "model.safetensors") -> Path:
    save_file(tensors, directory / file)
    return directory


def sharded(directory: Path, *shards: Tensors) -> list[Path]:
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [directory / file for file in files]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and raw(one.reshape(-1)).tobytes() == raw(other.reshape(-1)).tobytes()


# 1. NVFP4: the scale is e4m3fn and has none of its own
def test_01_nvfp4_scales_are_left_alone(tmp_path: Path) -> None:
    before = made({
        "a.weight_packed": "u8 16 32", "a.weight_scale": "fp8 16 4", "a.weight_global_scale": "f32 1",
        "b.weight": "u8 16 32", "b.weight_scale": "fp8 16 4", "b.weight_scale_2": "f32", "b.input_scale": "f32",
        "e.gate_up_proj": "u8 2 16 32", "e.gate_up_proj_weight_scale": "fp8 2 4 32",
    })  # fmt: skip
    loaded = load_checkpoint(written(tmp_path, before), always=True)
    assert all(same(loaded.state_dict[name], before[name]) for name in before)
    assert (loaded.plan.pairs, loaded.plan.unscaled) == ((), ())
    assert "3 FP8 tensors that are no weights, left alone" in loaded.plan.summary()
    with safe_open(tmp_path / "model.safetensors") as file:
        assert all(same(file.get_tensor(name), before[name]) for name in before)


# 2. FP8 weights without a scale
def test_02_a_weight_without_a_scale_is_refused_or_dequantized(tmp_path: Path) -> None:
    before = made({"mtp.0.e_proj.weight": "fp8 8 8", "mtp.0.e_proj.misnamed": "f32 1"})
    written(tmp_path, before)
    with pytest.raises(WeightError, match=r"(?s)mtp\.0\.e_proj\.weight.*unscaled=\"dequantize\".*register"):
        load_state_dict(tmp_path)
    weight = load_state_dict(tmp_path, unscaled="dequantize")["mtp.0.e_proj.weight"]
    assert weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(weight.double().numpy(), e4m3fn(before["mtp.0.e_proj.weight"]))
    kept = load_state_dict(tmp_path, unscaled="keep")["mtp.0.e_proj.weight"]
    assert same(kept, before["mtp.0.e_proj.weight"])


def test_02_a_raw_cast_that_fits_passes(tmp_path: Path) -> None:
    before = {"a.weight": fp8(np.linspace(-3, 3, 64)), "a.norm.scale": fp8(np.linspace(0.5, 2, 8))}
    after = load_state_dict(written(tmp_path, before))
    assert all(same(after[name], before[name]) for name in before)


# 3. e8m0 scales
@pytest.mark.parametrize("dtype", E8M0_OR_ITS_BYTES)
def test_03_e8m0_scales_double_by_their_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    scale = torch.arange(254, dtype=torch.uint8).reshape(254, 1)
    weight = codes(*[0x7E] * 254 * 32).reshape(254, 32)
    after = load_state_dict(written(tmp_path, {"a.weight": weight, "a.weight_scale": scale.view(dtype)}))
    assert after["a.weight_scale"].dtype == dtype
    got = raw(after["a.weight_scale"]).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(got, 2 * scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64))


@pytest.mark.parametrize("dtype", E8M0_OR_ITS_BYTES)
@pytest.mark.parametrize("byte", [254, 255])
def test_03_e8m0_254_and_255_are_errors(dtype: torch.dtype, byte: int, tmp_path: Path) -> None:
    scale = torch.tensor([[120], [byte]], dtype=torch.uint8).view(dtype)
    written(tmp_path, {"a.weight": codes(*[0x7E] * 64).reshape(2, 32), "a.weight_scale": scale})
    with pytest.raises(ScaleError, match=r"model\.safetensors: a\.weight_scale: 1 of 2"):
        load_state_dict(tmp_path)


def test_03_ratio_has_no_e8m0_value_and_says_what_has(tmp_path: Path) -> None:
    written(tmp_path, made({"a.weight": "fp8 4 32", "a.weight_scale": "u8 4 1"}))
    with pytest.raises(ScaleError, match='use method="half"'):
        load_state_dict(tmp_path, method="ratio")


def test_03_ue8m0_in_the_config_does_not_mean_e8m0_on_disk(tmp_path: Path) -> None:
    before = {"a.weight": codes(*[0x7E] * 16).reshape(4, 4), "a.weight_scale_inv": torch.tensor([[2.0**-12]])}
    section = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    after = load_state_dict(written(tmp_path, before))
    assert after["a.weight_scale_inv"].dtype == torch.float32
    assert after["a.weight_scale_inv"].item() == 2.0**-11


# 4. reciprocals
RECIPROCAL = ("a.quant_input.scale_inv", "k_cache.quant_input.scale_inv", "x.kv_cache_rcp_scaling_factor",
              "a.activation_rcp_scaling_factor")  # fmt: skip


@pytest.mark.parametrize("method", ["half", "ratio"])
def test_04_reciprocal_scales_are_divided_and_only_they(method: str) -> None:
    before = made({"a.weight": "fp8 4 4", "a.weight_scale_inv": "f32 1", **dict.fromkeys(RECIPROCAL, "f32 1")})
    after = rescale_state_dict(before, method=method)
    factor = {"half": 2.0, "ratio": 448 / 240}[method]
    assert after["a.weight_scale_inv"].item() == pytest.approx(before["a.weight_scale_inv"].item() * factor, rel=1e-7)
    for name in RECIPROCAL:
        assert after[name].item() == pytest.approx(before[name].item() / factor, rel=1e-7)
    kept = rescale_state_dict(before, method=method, activation_scales="keep")
    assert all(same(kept[name], before[name]) for name in RECIPROCAL)


def test_04_global_scales_that_divide_are_left_alone() -> None:
    others = {"b.weight_packed": "u8 8 8", "b.weight_scale": "fp8 8 1", "b.weight_global_scale": "f32 1",
              "b.input_global_scale": "f32 1"}  # fmt: skip
    before = made({"a.weight": "fp8 4 4", "a.weight_scale": "f32 1", **others})
    after = rescale_state_dict(before)
    assert all(same(after[name], before[name]) for name in others)


# 5. zero scales, and KV scales that mean "absent"
def test_05_zero_and_negative_scales_keep_their_meaning(tmp_path: Path) -> None:
    before = {
        "a.weight": codes(*[0x7E] * 8).reshape(2, 4),
        "a.weight_scale": torch.tensor([[0.0], [1e-3]]),
        "attn.k_scale": torch.tensor(0.0),
        "attn.v_scale": torch.tensor(-1.0),
        "k_cache.quant_input.scale_inv": torch.tensor(0.0),
    }
    after = load_state_dict(written(tmp_path, before))
    assert after["a.weight_scale"].tolist() == [[0.0], [pytest.approx(2e-3)]]
    assert after["attn.k_scale"].item() == 0 and after["attn.v_scale"].item() < 0  # noqa: PT018 - absent to vLLM
    assert after["k_cache.quant_input.scale_inv"].item() == 0


# 6. NaN bytes, and -0
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_06_nan_bytes_are_reported_and_stay_nan(byte: int, tmp_path: Path) -> None:
    weight = codes(0x7E, byte, 0x38, 0x80)
    written(tmp_path, {"a.weight": weight, "a.weight_scale": torch.tensor(0.1)})
    with pytest.raises(WeightError, match=r"model\.safetensors: a\.weight: 1 NaN codes"):
        load_state_dict(tmp_path)
    after = load_state_dict(tmp_path, nan="keep")
    np.testing.assert_array_equal(ieee_e4m3(after["a.weight"]), [224, np.nan, 0.5, -0.0])


def test_06_minus_zero_stays(tmp_path: Path) -> None:
    before = {"a.weight": codes(0x80, 0x00, 0x7E), "a.weight_scale": torch.tensor(1.0)}
    after = load_state_dict(written(tmp_path, before))
    assert raw(after["a.weight"]).tolist() == [0x80, 0x00, 0x76]


# 7. odd subnormals
def test_07_only_odd_codes_below_0x10_round(tmp_path: Path) -> None:
    every = [code | sign for sign in (0, 0x80) for code in range(0x7F)]
    before = {"a.weight": codes(*every), "a.weight_scale": torch.tensor(1.0)}
    loaded = load_checkpoint(written(tmp_path, before))
    old, new = e4m3fn(before["a.weight"]), 2 * ieee_e4m3(loaded.state_dict["a.weight"])
    rounded = {every[i] & 0x7F for i in np.flatnonzero(old != new)}
    assert rounded == {1, 3, 5, 7, 9, 11, 13, 15}
    assert loaded.report.rounded == 2 * len(rounded)
    # to nearest, ties to even, as ml_dtypes rounds the halved value
    np.testing.assert_array_equal(new / 2, (old / 2).astype(ml_dtypes.float8_e4m3).astype(np.float64))


# 8. ragged blocks
@given(rows=st.integers(1, 700), columns=st.integers(1, 700))
def test_08_a_ragged_grid_gives_back_its_block_size(rows: int, columns: int) -> None:
    grid = (-(-rows // 128), -(-columns // 128))
    for declared in ((128, 128), None):
        found = granularity((rows, columns), grid, declared)
        if grid == (1, 1):
            assert found.kind == "tensor"
            continue
        if (grid == (rows, 1)) or (grid == (1, columns)):
            continue  # a row is a block then
        assert found.kind == "block"
        assert found.block is not None
        # the same cut: a block as large as what there is covers it like any larger one
        for size, mine in zip((rows, columns), found.block, strict=True):
            assert mine == 128 or (size <= 128 and mine >= size)


@pytest.mark.parametrize("config", [True, False])
def test_08_ragged_blocks_load(config: bool, tmp_path: Path) -> None:
    before = made({"a.weight": "fp8 576 448", "a.weight_scale_inv": "f32 5 4"})
    if config:
        section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    loaded = load_checkpoint(written(tmp_path, before))
    assert str(loaded.plan.pairs[0].granularity) == "block 128x128"
    wide = [
        expanded(values(t["a.weight_scale_inv"]), (576, 448), "block 128x128") for t in (before, loaded.state_dict)
    ]
    assert wide[0] is not None
    assert wide[1] is not None
    assert sqnr(e4m3fn(before["a.weight"]) * wide[0], ieee_e4m3(loaded.state_dict["a.weight"]) * wide[1]) >= 100


# 9. fused experts: every layout of the scale there is, and the guesses that are not made
@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        ((4, 8, 16), (), "tensor"), ((4, 8, 16), (1,), "tensor"), ((4, 8, 16), (1, 1, 1), "tensor"),
        ((4, 8, 16), (4,), "expert"), ((4, 8, 16), (4, 1), "expert"), ((4, 8, 16), (4, 1, 1), "expert"),
        ((4, 8, 16), (4, 8, 1), "expert row"), ((4, 8, 16), (4, 8), "expert row"),
        ((4, 8, 16), (4, 1, 16), "expert column"), ((4, 256, 448), (4, 2, 4), "expert block 128x128"),
        ((4, 8, 16), (4, 16), "unknown"), ((4, 8, 8), (4, 8), "unknown"), ((4, 8, 16), (1, 8, 1), "unknown"),
        ((4, 8, 16), (3,), "unknown"), ((1, 8, 16), (1, 8, 1), "expert row"),
        ((8, 16), (8,), "row"), ((8, 16), (8, 1), "row"), ((8, 8), (8,), "row"), ((8, 8), (8, 1), "row"),
        ((8, 16), (16,), "unknown"), ((8, 16), (1, 16), "column"), ((8, 8), (1, 8), "column"),
        ((24, 16), (3,), "unknown"), ((48, 64), (7, 2), "unknown"), ((1280, 128), (12, 1), "unknown"),
        ((256, 448), (2, 1, 4, 1), "block 128x128"), ((256, 448), (2, 2, 4, 1), "unknown"),
        ((16, 96), (16, 3), "block 1x32"), ((64, 96), (2, 3), "block 32x32"), ((16,), (16,), "row"),
        ((8, 4, 3, 3), (8,), "unknown"), ((8, 4, 3, 3), (8, 1, 1, 1), "unknown"), ((8, 4, 3, 3), (1,), "tensor"),
        ((0, 16), (0, 1), "row"), ((0, 16), (3, 1), "unknown"), ((), (), "tensor"),
    ],
)  # fmt: skip
def test_09_granularity(weight: tuple[int, ...], scale: tuple[int, ...], expected: str) -> None:
    assert str(granularity(weight, scale)) == expected


def test_09_mx_groups_are_told_by_their_scale() -> None:
    assert str(granularity((16, 96), (16, 3), e8m0=True)) == "MX group 1x32"
    assert str(granularity((4, 16, 96), (4, 16, 3), e8m0=True)) == "expert MX group 1x32"
    assert str(granularity((256, 256), (2, 2), e8m0=True)) == "block 128x128"


@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        ((500, 128), (8, 1), "unknown"),  # 64 rows would fit, cut short, but that is not what the config says
        ((512, 128), (8, 1), "block 64x128"), ((16, 96), (16, 3), "block 1x32"), ((576, 448), (5, 4), "block 128x128"),
    ],
)  # fmt: skip
def test_09_a_declared_size_that_does_not_fit_leaves_whole_blocks_only(
    weight: tuple[int, ...], scale: tuple[int, ...], expected: str
) -> None:
    assert str(granularity(weight, scale, (128, 128))) == expected


@pytest.mark.parametrize("scale", ["f32", "f32 2", "f32 2 1 1", "f32 2 8 1", "f32 2 1 16", "f32 2 16 1", "f32 2 16"])
def test_09_a_constant_factor_needs_no_granularity(scale: str, tmp_path: Path) -> None:
    before = made({"m.experts.down_proj": "fp8 2 8 16", "m.experts.down_proj_scale": scale})
    after = load_state_dict(written(tmp_path, before))
    assert np.isfinite(ieee_e4m3(after["m.experts.down_proj"])).all()
    new, old = values(after["m.experts.down_proj_scale"]), values(before["m.experts.down_proj_scale"])
    np.testing.assert_array_equal(new, 2 * old)


# 10. weight and scale in different shards, in either order
@pytest.mark.parametrize("first", ["weight", "scale"])
def test_10_pairs_across_shards(first: str, tmp_path: Path) -> None:
    before = made({"a.weight": "fp8 8 8", "a.weight_scale": "f32 8 1"})
    parts = [{name: before[name]} for name in sorted(before, reverse=first == "scale")]
    files = sharded(tmp_path, *parts)
    whole = load_state_dict(tmp_path)
    apart = {name: t for file in files for name, t in load_file(file).items()}
    np.testing.assert_array_equal(values(whole["a.weight_scale"]), 2 * values(before["a.weight_scale"]))
    assert np.isfinite(ieee_e4m3(whole["a.weight"])).all()
    assert all(same(whole[name], apart[name]) for name in before)


def test_10_a_scale_that_is_in_no_shard_is_reported(tmp_path: Path) -> None:
    files = sharded(tmp_path, made({"a.weight": "fp8 8 8"}), made({"a.weight_scale": "f32"}))
    files[1].unlink()
    with pytest.raises(neuron_fp8_loader.CheckpointError, match=r"missing shard model-00002-of-00002\.safetensors"):
        load_state_dict(tmp_path)


# 11. the decision is the whole weight's, whoever reads a part of it
def test_11_slices_of_one_weight_agree(tmp_path: Path) -> None:
    weight = torch.cat([codes(*[0x30] * 32), codes(*[0x7E] * 32)]).reshape(8, 8)  # only the lower half is above 240
    written(tmp_path, {"a.weight": weight, "a.weight_scale": torch.tensor([0.5])})
    with safe_open(tmp_path / "model.safetensors") as file:
        top, bottom = file.get_slice("a.weight")[:4], file.get_slice("a.weight")[4:]
        scale = file.get_slice("a.weight_scale")[:]
    assert scale.item() == 1.0
    np.testing.assert_array_equal(np.concatenate([ieee_e4m3(top), ieee_e4m3(bottom)]) * 2, e4m3fn(weight))
    whole = load_state_dict(tmp_path)
    assert same(whole["a.weight"], torch.cat([top.view(torch.uint8), bottom.view(torch.uint8)]).view(weight.dtype))


def test_11_weights_that_share_a_scale_are_decided_together() -> None:
    scale = torch.tensor(0.5)
    before = {"q.weight": codes(0x30, 0x30), "q.weight_scale": scale, "k.weight": codes(0x7E, 0x30),
              "k.weight_scale": scale.view(())}  # fmt: skip
    after = rescale_state_dict(before)
    for name in ("q", "k"):
        new = ieee_e4m3(after[f"{name}.weight"]) * after[f"{name}.weight_scale"].item()
        np.testing.assert_array_equal(new, e4m3fn(before[f"{name}.weight"]) * 0.5)


@pytest.mark.parametrize("above", [0, 1, 2])
def test_11_activation_scales_of_all_shards_agree(above: int, tmp_path: Path) -> None:
    shards = []
    for n in range(3):
        weight = codes(0x7E if n == above else 0x30, 0x30).reshape(1, 2)
        shards.append(
            {f"{n}.weight": weight, f"{n}.weight_scale": torch.tensor(1.0), f"{n}.k_scale": torch.tensor(1.0)}
        )
    files = sharded(tmp_path, *shards)
    whole = load_state_dict(tmp_path)
    assert {whole[f"{n}.k_scale"].item() for n in range(3)} == {2.0}  # q, k and v of every layer stay alike
    apart = {name: t for file in files for name, t in load_file(file).items()}
    assert all(same(whole[name], apart[name]) for name in whole)


# 12. idempotence
def test_12_converted_checkpoints_pass_bit_for_bit(tmp_path: Path) -> None:
    before = made({"a.weight": "fp8 8 8", "a.weight_scale": "f32 8 1", "a.input_scale": "f32", "k_scale": "f32"})
    once = load_state_dict(written(tmp_path, before))
    (tmp_path / "again").mkdir()
    twice = load_state_dict(written(tmp_path / "again", once))
    assert all(same(once[name], twice[name]) for name in before)
    assert not same(once["a.input_scale"], before["a.input_scale"])


# 13. other FP8 dtypes
def test_13_e5m2_is_left_alone() -> None:
    before = made({"a.weight": "e5m2 8 8", "a.weight_scale": "f32", "b.weight": "fp8 8 8", "b.weight_scale": "f32"})
    after = rescale_state_dict(before)
    assert all(same(after[name], before[name]) for name in ("a.weight", "a.weight_scale"))


ALL_BUT_NAN = [code for code in range(256) if code != 0x80]


def fnuz(directory: Path | None = None, *, nan: bool = False) -> Tensors:
    weight = torch.tensor([0x80, *ALL_BUT_NAN] if nan else ALL_BUT_NAN, dtype=torch.uint8)
    tensors = {
        "a.weight": weight.view(torch.float8_e4m3fnuz).reshape(1, -1),
        "a.weight_scale": torch.tensor([[0.25]]),
        "a.input_scale": torch.tensor(0.5),
        **made({"b.weight": "fp8 4 4", "b.weight_scale": "f32", "b.input_scale": "f32"}),
    }
    if directory is not None:
        written(directory, tensors)
    return tensors


@pytest.mark.parametrize("way", ["state dict", "in place", "load_state_dict", "load_file", "safe_open", "slice"])
@pytest.mark.parametrize("method", ["half", "ratio"])
def test_13_fnuz_weights_keep_their_value(way: str, method: str, tmp_path: Path) -> None:
    before = fnuz(tmp_path)
    file = tmp_path / "model.safetensors"
    if way in ("state dict", "in place"):
        after = rescale_state_dict(dict(before), inplace=way == "in place", method=method)
    elif way in ("load_state_dict", "load_file"):
        after = (load_state_dict if way == "load_state_dict" else load_file)(file, method=method)
    else:
        with safe_open(file, method=method) as opened:
            get = opened.get_tensor if way == "safe_open" else lambda name: opened.get_slice(name)[...]
            after = {name: get(name) for name in ("a.weight", "a.weight_scale", "a.input_scale")}
    assert after["a.weight"].dtype == torch.float8_e4m3fn
    expected = np.array(ALL_BUT_NAN, dtype=np.uint8).view(ml_dtypes.float8_e4m3fnuz).astype(np.float64)
    got = ieee_e4m3(after["a.weight"])[0]
    rounded = expected.astype(ml_dtypes.float8_e4m3).astype(np.float64)  # fnuz has half subnormal steps below ours
    np.testing.assert_array_equal(got, rounded)
    exact = np.abs(expected) >= 2**-6
    np.testing.assert_array_equal(got[exact], expected[exact])
    # no factor, so no change of its scale; its input scale was calibrated for 240
    assert same(after["a.weight_scale"], fnuz()["a.weight_scale"])
    assert same(after["a.input_scale"], fnuz()["a.input_scale"])


@pytest.mark.parametrize("way", ["state dict", "load_state_dict", "slices", "safe_open", "scan"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
def test_13_a_scale_of_fnuz_weights_is_held_to_what_others_are(way: str, value: float, tmp_path: Path) -> None:
    def refused(weight: str) -> bool:
        directory = tmp_path / weight
        directory.mkdir()
        file = directory / "model.safetensors"
        before = {"a.weight": made({"w": f"{weight} 4 4"})["w"], "a.weight_scale": torch.tensor([[value]])}
        before["a.weight"] = torch.full((4, 4), 0x10, dtype=torch.uint8).view(before["a.weight"].dtype)
        written(directory, before)
        try:
            if way == "state dict":
                rescale_state_dict(dict(before))
            elif way == "load_state_dict":
                load_state_dict(file)
            elif way == "slices":
                load_state_dict(file, slices={"a.weight": (0, 0, 2)})
            elif way == "scan":
                return bool(scan_checkpoint(file).refusals)
            else:
                with safe_open(file) as opened:
                    opened.get_tensor("a.weight_scale")
        except ScaleError:
            return True
        return False

    assert refused("fp8") == refused("fnuz") == (not np.isfinite(value))


def test_13_the_nan_of_fnuz_is_0x80(tmp_path: Path) -> None:
    fnuz(tmp_path, nan=True)
    with pytest.raises(WeightError, match=r"a\.weight: 1 NaN codes"):
        load_state_dict(tmp_path)
    with pytest.raises(WeightError, match=r"a\.weight: 1 NaN codes"):
        rescale_state_dict(fnuz(nan=True))
    kept = load_state_dict(tmp_path, nan="keep")["a.weight"]
    assert np.isnan(ieee_e4m3(kept)[0]).tolist() == [True] + [False] * 255


def test_13_a_scale_that_fnuz_and_e4m3fn_weights_share_in_memory_is_refused() -> None:
    before = fnuz()
    before["b.weight_scale"] = before["a.weight_scale"]  # one would have to change, the other must not
    with pytest.raises(WeightError, match=r"(?s)a\.weight_scale, b\.weight_scale.*Clone"):
        rescale_state_dict(before)


# 14. FP8 tensors that are not matmul weights
@pytest.mark.parametrize("marker", ["fp8 0", "fp8 2", "fnuz 2", "e5m2 2", "f32 2"])
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl."])
def test_14_markers_are_left_alone(marker: str, prefix: str, tmp_path: Path) -> None:
    name = f"{prefix}scaled_fp8"
    before = made({name: marker, "a.weight": "fp8 4 4", "a.scale_weight": "f32"})
    if marker != "f32 2":
        before[name].view(torch.uint8).fill_(0x7F if "5" not in marker else 0x7C)  # not values: they would be refused
    after = load_state_dict(written(tmp_path, before))
    assert same(after[name], before[name])
    assert not same(after["a.weight"], before["a.weight"])


def test_14_embeddings_and_heads_are_weights_like_any_other() -> None:
    before = made({"engram.embed.weight": "fp8 8 4", "engram.embed.scale": "e8m0 1 1", "lm_head.weight": "fp8 8 4",
                   "lm_head.weight_scale": "bf16 8 1"})  # fmt: skip
    after = rescale_state_dict(before)
    for name in ("engram.embed.weight", "lm_head.weight"):
        assert np.isfinite(ieee_e4m3(after[name])).all()


# 15. the scale's dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_15_scales_keep_their_dtype_and_double_exactly(dtype: torch.dtype) -> None:
    scale = torch.tensor([[6e-8], [1e-4], [3.0]], dtype=dtype)  # subnormal in float16
    after = rescale_state_dict({"a.weight": codes(0x7E, 0x7E, 0x7E).reshape(3, 1), "a.weight_scale": scale})
    assert after["a.weight_scale"].dtype == dtype
    np.testing.assert_array_equal(after["a.weight_scale"].double().numpy(), 2 * scale.double().numpy())


def test_15_float16_overflow_is_an_error() -> None:
    scale = torch.tensor([40000.0], dtype=torch.float16)
    with pytest.raises(ScaleError, match=r"a\.weight_scale: 1 of 1 values overflow torch\.float16"):
        rescale_state_dict({"a.weight": codes(0x7E).reshape(1, 1), "a.weight_scale": scale})


# 16. ignore lists are advisory
@pytest.mark.parametrize(
    ("scale", "fits"),
    [
        (torch.tensor(2.0**118), True),
        (torch.tensor(2.0**120), False),
        (torch.tensor(-(2.0**120), dtype=torch.bfloat16), False),
        (torch.tensor(1e300, dtype=torch.float64), False),
        (torch.tensor(246, dtype=torch.uint8), True),
        (torch.tensor(247, dtype=torch.uint8), False),
    ],
    ids=str,
)
def test_15_no_weight_becomes_an_infinite_bfloat16(scale: torch.Tensor, fits: bool) -> None:
    sd = {
        "a.weight": codes(0x7E, 0x08).reshape(1, 2),
        "a.weight_scale": scale,
        "b.weight": codes(0x7E, 0x08).reshape(1, 2),
    }
    sd["b.weight_scale"] = torch.ones((), dtype=scale.dtype)
    if fits:
        assert rescale_state_dict(sd, dequantize=["*"])["a.weight"].isfinite().all()
        return
    with pytest.raises(ScaleError, match=r"a\.weight_scale: 1 of 1 scale values take codes of its weight beyond"):
        rescale_state_dict(sd, dequantize=["*"])
    assert rescale_state_dict(sd, dequantize=["*"], nan="keep")["a.weight"].isinf().any()


def test_15_an_empty_scale_makes_up_for_nothing() -> None:
    sd = {"a.weight": codes(0x7E, 0x08).reshape(1, 2), "a.weight_scale": torch.empty(0)}
    with pytest.raises(PlanError, match=r"a\.weight: its scale a\.weight_scale is empty, \[0\]"):
        rescale_state_dict(sd)
    assert rescale_state_dict({**sd, "a.weight": codes().reshape(0, 4)})


def test_16_the_dtype_counts_and_not_the_ignore_list(tmp_path: Path) -> None:
    before = made({"indexer.wk.weight": "fp8 8 8", "indexer.wk.weight_scale_inv": "f32 1 1"})
    section = {"quant_method": "fp8", "modules_to_not_convert": ["indexer.wk"], "ignored_layers": ["indexer.wk"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    after = load_state_dict(written(tmp_path, before))
    assert np.isfinite(ieee_e4m3(after["indexer.wk.weight"])).all()
    np.testing.assert_array_equal(values(after["indexer.wk.weight_scale_inv"]),
                                  2 * values(before["indexer.wk.weight_scale_inv"]))  # fmt: skip


# 17. names that collide
def test_17_names_that_contain_one_another(tmp_path: Path) -> None:
    pairs = {
        "w1.weight": "w1.weight_scale", "wq.weight": "wq.weight_scale_inv", "kv_b.weight": "kv_b.scale",
        "weight_scale.weight": "weight_scale.weight_scale", "scale.weight": "scale.scale",
        "experts.w13": "experts.w13_scale", "experts.w2": "experts.w2_scale_inv",
        "model.scale_weight.weight": "model.scale_weight.weight_scale",
    }  # fmt: skip
    plain = {"up_proj.weight": "bf16 4 4", "w1.weight_scale_2": "f32", "w1.scales": "f32"}
    before = made({**dict.fromkeys(pairs, "fp8 4 4"), **dict.fromkeys(pairs.values(), "f32 4 1"), **plain})
    plan = plan_checkpoint(written(tmp_path, before))
    assert {p.weight: p.scale for p in plan.pairs} == pairs
    after = load_state_dict(tmp_path)
    assert all(same(after[name], before[name]) for name in plain)
    assert all(np.isfinite(ieee_e4m3(after[name])).all() for name in pairs)


# 18. tied weights
def test_18_tied_weights_are_rescaled_once_and_stay_tied() -> None:
    weight, scale = made({"w": "fp8 8 4", "s": "f32 8 1"}).values()
    before = {"embed.weight": weight, "embed.weight_scale": scale, "lm_head.weight": weight,
              "lm_head.weight_scale": scale}  # fmt: skip
    after = rescale_state_dict(before)
    assert after["embed.weight"].data_ptr() == after["lm_head.weight"].data_ptr()
    assert after["embed.weight_scale"].data_ptr() == after["lm_head.weight_scale"].data_ptr()
    np.testing.assert_array_equal(values(after["lm_head.weight_scale"]), 2 * values(scale))


def test_18_an_absent_head_is_nothing_special(tmp_path: Path) -> None:
    before = made({"model.embed_tokens.weight": "bf16 8 4", "a.weight": "fp8 4 4", "a.weight_scale": "bf16 1"})
    assert set(load_state_dict(written(tmp_path, before))) == set(before)


# 19. the same model twice in one directory
@pytest.mark.parametrize("sharding", [True, False])
def test_19_the_other_dialect_beside_it_is_not_read(sharding: bool, tmp_path: Path) -> None:
    before = made({"model.a.weight": "fp8 8 8", "model.a.weight_scale_inv": "f32"})
    if sharding:
        sharded(tmp_path, *({name: t} for name, t in before.items()))
    else:
        written(tmp_path, before)
    native = made({"layers.a.weight": "fp8 8 8", "layers.a.qscale_weight": "f32"})
    written(tmp_path, native, "consolidated.safetensors")
    assert set(load_state_dict(tmp_path)) == set(before)
    assert set(load_state_dict(tmp_path / "consolidated.safetensors")) == set(native)


def test_19_two_scales_for_one_weight_are_refused(tmp_path: Path) -> None:
    written(tmp_path, made({"a.weight": "fp8 8 8", "a.weight_scale": "f32", "a.weight_scale_inv": "f32"}))
    with pytest.raises(PlanError, match=r"a\.weight_scale \(weight_scale\) and a\.weight_scale_inv"):
        load_state_dict(tmp_path)


# the rule behind half of the traps, on bytes from a producer
def test_real_nvfp4_scales_reach_448_and_pass() -> None:
    loaded = load_checkpoint(shared("ct_nvfp4"), always=True)
    assert not loaded.report.rescaled
    above = [n for n in loaded.plan.untouched_fp8 if (raw(loaded.state_dict[n]) & 0x7F > 0x77).any()]
    assert above
