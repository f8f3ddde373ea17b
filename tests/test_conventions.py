"""Every published layout of FP8 checkpoints: planned as expected, and loaded without losing anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from convention_rows import LEFT_ALONE, ROWS, STATIC_SCALES, Row, made, parse
from oracle import assert_bytes_kept, assert_pair_kept, values
from safetensors.torch import load_file as original
from safetensors.torch import save_file
from support import REAL, raw, shared

from neuron_fp8_loader import (
    conventions,
    load_checkpoint,
    plan_checkpoint,
    rescale_state_dict,
)

by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)


def write(directory: Path, row: Row) -> dict[str, torch.Tensor]:
    """The row's checkpoint, on disk and as it is."""
    tensors = made(row.tensors, seed=row.number)
    save_file(tensors, directory / row.filename, metadata=row.metadata or {"format": "pt"})
    files = dict(row.files) if row.config is None else {"config.json": row.config, **row.files}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return tensors


def test_every_layout_has_a_row() -> None:
    assert {row.number for row in ROWS} == set(range(1, 30))
    assert len({row.id for row in ROWS}) == len(ROWS)
    used = {rule for row in ROWS for rule in row.convention.split()}
    spare = {"quanto_weight", "fused_scales", "fused_dot_weight_scale"}  # tested with the registry
    assert used | spare == {rule.name for rule in conventions.conventions()}


@by_row
def test_plan(row: Row, tmp_path: Path) -> None:
    write(tmp_path, row)
    plan = plan_checkpoint(tmp_path)
    assert {p.weight: (p.scale, str(p.granularity)) for p in plan.pairs} == row.pairs
    assert {p.convention for p in plan.pairs} == set(row.convention.split())
    assert {a.name for a in plan.activation_scales} == {*row.activations, *row.reciprocal}
    assert {a.name for a in plan.activation_scales if a.reciprocal} == set(row.reciprocal)
    assert set(plan.unquantized) == set(row.unquantized)
    assert (plan.unscaled, plan.other_formats) == ((), ())
    others = {name for name, text in row.tensors.items() if parse(text)[0] == "float8_e4m3fn"} - set(row.pairs)
    assert set(plan.untouched_fp8) == others
    assert (plan.declared.method, plan.declared.block) == (row.declared, row.block)
    assert plan.declared.fp8 is (True if row.declared else None)
    assert plan.warnings == ()
    if row.declared:
        assert f"declared: {row.declared}" in plan.summary()


@by_row
def test_load(row: Row, tmp_path: Path) -> None:
    before = write(tmp_path, row)
    loaded = load_checkpoint(tmp_path)
    after = loaded.state_dict
    assert sorted(after) == sorted(before)
    for weight, (scale, granularity) in row.pairs.items():
        assert_pair_kept(before, after, weight, scale, granularity)
    for names, factor in ((row.activations, 2.0), (row.reciprocal, 0.5)):
        for name in names:
            assert after[name].dtype == before[name].dtype
            np.testing.assert_array_equal(values(after[name]), factor * values(before[name]))
    changed = {*row.pairs, *(scale for scale, _ in row.pairs.values()), *row.activations, *row.reciprocal}
    assert_bytes_kept(before, after, set(before) - changed)
    assert loaded.report.activation_scales == len(row.activations) + len(row.reciprocal)
    if row.metadata:
        assert loaded.metadata == row.metadata  # torchao and ComfyUI cannot read the file without


@by_row
def test_state_dict_in_memory(row: Row, tmp_path: Path) -> None:
    before = write(tmp_path, row)
    after = rescale_state_dict(before)
    assert list(after) == list(before)
    from_disk = load_checkpoint(tmp_path).state_dict
    assert_bytes_kept(from_disk, after, set(before))


@by_row
def test_keep_activation_scales(row: Row, tmp_path: Path) -> None:
    before = write(tmp_path, row)
    after = load_checkpoint(tmp_path, activation_scales="keep").state_dict
    assert_bytes_kept(before, after, {*row.activations, *row.reciprocal})


# -- static scales ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATIC_SCALES)
@pytest.mark.parametrize("kind", ["f32", "bf16 1", "f16"])
def test_static_scales_by_name(name: str, kind: str) -> None:
    before = made({"x.weight": "fp8 8 8", "x.weight_scale": "f32", name: kind})
    np.testing.assert_array_equal(values(rescale_state_dict(before)[name]), 2 * values(before[name]))
    assert_bytes_kept(before, rescale_state_dict(before, activation_scales="keep"), {name})
    before["x.weight"] = before["x.weight"].float().clamp(-240, 240).to(torch.float8_e4m3fn)
    assert_bytes_kept(before, rescale_state_dict(before), {name})  # no weight was rescaled, so nothing is


def test_static_scales_stay_alike() -> None:
    before = made({"x.weight": "fp8 8 8", "x.weight_scale": "f32", **dict.fromkeys(STATIC_SCALES, "f32")})
    for method in ("half", "ratio"):
        after = rescale_state_dict(before, method=method)
        ratios = {round(float(values(after[n]) / values(before[n])), 5) for n in STATIC_SCALES}
        assert ratios == {{"half": 2.0, "ratio": round(448 / 240, 5)}[method]}


@pytest.mark.parametrize("weight", ["u8 8 8", "i8 8 8", "bf16 8 8", "e5m2 8 8"])
@pytest.mark.parametrize("name", [".weight", ".weight_packed", "_packed", "._weight_qdata"])
def test_the_input_scale_of_a_module_that_is_not_fp8_is_left_alone(weight: str, name: str) -> None:
    before = made({"x.weight": "fp8 8 8", "x.weight_scale": "f32", f"y{name}": weight, "y.input_scale": "f32",
                   "y_input_scale": "f32", "x.input_scale": "f32"})  # fmt: skip
    after = rescale_state_dict(before)
    assert_bytes_kept(before, after, {"y.input_scale", "y_input_scale"})
    assert after["x.input_scale"] == 2 * before["x.input_scale"]


def test_per_head_kv_scales_are_told_from_learned_vectors() -> None:
    heads = {f"x.{name}_scale": "f32 4" for name in "kv"} | {"y.k_proj.k_scale": "f32 4", "y.v_proj.v_scale": "f32 4"}
    learned = {"z.q_scale": "f32 4", "z.k_scale": "f32 4"}
    before = made({"x.weight": "fp8 8 8", "x.weight_scale": "f32", **heads, **learned})
    after = rescale_state_dict(before)
    assert_bytes_kept(before, after, set(learned))
    for name in heads:
        np.testing.assert_array_equal(values(after[name]), 2 * values(before[name]))


# -- left alone -----------------------------------------------------------------------------------------------


def test_left_alone_beside_fp8(tmp_path: Path) -> None:
    fp8 = {"x.weight": "fp8 16 16", "x.weight_scale": "f32", "x.k_scale": "f32"}
    row = Row(0, "left alone", {**LEFT_ALONE, **fp8}, {"x.weight": ("x.weight_scale", "tensor")})
    before = write(tmp_path, row)
    loaded = load_checkpoint(tmp_path)
    assert_pair_kept(before, loaded.state_dict, "x.weight", "x.weight_scale", "tensor")
    assert_bytes_kept(before, loaded.state_dict, set(LEFT_ALONE))
    assert [a.name for a in loaded.plan.activation_scales] == ["x.k_scale"]
    assert set(loaded.plan.untouched_fp8) == {n for n, text in LEFT_ALONE.items() if text.startswith("fp8")}


# what the others are depends on their neighbours
BY_NAME = sorted(
    name
    for name, text in LEFT_ALONE.items()
    if not name.endswith("input_scale") and (text[:3] != "fp8" or name.endswith(("scaled_fp8", "zero_point")))
)


@pytest.mark.parametrize("name", BY_NAME)
def test_left_alone_by_name(name: str) -> None:
    """One by one too, with FP8 weights all around: no rule may lean on another tensor of the table."""
    around = {
        "model.layers.0.self_attn.q_proj.weight": "fp8 8 8",
        "model.layers.0.self_attn.q_proj.weight_scale": "f32",
    }
    before = made({**around, name: LEFT_ALONE[name]})
    after = rescale_state_dict(before)
    assert_bytes_kept(before, after, {name})
    assert raw(after[next(iter(around))]).tobytes() != raw(before[next(iter(around))]).tobytes()


# -- real checkpoints -----------------------------------------------------------------------------------------

CONTROLS = {"ct_nvfp4", "ct_int8_w8a8"}
DECLARED = {
    "ct_fp8_block": ("compressed-tensors float-quantized", (128, 128)),
    "ct_fp8_dynamic": ("compressed-tensors float-quantized", None),
    "ct_int8_w8a8": ("compressed-tensors int-quantized", None),
    "ct_mxfp8": ("compressed-tensors mxfp8-quantized", (1, 32)),
    "ct_nvfp4": ("compressed-tensors nvfp4-pack-quantized", None),
    "derived_comfy_scaled_old": ("", None),
    "derived_fbgemm": ("fbgemm_fp8", None),
    "hf_fp8_block": ("fp8 float", (128, 128)),
    "modelopt_fp8": ("modelopt FP8", None),
    "modelopt_fp8_pb_wo": ("modelopt fp8_pb_wo", (128, 128)),
    "quark_fp8_tensor_kv": ("quark fp8_e4m3", None),
    "torchao_fp8_wo": ("torchao Float8WeightOnlyConfig", None),
}


@pytest.mark.parametrize("name", DECLARED)
def test_what_real_configs_declare(name: str) -> None:
    declared = plan_checkpoint(shared(name)).declared
    assert (declared.method, declared.block) == DECLARED[name]
    assert declared.fp8 is (None if not declared.method else name not in CONTROLS)


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoint(name: str) -> None:
    directory = shared(name)
    before = {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in original(file).items()}
    loaded = load_checkpoint(directory)
    after, plan = loaded.state_dict, loaded.plan
    assert sorted(after) == sorted(before)
    assert bool(plan.pairs) == (name not in CONTROLS)
    assert plan.warnings == ()
    fp8 = {n for n, t in before.items() if t.dtype == torch.float8_e4m3fn and t.dim() > 1}
    assert {p.weight for p in plan.pairs} == (set() if name in CONTROLS else fp8)
    for pair in plan.pairs:
        assert pair.granularity.kind != "unknown"
        assert_pair_kept(before, after, pair.weight, pair.scale, str(pair.granularity))
    for activation in plan.activation_scales:
        np.testing.assert_array_equal(values(after[activation.name]), 2 * values(before[activation.name]))
    changed = {*(p.weight for p in plan.pairs), *(p.scale for p in plan.pairs)}
    changed |= {a.name for a in plan.activation_scales}
    assert_bytes_kept(before, after, set(before) - changed)
