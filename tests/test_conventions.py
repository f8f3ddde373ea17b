"""Every published layout of FP8 checkpoints: planned as expected, and loaded without losing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from convention_rows import LEFT_ALONE, ROWS, STATIC_SCALES, Row, made, parse
from made import expanded, values
from safetensors.torch import load_file as original
from safetensors.torch import save_file
from support import ROOT, SHARED, e4m3fn, ieee_e4m3, raw, shared, sqnr

from neuron_fp8_loader import (
    OptionError,
    Plan,
    PlanError,
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


def assert_pair_kept(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], weight: str, scale: str, granularity: str
) -> None:
    """weight x scale, as the device reads it, is what a GPU makes of the original."""
    old, new = e4m3fn(before[weight]), ieee_e4m3(after[weight])
    assert np.isfinite(new).all()
    assert after[weight].dtype == before[weight].dtype
    assert after[weight].shape == before[weight].shape
    # only codes below 2^-5 may round, by half a subnormal step of the new weight
    assert (np.abs(2 * new - old)[np.abs(old) >= 2**-5] == 0).all()
    assert np.abs(2 * new - old).max() <= 2**-9
    assert after[scale].dtype == before[scale].dtype
    assert after[scale].shape == before[scale].shape
    scales = values(before[scale]), values(after[scale])
    np.testing.assert_array_equal(scales[1], 2 * scales[0])
    wide = [expanded(s, old.shape, granularity) for s in scales]
    if wide[0] is not None and wide[1] is not None:
        assert sqnr(old * wide[0], new * wide[1]) >= 100


def assert_bytes_kept(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], names: set[str]) -> None:
    for name in names:
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape), name
        assert raw(after[name].reshape(-1)).tobytes() == raw(before[name].reshape(-1)).tobytes(), name


def test_every_layout_has_a_row() -> None:
    assert {row.number for row in ROWS} == set(range(1, 30))
    assert len({row.id for row in ROWS}) == len(ROWS)
    used = {rule for row in ROWS for rule in row.convention.split()}
    spare = {"quanto_weight", "fused_scales", "fused_dot_weight_scale"}  # tested below
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
    assert (plan.unscaled, plan.fnuz) == ((), ())
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
REAL = sorted(d.name for d in SHARED.iterdir() if d.is_dir() and d.name[0] != "_") if SHARED.is_dir() else ["none"]


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


# -- the registry ---------------------------------------------------------------------------------------------

MINE = conventions.Convention("mine", "{}.w_fp8", "{}.w_mult", "our trainer")


@pytest.fixture
def mine() -> Iterator[None]:
    conventions.register(MINE)
    yield
    conventions.unregister("mine")


def some(**shapes: str) -> dict[str, torch.Tensor]:
    return made({name.replace("__", "."): text for name, text in shapes.items()})


def plan_of(tensors: dict[str, torch.Tensor], directory: Path) -> Plan:
    save_file(tensors, directory / "model.safetensors")
    return plan_checkpoint(directory)


def test_a_convention_of_ones_own(tmp_path: Path, mine: None) -> None:
    before = some(a__w_fp8="fp8 8 8", a__w_mult="f32 8 1")
    (pair,) = plan_of(before, tmp_path).pairs
    assert (pair.weight, pair.scale, pair.convention, str(pair.granularity)) == ("a.w_fp8", "a.w_mult", "mine", "row")
    assert_pair_kept(before, load_checkpoint(tmp_path).state_dict, "a.w_fp8", "a.w_mult", "row")
    assert conventions.conventions()[0] == MINE
    assert "our trainer" in conventions.table()
    conventions.register(MINE)  # again: nothing happens
    assert conventions.conventions().count(MINE) == 1


def test_a_convention_of_ones_own_holds_for_packed_weights_too(tmp_path: Path, mine: None) -> None:
    """NVFP4 under one's own names: its e4m3fn scale is no weight."""
    before = some(a__w_fp8="u8 16 32", a__w_mult="fp8 16 4", b__w_fp8="fp8 8 8", b__w_mult="f32")
    plan = plan_of(before, tmp_path)
    assert [p.weight for p in plan.pairs] == ["b.w_fp8"]
    assert plan.untouched_fp8 == ("a.w_mult",)
    assert_bytes_kept(before, load_checkpoint(tmp_path).state_dict, {"a.w_fp8", "a.w_mult"})


def test_unregistered_again(tmp_path: Path) -> None:
    conventions.register(MINE)
    conventions.unregister("mine")
    assert plan_of(some(a__w_fp8="fp8 8 8", a__w_mult="f32 8 1"), tmp_path).unscaled == ("a.w_fp8",)


def test_two_candidates_are_an_error_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(some(a__weight="fp8 8 8", a__weight_scale="f32", a__scale="f32 8"), tmp_path)
    for word in ("a.weight: ", "a.weight_scale (weight_scale)", "a.scale (scale)", "beats"):
        assert word in str(caught.value)


def test_a_rule_says_which_of_two_counts(tmp_path: Path) -> None:
    conventions.register(conventions.Convention("ours", "{}.weight", "{}.mult", "our trainer", beats=("scale",)))
    try:
        before = some(a__weight="fp8 8 8", a__mult="f32", a__scale="f32 8")
        assert [p.scale for p in plan_of(before, tmp_path).pairs] == ["a.mult"]
        assert_bytes_kept(before, load_checkpoint(tmp_path).state_dict, {"a.scale"})
    finally:
        conventions.unregister("ours")


def test_a_rule_of_ones_own_is_named_where_a_published_one_fits_too(tmp_path: Path) -> None:
    conventions.register(conventions.Convention("ours", "{}.weight", "{}.weight_scale"))
    try:
        (pair,) = plan_of(some(a__weight="fp8 8 8", a__weight_scale="f32"), tmp_path).pairs
        assert pair.convention == "ours"
    finally:
        conventions.unregister("ours")


@pytest.mark.parametrize(
    ("convention", "message"),
    [
        (("scale", "{}.w", "{}.s"), "'scale' is registered already"),
        (
            ("x", "{}.w", "{}.s", "", ("scales", "scale")),
            "beats 'scales', which is not known; there are weight_scale,",
        ),
        (("x", "w", "{}.s"), "'w' must hold exactly one {}"),
        (("x", "{}.w", "{}.{}.s"), "must hold exactly one {}"),
        (("x", "{}.w", "{}.w"), "weight and scale are both"),
    ],
)
def test_a_convention_that_cannot_be(convention: tuple[str, ...], message: str) -> None:
    known = conventions.conventions()
    with pytest.raises(OptionError) as caught:
        conventions.register(conventions.Convention(*convention))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert conventions.conventions() == known


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(OptionError, match=r"no convention 'wight_scale'; there are weight_scale, weight_scale_inv, "):
        conventions.unregister("wight_scale")


@pytest.mark.parametrize(
    ("weight", "scale", "rule"),
    [
        ("a.weight", "a.weight._scale", "quanto_weight"),
        ("a.up_proj", "a.up_proj_scales", "fused_scales"),
        ("a.up_proj", "a.up_proj.weight_scale", "fused_dot_weight_scale"),
    ],
)
def test_rules_that_no_row_needs(weight: str, scale: str, rule: str, tmp_path: Path) -> None:
    before = made({weight: "fp8 8 8", scale: "f32 8 1"})
    (pair,) = plan_of(before, tmp_path).pairs
    assert (pair.weight, pair.scale, pair.convention) == (weight, scale, rule)


@pytest.mark.parametrize("rule", conventions.conventions(), ids=lambda rule: rule.name)
def test_rules_go_both_ways(rule: conventions.Convention) -> None:
    weight = rule.weight.format("model.layers.0.q_proj")
    scale = rule.scale.format("model.layers.0.q_proj")
    assert rule.scale_of(weight) == scale
    assert rule.weight_of(scale) == weight
    assert rule.scale_of(rule.weight.format("")) is None  # a module must have a name
    assert conventions.candidates(weight, {scale})[0][1] == scale


def test_the_registry_prints() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "neuron_fp8_loader.conventions"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.rstrip("\n") == conventions.table()
    assert run.stderr == ""
    for rule in conventions.conventions():
        assert rule.name in run.stdout
        assert rule.producers in run.stdout


def test_the_documentation_is_in_step() -> None:
    page = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    assert conventions.table() in page, "paste the output of `python -m neuron_fp8_loader.conventions` into the page"
